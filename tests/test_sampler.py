"""The sampler end to end, with real priors, the real solver and denoisers whose answer is known."""

import inspect
import logging
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tdpm_ext.fit import fit_prior
from tdpm_ext.ideal import IdealDenoiser
from tdpm_ext.plan import Plan
from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.sampler import active_prior, sample, sample_tdpm, use_prior
from tdpm_ext.schedule import karras
from tdpm_ext.solver import solve

SHAPE = (1, 4, 4)
HOST = karras(4, 80.0, 0.02)


def data(shape=SHAPE, count=300, seed=0):
    """Two classes of correlated pictures, std about 0.5."""
    generator = torch.Generator().manual_seed(seed)
    d = math.prod(shape)
    spread = torch.randn(d, d, generator=generator) * torch.linspace(1, 0.05, d) / d**0.5
    labels = torch.arange(count) % 2
    pictures = torch.randn(count, d, generator=generator) @ spread + 0.3 * (2 * labels[:, None] - 1)
    return pictures.reshape(count, *shape), labels


class Counted:
    """The exact denoiser of a prior's own model of the data; counts its calls and keeps what it was given."""

    def __init__(self, prior):
        self.prior, self.seen = prior, []

    def __call__(self, x, sigma, class_cond=None, **extra):
        assert sigma.shape == (len(x),)
        self.seen.append(SimpleNamespace(x=x, sigma=sigma, extra=extra))
        return self.prior.denoise(x.float(), sigma.float(), class_cond=class_cond).to(x.dtype)

    @property
    def sigmas(self):
        return [call.sigma[0].item() for call in self.seen]


@pytest.fixture(scope="module")
def gaussian():
    return fit_prior("gaussian", data()[0], progress=False)


@pytest.fixture
def prior(gaussian):
    gaussian.sigma_trunc, gaussian.plans = 2.5, {}
    return gaussian


@pytest.fixture
def model(prior):
    return Counted(prior)


