"""Geometric augmentation that does not leak into the pictures a network draws, in batches and on any device.

The scheme of Karras et al. 2022 (arXiv 2206.00364, appendix F.2) with the numbers of k-diffusion's
`KarrasAugmentationPipeline`: the network is told what was done to its picture in nine values, and all zeros mean
"nothing". k-diffusion's own pipeline works on one Pillow picture at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SCALE = ANISOTROPY = 2**0.2  # one standard deviation, as a factor
SHIFT = 1 / 8  # one standard deviation, in picture widths


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _rotation(angle: Tensor) -> Tensor:
    return _matrix([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y], -1))


def augment(x: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Square pictures [B, C, H, H] -> (transformed pictures, aug_cond [B, 9]), drawn from the global generator.

    Half are mirrored; each other transformation (upside down, scale, rotation, stretch, shift) happens with
    ``probability``. Edges are reflected. A picture to which nothing happens keeps its bits and gets zeros.
    """
    b, device = len(x), x.device

    def chance() -> Tensor:
        return (torch.rand(b, device=device) < probability).float()

    def angle() -> Tensor:
        return (torch.rand(b, device=device) * 2 - 1) * math.pi * chance()

    def normal() -> Tensor:
        return torch.randn(b, device=device)

    mirror, upside = (torch.randint(2, (b,), device=device).float() for _ in range(2))
    upside = upside * chance()
    scale, turn, axis, shifted = normal() * chance(), angle(), angle(), chance()
    stretch = normal() * (axis != 0)
    right, down = normal() * shifted, normal() * shifted
    cond = [mirror, upside, scale, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin(), right, down]
    cond = torch.stack(cond, -1)

    # from a place in the new picture to the place it is read from: every transformation inverted, the last one first
    read = _rotation(axis) @ _diagonal(ANISOTROPY**-stretch, ANISOTROPY**stretch) @ _rotation(-axis)
    read = read @ _rotation(turn) @ _diagonal(SCALE**-scale, SCALE**-scale)
    read = read @ _diagonal(1 - 2 * mirror, 1 - 2 * upside)
    shift = -2 * SHIFT * torch.stack([right, down], -1)[..., None]
    grid = F.affine_grid(torch.cat([read, shift], -1), list(x.shape), align_corners=False)
    warped = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    untouched = (cond == 0).all(-1)
    return torch.where(untouched[:, None, None, None], x, warped), cond
