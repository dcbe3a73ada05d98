"""One judge: a feature network, the real pictures it compares with, and everything that is said of a set of samples.

    judge = Judge.for_set("fashion-mnist")            # its shipped classifier; or features="efflite"
    rows = judge.over_blocks(x, blocks=3)             # {"fd": Estimate, "kd": Estimate, "coverage": ...}

Distances are between features standardised by the evaluation half alone. Frechet distances are quoted with the floor
at the same count: what real pictures of the fit half get.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from benchmarks import features as nets
from benchmarks import metrics
from tdpm_ext.pictures import Pictures, load_pictures, to_unit

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "out" / "features"
NEIGHBOURS = 5
MEASURES = ("fd", "kd", "precision", "recall", "density", "coverage")


def spread(total: int, count: int) -> np.ndarray:
    """``count`` indices evenly over ``total``: folders are read class by class, so [:count] is no sample."""
    return np.linspace(0, total - 1, min(total, count)).round().astype(int)


@dataclass
class Judge:
    """``net`` and what it judges with.

    Attributes:
        net: features of pictures [B, C, H, W] in [-1, 1]; has ``dim``.
        name: how distances in its features are called, as "FD-CNN128".
        real: the evaluation half, uint8; samples are judged against all of it.
        fit: the fit half, uint8: gives the floor, and what samples must not copy; None where there is none.
        cache: folder for features of real pictures (None: nothing is kept).
    """

    net: torch.nn.Module
    name: str
    real: Pictures
    fit: Pictures | None
    cache: Path | None = CACHE

    @classmethod
    def for_set(cls, folder: str | Path, features: str | None = None, cache: Path | None = CACHE) -> Judge:
        """The judge of a set in ``assets`` (or any folder with ``fit.zip`` and ``eval.zip``).

        Args:
            features: "efflite", or a file of ``recipes/train_features.py``; default: the set's own, else "efflite".
        """
        folder = Path(folder) if Path(folder).is_dir() else ROOT / "assets" / str(folder)
        if not (folder / "eval.zip").exists():
            known = sorted(p.parent.name for p in (ROOT / "assets").glob("*/eval.zip"))
            raise FileNotFoundError(f"no eval.zip in {folder}: give such a folder, or one of {', '.join(known)}")
        own = folder / "features.safetensors"
        features = features or (str(own) if own.exists() else "efflite")
        net, name = load_net(features)
        return cls(net, name, load_pictures(folder / "eval.zip"), load_pictures(folder / "fit.zip"), cache)

    @cached_property
    def raw(self) -> np.ndarray:
        """Features of the evaluation half as the network gives them, float64 [N, D]."""
        return nets.cached_features(self.net, self.real.images, self.cache).astype(np.float64)

    @cached_property
    def reference(self) -> np.ndarray:
        """The same, standardised."""
        return metrics.standardise(self.raw)[0]

    def features(self, x: torch.Tensor, batch: int = 250) -> np.ndarray:
        """Standardised features [N, D] of float pictures, clamped to [-1, 1] first as a file would clamp them."""
        return self.standardised(raw_features(self.net, x, batch))

    def standardised(self, raw: np.ndarray) -> np.ndarray:
        """Features as the network gives them [N, D] -> standardised by the evaluation half."""
        return metrics.standardise(self.raw, raw)[1]

    @cached_property
    def normal(self) -> metrics.Normal:
        """The Gaussian fit of the reference."""
        return metrics.normal(self.reference)

    def fd(self, x: torch.Tensor) -> float:
        """Frechet distance alone: what a search looks at."""
        return metrics.frechet_distance(self.features(x), self.normal)

    def measure(self, features: np.ndarray, replicates: int = 100) -> dict[str, float]:
        """All of ``MEASURES`` and ``kd_error`` (bootstrap) of standardised features [N, D]; N > 5."""
        kernel = metrics.kernel_distance(features, self.reference, replicates)
        some = self.reference[spread(len(self.reference), len(features))]
        manifold = metrics.manifold(some, features, NEIGHBOURS)
        fd = metrics.frechet_distance(features, self.reference)
        return {"fd": fd, "kd": kernel.value, "kd_error": kernel.error, **manifold._asdict()}

    def over_blocks(self, features: np.ndarray, blocks: int = 3) -> dict[str, metrics.Estimate]:
        """``MEASURES`` over disjoint blocks of consecutive seeds: mean and standard deviation of each."""
        size = len(features) // blocks
        if size <= NEIGHBOURS:
            raise ValueError(f"{len(features)} samples make {blocks} blocks of {size}: each needs at least 6")
        rows = [self.measure(features[i * size : (i + 1) * size], replicates=2) for i in range(blocks)]
        return {name: metrics.over_blocks(row[name] for row in rows) for name in MEASURES}

    def floor(self, count: int) -> metrics.Estimate:
        """What ``count`` real pictures of the fit half get, in the evaluation half's own class proportions."""
        if self.fit is None:
            raise ValueError("no fit half, so no floor: real pictures outside the evaluation half are needed")
        count = min(count, len(self.fit))
        other = self.standardised(nets.cached_features(self.net, self.fit.images, self.cache))
        labels = None if self.fit.labels is None else self.fit.labels.numpy()
        return metrics.floor(self.reference, other, count, labels=labels)

    def paired(self, x: torch.Tensor, reference: torch.Tensor) -> metrics.Paired:
        """Fidelity of ``x`` to the un-accelerated run from the same seeds."""
        return metrics.paired(x, reference, self.features(x), self.features(reference))

    def memorisation(self, x: torch.Tensor) -> metrics.Memorisation:
        """Whether ``x`` copies pictures of the fit half, with as many pictures of the evaluation half beside it."""
        held = to_unit(self.real.images[spread(len(self.real), len(x))])
        return metrics.memorisation(x.float().clamp(-1, 1), held, to_unit(self.fit.images))


def raw_features(net: torch.nn.Module, x: torch.Tensor, batch: int = 250) -> np.ndarray:
    """Features [N, D] of float pictures as the network gives them, clamped to [-1, 1] first as a file would be."""
    return nets.extract(net, x.float().clamp(-1, 1), batch)


def load_net(features: str) -> tuple[torch.nn.Module, str]:
    """A feature network by file or as "efflite", and the name of the distance in its features."""
    if features == "efflite":
        return nets.EffLiteMid(), "FD-EffLite0-mid112"
    net = nets.load_features(features)
    return net, f"FD-CNN{net.dim}"
