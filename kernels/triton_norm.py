"""Group normalisation in Triton, fused with what stands around it; `reference.group_norm` says what it means.

The kernels are in `norm_kernels`, how they are cut in `norm_plan`, what is launched in `norm_launch`. All is the same
for contiguous and channels_last tensors, and there are no atomics: on one GPU, the same call gives the same bits.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from .norm_launch import OPTIONS, Call, launches, scratch
from .norm_plan import Strides, strides_of, supported
from .norm_variants import aot_variants
from .reference import check_group_norm

__all__ = ["aot_variants", "group_norm", "supported"]

PROCESSORS = 108  # taken where there is no GPU to ask: in the interpreter


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
    """`reference.group_norm` by Triton kernels: the same arguments and result, without gradients.

    Raises:
        ValueError: for arguments that the reference refuses too, and where `supported` gives a reason.
    """
    check_group_norm(x, groups, weight, bias, pre_add, scale, shift, act)
    parameters = (weight, bias, pre_add, scale, shift)
    dtypes = tuple(t.dtype for t in parameters if t is not None)
    reasons = _reasons(tuple(x.shape), x.stride(), x.dtype, groups, dtypes)
    if reasons:
        raise ValueError("group_norm: the Triton kernels cannot take this: " + "; ".join(reasons))
    out = torch.empty_like(x)
    if x.numel() != 0:
        with _on(x.device):
            _group_norm_into(out, x, groups, parameters, eps, act)
    return out


def _group_norm_into(
    out: Tensor,
    x: Tensor,
    groups: int,
    parameters: tuple[Tensor | None, ...],
    eps: float = 1e-5,
    act: str | None = None,
    form: str | None = None,
) -> None:
    """Write group_norm(x) to ``out``, which has x's shape and any strides that `strides_of` takes.

    ``parameters`` are weight, bias, pre_add, scale and shift; ``form`` is one of `norm_plan.FORMS`, or None for the
    one that `norm_plan.plan` chooses.
    """
    weight, bias, *rows = parameters
    tensors = {"x": x, "y": out, "weight": _dense(weight), "bias": _dense(bias)}
    steps = {}
    for name, t in zip(("pre_add", "scale", "shift"), rows, strict=True):
        tensors[name], steps[name] = _rows(t, x.shape[1])
    views = (_view(tuple(t.shape), t.stride()) for t in (x, out))
    call = Call(
        tuple(x.shape), *views, x.dtype, groups, **steps,
        eps=eps, act=act, processors=_processors(x.device), form=form,
    )  # fmt: skip
    for name, shape in scratch(call).items():
        tensors[name] = torch.empty(shape, dtype=torch.float32, device=x.device)
    for launch in launches(call):
        given = {name: tensors[name] for name in launch.tensors}
        launch.kernel[(launch.grid,)](**given, **launch.numbers, **launch.constants, num_warps=launch.warps, **OPTIONS)


_reasons = lru_cache(maxsize=4096)(supported)


@lru_cache(maxsize=4096)
def _view(shape: tuple[int, ...], strides: tuple[int, ...]) -> Strides:
    view = strides_of(shape, strides)
    if isinstance(view, str):
        raise ValueError(f"group_norm: {view}")
    return view


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _rows(t: Tensor | None, channels: int) -> tuple[Tensor | None, int]:
    """A per-sample parameter as rows of channels next to each other, and the step from one sample's row to the next."""
    if t is None:
        return None, 0
    rows = t.reshape(t.shape[0], channels)
    if channels > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0) if t.shape[0] > 1 else 0


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def _on(device: torch.device):
    """Triton launches on the current device, whatever device the tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
