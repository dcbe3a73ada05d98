"""A tiny random latent denoiser that takes text, as a file, and captions for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tdpm_ext.optional import import_k_diffusion
from tdpm_ext.text import Text

WIDTH, COUNT, SHAPE = 8, 300, (2, 8, 8)
MODEL = {
    "type": "image_v1", "input_channels": 2, "input_size": [8, 8], "patch_size": 1, "mapping_out": 16,
    "mapping_cond_dim": WIDTH, "cross_cond_dim": WIDTH, "depths": [1], "channels": [32], "self_attn_depths": [False],
    "cross_attn_depths": [True], "dropout_rate": 0.0, "augment_wrapper": False, "augment_prob": 0.0,
    "sigma_data": 1.0, "sigma_min": 0.02, "sigma_max": 20,
    "sigma_sample_density": {"type": "lognormal", "mean": 0.0, "std": 1.0},
}  # fmt: skip


def written(folder: Path, model: dict = MODEL, about: dict | None = None) -> Path:
    """A tiny random denoiser as a file."""
    config = import_k_diffusion().config.load_config({"model": model, "dataset": {"type": "text", "num_classes": 0}})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = import_k_diffusion().config.make_model(config)
        for p in inner.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
    weights = {name: value.contiguous() for name, value in inner.state_dict().items()}
    path = folder / "denoiser.safetensors"
    save_file(weights, path, {"config": json.dumps(config | ({"text": about} if about else {}))})
    return path


def captions(count: int = COUNT, width: int = WIDTH) -> Text:
    generator = torch.Generator().manual_seed(1)
    pooled = torch.randn(count, width, generator=generator)
    return Text(pooled[:, None].repeat(1, 2, 1), torch.zeros(count, 2), pooled)
