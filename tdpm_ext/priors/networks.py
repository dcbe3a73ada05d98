"""Small networks for learned priors: a condition's embedding, a generator, and low-rank changes to a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conditioning(nn.Module):
    """Noise level and condition -> one vector of ``width``.

    Args:
        num_classes: labels 0 .. num_classes - 1; ``num_classes`` itself stands for "no label".
        cond_width: of an embedding [B, cond_width] (of a text, say) in place of labels. Both 0: no condition.
    """

    def __init__(self, num_classes: int, cond_width: int, width: int):
        super().__init__()
        if num_classes and cond_width:
            raise ValueError(f"num_classes {num_classes} and cond_width {cond_width}: give one of the two")
        self.num_classes, self.cond_width = num_classes, cond_width
        self.level = nn.Linear(8, width)
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.vector = nn.Linear(cond_width, width, bias=False) if cond_width else None  # zeros: no condition
        self.mix = nn.Linear(width, width)
        self.register_buffer("octaves", 2.0 ** torch.arange(4) * 0.5, persistent=False)

    def forward(self, sigma: Tensor, cond: Tensor | None) -> Tensor:
        """sigma [B], cond int64 [B] or float [B, cond_width] or None -> [B, width]."""
        angles = sigma.log()[:, None] * self.octaves
        h = self.level(torch.cat([angles.sin(), angles.cos()], 1))
        if self.labels is not None:
            missing = torch.full(sigma.shape, self.num_classes, dtype=torch.long, device=sigma.device)
            h = h + self.labels(missing if cond is None else cond)
        elif self.vector is not None and cond is not None:
            h = h + self.vector(cond)
        return F.silu(self.mix(F.silu(h)))


class Generator(nn.Module):
    """x at one noise level -> a clean picture, in one call that costs less than half of a denoiser's.

    A small U-Net on 2 x 2 patches. It adds to ``guess``, a first estimate of the picture, and its last layer starts at
    zero: untrained, the prior is the closed form that it starts from.

    Args:
        shape: of one picture, (C, H, W) with even sides, or (D,) for points, which get linear layers.
        sigma_data: std of the data, which scales the output.
        width: channels at the first level, twice as many at the second (units of each layer for points).
        depth: residual blocks at the second level (layers for points).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        num_classes: int = 0,
        cond_width: int = 0,
        sigma_data: float = 0.5,
        width: int = 48,
        depth: int = 3,
    ):
        super().__init__()
        self.options = {"num_classes": num_classes, "cond_width": cond_width, "sigma_data": sigma_data}
        self.options |= {"width": width, "depth": depth}
        self.sigma_data, self.num_classes = sigma_data, num_classes
        self.condition = Conditioning(num_classes, cond_width, 2 * width)
        self.body = (_Layers if len(shape) == 1 else _UNet)(shape, width, depth, 2 * width)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None, guess: Tensor | None = None) -> Tensor:
        """x [B, *shape] at sigma [B], a first estimate like x (None: x shrunk as for Gaussian data) -> [B, *shape]."""
        spread = sigma.square() + self.sigma_data**2
        share = (self.sigma_data**2 / spread).reshape(-1, *[1] * (x.ndim - 1))
        scaled = x * spread.rsqrt().reshape(share.shape)
        guess = x * share if guess is None else guess
        inputs = torch.cat([scaled, guess / self.sigma_data], 1)
        return guess + self.sigma_data * self.body(inputs, self.condition(sigma, cond))


class _UNet(nn.Module):
    def __init__(self, shape: tuple[int, ...], width: int, depth: int, emb: int):
        super().__init__()
        channels, height, side = shape
        if height % 4 or side % 4:
            raise ValueError(f"pictures of {height}x{side}: this generator needs sides that are multiples of 4")
        self.first = nn.Conv2d(8 * channels, width, 3, padding=1)
        self.enter = _Block(width, emb)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(_Block(2 * width, emb) for _ in range(depth))
        self.up = nn.Conv2d(2 * width, 4 * width, 1)
        self.leave = _Block(width, emb)
        self.last = nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        skip = self.enter(self.first(F.pixel_unshuffle(x, 2)), emb)
        h = self.down(skip)
        for block in self.middle:
            h = block(h, emb)
        h = self.leave((skip + F.pixel_shuffle(self.up(h), 2)) * 0.5**0.5, emb)
        return F.pixel_shuffle(self.last(F.silu(h)), 2)


class _Block(nn.Module):
    """Norm, activation and convolution, twice, with the condition as scale and shift in between."""

    def __init__(self, width: int, emb: int):
        super().__init__()
        groups = max(1, width // 16)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.modulate = nn.Linear(emb, 2 * width)
        for layer in (self.modulate, self.convs[1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        gain, shift = self.modulate(emb)[:, :, None, None].chunk(2, 1)
        h = self.convs[0](F.silu(self.norms[0](x)))
        return x + self.convs[1](F.silu(self.norms[1](h) * (1 + gain) + shift))


class _Layers(nn.Module):
    def __init__(self, shape: tuple[int, ...], width: int, depth: int, emb: int):
        super().__init__()
        self.first = nn.Linear(2 * shape[0], width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.modulate = nn.ModuleList(nn.Linear(emb, 2 * width) for _ in range(depth))
        self.last = nn.Linear(width, shape[0])
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.first(x)
        for layer, modulate in zip(self.hidden, self.modulate, strict=True):
            gain, shift = modulate(emb).chunk(2, 1)
            h = h + F.silu(layer(h) * (1 + gain) + shift)
        return self.last(F.silu(h))
