"""Moments of a data set in one pass and bounded memory: full covariance, or a randomised low-rank sketch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tdpm_ext.pictures import Pictures, load_pictures, to_unit

BATCH = 1024
SMALL = 1024  # entries of a picture up to which its moments are small linear algebra
MAX_FULL = 4096  # entries of a picture up to which a full covariance is taken


@dataclass
class Moments:
    """mean [d] float64; basis [d, R] float64, orthonormal; variances [R], falling; residual: variance per remaining
    direction; count: pictures seen; sha256 of the pictures in order."""

    mean: torch.Tensor
    basis: torch.Tensor
    variances: torch.Tensor
    residual: float
    count: int
    sha256: str
    shape: tuple[int, ...]

    @property
    def std(self) -> float:
        """Root mean variance per entry: the data's std in the denoiser's units."""
        d = self.basis.shape[0]
        return math.sqrt((float(self.variances.sum()) + self.residual * (d - len(self.variances))) / d)


class Batches:
    """Float batches [B, *shape] from a tensor, `Pictures`, a folder or zip, a DataLoader, or any iterable of batches.

    uint8 pictures are taken to [-1, 1]; float data are taken to be in the denoiser's units already. Loaders may
    yield tensors or (images, labels). Every value is checked: NaN or infinity is an error that names the picture.
    """

    def __init__(self, data, labels: torch.Tensor | None = None, progress: bool = True):
        if isinstance(data, (str, Path)):
            data = load_pictures(data)
        if isinstance(data, Pictures):
            labels = data.labels if labels is None else labels
            data = data.images
        if not isinstance(data, torch.Tensor) and not isinstance(data, Iterable):
            raise ValueError(f"data is {type(data).__name__}: give a tensor [N, C, H, W], a folder or zip, or a loader")
        if isinstance(data, torch.Tensor) and (data.ndim < 2 or len(data) == 0):
            raise ValueError(f"data has shape {tuple(data.shape)}: give [N, C, H, W] with at least one picture")
        if labels is not None and isinstance(data, torch.Tensor) and len(labels) != len(data):
            raise ValueError(f"{len(labels)} labels for {len(data)} pictures")
        if labels is not None and not isinstance(data, torch.Tensor):
            raise ValueError("labels= goes with a tensor of pictures; let a loader yield (pictures, labels) instead")
        self.data, self.labels, self.progress = data, labels, progress

    @property
    def repeatable(self) -> bool:
        return not isinstance(self.data, Iterator)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        shape, seen = None, 0
        for x, labels in tqdm(self._pairs(), desc="reading", disable=not self.progress, leave=False):
            if not isinstance(x, torch.Tensor):
                raise ValueError(f"the loader gave {type(x).__name__}: give a tensor [B, C, H, W], or (tensor, labels)")
            if len(x) == 0:
                continue
            x = x.detach().cpu()
            x = to_unit(x) if x.dtype == torch.uint8 else x.float()
            shape = shape or tuple(x.shape[1:])
            if tuple(x.shape[1:]) != shape:
                raise ValueError(f"pictures of shape {tuple(x.shape[1:])} after pictures of shape {shape}")
            good = x.flatten(1).isfinite().all(1)
            if not bool(good.all()):
                bad = seen + int((~good).nonzero()[0])
                raise ValueError(f"picture {bad} of the data holds NaN or infinity")
            seen += len(x)
            yield x, labels
        if seen == 0:
            raise ValueError("no data: the loader gave no pictures (a generator can be read only once)")

    def _pairs(self):
        if isinstance(self.data, torch.Tensor):
            for k in range(0, len(self.data), BATCH):
                yield self.data[k : k + BATCH], None if self.labels is None else self.labels[k : k + BATCH]
            return
        for item in self.data:
            pair = isinstance(item, (tuple, list)) and len(item) > 0
            yield item[0] if pair else item, item[1] if pair and len(item) > 1 else None


@contextmanager
def one_thread():
    """Run small linear algebra on one thread: on a busy machine, two that wait for each other take 20x longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Sums:
    """Running mean and norm about the first batch's mean: no cancellation when the mean is far from zero."""

    def __init__(self):
        self.count, self.digest, self.shift, self.shape = 0, hashlib.sha256(), None, ()

    def centred(self, x: torch.Tensor) -> torch.Tensor:
        self.digest.update(x.contiguous().numpy().tobytes())
        flat = x.flatten(1).double()
        if self.shift is None:
            self.shift, self.shape = flat.mean(0), tuple(x.shape[1:])
            self.total, self.square = torch.zeros_like(self.shift), 0.0
        flat -= self.shift
        self.count += len(flat)
        self.total += flat.sum(0)
        self.square += float(torch.dot(flat.flatten(), flat.flatten()))
        return flat

    @property
    def offset(self) -> torch.Tensor:
        return self.total / self.count


