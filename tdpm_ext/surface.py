"""The lowest point of a noisy score over two positive numbers, found on a surface through many scores.

Which of two near plans scores better on a few hundred seeds is partly luck; a parabola in the logarithms, fitted to a
dozen scores around the best, averages that luck out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

Point = tuple[float, float]

STEP = (math.log(1.4), math.log(1.5))  # between neighbours
REACH = 2.2  # steps from the middle within which scores shape the surface
FARTHEST = 1.4  # steps from the middle that its lowest point is believed
ROUNDS = 4  # times that the middle moves
LUCK = 1.03  # the surface's lowest point may score this much above the best score and is taken all the same


class Surface:
    """Scores of points, each computed once: ``surface(point) -> float``, infinite where a point is not allowed."""

    def __init__(self, score: Callable[[Point], float]):
        self._score = score
        self.known: dict[Point, float] = {}

    def __call__(self, point: Point) -> float:
        key = tuple(float(f"{v:.6g}") for v in point)
        if key not in self.known:
            self.known[key] = self._score(key)
        return self.known[key]

    def lowest(self, start: Point) -> Point:
        """Walk from ``start`` over a lattice until the surface's lowest point is nearest to the middle."""
        middle = start
        for _ in range(ROUNDS):
            for around in itertools.product((-1, 0, 1), repeat=2):
                self(_moved(middle, around))
            steps = self._bottom(middle)
            onward = tuple(round(n) for n in steps)
            if onward == (0, 0):
                break
            middle = _moved(middle, onward)
        found, best = _moved(middle, self._bottom(middle)), min(self.known, key=self.known.__getitem__)
        return found if self(found) <= LUCK * self.known[best] else best

    def _bottom(self, middle: Point) -> tuple[float, float]:
        """Steps from ``middle`` to the lowest point of a parabola through the scores near it, at most one and a bit."""
        near = [
            (steps, math.log(max(value, 1e-12)))
            for point, value in self.known.items()
            if math.isfinite(value) and max(map(abs, steps := _steps(middle, point))) <= REACH
        ]
        found = _parabola(near) if len(near) >= 8 else None
        if found is None and near:  # a saddle, or too few scores: on to the best of them
            found = min(near, key=lambda item: item[1])[0]
        return tuple(min(max(v, -FARTHEST), FARTHEST) for v in found or (0.0, 0.0))


def _parabola(near: list[tuple[Point, float]]) -> Point | None:
    """Where the least squares parabola through (u, value) is lowest; None if it is no bowl."""
    u, values = np.array([u for u, _ in near]), np.array([v for _, v in near])
    x, y = u.T
    a, b, c, d, e = np.linalg.lstsq(np.stack([x * x, x * y, y * y, x, y, x * 0 + 1], 1), values, rcond=None)[0][:5]
    curvature = np.array([[2 * a, b], [b, 2 * c]])
    if np.linalg.eigvalsh(curvature)[0] <= 1e-6:
        return None
    return tuple(np.linalg.solve(curvature, [-d, -e]).tolist())


def _moved(point: Point, steps: tuple[float, float]) -> Point:
    return tuple(v * math.exp(s * n) for v, s, n in zip(point, STEP, steps, strict=True))


def _steps(middle: Point, point: Point) -> tuple[float, float]:
    return tuple(math.log(p / m) / s for p, m, s in zip(point, middle, STEP, strict=True))
