"""`mixture`: Gaussians per class (or found by EM) in the leading principal axes, Gaussian beyond them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from tdpm_ext.priors import em
from tdpm_ext.priors.closed_form import ClosedFormPrior, gaussian_tensors
from tdpm_ext.priors.gaussian import default_sigma_trunc, unshrink
from tdpm_ext.priors.lowrank import DEFAULT_RANK
from tdpm_ext.priors.moments import MAX_FULL, Batches, full_moments, one_thread, sketch_moments
from tdpm_ext.priors.registry import register_prior

MIXTURE_AXES = 96  # principal axes in which components differ
HELD_OUT = 0.15
UNLABELLED_CHOICES = (1, 2, 4, 8, 16, 32)
PER_CLASS_CHOICES = (1, 2, 3, 4)


@dataclass
class _Data:
    """Coordinates along the leading axes [N, q] float64, labels int64 [N] (all -1: none), held-out mask [N]."""

    points: torch.Tensor
    labels: torch.Tensor
    held: torch.Tensor


@register_prior("mixture")
class MixturePrior(ClosedFormPrior):
    """A Gaussian mixture; with labels, each component belongs to one class and obeys ``class_cond``."""

    @classmethod
    def fit(
        cls,
        batches: Batches,
        *,
        components: int | None = None,
        rank: int | None = None,
        axes: int = MIXTURE_AXES,
        sigma_max: float = 80.0,
        denoised_at: float = 0.0,
        seed: int = 0,
    ):
        """Fit from batches that can be read twice.

        Args:
            components: per class with labels, in all without; None chooses by held-out likelihood.
            rank: principal axes kept; None keeps all up to 4,096 entries a picture, 256 beyond.
            axes: the leading ones in which components have means and full covariances of their own.
            denoised_at: the data are denoised estimates at that sigma (0: clean pictures).
        """
        if components is not None and components < 1:
            raise ValueError(f"components {components}: give 1 or more")
        if not batches.repeatable:
            raise ValueError("a mixture reads the data twice: give a tensor, a folder or a DataLoader, not a generator")
        d = math.prod(next(iter(batches))[0].shape[1:])
        full = rank is None and d <= MAX_FULL
        moments = full_moments(batches) if full else sketch_moments(batches, rank or DEFAULT_RANK, seed)
        q = min(axes, len(moments.variances))
        data = _project(batches, moments, q, seed)
        with one_thread():
            log_weights, means, covariances, classes = _choose(data, components, moments.std, seed, batches.progress)
            spreads, rotations = torch.linalg.eigh(covariances)
        tensors = gaussian_tensors(moments.mean, moments.basis, unshrink(moments.variances, denoised_at))
        tensors |= {
            "log_weights": log_weights.float(),
            "means": means.float(),
            "rotations": rotations.float().contiguous(),
            "spreads": unshrink(spreads.clamp_min(0), denoised_at).float(),
            "classes": classes,
        }
        residual = float(unshrink(torch.tensor(moments.residual, dtype=torch.float64), denoised_at))
        sigma_trunc = default_sigma_trunc(moments.std)
        return cls(tensors, moments.shape, residual, sigma_trunc=sigma_trunc, sigma_max=sigma_max), moments


def _project(batches: Batches, moments, q: int, seed: int) -> _Data:
    points, labels = [], []
    for x, y in batches:
        points.append((x.flatten(1).double() - moments.mean) @ moments.basis[:, :q])
        labels.append(torch.full([len(x)], -1) if y is None else y.long())
    points, labels = torch.cat(points), torch.cat(labels)
    held = torch.rand(len(points), generator=torch.Generator().manual_seed(seed)) < HELD_OUT
    return _Data(points, labels, held)


def _choose(data: _Data, components: int | None, std: float, seed: int, progress: bool):
    """Number of components and strength of shrinkage by held-out likelihood, then a fit on everything.

    Likelihood is measured at a noise level of half the data's std: finer structure than that is the denoiser's
    business, and rank-deficient components would otherwise decide.
    """
    labelled = bool((data.labels >= 0).all())
    noise = (0.5 * std) ** 2 + 1e-12
    options = [components] if components else list(PER_CLASS_CHOICES if labelled else UNLABELLED_CHOICES)
    q, n = data.points.shape[1], len(data.points)
    groups = data.labels.unique().tolist() if labelled else [-1]
    smallest = min(int((data.labels == g).sum()) for g in groups) if labelled else n
    options = [k for k in options if k == 1 or smallest >= 20 * k] or [1]
    pulls = [q / 8, q / 2, 2.0 * q, 8.0 * q]
    train, test = data.points[~data.held], data.points[data.held]
    if len(options) == 1 and len(test) < 10 or len(train) < 2:
        return _fit(data.points, data.labels, groups, options[0], pulls[1], noise, seed)
    best, score = (options[0], pulls[1]), -math.inf
    for k in tqdm(options, desc="mixture", disable=not progress or len(options) == 1, leave=False):
        shares = _assign(train, data.labels[~data.held], groups, k, noise, seed)
        for pull in pulls:
            fitted = _assemble(train, shares, groups, k, pull)
            value = float(em.log_density(test, *fitted[:3], noise).mean()) if len(test) else 0.0
            if value > score:
                best, score = (k, pull), value
    return _fit(data.points, data.labels, groups, *best, noise, seed)


def _fit(points, labels, groups, k, pull, noise, seed):
    return _assemble(points, _assign(points, labels, groups, k, noise, seed), groups, k, pull)


def _assign(points, labels, groups, k: int, noise: float, seed: int) -> torch.Tensor:
    """Responsibilities [N, K]: classes hard, components within a class by EM."""
    blocks = []
    for g in groups:
        block = torch.zeros(len(points), k, dtype=torch.float64)
        rows = (labels == g).nonzero()[:, 0]
        block[rows] = em.responsibilities(points[rows], min(k, max(1, len(rows))), noise, seed, width=k)
        blocks.append(block)
    return torch.cat(blocks, 1)


def _assemble(points, shares, groups, k: int, pull: float):
    """Weights, means, covariances; each covariance is pulled towards the pooled one as if by ``pull`` more pictures."""
    alive = shares.sum(0) > 1e-6
    classes = torch.tensor([g for g in groups for _ in range(k)])[alive]
    shares = shares[:, alive]
    counts = shares.sum(0)
    means = (shares.T @ points) / counts[:, None]
    q = points.shape[1]
    scatter = torch.zeros(len(counts), q, q, dtype=torch.float64)
    for j in range(len(counts)):
        rows = shares[:, j].nonzero()[:, 0]
        y = points[rows] - means[j]
        scatter[j] = (y * shares[rows, j, None]).T @ y
    pooled = scatter.sum(0) / counts.sum()
    covariances = (scatter + pull * pooled) / (counts + pull)[:, None, None]
    return (counts / counts.sum()).log(), means, covariances, classes
