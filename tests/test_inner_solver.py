"""Other people's samplers below sigma_trunc: k-diffusion's own, run for real."""

import functools
import logging
import sys
import warnings

import pytest
import torch

from tdpm_ext import inner_solver
from tdpm_ext.fit import fit_prior
from tdpm_ext.sampler import sample_tdpm
from tdpm_ext.schedule import karras
from tdpm_ext.solver import solve

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sampling = pytest.importorskip("k_diffusion.sampling")

SHAPE = (1, 4, 4)
HOST = karras(4, 80.0, 0.02)
FIXED = ["euler", "heun", "dpm_2", "lms", "dpmpp_2m"]
NOISY = [
    "euler_ancestral",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
]


@pytest.fixture(scope="module")
def prior():
    pictures = 0.5 * torch.randn(300, *SHAPE, generator=torch.Generator().manual_seed(0))
    made = fit_prior("gaussian", pictures, progress=False)
    made.sigma_trunc = 2.5
    return made


@pytest.fixture
def model(prior):
    def denoise(x, sigma):
        denoise.sigmas.append(sigma[0].item())
        return prior.denoise(x, sigma)

    denoise.sigmas = []
    return denoise


def noise(count=2):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def run(model, prior, solver, sigmas=HOST, **options):
    return sample_tdpm(model, noise() * sigmas[0], sigmas, disable=True, prior=prior, solver=solver, **options)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", FIXED + NOISY)
@pytest.mark.parametrize("schedule", ["prior", "respace", "cut"])
def test_every_solver_starts_at_sigma_trunc_and_stays_inside_the_budget(model, prior, name, steps, schedule, caplog):
    caplog.set_level(logging.INFO, logger="tdpm_ext")
    indices = []
    host = karras(steps, 80.0, 0.02)
    out = run(model, prior, name, host, schedule=schedule, callback=lambda info: indices.append(info["i"]))
    assert model.sigmas[0] == pytest.approx(2.5)
    assert 1 <= len(model.sigmas) <= steps
    assert indices[-1] == steps - 1
    assert out.isfinite().all()
    message = caplog.records[-1].getMessage()
    assert len(caplog.records) == 1
    assert f"{len(model.sigmas)} calls" in message


@pytest.mark.parametrize("name", FIXED + NOISY)
def test_a_non_zero_end_keeps_the_budget_too(model, prior, name):
    for host in (HOST[:-1], HOST[[0, -2]]):
        model.sigmas.clear()
        run(model, prior, name, host)
        assert 1 <= len(model.sigmas) <= len(host) - 1


@pytest.mark.parametrize("name", FIXED)
def test_a_solver_does_below_sigma_trunc_what_it_does_alone(model, prior, name):
    x = prior.sample(noise(), 2.5)
    out = run(model, prior, name, schedule="cut")
    below = torch.cat([torch.tensor([2.5]), HOST[HOST < 2.5].float()])
    if name in ("heun", "dpm_2"):  # two calls a step: fewer steps than `cut` would give
        assert len(model.sigmas) == 3
    else:
        want = getattr(sampling, f"sample_{name}")(model, x, below, disable=True)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_a_callable_and_its_partial_are_taken_as_they_are(model, prior):
    by_name = run(model, prior, "dpmpp_2m")
    assert torch.equal(run(model, prior, "sample_dpmpp_2m"), by_name)
    assert torch.equal(run(model, prior, sampling.sample_dpmpp_2m), by_name)
    model.sigmas.clear()
    run(model, prior, functools.partial(sampling.sample_heun, s_churn=0.0))
    assert len(model.sigmas) <= 4


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
@pytest.mark.parametrize("init", ["auto", "never"])
def test_one_step_to_zero_does_not_crash_where_upstream_does(model, prior, name, init, caplog):
    caplog.set_level(logging.INFO, logger="tdpm_ext")
    with pytest.raises(UnboundLocalError):  # if this stops failing upstream, `fails_on` can go
        getattr(sampling, f"sample_{name}")(model, noise(), torch.tensor([2.5, 0.0]), disable=True)
    out = run(model, prior, name, karras(1, 80.0, 0.02), init=init)
    assert torch.equal(out, run(model, prior, None, karras(1, 80.0, 0.02), init=init))
    assert "built-in solver" in caplog.records[0].getMessage()


@pytest.mark.parametrize("solver", ["dpm_fast", "sample_dpm_adaptive", sampling.sample_dpm_fast])
def test_solvers_that_take_no_sigmas_are_refused_with_the_reason(model, prior, solver):
    with pytest.raises(ValueError, match="takes no sigmas"):
        run(model, prior, solver)


@pytest.mark.parametrize(
    ("solver", "reason"),
    [("unipc", "known are .*dpmpp_2m.*heun"), (3, "give a k-diffusion sampler"), (sample_tdpm, "would call itself")],
)
def test_what_is_no_solver_is_refused(model, prior, solver, reason):
    with pytest.raises(ValueError, match=reason):
        run(model, prior, solver)


def test_where_the_prior_does_not_apply_the_solver_runs_on_the_hosts_sigmas(model, prior):
    low = karras(3, 1.0, 0.02)
    want = sampling.sample_heun(model, noise(), low.float(), disable=True)
    model.sigmas.clear()
    assert torch.equal(run(model, prior, "heun", low), want)
    assert len(model.sigmas) == 5
    model.sigmas.clear()
    run(model, prior, "heun", low, steps=3)
    assert len(model.sigmas) == 3


def test_a_noise_sampler_reaches_the_solvers_that_take_one_and_no_others(model, prior):
    asked = []

    def sampler(sigma, sigma_next):
        asked.append((sigma.item(), sigma_next.item()))
        return torch.zeros(2, *SHAPE)

    for name in FIXED:
        run(model, prior, name, noise_sampler=sampler)
    assert not asked
    run(model, prior, "euler_ancestral", noise_sampler=sampler)
    assert asked[0][0] == pytest.approx(2.5)
    assert min(low for _, low in asked) >= 0.02  # never below what the host's own noise covers


def test_generators_make_a_noisy_solver_repeatable_and_independent_of_the_batch(model, prior):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = run(model, prior, "euler_ancestral", generator=generators(1, 2))
    again = run(model, prior, "euler_ancestral", generator=generators(1, 2))
    alone = sample_tdpm(
        model, noise()[1:] * 80, HOST, disable=True, prior=prior, solver="euler_ancestral", generator=generators(2)
    )
    assert torch.equal(both, again)
    torch.testing.assert_close(alone, both[1:], atol=1e-5, rtol=1e-4)


def test_call_counts_are_those_measured(model):
    for name in FIXED + NOISY:
        solver = inner_solver.resolve(name)
        for levels in (karras(4, 2.0, 0.1), torch.tensor([2.0, 1.0, 0.5])):
            model.sigmas.clear()
            solver(model, noise(), levels.float(), disable=True)
            assert len(model.sigmas) == inner_solver.calls_of(solver, levels), name
        for calls in range(1, 9):
            steps = inner_solver.steps_within(solver, calls, True)
            assert inner_solver.calls_of(solver, karras(steps, 2.0, 0.1)) <= calls
            assert inner_solver.calls_of(solver, karras(steps + 1, 2.0, 0.1)) > calls


def test_without_k_diffusion_a_name_says_what_to_install_and_the_built_in_solver_runs(model, prior, monkeypatch):
    monkeypatch.setitem(sys.modules, "k_diffusion", None)
    with pytest.raises(ImportError, match="pip install"):
        run(model, prior, "euler")
    assert torch.equal(run(model, prior, None, init="never"), solve(model, noise() * 80, HOST, disable=True))
