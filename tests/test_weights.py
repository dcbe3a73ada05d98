"""Plans with fitted weights: what is allowed, how the solver uses them, and that calibration's are worth having."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tdpm_ext as tdpm
from tdpm_ext.calibrate import rmse
from tdpm_ext.plan import Plan
from tdpm_ext.priors.base import blend_plans, resize_plan
from tdpm_ext.reference import run_batched
from tdpm_ext.schedule import karras
from tdpm_ext.solver import solve, step_weights

PLAN = Plan((4.0, 2.0, 0.5, 0.0), (2, 2, 2), (6.0,))


def shrink(x, sigma):
    """The exact denoiser of unit Gaussian data."""
    return x / (1 + sigma[:, None] ** 2)


def usual_rows(plan: Plan) -> list[list[float]]:
    rows = []
    for i, (here, there) in enumerate(pairwise(plan.sigmas)):
        seen = [*plan.sigmas[i::-1], *plan.history][:3]
        rows.append([w / (1 - there / here) for w in step_weights([there, *seen], plan.orders[i])])
    return rows


def test_the_usual_weights_written_out_change_nothing():
    x = 4 * torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    history = [(6.0, x / 37)]
    written = Plan(PLAN.sigmas, PLAN.orders, PLAN.history, usual_rows(PLAN))
    plain = solve(shrink, x, PLAN.sigmas, disable=True, orders=PLAN.orders, history=history)
    mixed = solve(shrink, x, PLAN.sigmas, disable=True, history=history, weights=written.weights)
    torch.testing.assert_close(mixed, plain)


def test_a_row_that_needs_more_estimates_than_there_are_gives_way_to_the_order():
    x = torch.ones(1, 1, dtype=torch.float64)
    weights = ((1.5, -0.5), (1.0,), (1.0,))
    without = solve(shrink, x, PLAN.sigmas, disable=True, orders=(1, 1, 1), weights=weights)
    torch.testing.assert_close(without, solve(shrink, x, PLAN.sigmas, disable=True, orders=1))
    known = [(6.0, x / 37)]
    mixed = solve(shrink, x, PLAN.sigmas, disable=True, orders=(1, 1, 1), history=known, weights=weights)
    assert not torch.equal(mixed, without)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=2))
def test_a_constant_estimate_is_reached_whatever_the_weights(free):
    rows = ((1.0,), (1 - free[0], free[0]), (1 - sum(free), *free))
    x = solve(lambda x, sigma: torch.full_like(x, 3.0), torch.zeros(1, 2), PLAN.sigmas, disable=True, weights=rows)
    torch.testing.assert_close(x, torch.full((1, 2), 3.0))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (((1.0,),), "3 steps"),
        (((0.9,), (1.0,), (1.0,)), "sum to 1"),
        (((0.4, 0.3, 0.3), (1.0,), (1.0,)), "1 to 2 numbers"),
        (((1.0,), (1.0,), ()), "sum to 1"),
        (((200.0, -199.0), (1.0,), (1.0,)), "up to 100"),
        (((float("nan"),), (1.0,), (1.0,)), "finite"),
        ("abc", "list of rows"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_reason(weights, reason):
    with pytest.raises(ValueError, match=reason):
        Plan(PLAN.sigmas, PLAN.orders, PLAN.history, weights)


def test_json_keeps_weights_and_other_budgets_and_cuts_drop_them():
    plan = replace(PLAN, weights=((1.5, -0.5), (1.0,), (1.2, -0.3, 0.1)), error=0.5)
    assert Plan.from_json(plan.to_json()) == plan
    assert resize_plan(plan, 5).weights == ()
    assert blend_plans(plan, replace(PLAN, error=0.1), 0.2).weights == ()


def test_solve_names_a_wrong_number_of_rows():
    with pytest.raises(ValueError, match="2 rows of weights for 3 steps"):
        solve(shrink, torch.ones(1, 1), PLAN.sigmas, weights=((1.0,), (1.0,)))


def test_calibrated_weights_bring_fresh_seeds_nearer_their_long_run():
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(6, 1, 4, 4, generator=generator)
    data = (centres[torch.arange(300) % 6] + 0.15 * torch.randn(300, 1, 4, 4, generator=generator)).clamp(-3, 3)
    model = tdpm.IdealDenoiser(data)
    prior = tdpm.fit_prior("gaussian", data, progress=False)
    tdpm.calibrate(prior, model, budgets=(3, 4), samples=64, progress=False)
    z = torch.randn(200, 1, 4, 4, generator=generator)
    reference = run_batched(model, 80 * z, karras(60, 80, 0.02, 7.0), {}, 200)
    fitted = {b: plan for b, plan in prior.plans["fidelity"].items() if plan.weights}
    assert fitted
    for plan in fitted.values():
        x, history = prior.start(z, plan.sigma_trunc, plan.history)
        way = {"history": history, "disable": True}
        mixed = solve(model, x, plan.sigmas, weights=plan.weights, orders=plan.orders, **way)
        plain = solve(model, x, plan.sigmas, orders=plan.orders, **way)
        assert rmse(mixed, reference) < rmse(plain, reference)


def test_calibration_stands_estimates_that_never_differ_and_arguments_that_are_no_rows():
    def constant(x, sigma, shift):
        return torch.zeros_like(x) + shift

    data = torch.zeros(20, 1, 4, 4)
    prior = tdpm.fit_prior("gaussian", data, progress=False)
    extra = {"shift": torch.tensor(0.0)}
    tdpm.calibrate(prior, constant, budgets=(2, 3), samples=4, extra_args=extra, progress=False)
    assert all(plan.error < 1e-6 for plan in prior.plans["fidelity"].values())
