"""The operations through torch's own kernels with fewest passes, in the input's dtype; no gradients through a step.

These are what a network would do without this package, so they may cost no more than that: arguments are checked at
length only where a glance does not settle it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tdpm_ext.kernels import reference

MANY = 20_000  # values from which oneDNN's GELU pays: a call of it costs more than a small array


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pre_add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str | None,
) -> Tensor:
    """`reference.group_norm`, rounded after each operation; parameters have x's dtype."""
    row = x.shape[:2]
    glance = (
        (weight is None or weight.shape == row[1:])
        and (bias is None or bias.shape == row[1:])
        and (pre_add is None or pre_add.shape == row)
        and (scale is None or scale.shape == row)
        and (shift is None or shift.shape == row)
        and act in reference.ACTS
        and groups > 0
        and row[1] % groups == 0
    )
    if not glance:
        reference.check_group_norm(x, groups, weight, bias, pre_add, scale, shift, act)
    beside = (-1, row[1], *[1] * (x.dim() - 2))
    if pre_add is not None:
        x = x + pre_add.reshape(beside)
    if x.is_cpu and not x.is_contiguous() and x.dim() == 4:
        x = near_zero(x, groups)
    y = torch.group_norm(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        torch.addcmul(shift.reshape(beside), y, 1 + scale.reshape(beside), out=y)
    elif scale is not None:
        y.mul_(1 + scale.reshape(beside))
    elif shift is not None:
        y.add_(shift.reshape(beside))
    if act is not None:
        y = functional.silu(y, inplace=True) if act == "silu" else gelu(y)
    # on CUDA torch's kernel may have made channels_last contiguous
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def near_zero(x: Tensor, groups: int) -> Tensor:
    """x [N, C, H, W] less one of its values in each group, which changes no group norm.

    In channels_last torch's CPU kernel sums plain squares: at a mean of 100 standard deviations it is wrong in the
    third digit, at 1000 in the first.
    """
    grouped, out = x.unflatten(1, (groups, -1)), torch.empty_like(x)
    torch.sub(grouped, grouped[:, :, :1, :1, :1], out=out.unflatten(1, (groups, -1)))
    return out


def gelu(y: Tensor) -> Tensor:
    """GELU (erf) of a tensor that is not needed any more, in its memory format."""
    if y.dim() != 4 or not y.is_cpu:
        return torch.ops.aten.gelu_(y)
    if y.numel() >= MANY:
        return functional.gelu(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # contiguous, for oneDNN's
    return functional.gelu(y.mT).mT if y.is_contiguous() else functional.gelu(y)  # not contiguous, for torch's own


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    """SDPA, which falls back to a slow kernel when a last dimension is not contiguous: then it is made so.

    k-diffusion's `SelfAttention2d` hands over such views of NCHW tensors; a copy costs far less than that fallback.
    """
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def sampler_step(
    x: Tensor,
    denoised: Tensor,
    previous: Sequence[Tensor],
    a: float,
    b: float,
    c: Sequence[float],
    noise: Tensor | None,
    d: float,
    uncond: Tensor | None,
    cond_scale: float | Tensor,
    c_skip: float | None,
    c_out: float | None,
    model_input: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`reference.sampler_step` in place, on float32 or float64 tensors of one dtype."""
    shape = x.shape
    glance = len(c) == len(previous) and denoised.shape == shape
    if noise is not None:
        glance = glance and noise.shape == shape
    elif d:
        glance = False
    if uncond is not None:
        glance = glance and uncond.shape == shape
    if c_skip is not None or c_out is not None or model_input is not None:
        both = c_skip is not None and c_out is not None
        glance = glance and both and (model_input is None or model_input.shape == shape)
    arguments = x, denoised, previous, c, noise, d, uncond, c_skip, c_out, model_input
    if not glance:
        reference.check_sampler_step(*arguments)
    if uncond is not None:
        denoised = torch.sub(denoised, uncond).mul_(cond_scale).add_(uncond)
    if c_skip is not None:
        denoised = torch.mul(denoised, c_out).add_(x if model_input is None else model_input, alpha=c_skip)
    y = x.mul(a).add_(denoised, alpha=b)
    for factor, older in zip(c, previous, strict=True):
        if older.shape != shape:
            reference.check_sampler_step(*arguments)
        y.add_(older, alpha=factor)
    if noise is not None:
        y.add_(noise, alpha=d)
    return y, denoised