def full_moments(batches: Batches) -> Moments:
    """All principal axes. Memory d^2 doubles; raises ``ValueError`` for d above ``MAX_FULL``."""
    sums, outer = _Sums(), None
    for x, _ in batches:
        flat = sums.centred(x)
        if flat.shape[1] > MAX_FULL:
            d = flat.shape[1]
            raise ValueError(f"pictures of {d} entries: a full covariance is for up to {MAX_FULL}; fit kind 'lowrank'")
        outer = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64) if outer is None else outer
        outer.addmm_(flat.T, flat)
    covariance = outer.div_(sums.count).sub_(torch.outer(sums.offset, sums.offset))
    with one_thread() if len(covariance) <= SMALL else nullcontext():
        values, vectors = torch.linalg.eigh(covariance)
    mean = sums.shift + sums.offset
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    return Moments(mean, vectors, values, 0.0, sums.count, sums.digest.hexdigest(), sums.shape)


def sketch_moments(batches: Batches, rank: int, seed: int = 0) -> Moments:
    """The leading ``rank`` axes from one pass, memory O(d * rank).

    Nystrom approximation of a positive semidefinite matrix from a random sketch, with the stabilising shift of
    Tropp, Yurtsever, Udell & Cevher, arXiv 1706.05736; what the axes leave over becomes the isotropic residual.
    """
    sums, sketch, test = _Sums(), None, None
    for x, _ in batches:
        flat = sums.centred(x)
        if sketch is None:
            d = flat.shape[1]
            width = min(d, 2 * rank + 16)
            draw = torch.randn(d, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            test = torch.linalg.qr(draw).Q
            sketch = torch.zeros(d, width, dtype=torch.float64)
        sketch.addmm_(flat.T, flat @ test)
    offset, d = sums.offset, len(sums.offset)
    sketch = sketch.div_(sums.count).sub_(torch.outer(offset, offset @ test))
    trace = max(0.0, sums.square / sums.count - float(offset.square().sum()))
    values, vectors = _nystrom(sketch, test)
    keep = min(rank, d, max(1, sums.count - 1))
    values, vectors = values[:keep].clamp_min(0), vectors[:, :keep]
    residual = max(0.0, trace - float(values.sum())) / (d - keep) if d > keep else 0.0
    mean = sums.shift + offset
    return Moments(mean, vectors, values, residual, sums.count, sums.digest.hexdigest(), sums.shape)


def _nystrom(sketch: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shift = 1e-10 * float(sketch.norm()) + 1e-300
    shifted = sketch + shift * test
    core = test.T @ shifted
    core = 0.5 * (core + core.T)
    values, vectors = torch.linalg.eigh(core)  # a square root that survives rank deficiency, unlike Cholesky
    root = vectors * values.clamp_min(shift).rsqrt()
    left, singular, _ = torch.linalg.svd(shifted @ root, full_matrices=False)
    return singular.square() - shift, left
