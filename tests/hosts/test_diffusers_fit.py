"""A pipeline as a denoiser, and priors fitted from one."""

import os

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import (  # noqa: E402
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

import tests.hosts.tiny_diffusers as tiny  # noqa: E402
from tdpm_ext import load_prior  # noqa: E402
from tdpm_ext.decide import seeded_noise  # noqa: E402
from tdpm_ext.hosts import diffusers as host  # noqa: E402
from tdpm_ext.hosts.diffusers_denoiser import PipelineDenoiser, conditioning_of  # noqa: E402
from tdpm_ext.schedule import sd_sigmas, sigma_to_index  # noqa: E402

FIT = {"kind": "lowrank", "draws": 24, "samples": 4, "budgets": (3,), "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def sd(folder):
    return tiny.sd(StableDiffusionPipeline, folder)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_pipeline_denoises_as_its_unet_does_under_guidance(prediction, folder):
    pipe = tiny.sd(StableDiffusionPipeline, folder, prediction)
    cond, uncond = (torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    call = {"prompt_embeds": cond, "negative_prompt_embeds": uncond, "guidance_scale": 2.5}
    denoiser, sigma = PipelineDenoiser(pipe, **call), 3.7
    x = seeded_noise(tiny.LATENTS, [0, 1]) * sigma
    step = torch.tensor(sigma_to_index(sigma, sd_sigmas()))
    with torch.no_grad():
        outputs = [
            pipe.unet(x / (sigma**2 + 1) ** 0.5, step, encoder_hidden_states=e.expand(2, -1, -1)).sample
            for e in (uncond, cond)
        ]
    guided = outputs[0] + 2.5 * (outputs[1] - outputs[0])
    wanted = {
        "epsilon": x - sigma * guided,
        "v_prediction": x / (sigma**2 + 1) - guided * sigma / (sigma**2 + 1) ** 0.5,
        "sample": guided,
    }[prediction]
    torch.testing.assert_close(denoiser(x, torch.full((2,), sigma)), wanted, rtol=1e-4, atol=1e-4)
    assert (denoiser.shape, denoiser.cond_scale) == (tiny.LATENTS, 2.5)
    assert (denoiser.sigma_min, denoiser.sigma_max) == pytest.approx((0.02917, 14.6146), rel=1e-3)
    with pytest.raises(ValueError, match="one noise level"):
        denoiser(x, torch.tensor([1.0, 2.0]))


def test_a_prior_is_fitted_calibrated_saved_and_used(sd, tmp_path):
    before, path = (sd.scheduler, dict(sd._progress_bar_config)), tmp_path / "ab.safetensors"
    made = host.fit(sd, path, prompt=["a", "b"], guidance_scale=3.0, **FIT)
    assert (sd.scheduler, sd._progress_bar_config) == before
    prior = load_prior(path)
    assert prior.shape == tiny.LATENTS and sorted(prior.plans["fidelity"]) == [3]
    assert prior.sigma_max == pytest.approx(14.6146, rel=1e-4)
    facts = {"source": "denoiser", "cond_scale": 3.0, "calibrated_cond_scale": 3.0, "host": "diffusers"}
    assert prior.card.items() >= {**facts, "checkpoint": host.fingerprint(sd)}.items()
    call = {"prompt": "a", "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    assert torch.equal(host.sample(sd, made, seeds=[0], **call)[0], host.sample(sd, path, seeds=[0], **call)[0])


def test_another_guidance_than_the_priors_is_said(sd, caplog):
    prior = host.fit(sd, prompt="a", guidance_scale=3.0, **{**FIT, "budgets": ()})
    caplog.set_level("INFO", logger="tdpm_ext")
    for scale in (3.0, 5.0):
        host.sample(sd, prior, seeds=[0], prompt="a", num_inference_steps=2, guidance_scale=scale)
    assert caplog.text.count("prior used") == 2
    assert caplog.text.count("fitted at guidance 3, this run has 5") == 1


def test_sdxl_and_its_size_conditioning_are_in_the_fit(folder):
    pipe = tiny.sdxl(StableDiffusionXLPipeline, folder)
    options = {"draws": 8, "budgets": (), "kind": "lowrank", "rank": 4, "progress": False}
    small = host.fit(pipe, prompt="a", **options)
    wide = host.fit(pipe, prompt="a", height=16, width=32, **options)
    assert (small.shape, wide.shape) == ((4, 8, 8), (4, 8, 16))
    told = host.fit(pipe, prompt="a", original_size=(900, 900), **options)
    assert not torch.equal(told.tensors["mean"], small.tensors["mean"])


def test_rows_take_prompts_and_embeddings_in_turn():
    embeds = torch.arange(3.0)[:, None]
    call = {"prompt": ["a", "b"], "negative_prompt": "no", "prompt_embeds": embeds, "guidance_scale": 2.0, "eta": None}
    got = conditioning_of(call, 3, 4)
    assert got["prompt"] == ["b", "a", "b", "a"] and got["negative_prompt"] == ["no"] * 4
    assert got["prompt_embeds"].flatten().tolist() == [0, 1, 2, 0]
    assert (got["guidance_scale"], got["eta"]) == (2.0, None)


def test_a_batch_does_not_change_which_prompt_a_row_has(sd):
    x = seeded_noise(tiny.LATENTS, range(5)) * 2
    sigma = torch.full((5,), 2.0)
    made = [PipelineDenoiser(sd, batch=n, prompt=["a", "b", "c"], guidance_scale=2.0)(x, sigma) for n in (2, 5)]
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)


def test_the_scheduler_comes_back_after_an_error(sd):
    before = sd.scheduler
    with pytest.raises(ValueError, match="`prompt` has to be of type"):
        host.fit(sd, prompt=3, **FIT)
    assert sd.scheduler is before


def test_what_cannot_be_fitted_is_said(sd, folder, tmp_path):
    pictures = tiny.sd(StableDiffusionImg2ImgPipeline, folder)
    with pytest.raises(ValueError, match="StableDiffusionImg2ImgPipeline starts from a picture"):
        host.fit(pictures, prompt="a")
    with pytest.raises(ValueError, match="generator, latents cannot be given"):
        host.fit(sd, prompt="a", latents=None, generator=None)
    with pytest.raises(ValueError, match="batch is 0"):
        host.fit(sd, prompt="a", batch=0)
    with pytest.raises(PermissionError, match="is missing or cannot be written to"):
        host.fit(sd, tmp_path / "nowhere" / "p.safetensors", prompt="a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_before_any_work(sd, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot be written to"):
        host.fit(sd, tmp_path / "p.safetensors", prompt="a")
