"""The operations as the dispatcher knows them, ``torch.ops.tdpm_ext.*``: schemas, and one kernel for each device.

CUDA: the Triton kernels. CPU: the plain definitions, so that traces made here run here. Fake kernels say shapes and
strides to whoever traces. An operation has neither a backward nor a choice: `tdpm_ext.kernels.ops` sees to both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdpm_ext.kernels import reference

_NORM = "(Tensor x, SymInt groups, Tensor? weight, Tensor? bias, float eps, Tensor? pre_add, Tensor? scale, Tensor? shift, str? act) -> Tensor"  # noqa: E501


@torch.library.custom_op("tdpm_ext::group_norm", mutates_args=(), device_types="cpu", schema=_NORM)
def _group_norm(x, groups, weight, bias, eps, pre_add, scale, shift, act):
    y = reference.group_norm(x, groups, weight, bias, eps=eps, pre_add=pre_add, scale=scale, shift=shift, act=act)
    return _allocated_like(x, y)


@_group_norm.register_kernel("cuda")
def _(x, groups, weight, bias, eps, pre_add, scale, shift, act):
    from tdpm_ext.kernels import triton_norm

    return triton_norm.group_norm(x, groups, weight, bias, eps=eps, pre_add=pre_add, scale=scale, shift=shift, act=act)


@_group_norm.register_fake
def _(x, groups, weight, bias, eps, pre_add, scale, shift, act):
    reference.check_group_norm(x, groups, weight, bias, pre_add, scale, shift, act)
    return torch.empty_like(x)


@torch.library.custom_op(
    "tdpm_ext::attention",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor q, Tensor k, Tensor v, float? scale, Tensor? mask) -> Tensor",
)
def _attention(q, k, v, scale, mask):
    return _allocated_like(q, reference.attention(q, k, v, scale=scale, mask=mask))


@_attention.register_kernel("cuda")
def _(q, k, v, scale, mask):
    from tdpm_ext.kernels import triton_attn

    return triton_attn.attention(q, k, v, scale=scale, mask=mask)


@_attention.register_fake
def _(q, k, v, scale, mask):
    return torch.empty_like(q)


_STEP = "(Tensor x, Tensor denoised, Tensor[] previous, float a, float b, float[] c, Tensor? noise, float d, Tensor? uncond, float cond_scale, float? c_skip, float? c_out, Tensor? model_input) -> Tensor[]"  # noqa: E501


@torch.library.custom_op("tdpm_ext::sampler_step", mutates_args=(), device_types="cpu", schema=_STEP)
def _sampler_step(x, denoised, previous, a, b, c, noise, d, uncond, cond_scale, c_skip, c_out, model_input):
    """[next state], or [next state, estimate] where the estimate is computed: an operation may not return an input."""
    found = reference.sampler_step(
        x, denoised, previous, a=a, b=b, c=c, noise=noise, d=d, uncond=uncond, cond_scale=cond_scale,
        c_skip=c_skip, c_out=c_out, model_input=model_input,
    )  # fmt: skip
    return [_allocated_like(x, t) for t in found[: 1 + _computes_estimate(uncond, c_skip)]]


@_sampler_step.register_kernel("cuda")
def _(x, denoised, previous, a, b, c, noise, d, uncond, cond_scale, c_skip, c_out, model_input):
    from tdpm_ext.kernels import triton_step

    found = triton_step.sampler_step(
        x, denoised, previous, a=a, b=b, c=c, noise=noise, d=d, uncond=uncond, cond_scale=cond_scale,
        c_skip=c_skip, c_out=c_out, model_input=model_input,
    )  # fmt: skip
    return list(found[: 1 + _computes_estimate(uncond, c_skip)])


@_sampler_step.register_fake
def _(x, denoised, previous, a, b, c, noise, d, uncond, cond_scale, c_skip, c_out, model_input):
    reference.check_sampler_step(x, denoised, previous, c, noise, d, uncond, c_skip, c_out, model_input)
    return [torch.empty_like(x) for _ in range(1 + _computes_estimate(uncond, c_skip))]


def _computes_estimate(uncond: Tensor | None, c_skip: float | None) -> bool:
    return uncond is not None or c_skip is not None


def _allocated_like(x: Tensor, y: Tensor) -> Tensor:
    """``y`` as a kernel would have allocated it: the strides of ``empty_like(x)``, and never an input itself."""
    return torch.empty_like(x).copy_(y)