def noise(count=2, shape=SHAPE, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def run(model, prior=None, x=None, sigmas=HOST, **options):
    x = noise() * sigmas[0] if x is None else x
    return sample_tdpm(model, x, sigmas, disable=True, prior=prior, **options)


def one_line(caplog):
    lines = [record for record in caplog.records if record.name == "tdpm_ext"]
    assert len(lines) == 1, [line.getMessage() for line in lines]
    return lines[0]


@pytest.fixture(autouse=True)
def listen(caplog):
    caplog.set_level(logging.INFO, logger="tdpm_ext")


def test_the_signature_is_what_hosts_read():
    parameters = inspect.signature(sample_tdpm).parameters
    names = "model x sigmas extra_args callback disable prior sigma_trunc steps schedule solver init objective"
    assert list(parameters) == [*names.split(), "noise_sampler", "generator"]
    assert [p.kind for p in parameters.values()].count(inspect.Parameter.KEYWORD_ONLY) == 9


@pytest.mark.parametrize(("steps", "error"), [(1, 0.6), (2, 0.2), (3, 0.12), (8, 0.06), (16, 0.015)])
def test_with_an_exact_prior_only_the_steps_below_sigma_trunc_err(model, prior, steps, error, caplog):
    z, host = noise(), karras(steps, 80.0, 0.02)
    out = sample_tdpm(model, z * 80, host, disable=True, prior=prior)
    exact = prior.transport(z * 80, 80.0, 1e-4)
    plain = solve(Counted(prior), z * 80, host, disable=True)

    def rms(made):
        return (made - exact).square().mean().sqrt()

    torch.testing.assert_close(model.seen[0].x, prior.transport(z * 80, 80.0, 2.5))
    assert rms(out) < error
    assert rms(out) < 0.7 * rms(plain)
    assert one_line(caplog).getMessage() == f"tdpm: prior used, sigma_trunc=2.5, {steps} calls"
    assert one_line(caplog).levelno == logging.INFO


def test_on_the_ideal_denoiser_four_calls_come_nearer_to_sixty_than_the_ordinary_solver_does(prior):
    ideal, z = IdealDenoiser(data()[0]), noise(64)
    reference = solve(ideal, z * 80, karras(60, 80.0, 0.02), disable=True)

    def error(made):
        return (made - reference).square().mean().sqrt()

    assert error(run(ideal, prior, z * 80)) < 0.6 * error(solve(ideal, z * 80, HOST, disable=True))


def test_history_from_the_prior_helps_the_first_step(model, prior):
    z, sigmas = noise(), (2.5, 0.5, 0.0)
    errors = []
    for history in ((), (4.0,)):
        prior.plans = {"fidelity": {2: Plan(sigmas, (2, 2), history)}}
        out = sample_tdpm(model, z * 80, karras(2, 80.0, 0.02), disable=True, prior=prior)
        errors.append((out - prior.transport(z * 80, 80.0, 1e-4)).square().mean().item())
    assert errors[1] < 0.5 * errors[0]


def test_init_never_is_dpmpp_2m(model, prior, caplog):
    sampling = pytest.importorskip("k_diffusion.sampling")
    x, seen, ours = noise() * 80, [], []
    want = sampling.sample_dpmpp_2m(model, x, HOST.float(), callback=seen.append, disable=True)
    torch.testing.assert_close(run(model, prior, x, init="never", callback=ours.append), want, atol=1e-5, rtol=1e-5)
    assert [set(info) for info in ours] == [set(info) for info in seen]
    assert [info["i"] for info in ours] == [0, 1, 2, 3]
    assert one_line(caplog).levelno == logging.INFO


@pytest.mark.parametrize("schedule", ["prior", "respace", "cut"])
@pytest.mark.parametrize("host", [karras(6, 80.0, 0.02), karras(2, 80.0, 0.02), torch.tensor([80.0, 1.0, 0.3])])
def test_no_schedule_exceeds_the_budget_or_starts_elsewhere(model, prior, schedule, host):
    indices = []
    run(model, prior, sigmas=host, schedule=schedule, callback=lambda info: indices.append(info["i"]))
    assert 1 <= len(model.seen) <= len(host) - 1
    assert model.sigmas[0] == pytest.approx(2.5)
    assert indices == list(range(len(host) - 1 - len(model.seen), len(host) - 1))


@settings(max_examples=40)
@given(st.integers(1, 9), st.none() | st.integers(1, 9), st.sampled_from(["prior", "respace", "cut"]), st.booleans())
def test_calls_never_exceed_the_steps_asked_for(gaussian, n, steps, schedule, ends_at_zero):
    host = karras(n + 1, 80.0, 0.02)[: None if ends_at_zero else -1]
    for init in ("auto", "never"):
        model, last = Counted(gaussian), []
        options = {"schedule": schedule, "steps": steps, "init": init}
        run(model, gaussian, sigmas=host, callback=lambda info, last=last: last.append(info["i"]), **options)
        assert len(model.seen) <= (len(host) - 1 if steps is None else max(steps, 1))
        assert last[-1] == len(host) - 2


def test_cut_runs_the_hosts_sigmas_below_and_respace_the_hosts_count(model, prior):
    host = torch.tensor([80.0, 10.0, 2.0, 0.5, 0.0])
    run(model, prior, sigmas=host, schedule="cut")
    assert model.sigmas == pytest.approx([2.5, 2.0, 0.5])
    model.seen.clear()
    run(model, prior, sigmas=host, schedule="respace")
    assert len(model.seen) == 4
    assert model.sigmas[-1] == pytest.approx(0.5)


def test_a_host_that_stops_early_gets_its_end_and_the_log_says_so(model, prior, caplog):
    z = noise()
    out = sample_tdpm(model, z * 80, [80.0, 10.0, 3.0, 2.0, 1.0], disable=True, prior=prior)
    assert "re-spaced: it ends at sigma 1)" in one_line(caplog).getMessage()
    torch.testing.assert_close(out, prior.transport(z * 80, 80.0, 1.0), atol=0.02, rtol=0.02)


def test_the_calibrated_plan_of_the_objective_is_run(model, prior):
    prior.plans = {
        "fidelity": {4: Plan((3.0, 1.0, 0.5, 0.1, 0.0), (1, 2, 3, 2), (5.0, 8.0))},
        "quality": {4: Plan((1.5, 0.5, 0.2, 0.0), (2, 2, 2))},
    }
    run(model, prior)
    assert model.sigmas == pytest.approx([3.0, 1.0, 0.5, 0.1])
    model.seen.clear()
    run(model, prior, objective="quality")
    assert model.sigmas == pytest.approx([1.5, 0.5, 0.2])
    model.seen.clear()
    run(model, prior, sigma_trunc=6.0)
    assert model.sigmas[0] == pytest.approx(6.0)
    assert len(model.seen) == 4
    assert model.sigmas[-1] == pytest.approx(0.1)


class Comfy:
    """What ComfyUI passes to a sampler: the denoiser, with the noise and the latent image hung on it."""

    def __init__(self, model, noise, latent=None):
        self.model, self.noise = model, noise
        self.latent_image = torch.zeros_like(noise) if latent is None else latent
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace())

    def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
        return self.model(x, sigma, model_options=model_options)


