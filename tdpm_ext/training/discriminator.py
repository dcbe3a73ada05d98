"""Discriminators of noised pictures that know level and condition: on a denoiser's activations, or of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdpm_ext.activations import outer_blocks
from tdpm_ext.priors.networks import Conditioning
from tdpm_ext.priors.shared import own_copy
from tdpm_ext.training.conditions import Classes


def conditioning(conditions: Classes, width: int) -> Conditioning:
    """The layers that turn noise level and condition into one vector."""
    return Conditioning(0 if conditions.width else conditions.count, conditions.width, width)


class Discriminator(nn.Module):
    """Scores of noised pictures: residual convolutions without any normalisation, so that each row is judged alone.

    Smooth almost everywhere and piecewise linear: the gradient penalties differentiate it twice.

    Args:
        shape: of one picture, (C, H, W), or (D,) for points, which get linear layers instead.
        conditions: what the numbers of rows stand for; None: nothing.
        sigma_data: std of the data, for scaling the input.
        width: channels at the first level (units of each layer for points).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        conditions: Classes | None = None,
        sigma_data: float = 0.5,
        width: int = 48,
        depth: int = 1,
    ):
        super().__init__()
        self.sigma_data = sigma_data
        self.conditions = conditions or Classes(0)
        self.condition = conditioning(self.conditions, 2 * width)
        if len(shape) == 1:
            self.body = nn.ModuleList([_Dense(shape[0], width), *(_Dense(width, width) for _ in range(depth + 1))])
            flat = width
        else:
            self.body, flat = _pyramid(shape, width, depth)
        self.width = 4 * width  # of the features
        self.last = nn.Linear(flat, self.width)
        for layer in self.modules():  # torch's own start loses half of the signal per layer: nothing to learn from
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, a=0.2)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.modulate = nn.ModuleList(nn.Linear(2 * width, 2 * block.channels) for block in self.body)
        for layer in self.modulate:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.score = nn.Linear(self.width, 1)
        self.project = nn.Linear(2 * width, self.width)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x [B, *shape] at noise levels sigma [B], cond int64 [B] or None -> scores [B]."""
        h, emb = self._run(x, sigma, cond)
        return self.score(h)[:, 0] + (self.project(emb) * h).mean(1)

    def features(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """The last hidden layer, [B, width]: what a transport cost compares."""
        return self._run(x, sigma, cond)[0]

    def _run(self, x: Tensor, sigma: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        emb = self.condition(sigma, self.conditions.seen(cond))
        scale = (sigma.square() + self.sigma_data**2).rsqrt()
        h = x * scale.reshape(-1, *[1] * (x.ndim - 1))
        for block, modulate in zip(self.body, self.modulate, strict=True):
            gain, shift = modulate(emb).chunk(2, 1)
            h = block(h, 1 + gain, shift)
        return F.leaky_relu(self.last(h.flatten(1)), 0.2), emb


class FeatureDiscriminator(nn.Module):
    """Small heads on the activations of the frozen denoiser, which already knows noisy pictures, levels and classes.

    It tells real from fake after tens of steps where a network of its own needs hundreds. Only the heads are trained,
    and the gradient penalties are taken at the activations, so that nothing is differentiated twice through the
    denoiser. Sauer et al. 2024 (arXiv 2403.12015) judge with a diffusion model's activations too.

    Args:
        model: the denoiser, used as it is, through a twin that shares its weights.
        shape: of one picture. conditions: what the numbers of rows stand for. width: channels of a head.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], *, conditions: Classes | None = None, width: int = 48):
        super().__init__()
        self.__dict__["twin"] = own_copy(model, [])  # no submodule: it is neither trained nor saved
        self._seen: list[Tensor] = []
        for block in outer_blocks(self.twin):
            block.register_forward_hook(lambda module, given, found: self._seen.append(found))
        self.conditions = conditions or Classes(0)
        self.condition = conditioning(self.conditions, width)
        probe = next(model.parameters())
        found = self.see(probe.new_zeros(1, *shape), probe.new_ones(1), None)
        if not found:
            raise ValueError("this denoiser shows no blocks with activations [B, C, H, W]: use the discriminator's own")
        self.heads = nn.ModuleList(_Head(feature.shape[1], width) for feature in found)
        self.width = width * len(found)  # of `features`
        self.score = nn.Linear(self.width, 1)
        self.project = nn.Linear(width, self.width)

    def see(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> list[Tensor]:
        """Activations [B, C, H, W] of x [B, *shape] at sigma [B], each picture's brought to mean 0 and std 1."""
        self._seen.clear()
        self.twin(x, sigma, **self.conditions.args(cond))
        found = [f for f in self._seen if isinstance(f, Tensor) and f.ndim == 4]
        self._seen.clear()
        return [F.group_norm(feature.float(), 1) for feature in found]

    def judge(self, seen: list[Tensor], sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """Scores [B] from what `see` gave."""
        h = self._pooled(seen)
        return self.score(h)[:, 0] + (self.project(self.condition(sigma, self.conditions.seen(cond))) * h).mean(1)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.judge(self.see(x, sigma, cond), sigma, cond)

    def features(self, x: Tensor | list[Tensor], sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """The heads' outputs [B, width], of pictures or of what `see` gave: what a transport cost compares."""
        return self._pooled(self.see(x, sigma, cond) if isinstance(x, Tensor) else x)

    def _pooled(self, seen: list[Tensor]) -> Tensor:
        return torch.cat([head(feature) for head, feature in zip(self.heads, seen, strict=True)], 1)


class _Head(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.second(F.leaky_relu(self.first(x), 0.2)), 0.2).mean((2, 3))


def _pyramid(shape: tuple[int, ...], width: int, depth: int) -> tuple[nn.ModuleList, int]:
    """Blocks from the picture down to at most 8 x 8, and the number of entries they end with."""
    channels, height, side = shape
    blocks, here = [_Stem(channels, width, 2 if min(height, side) > 16 else 1)], width
    height, side = height // blocks[0].patch, side // blocks[0].patch
    while True:
        blocks += [_Residual(here) for _ in range(depth)]
        if min(height, side) <= 8:
            return nn.ModuleList(blocks), here * height * side
        blocks.append(_Down(here, 2 * here))
        here, height, side = 2 * here, height // 2, side // 2


class _Stem(nn.Module):
    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.patch, self.channels = patch, width
        self.conv = nn.Conv2d(channels * patch**2, width, 3, padding=1)

    def forward(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.patch)
        return self.conv(x) * gain[:, :, None, None] + shift[:, :, None, None]


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.channels = width
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        h = self.first(F.leaky_relu(x, 0.2)) * gain[:, :, None, None] + shift[:, :, None, None]
        return (x + self.second(F.leaky_relu(h, 0.2))) * math.sqrt(0.5)


class _Down(nn.Module):
    def __init__(self, width: int, wider: int):
        super().__init__()
        self.channels = wider
        self.conv = nn.Conv2d(width, wider, 3, padding=1)

    def forward(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return self.conv(F.avg_pool2d(x, 2)) * gain[:, :, None, None] + shift[:, :, None, None]


class _Dense(nn.Module):
    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.channels = outside
        self.layer = nn.Linear(inside, outside)

    def forward(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return F.leaky_relu(self.layer(x) * gain + shift, 0.2)
