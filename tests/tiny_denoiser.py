"""A class-conditional k-diffusion denoiser small enough to train in a test: 8x8 pictures, 3 classes, random weights."""

from __future__ import annotations

import torch

import tdpm_ext as tdpm
from tdpm_ext.checkpoints import Checkpoint
from tdpm_ext.denoiser import CheckpointModel
from tdpm_ext.optional import import_k_diffusion

SHAPE, CLASSES = (1, 8, 8), 3
CONFIG = {
    "model": {
        "type": "image_v1", "input_channels": 1, "input_size": [8, 8], "patch_size": 1, "mapping_out": 16,
        "mapping_cond_dim": CLASSES, "depths": [1, 1], "channels": [8, 16], "self_attn_depths": [False, True],
        "dropout_rate": 0.0, "augment_wrapper": False, "sigma_data": 0.5, "sigma_min": 0.02, "sigma_max": 20,
        "sigma_sample_density": {"type": "lognormal", "mean": -0.8, "std": 1.3},
    },
    "dataset": {"type": "imagefolder", "location": "none", "num_classes": CLASSES},
}  # fmt: skip


def tiny_checkpoint(seed: int = 0) -> Checkpoint:
    """With random weights everywhere (k-diffusion starts its last layers at zero), so that every layer matters."""
    K = import_k_diffusion()
    config = K.config.load_config(CONFIG)
    torch.manual_seed(seed)
    model = CheckpointModel(K.config.make_denoiser_wrapper(config)(K.config.make_model(config)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.eval().requires_grad_(False)
    about = (model.shape, model.sigma_min, model.sigma_max, CLASSES)
    return Checkpoint(model, config, *about, f"tiny-{seed}")


def tiny_pictures(count: int = 240) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pictures [N, 1, 8, 8], a bright square whose corner is the class, and labels int64 [N]."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 90, (count, *SHAPE), generator=generator)
    for i, label in enumerate(labels.tolist()):
        images[i, :, 2 * label : 2 * label + 3, 2 * label : 2 * label + 3] += 150
    return images.to(torch.uint8), labels


def tiny_base():
    """A closed-form mixture of these pictures that starts where the tiny denoiser's chain does."""
    images, labels = tiny_pictures()
    return tdpm.fit_prior("mixture", images, labels=labels, components=1, sigma_max=20.0, progress=False)
