"""The launches that make up one group normalisation: computed from plain values, so that they can be looked at,
tested and compiled without a GPU, and kept from one call to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from . import norm_kernels as kernels
from .norm_plan import Plan, Strides, merging, pixels_of, plan

# of every launch; Triton's own default of the second is about to change
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Call:
    """Everything that the launches depend on.

    Args:
        shape: of x.
        x: its strides.
        y: the output's strides.
        dtype: of x and y.
        groups: divides the channels.
        pre_add, scale, shift: elements from one sample's row to the next; 0 where the samples share a row, or without
            one.
        eps: added to the variance.
        act: None, "silu" or "gelu".
        processors: multiprocessors of the GPU.
        form: None, or one of `norm_plan.FORMS` to have that one.
    """

    shape: tuple[int, ...]
    x: Strides
    y: Strides
    dtype: torch.dtype
    groups: int
    pre_add: int = 0
    scale: int = 0
    shift: int = 0
    eps: float = 1e-5
    act: str | None = None
    processors: int = 108
    form: str | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel launch, all but its tensors: those are passed by the names that the kernel gives them."""

    kernel: Any
    grid: int
    tensors: tuple[str, ...]
    numbers: Mapping[str, int | float]
    constants: Mapping[str, Any]
    warps: int


@lru_cache(maxsize=4096)
def launches(call: Call) -> tuple[Launch, ...]:
    """In order; intermediate results go through float32 tensors ``parts`` and ``affine`` (see `scratch`)."""
    chosen = plan(call.shape, call.x, call.dtype, call.groups, call.processors, call.form)
    return _split(call, chosen) if chosen.form == "split" else (_whole(call, chosen),)


def scratch(call: Call) -> dict[str, tuple[int, ...]]:
    """Shapes of the intermediate tensors, {} where there are none."""
    chosen = plan(call.shape, call.x, call.dtype, call.groups, call.processors, call.form)
    if chosen.form != "split":
        return {}
    samples, channels = call.shape[:2]
    return {"parts": (2, samples, chosen.splits, channels), "affine": (3, samples, channels)}


def _launch(kernel: Any, grid: int, values: Mapping[str, Any], warps: int) -> Launch:
    """Sorts ``values`` by what the kernel's arguments are."""
    tensors = ("x", "y", "parts", "affine", "weight", "bias", "pre_add", "scale", "shift")
    names = kernel.arg_names
    return Launch(
        kernel,
        grid,
        tuple(name for name in names if name in tensors),
        {name: values[name] for name in names if name not in tensors and name.islower()},
        {name: values[name] for name in names if name.isupper()},
        warps,
    )


def _values(call: Call) -> dict[str, Any]:
    return {
        "x_sample": call.x.sample,
        "x_channel": call.x.channel,
        "x_pixel": call.x.pixel,
        "y_sample": call.y.sample,
        "y_channel": call.y.channel,
        "y_pixel": call.y.pixel,
        "pre_add_sample": call.pre_add,
        "scale_sample": call.scale,
        "shift_sample": call.shift,
        "channels": call.shape[1],
        "pixels": pixels_of(call.shape),
        "eps": call.eps,
        "ACT": call.act,
        "PER_GROUP": call.shape[1] // call.groups,
    }


def _whole(call: Call, chosen: Plan) -> Launch:
    values = _values(call) | {
        "blocks": chosen.blocks,
        "BLOCK_C": chosen.block_c,
        "BLOCK_S": chosen.block_s,
        "BLOCK_G": chosen.block_g,
        "EVEN": call.groups % chosen.block_g == 0,
        "WIDE": chosen.wide,
    }
    kernel = kernels.tile_kernel if chosen.form == "tile" else kernels.loop_kernel
    return _launch(kernel, call.shape[0] * chosen.blocks, values, chosen.warps)


def _split(call: Call, chosen: Plan) -> tuple[Launch, ...]:
    """Partial statistics, their merging, the result."""
    samples, channels = call.shape[:2]
    values = _values(call) | {"splits": chosen.splits, "chunk": chosen.chunk}
    tiled = values | {
        "blocks": chosen.blocks,
        "BLOCK_C": chosen.block_c,
        "BLOCK_S": chosen.block_s,
        "EVEN": channels % chosen.block_c == 0,
        "WIDE": chosen.wide,
    }
    part_plane, affine_plane = samples * chosen.splits * channels, samples * channels
    tiles = -(-values["pixels"] // chosen.block_s)
    block_c, block_k, warps = merging(chosen.block_g, values["PER_GROUP"], chosen.splits)
    blocks = -(-call.groups // chosen.block_g)
    merge = values | {
        "blocks": blocks,
        "part_plane": part_plane,
        "affine_plane": affine_plane,
        "BLOCK_C": block_c,
        "BLOCK_K": block_k,
        "BLOCK_G": chosen.block_g,
        "EVEN": call.groups % chosen.block_g == 0,
    }
    # two sums for each element of the tile: half the tile, for the same number of registers
    part = tiled | {"plane": part_plane, "BLOCK_S": max(1, chosen.block_s // 2)}
    apply = tiled | {"plane": affine_plane, "tiles": tiles}
    return (
        _launch(kernels.part_kernel, samples * chosen.splits * chosen.blocks, part, chosen.warps),
        _launch(kernels.merge_kernel, samples * blocks, merge, warps),
        _launch(kernels.apply_kernel, samples * tiles * chosen.blocks, apply, chosen.warps),
    )
