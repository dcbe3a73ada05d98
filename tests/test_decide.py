"""When the prior replaces x, row by row, and from which noise. Hosts are small objects with the hosts' attributes."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdpm_ext.decide import decide, draw, read_host, seeded_noise, unit_noise
from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.schedule import check_sigmas

SHAPE = (4, 8, 8)
SIGMAS = (14.6, 6.0, 2.0, 0.5, 0.0)
NOISE = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
PRIOR = ImplicitPrior(SHAPE, sigma_trunc=5.0)


class EPS:
    """Named as ComfyUI's prediction types are."""


class CONST(EPS):
    pass


def comfy(noise=NOISE, latent=None, prediction=EPS, **guider):
    """The object ComfyUI passes: noise and latent image on it, the guider and the base model inside."""
    base = SimpleNamespace(model_sampling=type("ModelSampling", (prediction,), {})())
    latent = torch.zeros_like(NOISE) if latent is None else latent
    return SimpleNamespace(noise=noise, latent_image=latent, inner_model=SimpleNamespace(inner_model=base, **guider))


def a1111(init_latent=None, mask=None, is_hr_pass=False, prediction_type="epsilon"):
    unet = SimpleNamespace(model=SimpleNamespace(predictor=SimpleNamespace(prediction_type=prediction_type)))
    p = SimpleNamespace(is_hr_pass=is_hr_pass, sd_model=SimpleNamespace(forge_objects=SimpleNamespace(unet=unet)))
    return SimpleNamespace(init_latent=init_latent, mask=mask, p=p)


def reforge(init_latent=None, **options):
    """reForge's denoiser has ComfyUI's two attributes as well, and leaves them empty."""
    model = a1111(init_latent, **options)
    model.noise = model.latent_image = None
    return model


def bare(x, sigma):
    return x


def verdict(model=bare, sigmas=SIGMAS, x=NOISE, prior=PRIOR, sigma_trunc=5.0, budget=4, **options):
    return decide(model, x, check_sigmas(sigmas), prior=prior, sigma_trunc=sigma_trunc, budget=budget, **options)


PICTURE = torch.full_like(NOISE, 0.3)
MASK = torch.ones(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("host", "options"),
    [
        (comfy(), {"extra_args": {"denoise_mask": None, "model_options": {}}}),
        (a1111(), {}),
        (reforge(), {}),
        (bare, {}),
        (torch.nn.Identity(), {}),
        (comfy(latent=None), {"sigmas": (5.0, 1.0, 0.0)}),  # starts at sigma_trunc itself
        (comfy(), {"sigmas": (4.996, 1.0, 0.0)}),  # or within a thousandth of it
        (comfy(), {"sigmas": (14.6, 1.0, 0.4)}),  # stops early, below sigma_trunc
    ],
)
def test_fresh_noise_above_sigma_trunc_is_replaced(host, options):
    assert verdict(host, **options).use_prior


@pytest.mark.parametrize(
    ("host", "options", "reason"),
    [
        (comfy(latent=PICTURE), {}, "image to image"),  # also at denoise 1.0
        (a1111(init_latent=PICTURE), {}, "image to image"),
        (reforge(init_latent=PICTURE), {}, "image to image"),
        (reforge(mask=MASK), {}, "mask"),
        (reforge(is_hr_pass=True), {}, "hires"),
        (comfy(), {"sigmas": (2.0, 0.5, 0.0)}, "starts at sigma 2, below sigma_trunc 5"),  # denoise, detailers
        (bare, {"sigmas": (2.0, 0.5, 0.0)}, "starts at sigma 2"),
        (a1111(is_hr_pass=True), {}, "hires"),
        (comfy(), {"sigmas": (14.6, 8.0, 6.0)}, "ends at sigma 6, not below sigma_trunc 5"),  # SplitSigmas, end_at_step
        (comfy(noise=torch.zeros_like(NOISE)), {}, "no noise was added"),  # second-stage KSamplerAdvanced
        (comfy(), {"extra_args": {"denoise_mask": MASK}}, "mask"),
        (a1111(mask=MASK), {}, "mask"),
        (bare, {"sigmas": (0.1, 1.0, 14.6)}, "do not fall"),  # unsampling
        (bare, {"sigmas": (14.6, 14.6, 0.0)}, "do not fall strictly"),
        (comfy(prediction=CONST), {}, "rectified-flow"),
        (a1111(prediction_type="const"), {}, "rectified-flow"),
        (comfy(latent_shapes=[(4, 8, 8), (2, 8)]), {}, "packs 2 streams"),
        (bare, {"x": torch.zeros(2, 4, 16, 16)}, r"\(4, 16, 16\) and the prior was fitted for \(4, 8, 8\)"),
        (bare, {"x": torch.zeros(2, 3, 8, 8)}, r"\(3, 8, 8\) and"),
        (bare, {"prior": None}, "no prior"),
        (bare, {"init": "never"}, "init='never'"),
        (bare, {"extra_args": {"model_options": {}, "denoise_mask": None}}, "a wrapper hides"),
    ],
)
def test_everything_else_takes_the_ordinary_solver_and_says_why(host, options, reason):
    decision = verdict(host, **options)
    assert not decision.use_prior
    assert re.search(reason, decision.reason), decision.reason


