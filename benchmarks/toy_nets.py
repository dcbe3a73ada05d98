"""The networks of the toy study: three small multilayer perceptrons with one shape, a noise level as an input."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.toy_data import STD

WIDTH, NARROW, DEPTH, WAVES = 96, 64, 3, 8


class Mlp(nn.Module):
    """Points [B, 2] and a noise level [B] -> [B, outputs]; the level enters every layer."""

    def __init__(self, outputs: int = 2, width: int = WIDTH, activation=F.silu):
        super().__init__()
        self.activation = activation
        self.register_buffer("waves", 0.25 * 2.0 ** (torch.arange(WAVES) / 2))
        self.first = nn.Linear(2, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(DEPTH))
        self.levels = nn.ModuleList(nn.Linear(2 * WAVES, width) for _ in range(DEPTH))
        self.last = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        angle = sigma.log()[:, None] * self.waves
        level = torch.cat([angle.cos(), angle.sin()], 1)
        h = self.first(x)
        for layer, embed in zip(self.layers, self.levels, strict=True):
            h = h + self.activation(layer(h) + embed(level))
        return self.last(h)


class ToyDenoiser(nn.Module):
    """``model(x, sigma) -> denoised`` [B, 2], preconditioned as by Karras et al. (arXiv 2206.00364)."""

    def __init__(self):
        super().__init__()
        self.net = Mlp()

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        s, total = sigma[:, None], (sigma**2 + STD**2)[:, None]
        out = self.net(x * total.rsqrt(), sigma)
        return x * (STD**2 / total) + out * (s * STD * total.rsqrt())


class ToyGenerator(nn.Module):
    """z [B, 2] -> points [B, 2]: clean ones, or (the raw form) noisy ones."""

    def __init__(self):
        super().__init__()
        self.net = Mlp(width=NARROW)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return STD * self.net(z, z.new_ones(len(z)))


class ToyCritic(nn.Module):
    """Points at a noise level -> one number each [B]. Piecewise linear: its penalties differentiate it twice."""

    def __init__(self):
        super().__init__()
        self.net = Mlp(1, NARROW, F.leaky_relu)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, cond: None = None) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        return self.net(x * (sigma**2 + STD**2).rsqrt()[:, None], sigma)[:, 0]


def denoising_loss(model, x: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Karras et al.'s weighted squared error of the denoised estimate."""
    weight = (sigma**2 + STD**2) / (sigma * STD) ** 2
    return (weight[:, None] * (model(x + sigma[:, None] * noise, sigma) - x) ** 2).mean()


def log_uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """Noise levels [count], evenly spread in log sigma."""
    return low * (high / low) ** torch.rand(count, generator=generator)