PICTURE = torch.full((2, *SHAPE), 0.4)
EMPTY = {"denoise_mask": None, "model_options": {}, "seed": 0}


@pytest.mark.parametrize(
    ("latent", "has_noise", "sigmas", "mask", "used"),
    [
        (None, True, (80.0, 5.0, 1.0, 0.0), None, True),  # text to image
        (PICTURE, True, (80.0, 5.0, 1.0, 0.0), None, False),  # image to image at denoise 1.0
        (PICTURE, True, (2.0, 1.0, 0.5, 0.0), None, False),  # image to image at a low denoise
        (None, True, (2.0, 1.0, 0.5, 0.0), None, False),  # a detailer on an empty latent
        (None, True, (80.0, 20.0, 9.0, 5.0), None, False),  # the high part of split sigmas
        (None, False, (5.0, 1.0, 0.5, 0.0), None, False),  # the second stage, noise disabled
        (None, True, (80.0, 5.0, 1.0, 0.0), torch.ones(2, *SHAPE), False),  # a mask
    ],
)
def test_in_a_host_only_text_to_image_is_truncated(model, prior, caplog, latent, has_noise, sigmas, mask, used):
    z = noise() if has_noise else torch.zeros(2, *SHAPE)
    x = z * math.sqrt(1 + sigmas[0] ** 2) + (0 if latent is None else latent)
    out = run(Comfy(model, z, latent), prior, x, torch.tensor(sigmas), extra_args={**EMPTY, "denoise_mask": mask})
    line = one_line(caplog)
    assert ("prior used" in line.getMessage()) == used
    assert line.levelno == (logging.INFO if used else logging.WARNING)
    if used:
        assert model.sigmas[0] == pytest.approx(2.5)
        torch.testing.assert_close(out, run(Counted(prior), prior, z * 80, torch.tensor(sigmas)))
    else:
        assert model.sigmas == pytest.approx(list(sigmas[:3]))
        torch.testing.assert_close(out, solve(Counted(prior), x, sigmas, disable=True))


def test_unsampling_takes_ordinary_steps_and_never_the_prior(model, prior, caplog):
    rising = torch.tensor([0.1, 0.3, 1.0, 5.0])
    x = noise() * 0.1 + PICTURE
    out = run(model, prior, x, rising)
    torch.testing.assert_close(out, solve(model, x, rising, disable=True))
    assert "do not fall" in one_line(caplog).getMessage()
    with pytest.raises(ValueError, match="do not fall"):
        run(model, prior, x, rising, init="always")


def test_init_always_replaces_an_image(model, prior):
    z = noise()
    host = Comfy(model, z, PICTURE)
    out = run(host, prior, z * 80 + PICTURE, init="always", extra_args=EMPTY)
    torch.testing.assert_close(out, run(Counted(prior), prior, z * 80))


def test_without_any_prior_the_sampler_is_ordinary_and_not_alarming(model, caplog):
    run(model)
    assert one_line(caplog).levelno == logging.INFO
    assert "no prior" in one_line(caplog).getMessage()


