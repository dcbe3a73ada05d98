"""The group norm kernels in Triton's interpreter, against the definition in float64 and against torch's own.

Inputs and outputs lie in poisoned storage with gaps (see `interpreted`), every sample has parameters of its own, and
every shape says what it is there for.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tdpm_ext.kernels import norm_launch, norm_plan, norm_variants, reference
from tdpm_ext.kernels.norm_plan import FORMS, Strides, strides_of, supported
from tests.interpreted import canary, changed, check_canary, load_interpreted

FOLDER = Path(norm_plan.__file__).parent
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
FP32_BAR = 1e-5  # of the largest value, on ordinary data
NAMES = ("weight", "bias", "pre_add", "scale", "shift")
# samples, channels, spatial, groups
SHAPES = {
    "ten channels a group, odd size": (3, 20, (9, 7), 2),
    "one pixel": (3, 12, (1, 1), 3),
    "a line, five channels a group": (2, 15, (11,), 3),
    "a volume": (2, 8, (3, 2, 5), 2),
    "more groups than one program takes": (2, 30, (3, 3), 10),
}
MANY_TILES = {"tile": (2, 20, (9, 7), 2), "loop": (2, 20, (17, 19), 2), "split": (2, 20, (33, 35), 2)}


@pytest.fixture(scope="module")
def norm() -> ModuleType:
    return load_interpreted("triton_norm")


@dataclasses.dataclass
class Problem:
    """One call's arguments."""

    x: Tensor
    groups: int
    given: dict[str, Tensor]
    act: str | None = None
    eps: float = 1e-2  # large, so that leaving it out shows

    def parameters(self) -> tuple[Tensor | None, ...]:
        return tuple(self.given.get(name) for name in NAMES)

    def exact(self) -> Tensor:
        given = {name: t.double() for name, t in self.given.items()}
        return reference.group_norm(self.x.double(), self.groups, eps=self.eps, act=self.act, **given)

    def torchs(self) -> Tensor:
        """The same out of torch's operations, each in x's dtype, contiguous."""
        x, given = self.x.contiguous(), {name: t for name, t in self.given.items()}
        rows = {name: given[name].reshape(*x.shape[:2], *[1] * (x.ndim - 2)) for name in NAMES[2:] if name in given}
        x = x + rows["pre_add"] if "pre_add" in rows else x
        y = functional.group_norm(x, self.groups, given.get("weight"), given.get("bias"), self.eps)
        y = y * (1 + rows["scale"]) if "scale" in rows else y
        y = y + rows["shift"] if "shift" in rows else y
        return {None: lambda t: t, "silu": functional.silu, "gelu": functional.gelu}[self.act](y)


def problem(
    shape: tuple,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    names: tuple[str, ...] = NAMES,
    act: str | None = "silu",
    mean: float = 3.0,
    std: float = 2.0,
    seed: int = 0,
) -> Problem:
    samples, channels, spatial, groups = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = (randn(samples, channels, *spatial) * std + mean).to(dtype)
    sizes = {name: (channels,) if name in ("weight", "bias") else (samples, channels) for name in NAMES}
    given = {name: randn(*size).to(dtype) for name, size in sizes.items()}
    return Problem(in_layout(x, channels_last), groups, {name: given[name] for name in names}, act)


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def run(norm: ModuleType, form: str | None, p: Problem, out_dtype: torch.dtype | None = None) -> Tensor:
    """The kernels' result, all in poisoned storage with gaps between samples, and between channels or pixels."""
    gaps = (0, -1 if p.x.stride(1) == 1 else 1) if p.x.ndim > 2 else (0,)
    x = canary(p.x, gaps=gaps)
    out = canary(p.x.to(out_dtype or p.x.dtype), gaps=gaps, poisoned=True)
    given = {name: canary(t) for name, t in p.given.items()}
    norm._group_norm_into(out, x, p.groups, tuple(given.get(name) for name in NAMES), p.eps, p.act, form)
    check_canary(out)
    check_canary(x, *given.values(), written=False)
    return out


