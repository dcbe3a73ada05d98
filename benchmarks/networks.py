"""The networks that the kernel benchmark looks at: public shapes, built with random weights or with none at all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from tdpm_ext.optional import import_k_diffusion

CHECKPOINT = Path(__file__).resolve().parents[1] / "assets" / "fashion-mnist" / "denoiser.safetensors"
# The shape of k-diffusion's configs/config_cifar10.json, without its dropout: k-diffusion would drop attention weights
# in evaluation mode too.
CIFAR = {
    "type": "image_v1", "input_channels": 3, "input_size": [32, 32], "patch_size": 1, "mapping_out": 256,
    "depths": [2, 4, 4], "channels": [128, 256, 512], "self_attn_depths": [False, True, True],
    "augment_wrapper": True, "dropout_rate": 0.0, "sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 80,
}  # fmt: skip
# Stable Diffusion 1.5's unet/config.json, as far as it differs from diffusers' defaults
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


@dataclass(frozen=True)
class Network:
    """A denoiser in the benchmark.

    Args:
        title: for tables.
        parameters: millions, checked when it is built.
        build: () -> module, on torch's default device and in its default dtype.
        inputs: batch -> positional and keyword arguments of one call, likewise.
    """

    title: str
    parameters: float
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple, dict]]


def _k_diffusion(model: dict, classes: int = 0) -> nn.Module:
    K = import_k_diffusion()
    config = K.config.load_config({"model": model, "dataset": {"num_classes": classes}})
    return K.layers.Denoiser(K.config.make_model(config), config["model"]["sigma_data"])


def _noise_and_sigma(channels: int, side: int, batch: int) -> tuple[tuple[Tensor, ...], dict]:
    return (torch.randn(batch, channels, side, side), torch.full((batch,), 2.0)), {}


def _fashion_mnist() -> nn.Module:
    config = import_k_diffusion().config.load_config(CHECKPOINT)
    return _k_diffusion(config["model"], config["dataset"]["num_classes"])


def _fashion_inputs(batch: int) -> tuple[tuple, dict]:
    args, _ = _noise_and_sigma(1, 28, batch)
    return args, {"mapping_cond": torch.zeros(batch, 10)}


def _sd15() -> nn.Module:
    from diffusers import UNet2DConditionModel

    class Sample(nn.Module):
        """The network behind a plain call, (latents, timesteps, prompt) -> tensor."""

        def __init__(self):
            super().__init__()
            self.unet = UNet2DConditionModel(**SD15)

        def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            return self.unet(x, timestep, encoder_hidden_states=prompt, return_dict=False)[0]

    return Sample()


def _sd15_inputs(batch: int) -> tuple[tuple, dict]:
    return (torch.randn(batch, 4, 64, 64), torch.full((batch,), 500.0), torch.randn(batch, 77, 768)), {}


NETWORKS = {
    "cifar10": Network(
        "k-diffusion U-Net, CIFAR-10", 66.1, lambda: _k_diffusion(CIFAR), lambda n: _noise_and_sigma(3, 32, n)
    ),
    "sd15": Network("Stable Diffusion 1.5 U-Net, 64x64 latents", 859.5, _sd15, _sd15_inputs),
    "fashion-mnist": Network("the shipped checkpoint", 1.55, _fashion_mnist, _fashion_inputs),
}


@contextlib.contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    """New tensors are on ``device`` and floating ones in ``dtype`` while the block runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(name: str, device: str, dtype: torch.dtype, *, weights: bool = True) -> nn.Module:
    """Network ``name`` in evaluation mode; with ``weights`` random ones, else whatever memory holds (fake tensors)."""
    network = NETWORKS[name]
    with contextlib.ExitStack() as stack:
        stack.enter_context(defaults(device, dtype))
        if not weights:
            stack.enter_context(mock.patch.object(nn.init, "orthogonal_", lambda weight, *_: weight))
        model = network.build().eval().requires_grad_(False)
    if weights:
        _randomise(model)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    if not math.isclose(millions, network.parameters, abs_tol=0.051):
        raise ValueError(f"{network.title} has {millions:.2f} M parameters here, and {network.parameters} M in public")
    return model


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Small random numbers where libraries start with zeros, so that the output depends on every layer."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if not p.any():
            p.copy_(torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float32) * 0.02)
