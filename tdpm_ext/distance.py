"""A distance between sets of pictures for calibration: Frechet, in fixed random features unless better are given.

Random convolutions see edges, textures and their placement, and need no weights. Calibration multiplies their distance
by one in the activations of the checkpoint itself, where it shows any (activations.py). Neither is a network that the
benchmarks judge with.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from tdpm_ext.activations import activations_of
from tdpm_ext.pictures import Pictures, load_pictures, spread_over
from tdpm_ext.priors.moments import Batches

log = logging.getLogger("tdpm_ext")
KEPT = 64  # leading feature axes in which the distance is taken
FLAT = 1e-5  # of the widest axis's variance: along narrower ones the features do not vary
MOST = 5000  # pictures that the target is made of
LOOK = 0.5  # of the pictures' std: the noise level at which a denoiser looks at them


class RandomFeatures(nn.Module):
    """Pictures [B, C, H, W] -> vectors: means and spreads of three random convolution layers on a coarse grid."""

    def __init__(self, channels: int, seed: int = 0, width: int = 48):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = []
        for c_in in (channels, width, width):
            w = torch.randn(width, c_in, 3, 3, generator=generator)
            self.weights.append(w / w.flatten(1).norm(dim=1)[:, None, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = []
        for w in self.weights:
            x = F.leaky_relu(F.conv2d(x, w.to(x), padding=1), 0.1)
            out += [F.adaptive_avg_pool2d(x, 2).flatten(1), x.square().mean((2, 3)).add(1e-6).sqrt()]
            x = F.avg_pool2d(x, 2) if min(x.shape[-2:]) >= 4 else x
        return torch.cat(out, 1)


def frechet(mean_a, cov_a, mean_b, cov_b) -> float:
    """Frechet distance of two Gaussians, float64, by the symmetric root of cov_a (no complex square roots)."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


class FeatureDistance:
    """``distance(samples) -> float`` against a set of pictures; ``std`` is the pictures' own, per entry.

    The features are taken along their principal axes, each brought to variance 1 over the pictures (``whitened``): left
    as they are, the few widest axes of random features, brightness and shape, would outweigh all that tells sharp from
    blurred. Those of a trained network are what it tells pictures apart by, and are better left.

    Args:
        data: pictures in any form that fitting takes; at most ``MOST`` are used, evenly from all, or a loader's first.
        features: maps pictures [B, *shape] to vectors [B, F]; default: `RandomFeatures`.
    """

    def __init__(
        self,
        data,
        features: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        seed: int = 0,
        whitened: bool = True,
    ):
        x = some_pictures(data)
        if features is None and x.ndim != 4:
            raise ValueError(f"pictures of shape {tuple(x.shape[1:])}: give features= for data without C, H, W")
        if len(x) < 2 * KEPT:
            raise ValueError(f"{len(x)} pictures are too few to calibrate quality by: give at least {2 * KEPT}")
        self.features = RandomFeatures(x.shape[1], seed) if features is None else features
        self.range = float(x.min()), float(x.max())
        self.std = spread(x)
        vectors = torch.cat([self.features(part).double() for part in x.split(256)])
        self.mean, scale = vectors.mean(0), vectors.std(0).clamp_min(1e-6)
        values, axes = torch.linalg.eigh(torch.cov(((vectors - self.mean) / scale).T))
        kept = values[-KEPT:] > FLAT * values[-1]
        values, axes = values[-KEPT:][kept], axes[:, -KEPT:][:, kept]
        self.axes = axes / scale[:, None] / (values.sqrt() if whitened else 1.0)
        projected = (vectors - self.mean) @ self.axes
        self.target = (projected.mean(0), torch.cov(projected.T))

    def project(self, samples: torch.Tensor) -> torch.Tensor:
        """Pictures [B, *shape] -> float64 [B, at most KEPT]: what the distance compares, on the CPU.

        Within the range of the data, as they will be saved: where much of the data lies at an end of it (white paper),
        values beyond would let noise pass for contrast.
        """
        samples = samples.float().cpu().clamp(*self.range)
        vectors = torch.cat([self.features(part).double() for part in samples.split(256)])
        return (vectors - self.mean) @ self.axes

    def __call__(self, samples: torch.Tensor) -> float:
        if len(samples) < 2:
            raise ValueError(f"{len(samples)} pictures to judge: give at least 2, and better hundreds")
        if not bool(samples.isfinite().all()):
            raise ValueError("the pictures to judge hold NaN or infinity: check the checkpoint and its units")
        projected = self.project(samples)
        return frechet(projected.mean(0), torch.cov(projected.T), *self.target)


class AsSeenBy:
    """The geometric mean of the distances in random features and in a denoiser's own activations.

    Activations tell best where to cut, random features best when the prior's own draw still shows. A product needs
    no unit that the two would share. Of a denoiser that shows no activations, random features alone.

    Args:
        extra: conditions of one picture, [1, ...]; guidance among them is left out: one evaluation a picture will do.
    """

    def __init__(self, model: Callable, data, extra: dict | None = None, *, batch: int = 64, seed: int = 0):
        x = some_pictures(data)
        self.views = [FeatureDistance(x, seed=seed)]
        self.std = self.views[0].std
        extra = {k: v for k, v in (extra or {}).items() if k != "cond_scale"}
        seen = activations_of(model, max(LOOK * self.std, 1e-3), x.shape[1:], extra, batch=batch, seed=seed)
        if seen is None:
            log.info("this denoiser shows no activations of its blocks: pictures are compared in random features alone")
        else:
            self.views.append(FeatureDistance(x, seen, whitened=False))

    def __call__(self, samples: torch.Tensor) -> float:
        return math.prod(view(samples) for view in self.views) ** (1 / len(self.views))


def some_pictures(data) -> torch.Tensor:
    """At most ``MOST`` pictures, float [N, *shape]: evenly from all, or the first of a loader."""
    if isinstance(data, (str, Path)):
        data = load_pictures(data, limit=MOST)
    data = data.images if isinstance(data, Pictures) else data
    if isinstance(data, torch.Tensor) and len(data) > MOST:
        data = data[spread_over(len(data), MOST)]
    parts, count = [], 0
    for x, _ in Batches(data, progress=False):
        parts.append(x[: MOST - count])
        count += len(parts[-1])
        if count == MOST:
            break
    return torch.cat(parts)


def spread(x: torch.Tensor) -> float:
    """Root mean variance per entry: the std of pictures [N, *shape] in the denoiser's units."""
    return float(x.double().var(0, correction=0).mean().sqrt())
