"""Distances between sets of features, in float64 numpy; nothing here looks at a picture or a network.

Distances are between rows of features [N, D]. Standardise once with the reference set's own mean and deviation
(``standardise``), so that no feature dominates by its scale; then quote every Frechet distance with its
``floor`` at the same N: real pictures against real pictures, which is above zero and falls with N.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BLOCK = 1024  # rows of a distance or kernel matrix held at once


class Estimate(NamedTuple):
    """A value and its standard error (or, from ``floor``, its standard deviation between blocks)."""

    value: float
    error: float


class Manifold(NamedTuple):
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    precision: float
    recall: float
    density: float
    coverage: float


def _rows(features, name: str, least: int = 2) -> np.ndarray:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < least:
        raise ValueError(f"{name}: need features [N, D] with N >= {least}, not shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: {int((~np.isfinite(rows)).any(1).sum())} of {len(rows)} rows are not finite")
    return rows


def _pair(a, b, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    a, b = _rows(a, "first set", least), _rows(b, "second set", least)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the sets have {a.shape[1]} and {b.shape[1]} features: use one network for both")
    return a, b


def standardise(reference, *others) -> list[np.ndarray]:
    """``[reference, *others]`` with the reference's mean and deviation removed per feature, in float64.

    A feature that is constant over the reference is shifted but not scaled.
    """
    reference = _rows(reference, "reference")
    mean, deviation = reference.mean(0), reference.std(0)
    scale = np.where(deviation > 1e-9 * max(1.0, deviation.max()), deviation, 1.0)
    return [(_pair(reference, other, 1)[1] - mean) / scale for other in (reference, *others)]


def frechet_distance(feats_a, feats_b) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2): the squared 2-Wasserstein distance of the Gaussian fits.

    Args:
        feats_a, feats_b: features [N, D] and [M, D]; covariances are the unbiased ones. The square root is taken
            through two symmetric eigen-decompositions, which also hold for rank-deficient covariances; with fewer
            pictures than features in both sets, through the singular values of a [N, M] matrix.
            ``feats_b`` may be a ``Normal``: the fit of a reference that is compared with many times.

    Source: Dowson and Landau 1982; in image evaluation Heusel et al. 2017 (there on Inception features).
    """
    if isinstance(feats_b, Normal):
        return _to_normal(_rows(feats_a, "first set"), feats_b)
    a, b = _pair(feats_a, feats_b)
    shift = a.mean(0) - b.mean(0)
    if max(len(a), len(b)) < a.shape[1]:  # the same trace from the rows: |A^1/2 B^1/2|_* = |X_a X_b^T|_*
        rows_a, rows_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
        cross = np.linalg.svd(rows_a @ rows_b.T, compute_uv=False).sum()
        spread = (rows_a**2).sum() + (rows_b**2).sum()
        return float(max(0.0, shift @ shift + spread - 2 * cross))
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = root @ cov_b @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    return float(max(0.0, shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


class Normal(NamedTuple):
    """The Gaussian fit of a set of features: ``mean`` [D], ``root`` [D, D] of the covariance, its ``trace``."""

    mean: np.ndarray
    root: np.ndarray
    trace: float


def normal(features) -> Normal:
    """The fit of features [N, D], done once for ``frechet_distance``."""
    rows = _rows(features, "reference")
    covariance = np.atleast_2d(np.cov(rows, rowvar=False))
    values, vectors = np.linalg.eigh(covariance)
    return Normal(rows.mean(0), (vectors * np.sqrt(values.clip(0))) @ vectors.T, float(np.trace(covariance)))


def _to_normal(rows: np.ndarray, fit: Normal) -> float:
    if rows.shape[1] != len(fit.mean):
        raise ValueError(f"the sets have {rows.shape[1]} and {len(fit.mean)} features: use one network for both")
    covariance = np.atleast_2d(np.cov(rows, rowvar=False))
    inner, shift = fit.root @ covariance @ fit.root, rows.mean(0) - fit.mean
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    return float(max(0.0, shift @ shift + fit.trace + np.trace(covariance) - 2 * cross))


def floor(feats_a, feats_b, n: int, blocks: int | None = None, seed: int = 0, labels=None) -> Estimate:
    """Frechet distance from the reference ``feats_a`` to disjoint blocks of ``n`` other real pictures.

    Args:
        feats_a: reference features [N, D], the same ones that samples are judged against.
        feats_b: features [M, D] of real pictures outside the reference; shuffled by ``seed``.
        blocks: how many blocks (default: as many as fit).
        labels: classes [M] of ``feats_b``: every block then holds them in equal shares, as it should when the
            samples do (the floor is lower than that of random blocks).

    Returns the mean over the blocks and their standard deviation (NaN for one block).
    """
    a, b = _pair(feats_a, feats_b)
    blocks = len(b) // n if blocks is None else blocks
    if n < 2 or blocks < 1 or n * blocks > len(b):
        raise ValueError(f"{blocks} disjoint blocks of {n} do not fit into {len(b)} pictures: ask for fewer or smaller")
    order = np.random.default_rng(seed).permutation(len(b))
    if labels is not None:
        order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    order = order[np.arange(n * blocks) * len(b) // (n * blocks)]
    values = [frechet_distance(a, b[order[i::blocks]]) for i in range(blocks)]
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)) if blocks > 1 else float("nan"))


