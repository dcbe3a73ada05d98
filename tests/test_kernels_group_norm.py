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
from torch import Tensor
from torch.nn import functional

from tdpm_ext.kernels import norm_plan, reference
from tdpm_ext.kernels.norm_plan import FORMS
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


@pytest.mark.parametrize("alone", [False, True], ids=["with parameters", "alone"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_no_worse_than_torchs(norm, form, channels_last, dtype, alone):
    # Alone, torch rounds once too. With parameters it rounds after each operation, and ours still once.
    names, act = ((), None) if alone else (NAMES, "silu")
    p = problem((2, 20, (9, 7), 2), DTYPES[dtype], channels_last, names, act)
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
    "lanes with the same count": (KERNELS, "last - first - s +", "last - first - 0 * s +"),
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