@pytest.mark.parametrize("sigmas", [[], [5.0], torch.tensor([5.0])])
def test_no_step_to_make_returns_x_itself(model, prior, sigmas, caplog):
    x = noise()
    assert sample_tdpm(model, x, sigmas, prior=prior) is x
    assert not model.seen
    one_line(caplog)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sigmas": torch.tensor([80.0, math.nan, 0.0])}, "NaN"),
        ({"sigmas": torch.tensor([80.0, -1.0])}, "negative"),
        ({"sigmas": torch.tensor([80.0, 0.0, 0.0])}, "only the last sigma may be 0"),
        ({"schedule": "karras"}, "prior, respace, cut"),
        ({"init": "sometimes"}, "auto, always, never"),
        ({"objective": "speed"}, "fidelity, quality"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"sigma_trunc": -1.0}, "sigma_trunc is -1.0"),
        ({"x": noise(shape=(3, 4, 4)), "init": "always"}, r"\(3, 4, 4\) and the prior was fitted for \(1, 4, 4\)"),
        ({"sigma_trunc": 100.0, "init": "always"}, "below sigma_trunc 100"),
    ],
)
def test_a_mistake_is_an_error_that_names_it(model, prior, options, reason):
    with pytest.raises(ValueError, match=reason):
        run(model, prior, **options)
    assert not model.seen


def test_another_shape_falls_back_with_a_warning(model, prior, caplog):
    flat = fit_prior("gaussian", data((3, 2, 2))[0], progress=False)
    out = run(Counted(flat), prior, noise(shape=(3, 2, 2)) * 80)
    torch.testing.assert_close(out, solve(Counted(flat), noise(shape=(3, 2, 2)) * 80, HOST, disable=True))
    assert one_line(caplog).levelno == logging.WARNING


