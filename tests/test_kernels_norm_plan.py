"""How group normalisation is cut into programs, for any shape, and what of it is compiled ahead of time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tdpm_ext.kernels import norm_launch, norm_plan, norm_variants
from tdpm_ext.kernels.norm_plan import FORMS, Strides, strides_of, supported

PARAMETERS = ("weight", "bias", "pre_add", "scale", "shift")


def strides_for(channels: int, pixels: int, channels_last: bool) -> Strides:
    return Strides(channels * pixels, 1, channels) if channels_last else Strides(channels * pixels, pixels, 1)


@st.composite
def calls(draw, most_pixels: int = 2**20, most_channels: int = 100, forms: tuple = (None, *FORMS)):
    """Any call of the kernels: (shape, strides, dtype, groups, processors, form)."""
    groups, per_group = draw(st.integers(1, 64)), draw(st.integers(1, most_channels))
    samples, pixels = draw(st.integers(1, 70)), draw(st.integers(1, most_pixels))
    shape = (samples, groups * per_group, pixels)
    view = strides_for(shape[1], pixels, draw(st.booleans()))
    processors = draw(st.sampled_from([1, 14, 46, 108, 170]))
    return shape, view, draw(st.sampled_from(norm_plan.DTYPES)), groups, processors, draw(st.sampled_from(forms))


def is_power_of_two(n: int) -> bool:
    return n >= 1 and n & (n - 1) == 0


@given(calls())
def test_every_plan_can_be_launched(call):
    shape, view, dtype, groups, processors, form = call
    per_group, pixels = shape[1] // groups, shape[2]
    plan = norm_plan.plan(shape, view, dtype, groups, processors, form)
    block_c, block_k, warps = norm_plan.merging(plan.block_g, per_group, plan.splits)
    assert plan.form == form or form is None
    assert all(map(is_power_of_two, (plan.block_c, plan.block_s, plan.block_g, plan.warps, block_c, block_k, warps)))
    assert 1 <= plan.warps <= 16
    assert 1 <= warps <= 16
    assert plan.wide == (plan.block_c * view.channel + plan.block_s * view.pixel >= 2**31)
    if plan.form == "split":
        assert plan.block_c * plan.block_s <= norm_plan.SPLIT_TILE
        assert plan.splits * plan.chunk >= pixels > (plan.splits - 1) * plan.chunk
        assert plan.splits == 1 or plan.chunk % plan.block_s == 0
    else:
        assert plan.block_c >= plan.block_g * per_group
        assert plan.blocks * plan.block_g >= groups > (plan.blocks - 1) * plan.block_g
        assert plan.form == "tile" or plan.block_c * plan.block_s <= max(norm_plan.LOOP_TILE, plan.block_c)
    if form is None and plan.form != "split":
        assert plan.block_c * plan.block_s <= {"tile": norm_plan.TILE_MOST, "loop": norm_plan.LOOP_TILE}[plan.form]
    if plan.form == "tile":
        assert plan.block_s >= pixels


@given(calls(most_pixels=3000, most_channels=12))
def test_every_element_is_written_exactly_once(call):
    shape, view, dtype, groups, processors, form = call
    assume(math.prod(shape) <= 2**19)
    chosen = norm_launch.Call(shape, view, view, dtype, groups, processors=processors, form=form)
    launches = norm_launch.launches(chosen)
    if len(launches) == 1:
        assert coverage(launches[0], shape, 1, shape[2]) == (1, 1)
        return
    part, merge, apply = launches
    assert norm_launch.scratch(chosen)["parts"] == (2, shape[0], part.numbers["splits"], shape[1])
    assert coverage(part, shape, part.numbers["splits"], part.numbers["chunk"]) == (1, 1)
    assert coverage(merge, shape, 1, shape[2]) == (1, 1)
    assert coverage(apply, shape, apply.numbers["tiles"], apply.constants["BLOCK_S"]) == (1, 1)


def coverage(launch: norm_launch.Launch, shape: tuple, columns: int, width: int) -> tuple[int, int]:
    """How often the programs, each ``width`` pixels wide, cover an element: at least, at most."""
    constants, blocks = launch.constants, launch.numbers["blocks"]
    own = constants["PER_GROUP"] * constants["BLOCK_G"] if "PER_GROUP" in constants else constants["BLOCK_C"]
    assert own <= constants["BLOCK_C"]
    times = torch.zeros(shape, dtype=torch.int32)
    for program in range(launch.grid):
        row, first = program // blocks, program % blocks * own
        last = first + own if constants["EVEN"] else min(first + own, shape[1])
        assert last <= shape[1]
        start = row % columns * width
        times[row // columns, first:last, start : start + width] += 1
    return int(times.min()), int(times.max())


@given(st.data())
def test_strides_are_taken_only_if_they_address_every_element(data):
    rank = data.draw(st.integers(2, 5))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    axes = data.draw(st.permutations(range(rank)))
    stored = torch.arange(math.prod(shape)).reshape([shape[axis] for axis in axes])
    x = stored.permute([axes.index(axis) for axis in range(rank)])[:, :: data.draw(st.integers(1, 2))]
    view = strides_of(x.shape, x.stride())
    contiguous = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    if isinstance(view, str):
        assert not contiguous
        return
    assert 1 in (view.channel, view.pixel)
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    n, c, s = torch.meshgrid(*(torch.arange(size) for size in flat.shape), indexing="ij")
    offsets = x.storage_offset() + n * view.sample + c * view.channel + s * view.pixel
    assert torch.equal(stored.flatten()[offsets], flat)


@pytest.mark.parametrize("shape", [(0, 512, 65536), (1, 512, 0), (2, 0, 7)])
def test_nothing_is_taken_whatever_its_shape(shape):
    assert supported(shape, torch.empty(shape).stride(), torch.float16, 32) == []


def test_a_group_too_large_for_the_merging_program_is_refused():
    channels = 2 * norm_plan.GROUP_MOST
    assert supported((1, channels, 2, 2), (4 * channels, 4, 2, 1), torch.float16, 2) == []
    (reason,) = supported((1, channels, 2, 2), (4 * channels, 4, 2, 1), torch.float16, 1)
    assert reason == f"{channels} channels in a group; at most {channels // 2}"


def test_a_grid_too_large_is_refused():
    shape = (2**31 // 64, 128, 2)
    (reason,) = supported(shape, (256, 2, 1), torch.float16, 128)
    assert "needs more than 2147483647 programs" in reason


@pytest.mark.parametrize(
    ("shape", "channels_last", "form"),
    [
        ((2, 1280, 64), False, "tile"),  # SD1.5's middle: one program holds a group
        ((2, 320, 4096), False, "loop"),  # SD1.5's first: 64 programs, 80 kB each
        ((2, 320, 4096), True, "split"),  # the same in channels_last: only 16 programs
        ((64, 320, 4096), True, "loop"),  # pictures enough to fill the GPU
        ((1, 128, 512 * 512), False, "split"),  # a VAE's decoder: a million elements a group
        ((1, 128, 512 * 512), True, "split"),
    ],
)
def test_forms_chosen_for_known_layers(shape, channels_last, form):
    view = strides_for(*shape[1:], channels_last)
    assert norm_plan.plan(shape, view, torch.float16, 32, 108).form == form


# What is compiled ahead of time


@pytest.mark.parametrize("cc", [80, 86, 89, 90, 100, 120])
def test_every_kernel_is_compiled_in_every_dtype_and_memory_format(cc):
    variants = norm_variants.aot_variants(cc)
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names) <= 48
    for kernel in ("tile", "loop", "part", "merge", "apply"):
        for layout in ("nchw", "nhwc"):
            for dtype in ("fp16", "bf16", "fp32"):
                found = [v for v in variants if v.name.startswith(f"group_norm_{kernel}/{layout}/{dtype}/")]
                # in float32, what loops in half precision is more than one program should read
                assert found or (kernel, layout, dtype) == ("loop", "nchw", "fp32")
                assert all(v.vector_loads > 0 for v in found if kernel != "merge" and "odd" not in v.name)


def test_odd_layers_are_compiled_without_alignment():
    odd = [v for v in norm_variants.aot_variants(90) if v.name.endswith("/odd")]
    assert len(odd) == 2
    for variant in odd:
        assert set(variant.aligned) <= {"x", "y", *(name + "_sample" for name in PARAMETERS)}
        assert all(variant.constexprs[name] is None for name in PARAMETERS)
