"""The multistep solver: against k-diffusion and exact solutions, at the edges, and never waiting for the device."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tdpm_ext.schedule import align_your_steps, exponential, karras, sd_sigmas
from tdpm_ext.solver import expand_orders, solve, step_weights

VARIANCES = torch.tensor([0.02, 0.3, 1.0, 4.0], dtype=torch.float64)
MEAN = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
levels = st.floats(1e-3, 1e4)


class Gaussian:
    """The exact denoiser of Gaussian data, and the exact solution of its probability-flow ODE."""

    def __init__(self, mean=MEAN, variances=VARIANCES):
        self.mean, self.variances, self.calls = mean, variances, []

    def __call__(self, x, sigma, **extra):
        self.calls.append((sigma, extra))
        share = self.variances / (self.variances + sigma[:, None] ** 2)
        return (self.mean + share * (x - self.mean)).to(x.dtype)

    def exact(self, x, start, end):
        return self.mean + ((self.variances + end**2) / (self.variances + start**2)).sqrt() * (x - self.mean)

    def known(self, x, start, sigmas):
        """(sigma, denoised) along the exact path through x at ``start``."""
        points = [self.exact(x, start, s) for s in sigmas]
        return [(s, self(p, torch.full([len(x)], s, dtype=torch.float64))) for s, p in zip(sigmas, points, strict=True)]


class Wavy:
    """A smooth denoiser that is neither linear nor the same for every row."""

    def __call__(self, x, sigma):
        s = sigma.reshape(-1, *[1] * (x.ndim - 1))
        return torch.tanh(x / (1 + s)) + 0.1 * torch.sin(3 * x / (1 + s**2).sqrt())


@pytest.fixture(scope="module")
def k_sampling():
    return pytest.importorskip("k_diffusion.sampling", exc_type=ImportError)


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# -- against k-diffusion ---------------------------------------------------------------------------------------------

SCHEDULES = {
    "karras": karras(12, 80.0, 0.02),
    "two steps": karras(2, 10.0, 0.1),
    "one step to zero": torch.tensor([3.0, 0.0]),
    "exponential": exponential(7, 14.6, 0.03),
    "align your steps": align_your_steps(10),
    "a stable diffusion table": torch.cat([sd_sigmas(1000).flip(0)[::97], torch.zeros(1)]),
    "not ending in zero": torch.tensor([20.0, 9.0, 2.5, 0.7]),
    "ascending": torch.tensor([0.05, 0.2, 1.0, 4.0, 14.0]),
    "float64": torch.tensor([7.0, 3.0, 1.0, 0.1, 0.0], dtype=torch.float64),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 8, 8), (2, 2, 3, 4, 4)])
def test_without_history_it_is_dpmpp_2m_of_k_diffusion(k_sampling, name, shape):
    sigmas = SCHEDULES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * sigmas[0]
    expected = k_sampling.sample_dpmpp_2m(Wavy(), x, sigmas.double(), disable=True)
    actual = solve(Wavy(), x, sigmas, disable=True)
    # the model is told sigma in float32, so the two agree to that
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def test_order_one_is_euler_of_k_diffusion(k_sampling, x):
    sigmas = karras(9, 80.0, 0.02)
    expected = k_sampling.sample_euler(Wavy(), x * 80, sigmas, disable=True)
    torch.testing.assert_close(solve(Wavy(), x * 80, sigmas, disable=True, orders=1), expected, atol=1e-6, rtol=1e-6)


def test_float32_pictures_agree_to_rounding(k_sampling):
    x = 80 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = k_sampling.sample_dpmpp_2m(Wavy(), x, karras(12, 80.0, 0.02).float(), disable=True)
    actual = solve(Wavy(), x, karras(12, 80.0, 0.02), disable=True)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


# -- order of accuracy -----------------------------------------------------------------------------------------------


def slope(errors, counts):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def grids(spacing, counts, start=3.0, end=0.4):
    if spacing == "log":
        return [torch.linspace(math.log(start), math.log(end), n + 1, dtype=torch.float64).exp() for n in counts]
    high, low = start ** (1 / 3), end ** (1 / 3)
    return [torch.linspace(high, low, n + 1, dtype=torch.float64) ** 3 for n in counts]


@pytest.mark.parametrize("spacing", ["log", "power"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_accuracy_with_history(order, spacing, x):
    model, counts, errors = Gaussian(), [16, 24, 32, 48, 64], []
    for sigmas in grids(spacing, counts):
        start = float(sigmas[0])
        ratio = start / float(sigmas[1])
        history = model.known(x, start, [start * ratio, start * ratio**2])
        out = solve(model, x, sigmas, disable=True, orders=order, history=history)
        errors.append(float((out - model.exact(x, start, float(sigmas[-1]))).abs().max()))
    assert abs(slope(errors, counts) - order) < 0.2


@pytest.mark.parametrize("order", [1, 2])
def test_order_of_accuracy_without_history(order, x):
    model, counts, errors = Gaussian(), [32, 48, 64, 96, 128], []
    for sigmas in grids("power", counts):
        out = solve(model, x, sigmas, disable=True, orders=order)
        errors.append(float((out - model.exact(x, float(sigmas[0]), float(sigmas[-1]))).abs().max()))
    assert abs(slope(errors, counts) - order) < 0.2


@pytest.mark.parametrize("order", [1, 2, 3])
def test_seeded_history_gives_full_order_from_the_first_step(order, x):
    """One step of length h: the error of order p falls as h^(p + 1)."""
    model, steps, errors = Gaussian(), [0.2, 0.14, 0.1, 0.07], []
    for h in steps:
        history = model.known(x, 2.0, [2 * math.exp(0.9 * h), 2 * math.exp(2.1 * h)])
        end = 2 * math.exp(-h)
        out = solve(model, x, [2.0, end], disable=True, orders=order, history=history[: order - 1])
        errors.append(float((out - model.exact(x, 2.0, end)).abs().max()))
    assert abs(slope(errors, [1 / h for h in steps]) - (order + 1)) < 0.2


# -- the weights' law ------------------------------------------------------------------------------------------------


@given(st.lists(levels, min_size=2, max_size=5), st.integers(1, 3), st.booleans())
def test_weights_sum_to_one_minus_the_ratio_of_sigmas(values, order, falling):
    weights = step_weights(sorted(values) if falling else values, order)
    total = 1 - values[0] / values[1] if not falling else 1 - sorted(values)[0] / sorted(values)[1]
    assert 1 <= len(weights) <= order
    assert math.isclose(sum(weights), total, rel_tol=1e-9, abs_tol=1e-9 * max(map(abs, weights)))


step = st.floats(0.01, 3.0)
coefficient = st.floats(-2, 2)


@settings(max_examples=200)
@given(h=step, u1=step, gap=step, poly=st.tuples(coefficient, coefficient, coefficient))
def test_third_order_is_exact_for_quadratics_in_lambda(h, u1, gap, poly):
    a = 1.7
    older = [a * math.exp(u1), a * math.exp(u1 + gap)]
    weights = step_weights([a * math.exp(-h), a, *older], 3)
    nodes, shares = np.polynomial.legendre.leggauss(30)
    s = 0.5 * h * (nodes + 1)
    expected = 0.5 * h * float(np.sum(shares * np.exp(s - h) * np.polyval(poly, s)))
    terms = [w * np.polyval(poly, -u) for w, u in zip(weights, (0.0, u1, u1 + gap), strict=True)]
    assert math.isclose(sum(terms), expected, rel_tol=1e-9, abs_tol=1e-10 * (1 + sum(map(abs, terms))))


@given(h=st.floats(0.01, 0.3), u1=step, gap=step)
def test_third_order_weights_do_not_jump_where_the_series_takes_over(h, u1, gap):
    weights = [
        step_weights([math.exp(-k), 1.0, math.exp(u1), math.exp(u1 + gap)], 3) for k in (0.05 - 1e-12, 0.05 + 1e-12)
    ]
    assert all(math.isclose(a, b, rel_tol=1e-8) for a, b in zip(*weights, strict=True))


@given(st.lists(levels, min_size=1, max_size=3))
def test_a_step_to_zero_returns_the_denoised_estimate_alone(older):
    assert step_weights([0.0, *older], 3) == [1.0]


def test_coinciding_levels_in_the_past_lower_the_order():
    assert step_weights([1.0, 2.0, 5.0, 5.0], 3) == step_weights([1.0, 2.0, 5.0], 2)
    assert step_weights([1.0, 2.0, 2.0], 2) == [0.5]
    assert step_weights([2.0, 2.0, 5.0], 2) == [0.0]


# -- the ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orders", [1, 2, 3])
@pytest.mark.parametrize("points", [0, 1, 2])
def test_one_step_to_zero_is_the_denoised_picture(orders, points, x):
    model = Gaussian()
    history = model.known(x, 5.0, [8.0, 13.0][:points])
    expected = model(x, torch.full([3], 5.0, dtype=torch.float64))
    torch.testing.assert_close(solve(model, x, [5.0, 0.0], disable=True, orders=orders, history=history), expected)


@pytest.mark.parametrize("sigmas", [[], [5.0], torch.zeros(0), torch.tensor([2.0])])
def test_no_step_to_make_returns_x_itself(sigmas, x):
    model = Gaussian()
    assert solve(model, x, sigmas, disable=True) is x
    assert model.calls == []


def test_a_last_sigma_above_zero_leaves_the_picture_at_that_level(x):
    model = Gaussian()
    sigmas = exponential(60, 10.0, 0.5)[:-1]
    torch.testing.assert_close(solve(model, x, sigmas, disable=True), model.exact(x, 10.0, 0.5), atol=3e-3, rtol=3e-3)


def test_ascending_sigmas_are_ordinary_steps_that_come_back(x):
    model = Gaussian()
    up = exponential(80, 8.0, 0.2)[:-1].flip(0)
    there = solve(model, x, up, disable=True)
    torch.testing.assert_close(there, model.exact(x, 0.2, 8.0), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(solve(model, there, up.flip(0), disable=True), x, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("orders", [2, 3])
@pytest.mark.parametrize(
    "sigmas",
    [
        [10.0, 5.0, 5.0, 3.0, 1.0, 0.0],  # a level twice
        [10.0, 5.0, 5.0, 5.0, 3.0, 1.0, 0.3],
        [10.0, 3.0, 6.0, 2.0, 1.0, 0.0],  # back up, as restart samplers go
        [0.5, 2.0, 1.0, 0.2],
    ],
)
def test_levels_that_repeat_or_turn_stay_finite_and_close(orders, sigmas, x):
    model = Gaussian()
    fine = [s for a, b in pairwise(sigmas) for s in np.linspace(a, b, 400, endpoint=False)] + sigmas[-1:]
    expected = solve(model, x, fine, disable=True, orders=1)
    actual = solve(model, x, sigmas, disable=True, orders=orders)
    assert float((actual - expected).abs().max()) < 1.0 + 0.3 * float(x.abs().max())


@pytest.mark.parametrize("sigmas", [[0.0, 1.0, 2.0], [2.0, 0.0, 1.0], [math.nan, 1.0, 0.0], [2.0, math.inf, 0.0],
                                    [2.0, -1.0], [3.0, 1.0, math.nan]])  # fmt: skip
def test_levels_that_no_step_can_start_from_are_named(sigmas, x):
    model = Gaussian()
    with pytest.raises(ValueError, match="only the last"):
        solve(model, x, sigmas, disable=True)
    assert model.calls == []


# -- the calling convention ------------------------------------------------------------------------------------------


def test_the_callback_sees_every_step_before_its_update(x):
    seen, sigmas = [], [4.0, 2.0, 1.0, 0.0]
    out = solve(Gaussian(), x, sigmas, {}, seen.append, True)
    assert [set(info) for info in seen] == [{"x", "i", "sigma", "sigma_hat", "denoised"}] * 3
    assert [info["i"] for info in seen] == [0, 1, 2]
    assert [float(info["sigma"]) for info in seen] == [float(info["sigma_hat"]) for info in seen] == sigmas[:-1]
    assert seen[0]["x"] is x
    torch.testing.assert_close(out, seen[-1]["denoised"])


def test_tensors_handed_to_the_callback_do_not_change_afterwards(x):
    kept, before = [], x.clone()

    def keep(info):
        kept.append((info["x"], info["x"].clone(), info["denoised"], info["denoised"].clone()))

    solve(Wavy(), x, karras(6, 10.0, 0.1), None, keep, True, orders=3)
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) and torch.equal(c, d) for a, b, c, d in kept)


def test_the_model_gets_sigma_per_picture_and_the_extra_arguments(x):
    model = Gaussian()
    solve(model, x, [4.0, 1.0, 0.0], {"class_cond": 7}, disable=True)
    assert [sigma.tolist() for sigma, _ in model.calls] == [[4.0] * 3, [1.0] * 3]
    assert [extra for _, extra in model.calls] == [{"class_cond": 7}] * 2


def test_no_gradient_is_kept(x):
    assert not solve(Wavy(), x.requires_grad_(), [3.0, 1.0, 0.0], disable=True).requires_grad


def test_orders_per_step():
    assert expand_orders(2, 3) == [2, 2, 2]
    assert expand_orders((1, 2, 3), 3) == [1, 2, 3]
    for wrong in ((1, 2), (0, 1, 2), (1, 2, 4), 4):
        with pytest.raises(ValueError, match="for 3 steps"):
            expand_orders(wrong, 3)


def test_orders_are_followed_step_by_step(x):
    sigmas = [8.0, 4.0, 2.0, 1.0, 0.5]
    mixed = solve(Wavy(), x, sigmas, disable=True, orders=(1, 1, 2, 3))
    head = solve(Wavy(), x, sigmas[:3], disable=True, orders=1)
    tail = []
    solve(Wavy(), x, sigmas, None, tail.append, True, orders=1)
    history = [(4.0, tail[1]["denoised"]), (8.0, tail[0]["denoised"])]
    torch.testing.assert_close(solve(Wavy(), head, sigmas[2:], disable=True, orders=(2, 3), history=history), mixed)


class NoWaiting(TorchDispatchMode):
    """Fails on every operation that hands a tensor's value to Python, which on a GPU waits for the device."""

    FORBIDDEN = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in self.FORBIDDEN:
            raise AssertionError(f"{func._schema.name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("orders", [1, 2, 3])
def test_the_loop_never_waits_for_the_device(orders, x):
    guard, history = NoWaiting(), Gaussian().known(x, 8.0, [12.0, 20.0])
    calls = []

    def model(x, sigma):
        calls.append(1)
        if len(calls) == 1:  # coefficients are settled by now: from here to the end nothing may wait
            guard.__enter__()
        return torch.tanh(x)

    try:
        solve(model, x, torch.tensor([8.0, 3.0, 1.0, 0.3, 0.0]), None, lambda info: None, True, orders=orders,
              history=history)  # fmt: skip
    finally:
        if calls:
            guard.__exit__(None, None, None)
    assert len(calls) == 4


def test_the_guard_against_waiting_can_fail():
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        float(torch.ones(1))
