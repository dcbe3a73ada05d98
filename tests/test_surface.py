"""The lowest point of a noisy score."""

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tdpm_ext.surface import LUCK, STEP, Surface


def bowl(bottom, tilt=0.3, noise=0.0, seed=0):
    """exp of a tilted parabola in the logarithms, times luck that depends on the point."""

    def score(point):
        x, y = (math.log(p / b) for p, b in zip(point, bottom, strict=True))
        luck = random.Random(f"{seed} {point[0]:.6g} {point[1]:.6g}").gauss(0, noise)
        return 3.0 * math.exp(x * x + y * y + tilt * x * y + luck)

    return score


def steps_apart(a, b):
    return max(abs(math.log(p / q)) / s for p, q, s in zip(a, b, STEP, strict=True))


@settings(max_examples=40)
@given(st.floats(-2.5, 2.5), st.floats(-2.5, 2.5), st.floats(-1.2, 1.2))
def test_the_bottom_of_a_bowl_is_found_between_the_points_of_the_lattice(i, j, tilt):
    bottom = (1.0 * math.exp(i * STEP[0]), 0.1 * math.exp(j * STEP[1]))
    found = Surface(bowl(bottom, tilt)).lowest((1.0, 0.1))
    assert steps_apart(found, bottom) < 0.02


def test_on_a_noisy_bowl_it_errs_less_than_the_best_point_seen():
    errors, lucky = [], []
    for seed in range(40):
        surface = Surface(bowl((1.2, 0.12), noise=0.02, seed=seed))
        errors.append(steps_apart(surface.lowest((1.0, 0.1)), (1.2, 0.12)))
        lucky.append(steps_apart(min(surface.known, key=surface.known.get), (1.2, 0.12)))
    assert sum(errors) < 0.8 * sum(lucky)


def test_no_point_is_scored_twice_and_few_are_scored():
    asked = []
    score = bowl((1.5, 0.1))

    def counted(point):
        asked.append(point)
        return score(point)

    Surface(counted).lowest((1.0, 0.1))
    assert len(asked) == len(set(asked)) <= 20


@given(st.floats(0.3, 3.0))
def test_a_point_that_is_not_allowed_is_never_given(edge):
    score = bowl((2.0, 0.1))
    found = Surface(lambda p: score(p) if p[0] <= edge else math.inf).lowest((0.25, 0.1))
    assert found[0] <= edge


def test_a_surface_without_a_bottom_gives_the_best_point_seen():
    surface = Surface(lambda p: p[0])
    found = surface.lowest((1.0, 0.1))
    assert surface(found) <= LUCK * min(surface.known.values()) and found[0] < 0.6