def _kernel_sums(a: np.ndarray, b: np.ndarray, weights_a: np.ndarray, weights_b: np.ndarray, same: bool) -> np.ndarray:
    """For each column r: sum_ij weights_a[i, r] k(a_i, b_j) weights_b[j, r], without i = j if ``same``."""
    total = np.zeros(weights_a.shape[1])
    for start in range(0, len(a), BLOCK):
        part = slice(start, start + BLOCK)
        kernel = (a[part] @ b.T / a.shape[1] + 1) ** 3
        if same:
            rows = np.arange(len(kernel))
            kernel[rows, start + rows] = 0
        total += (weights_a[part] * (kernel @ weights_b)).sum(0)
    return total


def kernel_distance(feats_a, feats_b, replicates: int = 200, seed: int = 0) -> Estimate:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, and its bootstrap error.

    Its expectation is zero for two samples of one distribution, at any N: it needs no floor, and may come out
    negative. Bootstrap replicates resample both sets; pairs of one picture with itself stay excluded.

    Source: Binkowski et al. 2018 (there on Inception features).
    """
    a, b = _pair(feats_a, feats_b)
    rng = np.random.default_rng(seed)
    counts = [
        np.column_stack([np.ones(len(x)), rng.multinomial(len(x), np.full(len(x), 1 / len(x)), replicates).T])
        for x in (a, b)
    ]
    within = [
        _kernel_sums(x, x, w, w, same=True) / (w.sum(0) ** 2 - (w**2).sum(0))
        for x, w in zip((a, b), counts, strict=True)
    ]
    between = _kernel_sums(a, b, *counts, same=False) / (counts[0].sum(0) * counts[1].sum(0))
    values = within[0] + within[1] - 2 * between
    return Estimate(float(values[0]), float(values[1:].std(ddof=1)) if replicates > 1 else float("nan"))


def _squared_distances(a: np.ndarray, b: np.ndarray):
    """Yield (rows of a, squared distances [rows, len(b)]) block by block."""
    norm_b = (b**2).sum(1)
    for start in range(0, len(a), BLOCK):
        part = slice(start, min(start + BLOCK, len(a)))
        square = (a[part] ** 2).sum(1)[:, None] + norm_b - 2 * a[part] @ b.T
        yield part, square.clip(0)


def _squared_radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other row."""
    radii = np.empty(len(x))
    for part, square in _squared_distances(x, x):
        rows = np.arange(len(square))
        square[rows, part.start + rows] = 0  # itself comes first, also among duplicates
        radii[part] = np.partition(square, k, axis=1)[:, k]
    return radii


def manifold(real, fake, k: int = 5) -> Manifold:
    """Precision, recall, density and coverage of ``fake`` [M, D] against ``real`` [N, D] with k nearest neighbours.

    Coverage and recall reveal missing modes and duplicates that a Frechet distance hardly sees. All four depend
    on N and M: compare them at equal counts only.
    """
    real, fake = _pair(real, fake, k + 1)
    radii_real, radii_fake = _squared_radii(real, k), _squared_radii(fake, k)
    inside, recalled, covered = np.zeros(len(fake)), np.zeros(len(real), bool), np.zeros(len(real), bool)
    for part, square in _squared_distances(real, fake):
        in_real_ball = square <= radii_real[part, None]
        inside += in_real_ball.sum(0)
        covered[part] = in_real_ball.any(1)
        recalled[part] = (square <= radii_fake).any(1)
    return Manifold(float((inside > 0).mean()), float(recalled.mean()), float(inside.mean() / k), float(covered.mean()))


