"""How a prior plans any budget: from its table, between its rows, beyond them, and without one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdpm_ext.plan import Plan
from tdpm_ext.priors.base import ImplicitPrior

SHAPE = (2, 3, 2)
budgets = st.integers(1, 40)


@st.composite
def plans(draw_, steps=None):
    steps = draw_(st.integers(1, 12)) if steps is None else steps
    sigmas = [draw_(st.floats(0.01, 50.0))]
    for _ in range(steps - 1):
        sigmas.append(sigmas[-1] * draw_(st.floats(1.01, 4.0)))
    history = [sigmas[-1] * ratio for ratio in ((), (1.6,), (1.6, 2.5))[draw_(st.integers(0, 2))]]
    orders = draw_(st.lists(st.integers(1, 3), min_size=steps, max_size=steps))
    return Plan(tuple([*reversed(sigmas), 0.0]), tuple(orders), tuple(history), error=draw_(st.floats(0, 1)))


tables = st.sets(st.integers(1, 12), min_size=1, max_size=5).flatmap(
    lambda steps: st.fixed_dictionaries({n: plans(n) for n in steps})
)


@pytest.fixture
def blank():
    return ImplicitPrior(SHAPE, 2.5)


@given(budget=budgets, sigma_trunc=st.floats(1e-6, 1e5))
def test_every_budget_has_a_default_plan(budget, sigma_trunc):
    plan = ImplicitPrior(SHAPE, sigma_trunc).plan_for(budget, "quality")
    assert plan.steps == budget and plan.sigma_trunc == sigma_trunc
    assert all(h > sigma_trunc for h in plan.history)


@given(table=tables, budget=budgets)
def test_any_table_gives_a_valid_plan_for_every_budget(table, budget):
    prior = ImplicitPrior(SHAPE, 2.5)
    prior.plans["fidelity"] = table
    plan = prior.plan_for(budget)
    assert plan.steps == budget
    assert plan.sigmas[-2] >= min(0.01, 0.9 * min(p.sigmas[-2] for p in table.values()))
    cuts = [p.sigma_trunc for p in table.values()]
    assert 0.999 * min(cuts) <= plan.sigma_trunc <= 1.001 * max(cuts)
    if budget in table:
        assert plan is table[budget]


@given(low=plans(3), high=plans(7), budget=st.sampled_from([4, 5, 6]))
def test_between_two_plans_every_level_lies_between_theirs(low, high, budget):
    prior = ImplicitPrior(SHAPE, 2.5)
    prior.plans["quality"] = {3: low, 7: high}
    plan, share = prior.plan_for(budget, "quality"), (budget - 3) / 4
    cut = math.exp((1 - share) * math.log(low.sigma_trunc) + share * math.log(high.sigma_trunc))
    last = math.exp((1 - share) * math.log(low.sigmas[-2]) + share * math.log(high.sigmas[-2]))
    assert math.isclose(plan.sigma_trunc, cut, rel_tol=1e-9) and math.isclose(plan.sigmas[-2], last, rel_tol=1e-9)
    assert math.isclose(plan.error, (1 - share) * low.error + share * high.error, rel_tol=1e-9, abs_tol=1e-12)
    near = low if share < 0.5 else high
    assert len(plan.history) == len(near.history)


def test_beyond_the_table_the_nearest_plan_is_stretched(blank):
    four = Plan((3.0, 1.0, 0.4, 0.1, 0.0), (2, 3, 2, 1), (5.0,), error=0.3)
    blank.plans["fidelity"] = {4: four}
    more, fewer = blank.plan_for(8), blank.plan_for(2)
    assert more.sigmas[0] == pytest.approx(3.0) and more.sigmas[-2] == pytest.approx(0.1)
    assert fewer.sigmas[0] == pytest.approx(3.0) and fewer.sigmas[-2] == pytest.approx(0.1)
    assert more.orders == (2, 2, 3, 3, 2, 2, 1, 1) and more.history == (5.0,)
    assert math.isnan(more.error) and math.isnan(fewer.error)  # nobody measured these


def test_a_plan_of_one_step_is_extended_to_sensible_levels(blank):
    blank.plans["fidelity"] = {1: Plan((2.0, 0.0), (1,), (3.2,), error=0.5)}
    plan = blank.plan_for(40)
    assert plan.sigma_trunc == 2.0 and plan.sigmas[-2] > 1e-3 and plan.history == (3.2,)


def test_each_objective_has_its_own_table(blank):
    quality = Plan((1.0, 0.2, 0.0), (2, 2))
    blank.plans["quality"] = {2: quality}
    assert blank.plan_for(2, "quality") is quality
    assert blank.plan_for(2, "fidelity").sigma_trunc == 2.5
    blank.plans["quality"] = {}
    assert blank.plan_for(2, "quality").sigma_trunc == 2.5


@pytest.mark.parametrize("budget", [0, -3])
def test_no_budget_no_plan(blank, budget):
    with pytest.raises(ValueError, match=f"budget of {budget}"):
        blank.plan_for(budget)
