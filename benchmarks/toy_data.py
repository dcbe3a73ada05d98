"""Six distributions in the plane, and how far samples are from them.

Each set is a fixed pool of points with a std of 0.5 per coordinate and mean 0, cut into parts of equal mass: its modes
where it has modes (8 Gaussians, 25-grid, squares of the checkerboard, arms of the pinwheel), pieces of its curve where
it has none (two moons, swiss roll). Training and judging points are disjoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree

STD = 0.5  # of every set, per coordinate
POOL, JUDGED = 60_000, 20_000
ANGLES = 64
COVERED = 0.25  # a part counts as covered when it gets this share of what it should get
STRAY = 0.999  # quantile of real points' distances beyond which a sample belongs to no part


class Score(NamedTuple):
    """``sw``: sliced 2-Wasserstein distance over the data's std. ``coverage``: share of the parts that are covered.
    ``stray``: share of the samples that lie off the data. ``rarest``: the worst served part's share of its due."""

    sw: float
    coverage: float
    stray: float
    rarest: float


def _ring(n: int, rng: np.random.Generator):
    part = np.arange(n) % 8
    angle = part * math.pi / 4
    return np.stack([np.cos(angle), np.sin(angle)], 1) + 0.05 * rng.standard_normal((n, 2)), part


def _grid(n: int, rng: np.random.Generator):
    part = np.arange(n) % 25
    return np.stack([part % 5, part // 5], 1) + 0.05 * rng.standard_normal((n, 2)), part


def _moons(n: int, rng: np.random.Generator):
    along, upper = rng.random(n), np.arange(n) % 2
    angle = math.pi * along
    x = np.where(upper, 1 - np.cos(angle), np.cos(angle))
    y = np.where(upper, 0.5 - np.sin(angle), np.sin(angle))
    return np.stack([x, y], 1) + 0.05 * rng.standard_normal((n, 2)), upper * 5 + (along * 5).astype(int)


def _roll(n: int, rng: np.random.Generator):
    along = rng.random(n)
    angle = 1.5 * math.pi * (1 + 2 * along)
    points = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return points + 0.3 * rng.standard_normal((n, 2)), (along * 10).astype(int)


def _board(n: int, rng: np.random.Generator):
    part = np.arange(n) % 8
    row, half = part // 2, part % 2
    corner = np.stack([2 * half + row % 2, row], 1)
    return corner + rng.random((n, 2)), part


def _pinwheel(n: int, rng: np.random.Generator):
    part = np.arange(n) % 5
    points = rng.standard_normal((n, 2)) * [0.3, 0.05] + [1, 0]
    angle = part * 2 * math.pi / 5 + 0.25 * np.exp(points[:, 0])
    x = points[:, 0] * np.cos(angle) - points[:, 1] * np.sin(angle)
    y = points[:, 0] * np.sin(angle) + points[:, 1] * np.cos(angle)
    return np.stack([x, y], 1), part


DRAWN: dict[str, tuple[str, Callable]] = {
    "ring": ("8 Gaussians", _ring),
    "grid": ("25-grid", _grid),
    "moons": ("two moons", _moons),
    "roll": ("swiss roll", _roll),
    "checkerboard": ("checkerboard", _board),
    "pinwheel": ("pinwheel", _pinwheel),
}


class SlicedDistance:
    """``distance(x) -> float``: sliced 2-Wasserstein distance of points x [N, 2] to a larger set, data units.

    The root of the mean over evenly spread directions of the squared 2-Wasserstein distances of the projections; the
    larger set's quantile functions are read where the smaller one has its points.
    """

    def __init__(self, reference: torch.Tensor, angles: int = ANGLES):
        angle = torch.arange(angles, dtype=torch.float64) * (math.pi / angles)
        self.directions = torch.stack([angle.cos(), angle.sin()])
        self.sorted = (reference.double() @ self.directions).sort(0).values

    def __call__(self, x: torch.Tensor) -> float:
        if len(x) > len(self.sorted):
            raise ValueError(f"{len(x)} points against a reference of {len(self.sorted)}: give no more than those")
        own = (x.double() @ self.directions).sort(0).values
        at = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x) * len(self.sorted) - 0.5
        left = at.floor().long().clamp(0, len(self.sorted) - 1)
        right = (left + 1).clamp(max=len(self.sorted) - 1)
        there = torch.lerp(self.sorted[left], self.sorted[right], (at - left)[:, None].clamp(0, 1))
        return float((own - there).square().mean().sqrt())


@dataclass
class ToySet:
    """One distribution: points to train on and points to judge by, float32 [N, 2], with their parts int64 [N].

    ``from_train`` is the sliced distance to training points, for choosing; ``score`` compares with the others.
    """

    name: str
    title: str
    train: torch.Tensor
    train_parts: torch.Tensor
    real: torch.Tensor
    parts: torch.Tensor
    from_train: SlicedDistance = field(init=False, repr=False)

    def __post_init__(self):
        self.from_train, self._from_real = SlicedDistance(self.train[:JUDGED]), SlicedDistance(self.real)
        self._tree = cKDTree(self.real.numpy())
        self._reach = float(np.quantile(self._tree.query(self.train[:JUDGED].numpy())[0], STRAY))

    @classmethod
    def make(cls, name: str, count: int = POOL) -> ToySet:
        """The set ``name`` of ``DRAWN``; the same points at every call.

        Raises ValueError for an unknown name.
        """
        if name not in DRAWN:
            raise ValueError(f"no toy set {name!r}: choose from {', '.join(DRAWN)}")
        title, draw = DRAWN[name]
        rng = np.random.default_rng(2202_09671)
        points, parts = draw(count, rng)
        points = (points - points.mean(0)) / points.std(0) * STD
        order = rng.permutation(count)
        x, y = torch.from_numpy(points[order]).float(), torch.from_numpy(parts[order].astype(np.int64))
        held = count // 3
        return cls(name, title, x[held:], y[held:], x[:held], y[:held])

    @property
    def count(self) -> int:
        """Parts of the set."""
        return int(self.parts.max()) + 1

    def shares(self, x: torch.Tensor) -> tuple[np.ndarray, float]:
        """Samples' share of each part over the data's own [parts], and the share of samples that are in none."""
        distance, nearest = self._tree.query(x.numpy())
        inside = distance <= self._reach
        drawn = np.bincount(self.parts.numpy()[nearest[inside]], minlength=self.count) / len(x)
        due = np.bincount(self.parts.numpy(), minlength=self.count) / len(self.parts)
        return drawn / due, float(1 - inside.mean())

    def score(self, x: torch.Tensor) -> Score:
        """How samples x [N, 2] compare with the judging points. Raises ValueError if they are not finite."""
        if not bool(x.isfinite().all()):
            raise ValueError(f"{int((~x.isfinite()).any(1).sum())} of {len(x)} samples are not finite")
        shares, stray = self.shares(x)
        return Score(self._from_real(x) / STD, float((shares >= COVERED).mean()), stray, float(shares.min()))

    def floor(self, count: int) -> list[Score]:
        """Real points that nothing else uses for judging, against the judging points: disjoint blocks of ``count``."""
        return [self.score(x) for x in self.train[:JUDGED].split(count) if len(x) == count]
