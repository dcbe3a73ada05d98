"""The rivals are k-diffusion's own samplers, from the same noise, at the price they really pay."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

pytest.importorskip("k_diffusion", exc_type=ImportError)

from benchmarks import rivals  # noqa: E402

SHAPE = (1, 3, 3)


def gaussian_denoiser(x, sigma, mean=0.25, deviation=0.5):
    """The exact denoiser of data drawn from N(mean, deviation^2) in every pixel."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return (x * deviation**2 + mean * sigma**2) / (deviation**2 + sigma**2)


def gaussian_end(z, sigma_max, mean=0.25, deviation=0.5):
    """Where the probability-flow trajectory from z * sigma_max ends."""
    return mean + (z * sigma_max - mean) * deviation / math.hypot(deviation, sigma_max)


@pytest.fixture(scope="module")
def z():
    return rivals.noise_for(range(6), SHAPE)


@pytest.mark.parametrize("name", rivals.RIVALS)
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 8])
def test_no_sampler_overspends_and_none_leaves_a_whole_step_unspent(z, name, budget):
    _, nfe = rivals.run_rival(gaussian_denoiser, name, budget, 20.0, 7.0, z)
    assert nfe == rivals.RIVALS[name](rivals.steps_for(name, budget)) <= budget
    assert rivals.RIVALS[name](rivals.steps_for(name, budget) + 1) > budget


def test_two_stage_samplers_take_half_the_steps():
    assert [rivals.steps_for("heun", b) for b in range(1, 9)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [rivals.steps_for("lms", b) for b in (1, 4)] == [1, 4]


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_every_sampler_converges_to_the_exact_trajectory(z, name):
    end = gaussian_end(z, 10.0)
    runs = [rivals.run_rival(gaussian_denoiser, name, b, 10.0, 7.0, z, sigma_min=0.01) for b in (8, 128)]
    errors = [(run.x - end).abs().max() for run in runs]
    assert errors[1] < 0.3 * errors[0] and errors[1] < 0.02


def test_the_reference_run_is_closer_than_any_rival_at_eight(z):
    end = gaussian_end(z, 80.0)
    error = (rivals.reference_run(gaussian_denoiser, z, sigma_min=0.01) - end).square().mean().sqrt()
    runs = [rivals.run_rival(gaussian_denoiser, name, 8, 80.0, 7.0, z, 0.01).x for name in rivals.RIVALS]
    assert error < 0.1 * min((x - end).square().mean().sqrt() for x in runs)


@given(seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_noise_of_a_seed_is_the_same_alone_and_among_others(seeds):
    together = rivals.noise_for(seeds, SHAPE)
    assert all(torch.equal(together[i], rivals.noise_for([s], SHAPE)[0]) for i, s in enumerate(seeds))


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_batches_change_nothing_and_per_picture_arguments_follow_their_picture(z, name):
    labels = torch.arange(6)

    def model(x, sigma, class_cond, cond_scale):
        assert len(class_cond) == len(x) and cond_scale == 3.0
        return gaussian_denoiser(x, sigma, mean=class_cond.reshape(-1, 1, 1, 1).float())

    args = {"class_cond": labels, "cond_scale": 3.0}
    whole = rivals.run_rival(model, name, 4, 20.0, 7.0, z, extra_args=args)
    parts = rivals.run_rival(model, name, 4, 20.0, 7.0, z, extra_args=args, batch=4)
    torch.testing.assert_close(parts.x, whole.x)
    assert parts.nfe == whole.nfe


def test_tuning_finds_the_best_of_all_settings_for_each_score(z):
    end = gaussian_end(z, 80.0)

    def scores(x):
        return {"rmse": (x - end).square().mean().sqrt().item(), "spread": -x.std().item()}

    tuning = rivals.tune(gaussian_denoiser, (4, 2), z, scores, sigma_min=0.01, progress=False)
    assert len(tuning.rows) == 2 * len(rivals.RIVALS) * len(rivals.SIGMA_MAXES) * len(rivals.RHOS)
    assert tuning.rows == json.loads(json.dumps(tuning.rows))
    for score in ("rmse", "spread"):
        assert sorted(tuning.best[score]) == [2, 4]
        for budget, best in tuning.best[score].items():
            rows = [r for r in tuning.rows if r["budget"] == budget]
            assert best["scores"][score] == min(r["scores"][score] for r in rows)
            assert all(r["nfe"] <= budget for r in rows)
    best = tuning.best["rmse"][4]
    again = rivals.run_rival(gaussian_denoiser, best["sampler"], 4, best["sigma_max"], best["rho"], z, 0.01).x
    assert scores(again)["rmse"] == best["scores"]["rmse"]


def test_tuning_runs_each_different_schedule_once(z):
    counted = rivals.CountCalls(gaussian_denoiser)
    rivals.tune(counted, (2,), z, lambda x: 0.0, rivals=("euler", "heun"), sigma_maxes=(10.0,), progress=False)
    assert counted.calls == 2 + 1  # rho changes nothing at two steps; heun affords one


def test_pictures_that_are_not_finite_cannot_win(z):
    def model(x, sigma):
        return gaussian_denoiser(x, sigma) / (sigma.max() < 30)  # infinite from sigma_max 80 and 40

    tuning = rivals.tune(model, (3,), z, lambda x: x.abs().mean().item(), rivals=("euler",), progress=False)
    lost = [r for r in tuning.rows if not r["scores"]]
    assert {r["sigma_max"] for r in lost} == {80.0, 40.0}
    assert tuning.best["score"][3]["sigma_max"] in (20.0, 10.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "ddim"}, "unknown rival 'ddim': choose from euler, heun"),
        ({"budget": 0}, "at least 1 evaluation, not 0"),
        ({"sigma_min": 90.0}, "0 < sigma_min < sigma_max"),
        ({"sigma_max": float("nan")}, "0 < sigma_min < sigma_max"),
    ],
)
def test_requests_that_cannot_be_met_say_what_is_allowed(z, change, message):
    request = {"name": "euler", "budget": 4, "sigma_max": 20.0, "rho": 7.0, "z": z} | change
    with pytest.raises(ValueError, match=message):
        rivals.run_rival(gaussian_denoiser, **request)