def paired_rmse(a, b) -> float:
    """Root mean square difference over all values of two equally shaped sets, picture i against picture i."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"paired_rmse needs two non-empty sets of one shape, not {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("paired_rmse: some values are not finite")
    return float(np.sqrt(np.mean((a - b) ** 2)))


def nearest_distance(samples, references) -> np.ndarray:
    """Euclidean distance of each sample to its nearest reference: float64 [N]; zero means a copy.

    Args:
        samples, references: [N, ...] and [M, ...] of any one shape, flattened; compared block by block.
    """
    samples, references = (np.asarray(x).reshape(len(x), -1) for x in (samples, references))
    samples, references = _pair(samples, references, 1)
    nearest = np.empty(len(samples))
    for part, square in _squared_distances(samples, references):
        # the expanded square decides which is nearest; its distance is then taken without cancellation
        nearest[part] = np.linalg.norm(samples[part] - references[square.argmin(1)], axis=1)
    return nearest


class Paired(NamedTuple):
    """How far two runs from the same seeds are apart: ``rmse`` over all values; ``psnr`` in dB, the mean over the
    pictures; ``features``, the rms difference of standardised features (0 for the same pictures, sqrt(2) for unrelated
    ones of the reference's distribution)."""

    rmse: float
    psnr: float
    features: float


PSNR_CAP = 100.0  # dB: equal pictures would have infinitely many, and a report holds finite numbers


def psnr(a, b, peak: float = 2.0) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture [N] in dB, at most ``PSNR_CAP``.

    Args:
        a, b: [N, ...] of one shape. peak: the range of the values; 2 for pictures in [-1, 1], 255 for bytes.
    """
    a, b = (np.asarray(x, dtype=np.float64).reshape(len(x), -1) for x in (a, b))
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"psnr needs two non-empty sets of one shape, not {a.shape} and {b.shape}")
    squares = ((a - b) ** 2).mean(1)
    return 10 * np.log10(peak**2 / np.maximum(squares, peak**2 * 10 ** (-PSNR_CAP / 10)))


def paired(a, b, feats_a, feats_b) -> Paired:
    """Fidelity of pictures ``a`` to ``b`` [N, ...] in [-1, 1], with their standardised features [N, D]."""
    features = float(np.sqrt(np.mean(np.subtract(*_pair(feats_a, feats_b, 1)) ** 2)))
    return Paired(paired_rmse(a, b), float(psnr(a, b).mean()), features)


class Memorisation(NamedTuple):
    """Median distance to the nearest fitted picture, of samples and of held-out pictures, their ``ratio`` (1: no
    copying), and ``copies``: the share of samples nearer than all but one in a hundred of the held-out pictures."""

    samples: float
    held_out: float
    ratio: float
    copies: float


def memorisation(samples, held_out, fitted) -> Memorisation:
    """Whether ``samples`` lie nearer to the pictures used in fitting than pictures that were held out do.

    Args:
        samples, held_out, fitted: pictures [N, ...] of one shape; Euclidean distances over all values.
    """
    ours, theirs = nearest_distance(samples, fitted), nearest_distance(held_out, fitted)
    copies = float((ours < np.quantile(theirs, 0.01)).mean())
    if np.median(theirs) == 0:
        raise ValueError("most held-out pictures are among the fitted ones: give pictures that were not fitted")
    middle = float(np.median(ours)), float(np.median(theirs))
    return Memorisation(*middle, middle[0] / middle[1], copies)


def over_blocks(values) -> Estimate:
    """Mean and standard deviation (NaN for one) of one figure over disjoint blocks of seeds."""
    values = np.asarray(list(values), dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"over_blocks needs finite values, one per block, not {values.tolist()}")
    return Estimate(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan"))


def compare(a: Estimate, b: Estimate) -> int:
    """-1 if ``a`` is lower than ``b`` by more than the noise, 1 if higher, 0 for a tie.

    Args:
        a, b: means over disjoint blocks of seeds, with their standard deviations.

    The noise is two standard deviations of one block's difference, 2 sqrt(sd_a^2 + sd_b^2): with three blocks each
    deviation is itself known to a factor of about two only, which the smaller error of the mean is left to cover.
    """
    if not (np.isfinite(a.error) and np.isfinite(b.error)):
        raise ValueError("one block of seeds has no standard deviation: compare means over two or more")
    if abs(a.value - b.value) <= 2 * float(np.hypot(a.error, b.error)):
        return 0
    return -1 if a.value < b.value else 1
