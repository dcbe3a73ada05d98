"""Priors that know the prompt: what they recover, what they leave alone, and what they refuse."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import load_file, save_file

from tdpm_ext.calibrate import calibrate
from tdpm_ext.fit import fit_prior
from tdpm_ext.fit_text import fit_text_prior
from tdpm_ext.priors import load_prior, save_prior
from tdpm_ext.sampler import sample

SHAPE, WIDTH = (2, 4, 4), 12


@functools.lru_cache
def gaussian_world(count: int = 1500):
    """Pictures whose mean and spread follow an embedding: (pictures, embeddings, mean of each, variance of each)."""
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(count, WIDTH, generator=generator)
    slope = torch.randn(WIDTH, 32, generator=generator) * 0.3
    mean, spread = e @ slope, (0.5 * (0.5 * e[:, :1]).exp()).expand(-1, 32)
    x = mean + spread * torch.randn(count, 32, generator=generator)
    return x.reshape(-1, *SHAPE), e, mean.reshape(-1, *SHAPE), spread.square().reshape(-1, *SHAPE)


@functools.lru_cache
def cluster_world(count: int = 1200):
    """Four clusters, each with its own embedding: (pictures, embeddings, centres of each)."""
    generator = torch.Generator().manual_seed(1)
    k = torch.randint(4, (count,), generator=generator)
    centres, words = torch.randn(4, 32, generator=generator), 2 * torch.randn(4, WIDTH, generator=generator)
    x = centres[k] + 0.1 * torch.randn(count, 32, generator=generator)
    e = words[k] + 0.1 * torch.randn(count, WIDTH, generator=generator)
    return x.reshape(-1, *SHAPE), e, centres[k].reshape(-1, *SHAPE)


@functools.lru_cache
def fitted(kind: str):
    x, e, *_ = gaussian_world() if kind == "text_lowrank" else cluster_world()
    options = {"components": 4} if kind == "text_mixture" else {}
    return fit_text_prior(kind, x, e, progress=False, **options)


def best_estimate(noisy, mean, variance, sigma):
    return mean + (noisy - mean) * variance / (variance + sigma**2)


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_the_denoiser_of_a_gaussian_per_prompt_is_nearly_the_best_there_is(sigma):
    x, e, mean, variance = (part[:400] for part in gaussian_world())
    noisy = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    prior = fitted("text_lowrank")
    error = (prior.denoise(noisy, sigma, text_pooled=e) - x).square().mean()
    best = (best_estimate(noisy, mean, variance, sigma) - x).square().mean()
    blind = (prior.denoise(noisy, sigma) - x).square().mean()
    assert error < 1.1 * best and error < 0.9 * blind


def test_a_prompt_moves_the_mean_and_the_spread_of_what_is_drawn():
    *_, mean, variance = gaussian_world()
    e = gaussian_world()[1]
    prior, z = fitted("text_lowrank"), torch.randn(300, *SHAPE, generator=torch.Generator().manual_seed(3))
    for level in (-1.2, 0.0, 1.2):
        row = int((e[:, 0] - level).abs().argmin())
        drawn = prior.sample(z, 0.1, text_pooled=e[row : row + 1].expand(300, -1))
        assert (drawn.mean(0) - mean[row]).abs().mean() < 0.1
        assert 0.75 < drawn.var(0).mean() / (variance[row].mean() + 0.01) < 1.35


def test_a_mixture_goes_to_the_cluster_that_the_prompt_names():
    x, e, centres = (part[:200] for part in cluster_world())
    prior, z = fitted("text_mixture"), torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(4))
    told = (prior.sample(z, 0.05, text_pooled=e) - centres).square().mean((1, 2, 3))
    blind = (prior.sample(z, 0.05) - centres).square().mean((1, 2, 3))
    assert (told < 0.2).float().mean() > 0.98
    assert (blind < 0.2).float().mean() < 0.5


@pytest.mark.parametrize("kind", ["text_lowrank", "text_mixture"])
def test_a_picture_does_not_depend_on_its_batch(kind):
    prior, e = fitted(kind), (gaussian_world() if kind == "text_lowrank" else cluster_world())[1][:6]
    z = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(5))
    together = prior.sample(z, 0.5, text_pooled=e)
    alone = torch.cat([prior.sample(z[i : i + 1], 0.5, text_pooled=e[i : i + 1]) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("kind", ["text_lowrank", "text_mixture"])
def test_there_and_back_again_along_the_flow(kind):
    prior, e = fitted(kind), (gaussian_world() if kind == "text_lowrank" else cluster_world())[1][:16]
    x = prior.sample(torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(6)), 2.0, text_pooled=e)
    back = prior.transport(prior.transport(x, 2.0, 6.0, text_pooled=e), 6.0, 2.0, text_pooled=e)
    assert (back - x).abs().max() < (1e-4 if kind == "text_lowrank" else 0.1)


@pytest.mark.parametrize("kind", ["text_lowrank", "text_mixture"])
def test_history_is_what_denoise_says_on_the_way(kind):
    prior, e = fitted(kind), (gaussian_world() if kind == "text_lowrank" else cluster_world())[1][:5]
    z = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(7))
    x, ((level, denoised),) = prior.start(z, 1.0, (1.6,), text_pooled=e)
    high = prior.sample(z, 1.6, text_pooled=e)
    assert level == 1.6 and torch.allclose(denoised, prior.denoise(high, 1.6, text_pooled=e), atol=1e-4)
    assert torch.allclose(x, prior.transport(high, 1.6, 1.0, text_pooled=e), atol=1e-4)


@pytest.mark.parametrize("kind", ["text_lowrank", "text_mixture"])
def test_embeddings_that_say_nothing_change_nothing(kind):
    x = (gaussian_world() if kind == "text_lowrank" else cluster_world())[0]
    noise = torch.randn(len(x), WIDTH, generator=torch.Generator().manual_seed(8))
    prior = fit_text_prior(kind, x, noise, progress=False, **({"components": 4} if kind == "text_mixture" else {}))
    z = torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(9))
    told, blind = prior.sample(z, 1.0, text_pooled=noise[:200]), prior.sample(z, 1.0)
    assert (told - blind).std() < 0.1 * blind.std()


@pytest.mark.parametrize("kind", ["text_lowrank", "text_mixture"])
def test_a_file_brings_the_same_prior_back(kind, tmp_path):
    prior, e = fitted(kind), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10))
    z = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(11))
    back = load_prior(save_prior(prior, tmp_path / "p.safetensors"))
    assert torch.equal(back.sample(z, 0.7, text_pooled=e), prior.sample(z, 0.7, text_pooled=e))
    assert back.conditions == ("text_pooled",) and back.card["source"] == "pictures"


@pytest.mark.parametrize("kind", ["text_lowrank", "text_mixture"])
@pytest.mark.parametrize("name", ["text_axes", "text_mean", "variances"])
def test_a_file_with_tensors_that_do_not_fit_is_refused(kind, name, tmp_path):
    path = save_prior(fitted(kind), tmp_path / "p.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for change in ("missing", "shape", "nan"):
        tensors = load_file(path)
        if change == "missing":
            del tensors[name]
        elif change == "shape":
            tensors[name] = tensors[name][:-1]
        else:
            tensors[name] = torch.full_like(tensors[name], torch.nan)
        save_file(tensors, tmp_path / "bad.safetensors", metadata)
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            load_prior(tmp_path / "bad.safetensors")


class Guided:
    """A denoiser of one Gaussian per prompt whose guidance multiplies the mean, as a network's may."""

    def __init__(self):
        self.scales = set()

    def __call__(self, x, sigma, text_pooled, cond_scale=1.0):
        self.scales.add(cond_scale)
        mean = cond_scale * text_pooled[:, :1, None, None].expand(-1, *SHAPE)
        s2 = sigma.reshape(-1, 1, 1, 1) ** 2
        return mean + (x - mean) * 0.25 / (0.25 + s2)


