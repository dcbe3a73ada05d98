"""What each operation means, in plain torch: the definition that every kernel is held to.

Everything is computed in float32 (float64 for float64 inputs) and rounded once, at the end. Differentiable, and made
of operations that ``torch.compile`` can fuse, so these are also what runs under compilation and where gradients are
needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

ACTS = (None, "silu", "gelu")


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    pre_add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """``act((norm(x + pre_add) * weight + bias) * (1 + scale) + shift)``, norm = group normalisation (Wu & He 2018).

    ``scale`` and ``shift`` are the adaptive ones of k-diffusion's ``AdaGN`` (``weight`` and ``bias`` are None there)
    and of ADM's scale-shift residual blocks; ``pre_add`` is the time embedding that Stable Diffusion's blocks add.

    Args:
        x: [N, C, *spatial], any floating dtype and memory format.
        groups: how many groups of consecutive channels; divides C.
        weight: [C] or None.
        bias: [C] or None.
        eps: added to the variance (the biased one, mean of squares).
        pre_add: [N, C] or [1, C], or that with trailing axes of size 1, or None.
        scale: like ``pre_add``.
        shift: like ``pre_add``.
        act: None, "silu" or "gelu" (exact, with erf).

    Returns:
        [N, C, *spatial] in x's dtype and memory format.

    Raises:
        ValueError: when ``groups`` does not divide C, a parameter has another shape, or ``act`` is not known.
    """
    check_group_norm(x, groups, weight, bias, pre_add, scale, shift, act)
    if x.numel() == 0:
        return torch.empty_like(x)
    dtype = _internal(x)
    trailing = (1,) * (x.ndim - 2)

    def per_channel(t: Tensor) -> Tensor:
        return t.to(dtype).reshape(-1, x.shape[1], *trailing)

    values = x.to(dtype)
    if pre_add is not None:
        values = values + per_channel(pre_add)
    # Unflattened, not reshaped: a view in every memory format. The first element of each group goes first, so that
    # a mean far from zero costs no digits; the result does not depend on it, hence neither does the gradient.
    grouped = values.unflatten(1, (groups, -1))
    within = tuple(range(2, grouped.ndim))
    first = grouped[(slice(None), slice(None), *(slice(0, 1) for _ in within))].detach()
    grouped = grouped - first
    grouped = grouped - grouped.mean(within, keepdim=True)
    variance = grouped.square().mean(within, keepdim=True)
    y = (grouped * (variance + eps).rsqrt()).flatten(1, 2)
    if weight is not None:
        y = y * per_channel(weight)
    if bias is not None:
        y = y + per_channel(bias)
    if scale is not None:
        y = y * (1 + per_channel(scale))
    if shift is not None:
        y = y + per_channel(shift)
    if act is not None:
        y = functional.silu(y) if act == "silu" else functional.gelu(y)
    return _in_format_of(x, y)


def check_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    pre_add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str | None,
) -> None:
    """Raise ``ValueError`` for arguments that no backend of ``group_norm`` takes."""
    if x.ndim < 2:
        raise ValueError(f"group_norm: x has shape {tuple(x.shape)}; it must be [N, C, *spatial]")
    samples, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm: {channels} channels do not divide into {groups} groups")
    if act not in ACTS:
        raise ValueError(f"group_norm: act is {act!r}; it must be one of {ACTS}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and tuple(t.shape) != (channels,):
            raise ValueError(f"group_norm: {name} has shape {tuple(t.shape)}; x has {channels} channels: [{channels}]")
    for name, t in (("pre_add", pre_add), ("scale", scale), ("shift", shift)):
        if t is None:
            continue
        if t.ndim < 2 or t.shape[0] not in (1, samples) or t.shape[1] != channels or t.numel() != t.shape[0] * channels:
            raise ValueError(
                f"group_norm: {name} has shape {tuple(t.shape)}; for x of shape {tuple(x.shape)} it must be "
                f"[{samples}, {channels}] or [1, {channels}], with or without trailing axes of size 1"
            )


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """``softmax(scale * q k^T + mask) v`` (Vaswani et al. 2017), without a causal mask or dropout.

    Args:
        q: [B, H, Lq, D].
        k: [B, H, Lk, D].
        v: [B, H, Lk, D].
        scale: multiplies the scores; None is D**-0.5.
        mask: broadcastable to [B, H, Lq, Lk]: bool (True = attend), or floating and added to the scores.

    Returns:
        [B, H, Lq, D] in q's dtype and memory format. A row that may attend to nothing is 0.

    Raises:
        ValueError: when the shapes do not fit.
    """
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"attention: {shapes}; they must be q [B, H, Lq, D] and k, v [B, H, Lk, D]")
    dtype = _internal(q)
    scores = torch.matmul(q.to(dtype) * _default_scale(q, scale), k.to(dtype).transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
    highest = scores.amax(-1, keepdim=True).detach()
    weights = (scores - highest.masked_fill(highest == -math.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    y = torch.matmul(weights, v.to(dtype)) / total.masked_fill(total == 0, 1.0)
    return _in_format_of(q, y)


def sampler_step(
    x: Tensor,
    denoised: Tensor,
    previous: Sequence[Tensor] = (),
    *,
    a: float,
    b: float,
    c: Sequence[float] = (),
    noise: Tensor | None = None,
    d: float = 0.0,
    uncond: Tensor | None = None,
    cond_scale: float = 1.0,
    c_skip: float | None = None,
    c_out: float | None = None,
    model_input: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One update of a linear multistep sampler: ``a x + b denoised + sum_i c_i previous_i + d noise``.

    With ``uncond``, denoised is ``uncond + cond_scale (denoised - uncond)`` first (Ho & Salimans 2022). With ``c_skip``
    and ``c_out``, ``denoised`` and ``uncond`` are raw network outputs F, and stand for ``c_skip model_input + c_out F``
    (Karras et al. 2022, eq. 7).

    Args:
        x: the state, any shape.
        denoised: the network's estimate (or raw output, see above), shaped like x.
        previous: older estimates, each shaped like x, newest first.
        a: factor of x.
        b: factor of the estimate.
        c: one factor per older estimate.
        noise: shaped like x, or None.
        d: factor of the noise.
        uncond: the unconditional estimate or raw output, shaped like x, or None.
        cond_scale: guidance; used with ``uncond`` only.
        c_skip: given together with ``c_out``, or None.
        c_out: given together with ``c_skip``, or None.
        model_input: what ``c_skip`` multiplies, before the network's input scaling; None is x.

    Returns:
        The next state and the estimate that was used, both in x's dtype and memory format. The estimate may be the
        given tensor itself where nothing had to be computed.

    Raises:
        ValueError: for shapes that differ from x's, coefficients without tensors, or tensors without coefficients.
    """
    check_sampler_step(x, denoised, previous, c, noise, d, uncond, c_skip, c_out, model_input)
    dtype = _internal(x)
    estimate = denoised.to(dtype)
    if uncond is not None:
        estimate = uncond.to(dtype) + cond_scale * (estimate - uncond.to(dtype))
    if c_skip is not None:  # linear, so it may follow the guidance: the weights of the two estimates add up to 1
        estimate = c_skip * (x if model_input is None else model_input).to(dtype) + c_out * estimate
    y = a * x.to(dtype) + b * estimate
    for factor, older in zip(c, previous, strict=True):
        y = y + factor * older.to(dtype)
    if noise is not None:
        y = y + d * noise.to(dtype)
    return _in_format_of(x, y), _in_format_of(x, estimate)


