"""Schedules: published tables, and the laws of re-spacing and cutting."""

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdpm_ext import schedule

# Index -> sigma for linear 1e-4..0.02, cosine s=.008 and Stable Diffusion's scaled-linear table, as published.
TABLE = {
    4: ("0.02645", "0.01597", "0.0656"),
    49: ("0.17277", "0.08976", "0.2230"),
    99: ("0.33883", "0.16944", "0.3417"),
    499: ("3.424", "1.012", "1.613"),
    999: ("157.4", "2.0e4", "14.61"),
}
TABLES = (schedule.vp_linear_sigmas, schedule.cosine_sigmas, schedule.sd_sigmas)
laws = settings(deadline=None, max_examples=60)


@pytest.mark.parametrize("index", TABLE)
@pytest.mark.parametrize("column", range(3))
def test_tables_hold_the_published_sigmas(index, column):
    printed = Decimal(TABLE[index][column])
    half_a_digit = 0.5 * 10.0 ** printed.as_tuple().exponent
    assert abs(TABLES[column]()[index].item() - float(printed)) <= half_a_digit * 1.001


@pytest.mark.parametrize("make", TABLES)
@pytest.mark.parametrize("n", [1, 2, 50, 1000])
def test_tables_ascend_in_float64(make, n):
    table = make(n)
    assert table.dtype == torch.float64
    assert table.shape == (n,)
    assert (table.diff() > 0).all()


@laws
@given(st.sampled_from(TABLES), st.floats(0, 999))
def test_index_and_sigma_are_inverse(make, index):
    table = make()
    assert schedule.sigma_to_index(schedule.index_to_sigma(index, table), table) == pytest.approx(index, abs=1e-6)


@pytest.mark.parametrize("index", [0, 7, 999])
def test_whole_indices_give_the_table_entry_exactly(index):
    table = schedule.sd_sigmas()
    assert schedule.index_to_sigma(index, table) == table[index].item()
    assert schedule.sigma_to_index(table[index].item(), table) == index


def test_conversions_clamp_to_the_table():
    table = schedule.sd_sigmas()
    assert schedule.sigma_to_index(1e-6, table) == 0
    assert schedule.sigma_to_index(1e6, table) == 999
    assert schedule.index_to_sigma(-5, table) == table[0].item()
    assert schedule.index_to_sigma(math.inf, table) == table[-1].item()


@pytest.mark.parametrize("sigma", [0, -1, math.nan, math.inf])
def test_an_impossible_sigma_has_no_index(sigma):
    with pytest.raises(ValueError, match="above 0"):
        schedule.sigma_to_index(sigma, schedule.sd_sigmas())


@pytest.mark.parametrize("table", [[], [1.0, 1.0], [2.0, 1.0], [0.0, 1.0], [1.0, math.nan]])
def test_a_table_that_does_not_ascend_is_refused(table):
    with pytest.raises(ValueError, match="ascending|NaN"):
        schedule.index_to_sigma(0, table)


@laws
@given(st.integers(1, 40), st.floats(0.1, 200), st.floats(1e-3, 0.99), st.floats(1, 10))
def test_made_schedules_have_the_count_and_the_ends(n, sigma_max, ratio, rho):
    sigma_min = sigma_max * ratio
    for made in (schedule.karras(n, sigma_max, sigma_min, rho), schedule.exponential(n, sigma_max, sigma_min)):
        assert made.dtype == torch.float64
        assert made.shape == (n + 1,)
        assert made[0] == sigma_max
        assert made[-1] == 0
        assert n == 1 or made[-2] == sigma_min
        assert (made.diff() < 0).all()


def test_karras_is_the_published_formula():
    steps = torch.arange(10, dtype=torch.float64) / 9
    want = (80 ** (1 / 7) + steps * (0.02 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(schedule.karras(10, 80, 0.02)[:-1], want)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_align_your_steps_is_the_published_table_at_ten_steps(model):
    want = {
        "sd15": [14.61, 6.47, 3.86, 2.69, 1.88, 1.39, 0.964, 0.652, 0.398, 0.152],
        "sdxl": [14.61, 6.32, 3.77, 2.18, 1.34, 0.862, 0.555, 0.380, 0.233, 0.111],
    }[model]
    made = schedule.align_your_steps(10, model)
    assert made.shape == (11,)
    assert made[-1] == 0
    assert made[:-1].tolist() == pytest.approx(want, rel=4e-3)


@laws
@given(st.integers(1, 40), st.sampled_from(["sd15", "sdxl"]), st.none() | st.floats(0.1, 100))
def test_align_your_steps_starts_where_asked_and_falls(n, model, sigma_max):
    made = schedule.align_your_steps(n, model, sigma_max)
    assert made.shape == (n + 1,)
    assert made[0] == pytest.approx(14.6146 if sigma_max is None else sigma_max)
    assert made[-1] == 0
    assert (made.diff() < 0).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: schedule.karras(0, 80, 0.02),
        lambda: schedule.karras(2.5, 80, 0.02),
        lambda: schedule.karras(4, 0.01, 0.02),
        lambda: schedule.karras(4, math.inf, 0.02),
        lambda: schedule.karras(4, 80, 0),
        lambda: schedule.karras(4, 80, 0.02, rho=0),
        lambda: schedule.exponential(4, math.nan, 0.02),
        lambda: schedule.align_your_steps(4, "sd3"),
        lambda: schedule.align_your_steps(4, sigma_max=0.01),
        lambda: schedule.sd_sigmas(0),
        lambda: schedule.respace([2.0, 1.0, 0.0], 1.5, steps=0),
    ],
)
def test_impossible_requests_raise_value_error(call):
    with pytest.raises(ValueError, match="give|known are|ends at"):
        call()


