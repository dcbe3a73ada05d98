"""The rivals under their names: they converge, spend what they say, and their tuned grids are what they claim."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("k_diffusion", exc_type=ImportError)
pytest.importorskip("diffusers")

from benchmarks import diffusers_rivals, rivals, samplers  # noqa: E402
from benchmarks.samplers import SAMPLERS  # noqa: E402

SHAPE = (1, 3, 3)
MEAN, DEVIATION = 0.25, 0.5
EXACT = [n for n, s in SAMPLERS.items() if not s.random]


def denoiser(x, sigma):
    """The exact denoiser of data drawn from N(MEAN, DEVIATION^2) in every pixel."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return (x * DEVIATION**2 + MEAN * sigma**2) / (DEVIATION**2 + sigma**2)


def end_of(z, sigma_max):
    """Where the probability-flow trajectory from z * sigma_max ends."""
    return MEAN + (z * sigma_max - MEAN) * DEVIATION / math.hypot(DEVIATION, sigma_max)


@pytest.fixture(scope="module")
def z():
    return rivals.noise_for(range(6), SHAPE)


@pytest.mark.parametrize("name, options", [(n, o) for n in EXACT for o in SAMPLERS[n].options])
def test_every_deterministic_sampler_converges_to_the_exact_trajectory(z, name, options):
    end = end_of(z, 10.0)
    errors = [
        (SAMPLERS[name].run(denoiser, samplers.sigmas_for("karras-7", n, 10.0, 0.01), z, options=options).x - end)
        for n in (4, 96)
    ]
    first, last = (float(e.abs().max()) for e in errors)
    assert last < 0.35 * first and last < 0.025


@pytest.mark.parametrize("name", [n for n, s in SAMPLERS.items() if s.random and n != "diffusers:lcm"])
def test_every_stochastic_sampler_ends_at_the_data(name):
    z = rivals.noise_for(range(40), (1, 6, 6))
    steps = 12 if name == "dpmpp_sde" else 100  # a Brownian path per picture takes time; two calls a step suffice here
    x = SAMPLERS[name].run(denoiser, samplers.sigmas_for("karras-7", steps, 20.0), z, options={"eta": 0.7}).x
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.06)
    assert float(x.std()) == pytest.approx(DEVIATION, abs=0.1)


def test_the_latent_consistency_sampler_denoises_and_draws_again():
    # of a Gaussian its estimates are the mean plus what is left of the last draw: too narrow, as an ordinary denoiser
    # gives no consistency model; what can be checked is the mean and that noise is drawn by seed
    z = rivals.noise_for(range(200), SHAPE)
    x = SAMPLERS["diffusers:lcm"].run(denoiser, samplers.sigmas_for("karras-7", 4, 20.0), z).x
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.06) and float(x.std()) < DEVIATION


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_overspends_and_none_leaves_a_whole_step_unspent(z, name):
    sampler = SAMPLERS[name]
    for budget in (1, 2, 3, 4, 7):
        steps = sampler.steps_within(budget)
        assert sampler.evaluations(steps + 1) > budget or steps + 1 < sampler.least
        if steps:
            nfe = sampler.run(denoiser, samplers.sigmas_for("karras-7", steps, 20.0), z, budget=budget).nfe
            assert nfe == sampler.evaluations(steps) <= budget


