"""Plans: what is accepted, what is refused, and that JSON keeps them."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdpm_ext.plan import Plan

levels = st.floats(1e-3, 1e3)


@st.composite
def plans(draw):
    drawn = sorted(draw(st.lists(levels, min_size=1, max_size=12, unique=True)), reverse=True)
    orders = draw(st.lists(st.integers(1, 3), min_size=len(drawn), max_size=len(drawn)))
    history = [drawn[0] * factor for factor in draw(st.sampled_from([(), (1.6,), (1.6, 2.5)]))]
    error = draw(st.one_of(st.just(math.nan), st.floats(0, 10)))
    return Plan((*drawn, 0.0), tuple(orders), tuple(history), error=error)


@settings(deadline=None)
@given(plans())
def test_json_keeps_every_field(plan):
    text = json.dumps(plan.to_json(), allow_nan=False)
    again = Plan.from_json(json.loads(text))
    assert again.to_json() == plan.to_json()
    assert (again.steps, again.sigma_trunc) == (len(plan.orders), plan.sigmas[0])


def test_lists_and_ints_become_tuples_of_floats():
    plan = Plan([5, 1, 0], [1, 2], [8])
    assert (plan.sigmas, plan.orders, plan.history) == ((5.0, 1.0, 0.0), (1, 2), (8.0,))
    assert math.isnan(plan.error)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sigmas": (0.0,), "orders": ()}, "at least sigma_trunc"),
        ({"sigmas": (5.0, 1.0), "orders": (1,)}, "end in 0"),
        ({"sigmas": (1.0, 5.0, 0.0), "orders": (1, 1)}, "fall strictly"),
        ({"sigmas": (5.0, 5.0, 0.0), "orders": (1, 1)}, "fall strictly"),
        ({"sigmas": (math.inf, 0.0), "orders": (1,)}, "finite"),
        ({"sigmas": (math.nan, 0.0), "orders": (1,)}, "finite"),
        ({"sigmas": (10**400, 0), "orders": (1,)}, "too large"),
        ({"sigmas": "50", "orders": (1,)}, "list of numbers"),
        ({"sigmas": ("5", 0.0), "orders": (1,)}, "give a number"),
        ({"sigmas": (True, 0.0), "orders": (1,)}, "give a number"),
        ({"sigmas": tuple(range(2000, -1, -1)), "orders": (1,) * 2000}, "at most 1001"),
        ({"sigmas": (5.0, 0.0), "orders": (4,)}, "1, 2 or 3"),
        ({"sigmas": (5.0, 0.0), "orders": (1.5,)}, "1, 2 or 3"),
        ({"sigmas": (5.0, 0.0), "orders": (1, 1)}, "one per step"),
        ({"sigmas": (5.0, 0.0), "orders": (1,), "history": (4.0,)}, "above sigma_trunc"),
        ({"sigmas": (5.0, 0.0), "orders": (1,), "history": (9.0, 8.0)}, "rise strictly"),
        ({"sigmas": (5.0, 0.0), "orders": (1,), "history": (6.0, 7.0, 8.0)}, "at most 2"),
        ({"sigmas": (5.0, 0.0), "orders": (1,), "error": "low"}, "give a number"),
    ],
)
def test_a_broken_rule_is_named(fields, reason):
    with pytest.raises(ValueError, match=reason):
        Plan(**fields)
    with pytest.raises(ValueError, match=reason):
        Plan.from_json(fields)


@pytest.mark.parametrize(
    "value", [None, [], "plan", 3, {}, {"sigmas": [1, 0]}, {"sigmas": [1, 0], "orders": [1], "x": 1}]
)
def test_json_that_is_no_plan_is_refused(value):
    with pytest.raises(ValueError, match="plan"):
        Plan.from_json(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {"sigmas": json_values, "orders": json_values},
        optional={"history": json_values, "error": json_values},
    )
)
def test_hostile_json_gives_a_plan_or_a_value_error(value):
    try:
        plan = Plan.from_json(value)
    except ValueError:
        return
    assert plan.sigmas[-1] == 0
    assert plan.steps == len(plan.orders)