@pytest.mark.parametrize("shape", [(4, 4), (2, 2, 4), (2, 2, 2, 2)])
def test_pictures_of_three_to_five_dimensions_come_out_alike(gaussian, shape):
    prior = fit_prior("gaussian", data(shape)[0], progress=False)
    prior.sigma_trunc = gaussian.sigma_trunc = 2.5
    gaussian.plans = {}
    out = run(Counted(prior), prior, noise(3, shape) * 80)
    assert out.shape == (3, *shape)
    want = run(Counted(gaussian), gaussian, noise(3) * 80)
    torch.testing.assert_close(out.flatten(1), want.flatten(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_model_sees_and_the_caller_gets_the_dtype_of_x(model, prior, dtype):
    z = noise()
    out = run(model, prior, (z * 80).to(dtype), HOST.to(dtype))
    assert out.dtype == dtype
    assert {call.x.dtype for call in model.seen} == {dtype}
    assert {call.sigma.dtype for call in model.seen} == {dtype}
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    torch.testing.assert_close(out.float(), run(Counted(prior), prior, z * 80), atol=tolerance, rtol=tolerance)


def test_use_prior_nests_reenters_and_ends(prior):
    assert active_prior() is None
    outer = use_prior(prior)
    with outer as given:
        assert given is active_prior() is prior
        with use_prior(None):
            assert active_prior() is None
            with outer:
                assert active_prior() is prior
            assert active_prior() is None
        assert active_prior() is prior
    assert active_prior() is None
    with pytest.raises(KeyError), outer:
        raise KeyError
    assert active_prior() is None


def test_use_prior_does_not_reach_other_threads(prior):
    seen = []
    with use_prior(prior):
        thread = threading.Thread(target=lambda: seen.append(active_prior()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_the_active_prior_is_used_and_not_alarming_where_it_does_not_apply(model, prior, caplog):
    with use_prior(prior):
        out = run(model)
        assert torch.equal(out, run(Counted(prior), prior))
        caplog.clear()
        run(model, sigmas=torch.tensor([1.0, 0.5, 0.0]))
    assert one_line(caplog).levelno == logging.INFO


def test_the_hosts_record_of_its_sigmas_is_updated_in_a_copy(model, prior):
    told = HOST.float()
    options = {"transformer_options": {"sample_sigmas": told, "patches": 1}, "other": 2}
    run(Comfy(model, noise()), prior, extra_args={**EMPTY, "model_options": options})
    seen = model.seen[0].extra["model_options"]
    assert seen["transformer_options"]["sample_sigmas"].tolist() == pytest.approx([*model.sigmas, 0.0])
    assert (seen["transformer_options"]["patches"], seen["other"]) == (1, 2)
    assert options["transformer_options"]["sample_sigmas"] is told


def test_a_class_conditions_prior_and_model_alike():
    pictures, labels = data()
    prior = fit_prior("mixture", pictures, labels=labels, components=1, progress=False)
    z, want = noise(2).repeat(2, 1, 1, 1), torch.tensor([0, 0, 1, 1])
    model = Counted(prior)
    out = run(model, prior, z * 80, extra_args={"class_cond": want})
    start = prior.transport(z * 80, 80.0, prior.sigma_trunc, class_cond=want)
    torch.testing.assert_close(model.seen[0].x, start, atol=1e-4, rtol=1e-4)
    assert (start[:2] - start[2:]).abs().mean() > 0.1
    assert (out[:2] - out[2:]).abs().mean() > 0.2


class Learned(ImplicitPrior):
    """Shaped like a learned prior: one network call per draw, neither denoiser nor flow of its own."""

    coupled, prior_nfe = False, 1

    def __init__(self, model):
        super().__init__(SHAPE, sigma_trunc=1.0)
        self.model = model

    def sample(self, z, sigma=None, **cond):
        guess = self.model(z * 2.5, z.new_full([len(z)], 2.5))
        return guess + (sigma or self.sigma_trunc) * z


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_priors_own_calls_count_against_the_budget(model, steps, caplog):
    out = run(model, Learned(model), steps=steps)
    assert len(model.seen) <= max(steps, 1)
    assert ("prior used" in one_line(caplog).getMessage()) == (steps > 1)
    assert out.isfinite().all()
    with pytest.raises(ValueError, match="makes 1 network calls"):
        sample(model, Learned(model), steps=1)


class NoWaiting(TorchDispatchMode):
    """Counts operations that would make the host wait for the device."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.waits += name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("used", [True, False])
def test_the_host_never_waits_for_the_device_between_calls(prior, used):
    waits = []
    with NoWaiting() as watch:

        def shrink(x, sigma):
            waits.append(watch.waits)
            return x * (0.25 / (0.25 + sigma.square())).view(-1, 1, 1, 1)

        run(shrink, prior, sigmas=karras(6, 80.0, 0.02), init="auto" if used else "never")
    assert len(waits) == 6
    assert len(set(waits)) == 1


def test_sample_gives_a_seed_the_same_picture_alone_and_in_any_batch(model, prior):
    every = sample(model, prior, (7, *SHAPE), steps=3, seed=10, batch=3, disable=True)
    assert every.shape == (7, *SHAPE)
    assert len(model.seen) == 9
    for seed in (10, 12, 16):
        torch.testing.assert_close(sample(model, prior, steps=3, seed=seed)[0], every[seed - 10], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sample(model, prior, steps=3, seed=[16, 10]), every[[6, 0]], atol=1e-6, rtol=1e-5)


def test_sample_is_what_the_sampler_makes_of_the_same_noise(model, prior):
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(sample(model, prior, steps=4, seed=5), run(model, prior, z[None] * 80))


def test_sample_splits_conditions_with_the_pictures():
    pictures, labels = data()
    prior = fit_prior("mixture", pictures, labels=labels, components=1, progress=False)
    want = torch.tensor([0, 1, 0, 1, 1])
    whole = sample(Counted(prior), prior, seed=[0, 1, 2, 3, 4], extra_args={"class_cond": want})
    parts = sample(Counted(prior), prior, seed=[0, 1, 2, 3, 4], extra_args={"class_cond": want}, batch=2, disable=True)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shape": (2, 3, 4, 4)}, r"prior samples \[B, 1, 4, 4\]"),
        ({"shape": (0, *SHAPE)}, "prior samples"),
        ({"shape": (2, *SHAPE), "seed": [1]}, "1 seeds for 2 pictures"),
        ({"seed": []}, "no seeds"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"objective": "best"}, "fidelity, quality"),
    ],
)
def test_sample_names_a_mistake(model, prior, options, reason):
    with pytest.raises(ValueError, match=reason):
        sample(model, prior, **options)
