"""Latent spaces: this package's auto-encoder and others', their files, and priors at Stable Diffusion's sizes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.timing import peak_memory
from tdpm_ext.fit import fit_prior
from tdpm_ext.fit_text import fit_text_prior
from tdpm_ext.latent import LatentSpace
from tdpm_ext.sampler import sample
from tdpm_ext.vae import PictureVAE, load_vae, save_vae


@pytest.fixture(scope="module")
def vae() -> PictureVAE:
    torch.manual_seed(0)
    vae = PictureVAE(width=32, blocks=1).eval().requires_grad_(False)
    vae.scaling_factor, vae.notes = 0.7, {"pictures": 3}
    return vae


def pictures(count: int, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_latents_are_scaled_and_unscaled(vae):
    x, space = pictures(5), LatentSpace(vae, batch=2)
    latents = space.encode(x)
    assert latents.shape == (5, 4, 8, 8)
    assert torch.allclose(latents, vae.moments(x)[0] * 0.7, atol=1e-5)
    assert torch.allclose(space.decode(latents), vae.decode(vae.encode(x)), atol=1e-5)
    assert space.decode(latents).abs().max() <= 1


def test_a_file_brings_the_same_auto_encoder_back(vae, tmp_path):
    save_vae(vae, tmp_path / "v.safetensors")
    back = load_vae(tmp_path / "v.safetensors")
    assert (back.config, back.scaling_factor, back.notes) == (vae.config, 0.7, {"pictures": 3})
    for name, value in vae.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.half().float())
    assert not any(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "x"}, "format is 'x'"),
        ({"config": {"width": 10**9}}, "width must be"),
        ({"config": {"width": 48}}, "multiple of 32"),
        ({"config": {"depth": 3}}, "depth"),
        ({"scaling_factor": 0}, "positive"),
        ({"scaling_factor": None}, "not an auto-encoder"),
        ({"notes": 3}, "not an auto-encoder"),
    ],
)
def test_a_header_that_lies_is_refused(vae, tmp_path, change, words):
    path = tmp_path / "v.safetensors"
    save_vae(vae, path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["vae"])
    save_file(load_file(path), path, {"vae": json.dumps(header | change)})
    with pytest.raises(ValueError, match=words):
        load_vae(path)


def test_a_damaged_or_missing_file_is_refused(vae, tmp_path):
    path = tmp_path / "v.safetensors"
    save_vae(vae, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not an auto-encoder of this project"):
        load_vae(path)
    with pytest.raises(FileNotFoundError, match="no auto-encoder"):
        load_vae(tmp_path / "none.safetensors")


def test_pictures_and_latents_of_the_wrong_shape_are_refused(vae):
    for x in (torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 30, 32), torch.zeros(3, 32, 32)):
        with pytest.raises(ValueError, match="takes pictures"):
            vae.encode(x)
    with pytest.raises(ValueError, match="takes latents"):
        vae.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="uint8"):
        LatentSpace(vae).encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="empty"):
        LatentSpace(vae).decode(torch.zeros(0, 4, 8, 8))


class Halves(nn.Module):
    """An auto-encoder of the simplest kind, which returns what it is told to wrap its tensors in."""

    def __init__(self, wrap_encoded, wrap_decoded, **attributes):
        super().__init__()
        self.wrap_encoded, self.wrap_decoded = wrap_encoded, wrap_decoded
        for name, value in attributes.items():
            setattr(self, name, value)

    def encode(self, x):
        return self.wrap_encoded(nn.functional.avg_pool2d(x, 2))

    def decode(self, z):
        return self.wrap_decoded(nn.functional.interpolate(z, scale_factor=2))


@pytest.mark.parametrize(
    ("encoded", "decoded"),
    [
        (lambda z: z, lambda x: x),
        (lambda z: SimpleNamespace(latent_dist=SimpleNamespace(mean=z)), lambda x: SimpleNamespace(sample=x)),
        (lambda z: SimpleNamespace(latents=z), lambda x: (x,)),
    ],
)
def test_every_way_of_returning_a_tensor_is_understood(encoded, decoded):
    space = LatentSpace(Halves(encoded, decoded), scaling_factor=2.0, shift_factor=0.5)
    x = pictures(3)
    latents = space.encode(x)
    assert torch.allclose(latents, (nn.functional.avg_pool2d(x, 2) - 0.5) * 2, atol=1e-6)
    coarse = nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), scale_factor=2)
    assert torch.allclose(space.decode(latents), coarse, atol=1e-6)


def test_the_scaling_factor_is_found_or_asked_for():
    plain = (lambda z: z, lambda x: x)
    assert LatentSpace(Halves(*plain, scaling_factor=3.0)).scaling_factor == 3.0
    config = SimpleNamespace(scaling_factor=0.18215, shift_factor=None)
    assert LatentSpace(Halves(*plain, config=config)).scaling_factor == 0.18215
    with pytest.raises(ValueError, match="give scaling_factor="):
        LatentSpace(Halves(*plain))
    for wrong in (0, -1.0, float("nan"), "0.2"):
        with pytest.raises(ValueError, match="positive, finite"):
            LatentSpace(Halves(*plain), scaling_factor=wrong)
    with pytest.raises(TypeError, match=r"no encode\(\)"):
        LatentSpace(nn.Identity(), 1.0)
    with pytest.raises(TypeError, match="returned dict"):
        LatentSpace(Halves(lambda z: {"z": z}, lambda x: x), 1.0).encode(pictures(1))


def test_the_auto_encoder_of_diffusers_is_one_of_them():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kl = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, scaling_factor=0.18215)
    space, x = LatentSpace(kl.eval()), pictures(2)
    latents = space.encode(x)
    assert latents.shape == (2, 4, 32, 32) and space.decode(latents).shape == x.shape
    with torch.no_grad():
        assert torch.allclose(latents, kl.encode(x).latent_dist.mean * 0.18215, atol=1e-5)


@pytest.mark.parametrize(("side", "count"), [(64, 160), (128, 50)])
def test_priors_are_fitted_at_the_sizes_of_stable_diffusion(side, count):
    generator = torch.Generator().manual_seed(0)
    shape = (4, side, side)
    latents = torch.randn(count, *shape, generator=generator)
    pooled = torch.randn(count, 32, generator=generator)
    made = {}

    def fit():
        made["plain"] = fit_prior("lowrank", latents, rank=32, progress=False)
        made["text"] = fit_text_prior("text_lowrank", latents, pooled, rank=32, progress=False)

    peak = peak_memory(fit, torch.device("cpu"))
    assert peak is None or peak < 4096
    z = torch.randn(2, *shape, generator=generator)
    assert (
        made["plain"].sample(z, 2.0).shape == made["text"].sample(z, 2.0, text_pooled=pooled[:2]).shape == (2, *shape)
    )


class DiffusersText:
    """diffusers' text-conditional U-Net in k-diffusion's convention: epsilon, Stable Diffusion's noise table."""

    def __init__(self, unet):
        self.unet, betas = unet, torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
        kept = (1 - betas).cumprod(0)
        self.log_sigmas = (0.5 * ((1 - kept) / kept).log()).contiguous()

    @torch.no_grad()
    def __call__(self, x, sigma, text_states, text_pooled, cond_scale=1.0):
        sigma = sigma.expand(len(x)).reshape(-1, 1, 1, 1)
        step = torch.searchsorted(self.log_sigmas, sigma.flatten().log()).clamp_max(999)
        scaled = x / (1 + sigma**2).sqrt()
        towards = self.unet(scaled, step, encoder_hidden_states=text_states).sample
        away = self.unet(scaled, step, encoder_hidden_states=torch.zeros_like(text_states)).sample
        return x - sigma * (away + cond_scale * (towards - away))


def test_the_same_prior_code_runs_on_a_unet_and_an_auto_encoder_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (32,), "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 8}
    unet = diffusers.UNet2DConditionModel(**blocks, **sizes, cross_attention_dim=16, sample_size=8).eval()
    kl = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, scaling_factor=0.18215)
    generator = torch.Generator().manual_seed(1)
    text = {"text_states": torch.randn(40, 5, 16, generator=generator)}
    text["text_pooled"] = text["text_states"].mean(1)
    model, shape = DiffusersText(unet), (4, 8, 8)
    options = {"shape": shape, "sigma_max": 14.6, "cond_scale": 5.0, "draws": 40, "progress": False}
    prior = fit_text_prior("text_lowrank", denoiser=model, text=text, **options)
    extra = {name: value[:3] for name, value in text.items()} | {"cond_scale": 5.0}
    latents = sample(model, prior, steps=3, seed=[0, 1, 2], sigma_trunc=4.0, extra_args=extra, disable=True)
    pictures = LatentSpace(kl.eval()).decode(latents)
    assert latents.shape == (3, *shape) and pictures.shape == (3, 3, 8, 8) and bool(pictures.isfinite().all())
    assert prior.card["cond_scale"] == 5.0
