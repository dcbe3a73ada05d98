"""The k-diffusion pipelines that diffusers shipped up to 0.36, and LoRA; needs the overlay ``clients``."""

import logging

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
K = pytest.importorskip("k_diffusion")
if not hasattr(diffusers, "StableDiffusionKDiffusionPipeline"):
    pytest.skip("diffusers 0.37 and later have no k-diffusion pipelines", allow_module_level=True)

from diffusers import (  # noqa: E402
    StableDiffusionKDiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLKDiffusionPipeline,
)

import tdpm_ext  # noqa: E402
import tests.hosts.tiny_diffusers as tiny  # noqa: E402
from tdpm_ext.decide import seeded_noise  # noqa: E402
from tdpm_ext.hosts import diffusers as host  # noqa: E402
from tests.hosts.tiny_diffusers import Calls  # noqa: E402

CALL = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "latent"}
PIPELINES = [(StableDiffusionKDiffusionPipeline, tiny.sd), (StableDiffusionXLKDiffusionPipeline, tiny.sdxl)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(autouse=True)
def installed():
    with tdpm_ext.install("k_diffusion"):
        yield


def build(cls, make, folder, **options):
    pipe = make(cls, folder, scheduler=diffusers.LMSDiscreteScheduler(**tiny.SD_TABLE, **options))
    pipe.set_scheduler("sample_tdpm")
    return pipe


def run(pipe, seed=0, **call):
    with Calls(pipe.unet) as calls:
        made = pipe(prompt="a b", generator=torch.Generator().manual_seed(seed), **{**CALL, **call})[0]
    return made, calls.seen


@pytest.mark.parametrize(("cls", "make"), PIPELINES)
def test_the_sampler_is_found_by_name_and_starts_from_the_priors_draw(cls, make, folder, caplog):
    caplog.set_level(logging.INFO, logger="tdpm_ext")
    pipe, prior = build(cls, make, folder), tiny.prior()
    with tdpm_ext.use_prior(prior):
        made, calls = run(pipe)
    x = calls[0][0].chunk(2)[0] * (4.0**2 + 1) ** 0.5
    torch.testing.assert_close(x, prior.sample(seeded_noise(prior.shape, [0])), rtol=1e-3, atol=1e-3)
    assert len(calls) == 4 and made.isfinite().all()
    assert "prior used, sigma_trunc=4, 4 calls" in caplog.text
    with tdpm_ext.use_prior(prior):
        assert torch.equal(made, run(pipe)[0]) and not torch.equal(made, run(pipe, seed=1)[0])


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_the_network_is_called_as_often_as_steps_were_asked_for(steps, folder):
    pipe = build(*PIPELINES[0], folder)
    with tdpm_ext.use_prior(tiny.prior()):
        assert len(run(pipe, num_inference_steps=steps)[1]) == steps


def test_a_batch_of_four_is_four_singles(folder):
    pipe, z = build(*PIPELINES[0], folder), seeded_noise(tiny.LATENTS, range(4))
    with tdpm_ext.use_prior(tiny.prior()):
        together = pipe(prompt=["a b"] * 4, latents=z, **CALL)[0]
        alone = torch.cat([pipe(prompt="a b", latents=one[None], **CALL)[0] for one in z])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_half_precision_sigmas_give_finite_pictures(folder):
    pipe = build(*PIPELINES[0], folder).to(torch.float16)
    with tdpm_ext.use_prior(tiny.prior()):
        made, calls = run(pipe)
    assert made.dtype == torch.float16 and made.isfinite().all()
    assert {sent.dtype for sent, _ in calls} == {torch.float16}


def test_without_a_prior_or_at_another_resolution_it_is_the_ordinary_solver(folder, caplog):
    caplog.set_level(logging.INFO, logger="tdpm_ext")
    pipe = build(*PIPELINES[0], folder)
    plain = run(pipe)[0]
    pipe.set_scheduler("sample_dpmpp_2m")
    theirs = run(pipe)[0]
    assert (plain - theirs).norm() < 1e-4 * theirs.norm()
    pipe.set_scheduler("sample_tdpm")
    with tdpm_ext.use_prior(tiny.prior((4, 16, 16))):
        assert torch.equal(run(pipe)[0], plain)
    assert "x has shape (4, 8, 8) and the prior was fitted for (4, 16, 16)" in caplog.text


def test_another_sampler_keeps_its_bits_while_ours_is_installed(folder):
    pipe = build(*PIPELINES[0], folder)
    pipe.set_scheduler("sample_euler")
    during = run(pipe)[0]
    handle = tdpm_ext.install("k_diffusion")
    with tdpm_ext.use_prior(tiny.prior()):
        assert torch.equal(during, run(pipe)[0])
    handle.undo()


def test_lora_is_in_the_truncated_chain_and_leaves_the_fingerprint(folder):
    peft = pytest.importorskip("peft")
    pipe = tiny.sd(StableDiffusionPipeline, folder)
    own, call = host.fingerprint(pipe), {"prompt": "a b", **CALL}
    plain = host.sample(pipe, tiny.prior(checkpoint=own), seeds=[0], **call)[0]
    torch.manual_seed(0)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert host.fingerprint(pipe) == own
    adapted = host.sample(pipe, tiny.prior(checkpoint=own), seeds=[0], **call)[0]
    assert (adapted - plain).abs().max() > 1e-3
    pipe.unet.disable_adapters()
    assert torch.equal(plain, host.sample(pipe, tiny.prior(checkpoint=own), seeds=[0], **call)[0])
