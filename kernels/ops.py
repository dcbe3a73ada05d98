"""The operations as everybody calls them: `group_norm`, `attention`, `sampler_step`.

Under ``torch.compile`` and where gradients are needed they are plain torch, for Inductor to fuse and autograd to
differentiate. Otherwise the registry chooses, and kernels are called through ``torch.ops.tdpm_ext``: operations that
the dispatcher knows, with fake kernels for tracing and the plain definitions as their CPU kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tdpm_ext.kernels import attention_tiles, facts, native, norm_plan, reference, registry
from tdpm_ext.kernels import library as _library  # noqa: F401  (registers torch.ops.tdpm_ext)

# Group normalisation


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
    """``act((norm(x + pre_add) * weight + bias) * (1 + scale) + shift)``, norm = group normalisation.

    `tdpm_ext.kernels.reference.group_norm` is the definition; backends differ in rounding.

    Args:
        x: [N, C, *spatial], any floating dtype and memory format.
        groups: how many groups of consecutive channels; divides C.
        weight: [C] or None.
        bias: [C] or None.
        eps: added to the variance.
        pre_add: [N, C] or [1, C], or that with trailing axes of size 1, or None.
        scale: like ``pre_add``.
        shift: like ``pre_add``.
        act: None, "silu" or "gelu" (exact, with erf).

    Returns:
        [N, C, *spatial] in x's dtype and memory format.

    Raises:
        ValueError: shapes that do not fit, or an unknown ``act``.
        KernelError: a backend was asked for that cannot do this call.
    """
    if torch.compiler.is_compiling():
        return reference.group_norm(
            x, groups, weight, bias, eps=eps, pre_add=pre_add, scale=scale, shift=shift, act=act
        )
    backend = _norm_backend(x, groups, (weight, bias, pre_add, scale, shift))
    if backend == "native":
        return native.group_norm(x, groups, weight, bias, eps, pre_add, scale, shift, act)
    if backend == "triton":
        return torch.ops.tdpm_ext.group_norm(x, groups, weight, bias, eps, pre_add, scale, shift, act)
    return reference.group_norm(x, groups, weight, bias, eps=eps, pre_add=pre_add, scale=scale, shift=shift, act=act)


def _norm_backend(x: Tensor, groups: int, parameters: tuple[Tensor | None, ...]) -> str:
    request = registry.requested("group_norm")
    needs_grad = torch.is_grad_enabled() and facts.needs_grad(x, *parameters)
    dtype, mixed = x.dtype, False
    for t in parameters:
        mixed = mixed or (t is not None and t.dtype != dtype)
    # On the CPU the answer is known, and gathering facts would cost more than a small normalisation.
    if x.is_cpu and request == "auto":
        return "reference" if needs_grad or mixed else "native"
    dtypes = tuple(t.dtype for t in parameters if t is not None)
    given = facts.Facts(
        "group_norm",
        layout=facts.layout_of(x),
        nbytes=x.numel() * x.element_size(),
        mixed=mixed,
        needs_grad=needs_grad,
        request=request,
        refused=_norm_refused(tuple(x.shape), x.stride(), x.dtype, groups, dtypes) if x.is_cuda else (),
        native_nhwc=x.is_cuda and facts.native_nhwc_group_norm(),
        **facts.machine(x),
    )
    return registry.decide("group_norm", given)


@lru_cache(maxsize=4096)
def _norm_refused(shape, strides, dtype, groups, parameter_dtypes) -> tuple[str, ...]:
    return tuple(norm_plan.supported(shape, strides, dtype, groups, parameter_dtypes))


# Attention


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """``softmax(scale * q k^T + mask) v``: forward, without a causal mask.

    `tdpm_ext.kernels.reference.attention` is the definition; backends differ in rounding.

    Args:
        q: [B, H, Lq, D]; strided views are fine, the Triton kernel reads them without a copy.
        k: [B, H, Lk, D].
        v: [B, H, Lk, D].
        scale: multiplies the scores; None is D**-0.5.
        mask: broadcastable to [B, H, Lq, Lk]: bool (True = attend), or floating and added to the scores. One that is
            known to let everything through is dropped, see `full_mask`.

    Returns:
        [B, H, Lq, D] in q's dtype, in the memory format of the backend. A row that may attend to nothing is 0.

    Raises:
        KernelError: a backend was asked for that cannot do this call.
    """
    if torch.compiler.is_compiling():
        return native.attention(q, k, v, scale, mask)
    if mask is not None and not mask.requires_grad and full_mask(mask, wait=False):
        mask = None
    backend = _attention_backend(q, k, v, mask)
    if backend == "sdpa":
        return native.attention(q, k, v, scale, mask)
    if backend == "triton":
        return torch.ops.tdpm_ext.attention(q, k, v, scale, mask)
    if backend == "xformers":
        from tdpm_ext.kernels import xformers_probe

        return xformers_probe.attention(q, k, v, scale=scale, mask=mask)
    return reference.attention(q, k, v, scale=scale, mask=mask)


def _attention_backend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    request = registry.requested("attention")
    if q.is_cpu and request == "auto":
        return "sdpa"
    machine, dim, q_len, kv_len = facts.machine(q), q.shape[-1], q.shape[-2], k.shape[-2]
    table = ""
    if machine["cc"] and q.dtype in (torch.float16, torch.bfloat16):
        from tdpm_ext.kernels import attention_table

        table = attention_table.preferred(machine["cc"], dim, q_len, kv_len, mask is not None)
    given = facts.Facts(
        "attention",
        head_dim=dim,
        q_len=q_len,
        kv_len=kv_len,
        table=table,
        mask="" if mask is None else "bool" if mask.dtype == torch.bool else "added",
        needs_grad=facts.needs_grad(q, k, v, mask),
        request=request,
        refused=tuple(attention_tiles.unsupported(q, k, v, mask)) if q.is_cuda else (),
        **machine,
    )
    return registry.decide("attention", given)


_full_masks = WeakIdKeyDictionary()  # mask -> (its version, whether it lets everything through)


def full_mask(mask: Tensor, *, wait: bool = True) -> bool:
    """Whether an attention mask lets everything through: all True, or all 0 if it is added to the scores.

    The answer is kept for as long as the tensor lives unchanged, and `attention` then drops the mask, which makes
    faster kernels eligible. Ask once, outside of a CUDA graph, for a mask that many layers and steps will use.

    Args:
        mask: bool or floating.
        wait: look at the values even where that waits for a GPU; otherwise say False where they were never looked at.
    """
    if type(mask) is not Tensor:  # fake, functional and other traced tensors have no values to look at
        return False
    if mask.is_inference():  # its writes are not counted, so nothing may be remembered
        return (wait or mask.is_cpu) and _lets_everything_through(mask)
    known = _full_masks.get(mask)
    if known is None or known[0] != mask._version:
        if not (wait or mask.is_cpu):
            return False
        known = _full_masks[mask] = (mask._version, _lets_everything_through(mask))
    return known[1]


def _lets_everything_through(mask: Tensor) -> bool:
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())


# One step of a sampler


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
    cond_scale: float | Tensor = 1.0,
    c_skip: float | None = None,
    c_out: float | None = None,
    model_input: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``a x + b denoised + sum_i c_i previous_i + d noise``, after guidance and preconditioning where asked for.

    `tdpm_ext.kernels.reference.sampler_step` is the definition, and says what each argument is.

    Args:
        cond_scale: guidance; a 0-dimensional tensor where a CUDA graph is to be replayed with other values.

    Returns:
        The next state and the estimate that was used, in x's dtype and memory format. The estimate may be the given
        tensor itself.

    Raises:
        ValueError: for shapes that differ from x's, coefficients without tensors, or tensors without coefficients.
        KernelError: a backend was asked for that cannot do this call.
    """
    if torch.compiler.is_compiling():
        backend = "reference"
    else:
        backend = _step_backend(x, denoised, previous, noise, uncond, model_input)
    if backend == "native":
        return native.sampler_step(
            x, denoised, previous, a, b, c, noise, d, uncond, cond_scale, c_skip, c_out, model_input
        )
    if backend == "reference":
        return reference.sampler_step(
            x, denoised, previous, a=a, b=b, c=c, noise=noise, d=d, uncond=uncond, cond_scale=cond_scale,
            c_skip=c_skip, c_out=c_out, model_input=model_input,
        )  # fmt: skip
    if uncond is not None and isinstance(cond_scale, Tensor):  # the kernel takes numbers only
        denoised = torch.lerp(uncond.float(), denoised.float(), cond_scale.float())
        uncond, cond_scale = None, 1.0
    found = torch.ops.tdpm_ext.sampler_step(
        x, denoised, list(previous), a, b, list(c), noise, d, uncond, cond_scale, c_skip, c_out, model_input
    )
    return found[0], found[1] if len(found) == 2 else denoised.to(x.dtype)


def _step_backend(x, denoised, previous, noise, uncond, model_input) -> str:
    dtype, mixed = x.dtype, False
    for t in (denoised, noise, uncond, model_input, *previous):
        if t is not None and t.dtype != dtype:
            mixed = True
    request = registry.requested("sampler_step")
    needs_grad = torch.is_grad_enabled() and facts.needs_grad(x, denoised, *previous, noise, uncond, model_input)
    if x.is_cpu and request == "auto" and not needs_grad and not mixed and dtype in registry.EXACT:
        return "native"
    machine = facts.machine(x)
    refused: tuple[str, ...] = ()
    if x.is_cuda and "triton" not in dict(machine["unavailable"]):
        from tdpm_ext.kernels import triton_step

        refused = tuple(triton_step.supported(x, denoised, previous, noise, uncond, model_input))
    given = facts.Facts("sampler_step", mixed=mixed, needs_grad=needs_grad, request=request, refused=refused, **machine)
    return registry.decide("sampler_step", given)
