"""How group normalisation is cut into programs: pure functions of shape, strides, dtype and the number of processors.

A sample is seen as channels x pixels, whatever its memory format: a tile of ``block_c`` channels and ``block_s`` pixels
is addressed by two strides, one of which is 1. Statistics are taken per channel and then merged into groups, so a tile
may start and end anywhere. Three forms, in the order in which they are tried:

- ``tile``: one program holds some whole groups in registers; x is read once.
- ``loop``: one program runs twice over some whole groups, once for the statistics; the second read mostly hits cache.
- ``split``: many programs take statistics of parts, one merges them, many apply; for few, large groups.

The thresholds are estimates, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FORMS = ("tile", "loop", "split")
TILE_MOST = 16384  # elements that one program of the `tile` form holds, padding included
LOOP_TILE = 2048  # elements per iteration of the `loop` form
LOOP_BYTES = 96 * 1024  # what one program may read for one processor to be thought faster than three launches
SPLIT_TILE = 4096
SPLIT_CHANNELS = 64  # per tile in channels_last: every usual channel count divides by it, so all loads are aligned
MERGE_TILE = 4096  # partial results that the merging program looks at in one go
PER_WARP = {"tile": 512, "loop": 256, "split": 512}  # elements; the loop keeps two sums for each
WARPS_MOST = 16
ROW_BYTES = 64  # wanted per pixel and program in channels_last: two memory sectors
ROW_CHANNELS = 128  # most channels per program for the sake of that
GROUP_MOST = 16384  # channels of one group that the merging program can hold
GRID_MOST = 2**31 - 1
INT32 = 2**31


@dataclass(frozen=True)
class Strides:
    """Elements from one sample, channel, pixel to the next. ``channel`` or ``pixel`` is 1."""

    sample: int
    channel: int
    pixel: int


@dataclass(frozen=True)
class Plan:
    """One way to launch.

    Args:
        form: one of ``FORMS``.
        block_c: channels of a tile, a power of two.
        block_s: pixels of a tile, a power of two.
        block_g: groups of one program, a power of two; in the ``split`` form, of the program that merges.
        warps: of the programs that touch x.
        blocks: programs per sample; in the ``split`` form, blocks of channels per sample.
        chunk: pixels per program that takes partial statistics (``split``), else all.
        splits: such programs per block of channels (``split``), else 1.
        wide: offsets within a tile need 64 bits.
    """

    form: str
    block_c: int
    block_s: int
    block_g: int
    warps: int
    blocks: int
    chunk: int
    splits: int
    wide: bool


def strides_of(shape: Sequence[int], strides: Sequence[int]) -> Strides | str:
    """x [N, C, *spatial] as samples x channels x pixels, or why that cannot be done without a copy.

    Taken are contiguous and channels_last tensors of any rank, with or without gaps between samples, between channels
    (contiguous) or between pixels (channels_last), as slices of channels have; and anything else whose spatial axes
    merge into one, if pixels or channels are next to each other.
    """
    if len(shape) < 2:
        return f"shape {tuple(shape)} is not [N, C, *spatial]"
    spatial = [(size, stride) for size, stride in zip(shape[2:], strides[2:], strict=True) if size != 1]
    for (_, outer), (size, inner) in zip(spatial, spatial[1:], strict=False):
        if outer != size * inner:
            return f"the spatial axes of strides {tuple(strides)} do not merge into one"
    channel = strides[1] if shape[1] != 1 else 1
    pixel = spatial[-1][1] if spatial else 1
    if pixel != 1 and channel != 1:
        return f"strides {tuple(strides)}: neither pixels nor channels are next to each other"
    return Strides(strides[0] if shape[0] != 1 else 0, channel, pixel)


def supported(
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    groups: int,
    parameter_dtypes: Sequence[torch.dtype] = (),
) -> list[str]:
    """Why the kernels cannot normalise such an x; [] if they can.

    Args:
        shape: of x, [N, C, *spatial].
        strides: of x, in elements.
        dtype: of x.
        groups: divides C.
        parameter_dtypes: of weight, bias, pre_add, scale, shift, as far as given.
    """
    reasons = []
    names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
    for what, given in (("x", [dtype]), ("a parameter", parameter_dtypes)):
        reasons += [f"{what} is {str(d).removeprefix('torch.')}; taken are {names}" for d in given if d not in DTYPES]
    view = strides_of(shape, strides)
    if isinstance(view, str):
        return [*reasons, view]
    channels, pixels = shape[1], pixels_of(shape)
    if groups < 1 or channels % groups:
        return [*reasons, f"{channels} channels do not divide into {groups} groups"]
    if 0 in shape:
        return reasons  # nothing is launched for it
    if channels // groups > GROUP_MOST:
        reasons.append(f"{channels // groups} channels in a group; at most {GROUP_MOST}")
    if max(pixels, channels) >= INT32 // 2:
        reasons.append(f"{channels} channels x {pixels} pixels; each at most {INT32 // 2 - 1}")
    else:  # on a small and on a large GPU, which may choose different forms
        plans = (plan(tuple(shape), view, dtype, groups, processors) for processors in (1, 1024))
        if max(programs(p, shape) for p in plans) > GRID_MOST:
            reasons.append(f"shape {tuple(shape)} needs more than {GRID_MOST} programs")
    return reasons


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...], view: Strides, dtype: torch.dtype, groups: int, processors: int, form: str | None = None
) -> Plan:
    """How to launch for x of ``shape`` on a GPU with so many (streaming multi-)processors; ``form`` forces a form."""
    samples, channels, pixels = shape[0], shape[1], pixels_of(shape)
    per_group = channels // groups
    block_g = _groups_per_program(per_group, groups, view, dtype.itemsize)
    block_c, width = power_of_two(block_g * per_group), power_of_two(pixels)
    blocks = -(-groups // block_g)
    if form is None:
        work = block_g * per_group * pixels * dtype.itemsize
        if block_c * width <= TILE_MOST:
            form = "tile"
        elif block_c <= LOOP_TILE // 16 and (work <= LOOP_BYTES or samples * blocks >= 2 * processors):
            form = "loop"
        else:
            form = "split"
    chunk, splits = pixels, 1
    if form == "tile":
        block_s = width
    elif form == "loop":
        block_s = min(width, max(1, LOOP_TILE // block_c))
    else:
        block_c, block_s = _split_tile(channels, pixels, view)
        blocks = -(-channels // block_c)
        columns = -(-pixels // block_s)
        splits = max(1, min(columns, -(-4 * processors // (samples * blocks))))
        chunk = -(-columns // splits) * block_s
        splits = -(-pixels // chunk)
    warps = min(WARPS_MOST, max(1, block_c * block_s // PER_WARP[form]))
    extent = block_c * view.channel + block_s * view.pixel
    return Plan(form, block_c, block_s, block_g, warps, blocks, chunk, splits, extent >= INT32)


def programs(plan: Plan, shape: Sequence[int]) -> int:
    """The largest grid among the plan's launches: tiles of the last one in the ``split`` form."""
    tiles = -(-pixels_of(shape) // plan.block_s) if plan.form == "split" else 1
    return shape[0] * plan.blocks * tiles


def merging(block_g: int, per_group: int, splits: int) -> tuple[int, int, int]:
    """(block_c, block_k, warps) of the program that merges ``splits`` partial results of ``block_g`` groups."""
    block_c = power_of_two(block_g * per_group)
    block_k = max(1, min(power_of_two(splits), MERGE_TILE // block_c))
    return block_c, block_k, min(WARPS_MOST, max(1, block_c * block_k // PER_WARP["split"]))


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n`` (1 for 0)."""
    return 1 << max(0, n - 1).bit_length()


def _groups_per_program(per_group: int, groups: int, view: Strides, itemsize: int) -> int:
    """1 where each channel's pixels lie together; in channels_last so many that a pixel's row is aligned and long."""
    if view.channel != 1:
        return 1
    block_g = 1
    while block_g < groups and 2 * block_g * per_group <= ROW_CHANNELS:
        row = block_g * per_group * itemsize
        if row % 16 == 0 and row >= ROW_BYTES:
            break
        block_g *= 2
    return block_g


def _split_tile(channels: int, pixels: int, view: Strides) -> tuple[int, int]:
    if view.channel == 1:
        block_c = min(power_of_two(channels), SPLIT_CHANNELS)
        return block_c, min(power_of_two(pixels), SPLIT_TILE // block_c)
    block_s = min(power_of_two(pixels), SPLIT_TILE // 4)
    return min(power_of_two(channels), SPLIT_TILE // block_s), block_s


def pixels_of(shape: Sequence[int]) -> int:
    pixels = 1
    for size in shape[2:]:
        pixels *= size
    return pixels