def test_a_sampler_that_overspends_is_reported(z):
    with pytest.raises(RuntimeError, match="heun made 3 evaluations with a budget of 2"):
        SAMPLERS["heun"].run(denoiser, [5.0, 1.0, 0.0], z, budget=2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_depends_on_its_seed_and_arguments_alone(z, name):
    def model(x, sigma, class_cond):
        return denoiser(x, sigma) + 0.1 * class_cond.reshape(-1, 1, 1, 1)

    sampler, labels, seeds = SAMPLERS[name], torch.arange(6.0), [3, 1, 4, 1, 5, 9]
    sigmas = samplers.sigmas_for("exponential", 4, 20.0)
    options = sampler.options[-1]
    whole = sampler.run(model, sigmas, z, {"class_cond": labels}, options=options, seeds=seeds).x
    parts = sampler.run(model, sigmas, z, {"class_cond": labels}, batch=4, options=options, seeds=seeds).x
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    alone = sampler.run(model, sigmas, z[4:5], {"class_cond": labels[4:5]}, options=options, seeds=[5]).x
    torch.testing.assert_close(alone, whole[4:5], rtol=1e-5, atol=1e-6)


@settings(max_examples=30)
@given(st.integers(1, 20), st.sampled_from(samplers.SIGMA_MAXES))
def test_every_grid_starts_at_sigma_max_and_falls_to_zero(steps, sigma_max):
    for grid, low in samplers.grids(sigma_max):
        sigmas = samplers.sigmas_for(grid, steps, sigma_max, low)
        assert len(sigmas) == steps + 1 and sigmas[-1] == 0
        assert float(sigmas[0]) == pytest.approx(sigma_max)
        assert bool((sigmas.diff() < 0).all())


def test_the_cheapest_path_is_the_cheapest_of_all():
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(6, 6, generator=generator, dtype=torch.float64).triu(1)
    costs[costs == 0] = math.inf
    got = samplers._cheapest(costs, 3)
    every = [(0, a, b, 5) for a in range(1, 5) for b in range(a + 1, 5)]
    cost = {p: sum(float(costs[i, j]) for i, j in zip(p[:-1], p[1:], strict=True)) for p in every}
    assert tuple(got) == min(cost, key=cost.get)


def test_chosen_levels_beat_evenly_spaced_ones_on_their_own_denoiser(z):
    chosen = samplers.gits(denoiser, z, 40.0, (3, 5))
    end = end_of(z, 40.0)
    for n, sigmas in chosen.items():
        assert len(sigmas) == n + 1 and float(sigmas[0]) == pytest.approx(40.0) and sigmas[-1] == 0
        runs = [SAMPLERS["euler"].run(denoiser, s, z).x for s in (sigmas, samplers.sigmas_for("karras-7", n, 40.0))]
        ours, plain = ((x - end).square().mean() for x in runs)
        assert ours < plain


def test_straw_men_take_the_steps_in_their_names_and_end_at_the_data():
    z = rivals.noise_for(range(12), SHAPE)
    ddim = diffusers_rivals.run_straw_man(denoiser, "straw man: DDIM, 250 steps", z)
    assert ddim.nfe == 250
    assert float((ddim.x - end_of(z, 150.0)).abs().max()) < 0.05
    ddpm = diffusers_rivals.run_straw_man(denoiser, "straw man: DDPM, 1000 steps", z)
    assert ddpm.nfe == 1000
    assert float(ddpm.x.mean()) == pytest.approx(MEAN, abs=0.15) and float(ddpm.x.std()) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda z: diffusers_rivals.make("dpm", [1.0, 0.0]), "choose from euler, ddim"),
        (lambda z: diffusers_rivals.make("unipc", [1.0, 2.0, 0.0]), "decreasing sigmas that end in 0"),
        (lambda z: diffusers_rivals.run_straw_man(denoiser, "ddim", z), "there are straw man"),
        (lambda z: samplers.sigmas_for("cosine", 3, 80.0), "karras-RHO, exponential or ays"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(z, call, message):
    with pytest.raises(ValueError, match=message):
        call(z)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12, unique=True))
def test_a_table_of_betas_holds_the_levels_it_was_made_for(levels):
    levels = sorted(levels)
    kept = torch.cumprod(1 - torch.tensor(diffusers_rivals.betas_for(levels), dtype=torch.float64), 0)
    torch.testing.assert_close(((1 - kept) / kept).sqrt(), torch.tensor(levels, dtype=torch.float64), rtol=1e-6, atol=0)