def test_a_fit_from_the_checkpoint_is_made_under_the_guidance_that_will_be_used():
    e = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(12))
    for scale in (1.0, 3.0):
        model = Guided()
        prior = fit_text_prior(
            "text_lowrank",
            denoiser=model,
            text={"text_pooled": e},
            shape=SHAPE,
            cond_scale=scale,
            draws=256,
            progress=False,
        )
        assert model.scales == {scale} and prior.card["cond_scale"] == scale and prior.card["source"] == "denoiser"
        z = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(13))
        drawn = prior.sample(z, 0.1, text_pooled=e).mean((1, 2, 3))
        slope = (drawn * e[:, 0]).sum() / e[:, 0].square().sum()
        assert abs(slope - scale) < 0.25 * scale


def test_calibration_and_sampling_hand_the_prompt_on():
    e = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(14))
    model, args = Guided(), {"text_pooled": e, "cond_scale": 2.0}
    prior = fit_text_prior(
        "text_lowrank", denoiser=model, text={"text_pooled": e}, shape=SHAPE, cond_scale=2.0, draws=256, progress=False
    )
    prior = calibrate(prior, model, (2,), extra_args=args, samples=16, progress=False)
    assert prior.card["calibrated_cond_scale"] == 2.0
    x = sample(model, prior, steps=2, seed=list(range(16)), extra_args=args, disable=True)
    assert (x.mean((1, 2, 3)) - 2 * e[:, 0]).abs().mean() < 0.2


def test_what_does_not_go_together_is_said():
    x, e, *_ = gaussian_world()
    refused = [
        (("lowrank", x, e), {}, "does not know prompts"),
        (("text_lowrank",), {}, "one of the two"),
        (("text_lowrank", x, e[:5]), {}, "one embedding per picture"),
        (("text_lowrank", x, e), {"cond_scale": 3.0}, "fit from the denoiser"),
        (("text_lowrank", x, e), {"components": 3}, "components=3"),
        (("text_lowrank",), {"denoiser": Guided()}, "text_pooled"),
        (("text_lowrank", x, e * torch.nan), {}, "NaN"),
    ]
    for given, options, words in refused:
        with pytest.raises(ValueError, match=words):
            fit_text_prior(*given, progress=False, **options)
    with pytest.raises(ValueError, match="give --prompts"):
        fit_prior("text_lowrank", x, progress=False)
    with pytest.raises(ValueError, match="text encoder"):
        fitted("text_lowrank").sample(torch.zeros(2, *SHAPE), text_pooled=torch.zeros(2, WIDTH + 1))