def error(y: Tensor, exact: Tensor) -> float:
    """Largest absolute error in units of the largest value."""
    return float((y.double() - exact).abs().max() / exact.abs().max())


# What the kernels compute


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_definition(norm, form, channels_last, shape):
    p = problem(shape, channels_last=channels_last, act="gelu")
    assert error(run(norm, form, p), p.exact()) <= FP32_BAR


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
def test_several_tiles_are_merged(norm, form, channels_last):
    p = problem(MANY_TILES[form], channels_last=channels_last)
    assert error(run(norm, form, p), p.exact()) <= FP32_BAR


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_no_worse_than_torchs(norm, form, channels_last, dtype):
    p = problem(SHAPES["ten channels a group, odd size"], DTYPES[dtype], channels_last)
    exact, bar = p.exact(), 1.5 * error(p.torchs(), p.exact())
    if dtype == "bf16":
        # The interpreter cuts bfloat16 off where a GPU rounds: what is computed is held to the bar, rounded here, and
        # what is stored may be one more unit in the last place off.
        assert error(run(norm, form, p, torch.float32).bfloat16(), exact) <= bar
        bar += torch.finfo(torch.bfloat16).eps
    assert error(run(norm, form, p), exact) <= bar


@pytest.mark.parametrize("mean", [0, 100, 1000])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
def test_a_mean_far_from_zero_costs_no_digits(norm, form, channels_last, mean):
    p = problem(MANY_TILES[form], channels_last=channels_last, names=("weight", "bias"), act=None, mean=mean, std=1.0)
    ours = error(run(norm, form, p), p.exact())
    assert ours <= 1e-6
    assert ours <= max(2 * error(p.torchs(), p.exact()), 3e-7)


@pytest.mark.parametrize("form", FORMS)
def test_a_first_pixel_far_from_the_rest_costs_few_digits(norm, form):
    p = problem(MANY_TILES[form], names=(), act=None, mean=0.0, std=1.0)
    p.x[:, :, 0, 0] = 1e4
    assert error(run(norm, form, p), p.exact()) <= FP32_BAR


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
def test_values_of_300_do_not_overflow_in_half_precision(norm, form, channels_last):
    p = problem(SHAPES["ten channels a group, odd size"], torch.float16, channels_last, names=(), act=None)
    p.x.copy_(torch.where(p.x > 3, 300.0, -300.0))
    assert error(run(norm, form, p), p.exact()) <= 1.5 * error(p.torchs(), p.exact())


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("form", FORMS)
def test_a_constant_becomes_the_bias(norm, form, value):
    p = problem(SHAPES["ten channels a group, odd size"], names=("weight", "bias"), act=None)
    p.x.fill_(value)
    assert torch.equal(run(norm, form, p), p.given["bias"].reshape(1, -1, 1, 1).expand(p.x.shape))


@pytest.mark.parametrize("names", [(), *((name,) for name in NAMES), ("pre_add", "scale", "shift")], ids=" ".join)
@pytest.mark.parametrize("form", ["tile", "split"])
def test_every_parameter_can_be_left_out(norm, form, names):
    p = problem(SHAPES["more groups than one program takes"], channels_last=True, names=names, act=None)
    assert error(run(norm, form, p), p.exact()) <= FP32_BAR


def test_parameters_of_a_mapper_are_read_where_they_are(norm):
    p = problem((3, 12, (4, 5), 3), names=("pre_add",), act=None)
    mapped = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    scale, shift = mapped.chunk(2, dim=-1)
    row = p.given["pre_add"][:1]
    ours = norm.group_norm(p.x, 3, pre_add=row, scale=scale, shift=shift[:, :, None, None])
    expected = reference.group_norm(p.x.double(), 3, pre_add=row, scale=scale, shift=shift)
    assert error(ours, expected) <= FP32_BAR