@st.composite
def hosts(draw):
    """A host's decreasing schedule, ending in 0 or not, with a truncation level between its ends."""
    grid = draw(st.lists(st.integers(0, 400), min_size=2, max_size=20, unique=True))
    drawn = [0.01 * 10 ** (i / 100) for i in sorted(grid, reverse=True)]
    end = draw(st.sampled_from([0.0, drawn[-1] / 2]))
    trunc = drawn[-1] * (drawn[0] / drawn[-1]) ** draw(st.floats(0.1, 1))
    return torch.tensor([*drawn, end], dtype=torch.float64), trunc


@laws
@given(hosts(), st.none() | st.integers(1, 30))
def test_respace_falls_from_sigma_trunc_to_the_hosts_end_with_the_count_asked(host, steps):
    sigmas, trunc = host
    made = schedule.respace(sigmas, trunc, steps)
    assert made.dtype == torch.float64
    assert len(made) == len(sigmas) if steps is None else steps + 1
    assert made[0] == trunc
    assert made[-1] == sigmas[-1]
    assert (made.diff() < 0).all()
    if sigmas[-1] == 0 and len(made) > 2:
        assert made[-2].item() == pytest.approx(sigmas[-2].item())


@laws
@given(hosts())
def test_respace_keeps_the_shape_in_log_sigma(host):
    sigmas, trunc = host
    made = schedule.respace(sigmas, trunc)
    used = slice(0, None if sigmas[-1] > 0 else -1)
    old, new = sigmas[used].log(), made[used].log()
    want = (old[0] - old) / (old[0] - old[-1])
    torch.testing.assert_close((new[0] - new) / (new[0] - new[-1]), want, atol=1e-6, rtol=0)


@laws
@given(hosts())
def test_respace_at_the_hosts_own_start_changes_nothing(host):
    sigmas, _ = host
    torch.testing.assert_close(schedule.respace(sigmas, sigmas[0].item()), sigmas)


@laws
@given(hosts())
def test_cut_keeps_the_hosts_sigmas_below_sigma_trunc(host):
    sigmas, trunc = host
    made = schedule.cut(sigmas, trunc)
    assert made[0] == trunc
    assert made[-1] == sigmas[-1]
    assert (made.diff() < 0).all()
    assert set(made[1:].tolist()) <= set(sigmas.tolist())
    kept = int((sigmas < trunc * (1 - schedule.CLOSE)).sum())
    assert len(made) == kept + 1 <= len(sigmas)


def test_cut_treats_a_sigma_within_a_thousandth_as_equal():
    assert schedule.cut([10.0, 4.999, 1.0, 0.0], 5.0).tolist() == [5.0, 1.0, 0.0]
    assert schedule.cut([10.0, 4.9, 1.0, 0.0], 5.0).tolist() == [5.0, 4.9, 1.0, 0.0]


@pytest.mark.parametrize(
    ("sigmas", "steps", "want"),
    [
        ([14.0, 0.0], None, [5.0, 0.0]),  # one step: straight to the end
        ([14.0, 0.0], 3, [5.0, 1.5811, 0.5, 0.0]),  # no shape to keep: even in log sigma, to a tenth
        ([14.0, 9.0, 0.0], None, [5.0, 0.5, 0.0]),  # nothing between sigma_trunc and 0: to a tenth
        ([14.0, 14.0, 1.0], None, [5.0, 5.0, 1.0]),  # a host that repeats a level keeps repeating it
    ],
)
def test_respace_of_very_short_hosts(sigmas, steps, want):
    assert schedule.respace(sigmas, 5.0, steps).tolist() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("verb", [schedule.respace, schedule.cut])
@pytest.mark.parametrize(
    ("sigmas", "trunc", "reason"),
    [
        ([], 1.0, "at least two"),
        ([5.0], 1.0, "at least two"),
        ([1.0, 5.0], 2.0, "rise"),
        ([5.0, 2.0], 1.0, "never go below"),
        ([0.0, 0.0], 1.0, "never go below"),
        ([5.0, math.nan], 1.0, "NaN"),
        ([5.0, -1.0], 1.0, "negative"),
        ([[5.0, 0.0]], 1.0, "1-D"),
        ("5, 0", 1.0, "1-D"),
        ([5.0, 0.0], 0.0, "above 0"),
        ([5.0, 0.0], math.nan, "above 0"),
    ],
)
def test_what_cannot_be_truncated_says_why(verb, sigmas, trunc, reason):
    with pytest.raises(ValueError, match=reason):
        verb(sigmas, trunc)


def test_check_sigmas_returns_float64_on_the_cpu_without_touching_the_input():
    given_sigmas = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float16)
    checked = schedule.check_sigmas(given_sigmas)
    assert checked.dtype == torch.float64
    assert checked.tolist() == [2.0, 1.0, 0.0]
    assert given_sigmas.dtype == torch.float16
    assert schedule.check_sigmas([]).shape == (0,)