@pytest.mark.parametrize(
    ("host", "extra_args"),
    [
        (comfy(latent=PICTURE), {}),
        (a1111(init_latent=PICTURE, mask=MASK, is_hr_pass=True), {}),
        (comfy(noise=torch.zeros_like(NOISE)), {"denoise_mask": MASK}),
        (bare, {"model_options": {}}),
    ],
)
def test_always_overrides_what_concerns_the_picture(host, extra_args):
    assert verdict(host, init="always", extra_args=extra_args).use_prior


@pytest.mark.parametrize(
    ("host", "options", "reason"),
    [
        (bare, {"prior": None}, "no prior"),
        (bare, {"sigmas": (0.1, 1.0, 14.6)}, "do not fall"),
        (bare, {"sigmas": (2.0, 0.0)}, "below sigma_trunc"),
        (bare, {"sigmas": (14.6, 6.0)}, "not below sigma_trunc"),
        (bare, {"x": torch.zeros(2, 3, 8, 8)}, r"\(3, 8, 8\) and the prior was fitted for \(4, 8, 8\)"),
        (comfy(prediction=CONST), {}, "rectified-flow"),
    ],
)
def test_always_raises_where_the_prior_cannot_be_used(host, options, reason):
    with pytest.raises(ValueError, match=f"init='always' cannot be met: .*{reason}"):
        verdict(host, init="always", **options)


def test_a_prior_that_needs_the_whole_budget_for_itself_stays_out():
    hungry = ImplicitPrior(SHAPE, sigma_trunc=5.0)
    hungry.prior_nfe = 2
    assert not verdict(prior=hungry, budget=2).use_prior
    assert verdict(prior=hungry, budget=3).use_prior


def test_a_host_is_recognised_through_wrappers_that_show_what_they_wrap():
    inside = comfy(latent=PICTURE)
    assert read_host(SimpleNamespace(inner_model=inside), {}).latent is PICTURE
    assert read_host(SimpleNamespace(inner_model=inside.inner_model), {"model_options": {}}).hidden


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(1, 160))
def test_z_is_x_over_sigma(seed, sigma):
    z = seeded_noise(SHAPE, [seed, seed + 1])
    torch.testing.assert_close(unit_noise(bare, z * sigma, sigma, {}), z)


@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_a_start_scaled_by_the_root_is_recognised_where_it_matters(sigma):
    z = seeded_noise((4, 64, 64), range(3))
    torch.testing.assert_close(unit_noise(bare, z * math.sqrt(1 + sigma**2), sigma, {}), z)
    torch.testing.assert_close(unit_noise(bare, z * sigma, sigma, {}), z)


@pytest.mark.parametrize("sigma", [5.0, 14.6, 80.0])
def test_where_the_two_scales_nearly_agree_z_is_off_by_two_percent_at_most(sigma):
    z = seeded_noise((4, 64, 64), range(3))
    torch.testing.assert_close(unit_noise(bare, z * math.sqrt(1 + sigma**2), sigma, {}), z, rtol=0.022, atol=0)


def test_each_picture_of_a_batch_is_judged_alone():
    z = seeded_noise((4, 64, 64), range(2))
    mixed = torch.stack([z[0] * 3, z[1] * math.sqrt(10)])
    torch.testing.assert_close(unit_noise(bare, mixed, 3.0, {}), z)


def test_the_hosts_own_noise_is_z():
    x = NOISE * math.sqrt(1 + 14.6**2)
    assert torch.equal(unit_noise(comfy(), x, 14.6, {}), NOISE)
    assert torch.equal(unit_noise(comfy(noise=NOISE.double()), x, 14.6, {}), NOISE)


def test_the_picture_under_the_noise_is_taken_off_first():
    torch.testing.assert_close(unit_noise(a1111(init_latent=PICTURE), PICTURE + 6.0 * NOISE, 6.0, {}), NOISE)


def test_without_noise_z_comes_from_the_hosts_seed_or_the_generator():
    host, x = comfy(noise=torch.zeros_like(NOISE)), PICTURE
    assert torch.equal(unit_noise(host, x, 5.0, {"seed": 7}), seeded_noise(SHAPE, [7, 8]))
    one = torch.Generator().manual_seed(3)
    assert torch.equal(unit_noise(host, x, 5.0, {}, one), draw(x, torch.Generator().manual_seed(3)))
    with pytest.raises(ValueError, match="no noise.*generator="):
        unit_noise(host, x, 5.0, {})


def test_generators_one_per_picture_give_each_its_own_noise():
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 9)]
    assert torch.equal(draw(NOISE, generators), seeded_noise(SHAPE, [4, 9]))
    with pytest.raises(ValueError, match="1 generators for 2 pictures"):
        draw(NOISE, generators[:1])


def test_seeded_noise_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    seeded_noise(SHAPE, range(3))
    assert torch.equal(torch.get_rng_state(), before)