def check_sampler_step(
    x: Tensor,
    denoised: Tensor,
    previous: Sequence[Tensor],
    c: Sequence[float],
    noise: Tensor | None,
    d: float,
    uncond: Tensor | None,
    c_skip: float | None,
    c_out: float | None,
    model_input: Tensor | None,
) -> None:
    """Raise ``ValueError`` for arguments that no backend of ``sampler_step`` takes."""
    others = {"denoised": denoised, "noise": noise, "uncond": uncond, "model_input": model_input}
    others |= {f"previous[{i}]": older for i, older in enumerate(previous)}
    for name, t in others.items():
        if t is not None and t.shape != x.shape:
            raise ValueError(
                f"sampler_step: {name} has shape {tuple(t.shape)}, x has {tuple(x.shape)}; they must agree"
            )
    if len(c) != len(previous):
        raise ValueError(f"sampler_step: {len(c)} factors c for {len(previous)} previous estimates; give one for each")
    if noise is None and d != 0:
        raise ValueError(f"sampler_step: d is {d}, but there is no noise; give noise, or d=0")
    if (c_skip is None) != (c_out is None):
        raise ValueError(f"sampler_step: c_skip is {c_skip} and c_out is {c_out}; give both or neither")
    if model_input is not None and c_skip is None:
        raise ValueError("sampler_step: model_input is used with c_skip and c_out only; give them too")


def _internal(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _default_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in x's dtype and with the strides of ``torch.empty_like(x)``, which is what the kernels allocate."""
    y = y.to(x.dtype)
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)