@pytest.mark.parametrize("form", FORMS)
def test_a_broken_group_breaks_no_other(norm, form):
    p = problem((2, 16, (3, 3), 8), channels_last=True, act=None)
    p.x[1, 5] = math.nan  # the third group of the second sample
    broken = run(norm, form, p).isnan()
    expected = torch.zeros_like(broken)
    expected[1, 4:6] = True
    assert torch.equal(broken, expected)


def test_the_call_takes_what_empty_like_allocates(norm):
    for channels_last in (False, True):
        p = problem((2, 12, (5, 4), 3), channels_last=channels_last)
        part = p.x[:, 3:9]
        y = norm.group_norm(part, 3, act="gelu")
        assert y.stride() == torch.empty_like(part).stride()
        assert error(y, reference.group_norm(part.double(), 3, act="gelu")) <= FP32_BAR
    assert norm.group_norm(torch.empty(0, 4, 3, 3), 2).shape == (0, 4, 3, 3)


def test_the_call_says_why_it_refuses(norm):
    with pytest.raises(ValueError, match="spatial axes of strides .* do not merge"):
        norm.group_norm(torch.ones(2, 4, 3, 5).transpose(2, 3), 2)
    with pytest.raises(ValueError, match="x is float64; taken are float16, bfloat16, float32"):
        norm.group_norm(torch.ones(2, 4, 3, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match="a parameter is float64"):
        norm.group_norm(torch.ones(2, 4, 3), 2, torch.ones(4, dtype=torch.float64))


def test_wide_offsets_reach_further(tmp_path):
    (tmp_path / "norm_kernels.py").write_text((FOLDER / "norm_kernels.py").read_text(encoding="utf-8") + PROBE)
    probe = load_interpreted("norm_kernels", tmp_path).probe
    stride = 2**29 + 16
    out = torch.zeros(8, 4, dtype=torch.int64)
    for wide in (True, False):
        probe[(1,)](out, stride, 1, BLOCK_C=8, BLOCK_S=4, WIDE=wide)
        right = torch.equal(out, torch.arange(8)[:, None] * stride + torch.arange(4)[None, :])
        assert right == wide


PROBE = """

@triton.jit
def probe(out, stride_c, stride_s, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr):
    offsets = _offsets(stride_c, stride_s, BLOCK_C, BLOCK_S, WIDE)
    tl.store(out + tl.arange(0, BLOCK_C)[:, None] * BLOCK_S + tl.arange(0, BLOCK_S)[None, :], offsets)
"""


# What would go unnoticed without these tests: each change breaks one thing, and must be caught

FAR = {"names": (), "act": None, "mean": 1000.0, "std": 1.0}
KERNELS, LAUNCH = "norm_kernels.py", "norm_launch.py"
CHANGES = {
    "no mask over pixels": (
        KERNELS,
        "(tl.arange(0, BLOCK_S) < pixels)[None, :]",
        "(tl.arange(0, BLOCK_S) >= 0)[None, :]",
    ),
    "no mask over channels": (KERNELS, "c_in = c < PER_BLOCK", "c_in = c >= 0"),
    "scale read for shift": (KERNELS, "tl.load(shift + n * shift_sample", "tl.load(scale + n * scale_sample"),
    "one sample's scale for all": (KERNELS, "scale + n * scale_sample", "scale + 0 * scale_sample"),
    "one sample's pre_add for all": (KERNELS, "pre_add + n * pre_add_sample", "pre_add + 0 * pre_add_sample"),
    "pre_add after the mean": (KERNELS, "offset += added", "offset += 0.0 * added"),
    "no eps": (KERNELS, "pixels + eps", "pixels"),
    "no activation": (KERNELS, 'if ACT == "silu"', 'if ACT == "relu"'),
    "half the grid": (
        LAUNCH,
        "call.shape[0] * chosen.blocks, values",
        "(call.shape[0] * chosen.blocks + 1) // 2, values",
    ),
}
CHANGES_FAR = {
    "channels not measured from a pixel": (
        KERNELS,
        "mask=c_in, other=0.0).to(tl.float32)\n\n",
        "mask=c_in, other=0.0) * 0.0\n\n",
    ),
    "a mean of one float": (KERNELS, "term - lost * factor", "term"),
}
CHANGES_PARTS = {
    "lanes with the same count": (KERNELS, "last - first - s + (BLOCK_S - 1)", "last - first + (BLOCK_S - 1)"),
    "parts with the same count": (KERNELS, "tl.minimum(pixels - k * chunk, chunk)", "chunk + 0 * k"),
    "parts without their spread": (KERNELS, "within + seen * apart * apart", "within"),
    "half the tiles": (LAUNCH, "samples * tiles * chosen.blocks", "samples * tiles * chosen.blocks // 2"),
}


def caught(norm: ModuleType, form: str, p: Problem, bar: float) -> bool:
    try:
        return not error(run(norm, form, p), p.exact()) <= bar  # also where it is NaN
    except AssertionError:
        return True


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about the wrong numbers
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_wrong_kernel_is_caught(tmp_path, change):
    norm = load_interpreted("triton_norm", changed(tmp_path, *change))
    assert caught(norm, "tile", problem(SHAPES["ten channels a group, odd size"]), FP32_BAR)


@pytest.mark.parametrize("change", CHANGES_FAR.values(), ids=CHANGES_FAR)
def test_lost_digits_are_caught(tmp_path, change):
    norm = load_interpreted("triton_norm", changed(tmp_path, *change))
    assert caught(norm, "tile", problem(SHAPES["ten channels a group, odd size"], **FAR), 1e-6)


@pytest.mark.parametrize("change", CHANGES_PARTS.values(), ids=CHANGES_PARTS)
def test_wrong_merging_is_caught(tmp_path, change):
    norm = load_interpreted("triton_norm", changed(tmp_path, *change))
    assert caught(norm, "split", problem((1, 4, (33, 35), 2), mean=0.0), FP32_BAR)


# How the work is cut up


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
    most = norm_plan.PER_WARP[plan.form] * plan.warps
    assert form is not None or plan.block_c * plan.block_s <= max(most, norm_plan.TILE_MOST)


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
    n, c, s = torch.meshgrid(*(torch.arange(size) for size in x.flatten(2).shape), indexing="ij") if rank > 2 else (
        *torch.meshgrid(torch.arange(x.shape[0]), torch.arange(x.shape[1]), indexing="ij"), torch.tensor(0)
    )  # fmt: skip
    offsets = x.storage_offset() + n * view.sample + c * view.channel + s * view.pixel
    assert torch.equal(stored.flatten()[offsets].reshape(x.shape), x)


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
        assert set(variant.aligned) <= {"x", "y", *(name + "_sample" for name in NAMES)}
        assert all(variant.constexprs[name] is None for name in NAMES)


@pytest.mark.gpu
def test_on_a_gpu_every_form_is_the_definition_and_repeats_itself():
    triton_norm = pytest.importorskip("tdpm_ext.kernels.triton_norm")
    dtypes = {torch.float32: FP32_BAR, **dict.fromkeys(DTYPES.values())}
    for form, shape in [*MANY_TILES.items(), *((form, shape) for form in FORMS for shape in SHAPES.values())]:
        for channels_last in (False, True):
            for dtype, bar in dtypes.items():
                for act in (None, "silu", "gelu"):
                    p = problem(shape, dtype, channels_last, act=act)
                    p = Problem(p.x.cuda(), p.groups, {name: t.cuda() for name, t in p.given.items()}, act)
                    y = run(triton_norm, form, p)
                    assert error(y, p.exact()) <= (bar or 1.5 * error(p.torchs(), p.exact()))
                    assert torch.equal(y, run(triton_norm, form, p))
