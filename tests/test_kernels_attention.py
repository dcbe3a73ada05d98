"""The Triton attention in the interpreter against float64: values, masks, strides, and not one access outside.

bfloat16 is not run here: the interpreter's products of bfloat16 are wrong. Its kernels differ from those of float16 in
the type of loads, stores and products only; that they compile and use tensor cores is held by the compile gate.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tdpm_ext.kernels import attention_tiles as tiling
from tdpm_ext.kernels import reference
from tests.interpreted import canary, changed, check_canary, load_interpreted

HEAD_DIMS = list(tiling.PARTS)
HALF, SINGLE = torch.float16, torch.float32
ARCHS = (80, 86, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def attn():
    return load_interpreted("triton_attn")


def inputs(q_len, kv_len, head_dim, dtype=SINGLE, batch=2, heads=3, seed=0):
    """Random q, k, v inside of poison: after each row, each head and each sample."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, head_dim) for length in (q_len, kv_len, kv_len)]
    return [canary(torch.randn(s, generator=generator).to(dtype), gaps=(0, 1, 2)) for s in shapes]


def run(module, q, k, v, *, scale=None, mask=None):
    """Attention into a poisoned output; what was written outside, or not at all, is an error."""
    out = canary(torch.empty_like(q), gaps=(0, 1, 2), poisoned=True)
    module._attention_into(out, q, k, v, scale, mask)
    check_canary(out)
    return out


def check(out, q, k, v, *, scale=None, mask=None):
    """float32: 1e-5 of the largest value. Half precision: FlashAttention's rule, with 1.5 in place of its 2.

    The rule (flash-attention's tests): the error may be so many times that of torch's own operation in the same dtype,
    plus what rounding the result once costs.
    """
    exact_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = reference.attention(q.double(), k.double(), v.double(), scale=scale, mask=exact_mask)
    error = float((out.double() - exact).abs().max())
    if out.dtype == SINGLE:
        assert error <= 1e-5 * max(1.0, float(exact.abs().max()))
        return
    rounded = exact.to(out.dtype)
    rounding = 2 * float((rounded + 0.3 - 0.3 - rounded).abs().max())
    theirs = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    worst = torch.nan_to_num(theirs.double() - exact).abs().max()  # torch gives NaN for rows that attend to nothing
    assert error <= 1.5 * float(worst) + rounding


# Values


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dimension(attn, head_dim, dtype):
    for lengths in ((128, 64), (130, 77)):  # tiles that are filled, without bounds; a tile more, nearly empty
        q, k, v = inputs(*lengths, head_dim, dtype, batch=1, heads=1)
        check(run(attn, q, k, v), q, k, v)


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("q_len", "kv_len"),
    [
        (1, 1),  # softmax of one score: the value itself
        (5, 1),
        (64, 77),  # a prompt: whole tiles of queries, ragged keys
        (33, 128),  # ragged queries, whole tiles of keys
        (64, 64),  # neither is ragged: no bounds are compiled in
    ],
)
def test_lengths(attn, q_len, kv_len, dtype):
    q, k, v = inputs(q_len, kv_len, 40, dtype)
    out = run(attn, q, k, v)
    check(out, q, k, v)
    if kv_len == 1:
        assert torch.equal(out, v.expand_as(q))


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3])
def test_any_scale(attn, scale):
    # 1 is that of cosine-similarity attention; a negative one turns the order of the scores around
    q, k, v = inputs(20, 77, 32)
    check(run(attn, q, k, v, scale=scale), q, k, v, scale=scale)


def test_scores_far_beyond_the_range_of_exp(attn):
    q, k, v = inputs(20, 77, 64, HALF, batch=1)
    q.mul_(200), k.mul_(20)  # scores up to some thousands: as they are, exp2 would be inf
    check(run(attn, q, k, v), q, k, v)


def test_runs_twice_give_the_same_bits(attn):
    q, k, v = inputs(33, 77, 80, HALF)
    assert torch.equal(run(attn, q, k, v), run(attn, q, k, v))


def test_nothing_to_attend_to_gives_zero(attn):
    q, k, v = inputs(5, 0, 64)
    assert torch.equal(run(attn, q, k, v), torch.zeros(q.shape))
    assert attn.attention(q[:0], k[:0], v[:0]).shape == (0, 3, 5, 64)


# Masks


def bool_mask(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(2, 3, 33, 77), (2, 1, 1, 77), (1, 3, 33, 1), (33, 77)], ids=str)
def test_bool_masks(attn, shape, dtype):
    q, k, v = inputs(33, 77, 40, dtype)
    # what lies behind each row says True: a key that is not there would count
    mask = torch.cat([bool_mask(*shape), torch.ones(*shape[:-1], 60, dtype=torch.bool)], -1)[..., : shape[-1]]
    check(run(attn, q, k, v, mask=mask), q, k, v, mask=mask)


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(2, 3, 33, 77), (2, 1, 1, 77), (33, 77)], ids=str)
def test_added_masks(attn, shape, dtype):
    q, k, v = inputs(33, 77, 80, dtype)
    mask = canary(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype), gaps=(-1,))
    check(run(attn, q, k, v, mask=mask), q, k, v, mask=mask)


def test_large_negative_mask_of_k_diffusion(attn):
    q, k, v = inputs(20, 77, 64)
    mask = torch.where(bool_mask(2, 1, 1, 77), 0.0, -10000.0)
    check(run(attn, q, k, v, mask=mask), q, k, v, mask=mask)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_rows_that_may_attend_to_nothing_are_zero(attn, kind):
    q, k, v = inputs(33, 77, 40, HALF)
    mask = bool_mask(2, 1, 33, 77)
    mask[:, :, ::3] = False
    mask[:, :, 1, :64] = False  # nothing in the first tiles of keys, something later
    given = mask if kind == "bool" else torch.zeros(mask.shape, dtype=HALF).masked_fill_(~mask, -math.inf)
    out = run(attn, q, k, v, mask=given)
    assert out[:, :, ::3].abs().max() == 0
    check(out, q, k, v, mask=given)


# Strides


def packed(length, head_dim, dtype=SINGLE):
    """q, k, v as views of one projection [B, L, 3, H, D]."""
    qkv = canary(torch.randn(2, length, 3, 2, head_dim, generator=torch.Generator().manual_seed(2)).to(dtype))
    return [t.transpose(1, 2) for t in qkv.unbind(2)]


def nchw(length, head_dim, dtype=SINGLE):
    """q, k, v as k-diffusion's SelfAttention2d cuts them from a contiguous [B, C, H, W]: the sequence is contiguous."""
    qkv = canary(torch.randn(2, 6 * head_dim, length, generator=torch.Generator().manual_seed(2)).to(dtype))
    return qkv.unflatten(1, (6, head_dim)).transpose(2, 3).chunk(3, dim=1)


def channels_last(length, head_dim, dtype=SINGLE):
    """The same of a channels_last [B, C, H, W]: the head dimension is contiguous."""
    qkv = torch.randn(2, length, 6 * head_dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    return canary(qkv).unflatten(2, (6, head_dim)).permute(0, 2, 1, 3).chunk(3, dim=1)


def shifted(length, head_dim, dtype=SINGLE):
    """Not aligned to 16 bytes: an element later than they would be."""
    flat = [torch.randn(2 * 2 * length * head_dim + 1).to(dtype) for _ in range(3)]
    return [t[1:].view(2, 2, length, head_dim) for t in flat]


def spread(length, head_dim, dtype=SINGLE):
    """Every second element along both axes: no stride is 1."""
    return [torch.randn(2, 2, 2 * length, 2 * head_dim).to(dtype)[:, :, ::2, ::2] for _ in range(3)]


def expanded(length, head_dim, dtype=SINGLE):
    """One sample's keys and values for all samples: stride 0."""
    q, k, v = packed(length, head_dim, dtype)
    return q, k[:1].expand_as(k), v[:1].expand_as(v)


LAYOUTS = [packed, nchw, channels_last, shifted, spread, expanded]


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_read_in_place(attn, layout, dtype, monkeypatch):
    q, k, v = layout(64, 40, dtype)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a copy was made"))
    out = attn.attention(q, k, v)
    assert out.stride() == torch.empty_like(q).stride()
    check(out, q, k, v)
    check(run(attn, q, k, v), q, k, v)


def test_output_of_packed_inputs_is_joined_without_a_copy(attn):
    q, k, v = packed(16, 32)
    out = attn.attention(q, k, v)
    assert out.transpose(1, 2).reshape(2, 16, 64).data_ptr() == out.data_ptr()


@pytest.mark.parametrize(
    ("layout", "dtype", "units", "align"),
    [
        (packed, HALF, [1, 1, 1, 1], 8),
        (packed, SINGLE, [1, 1, 1, 1], 4),
        (nchw, HALF, [0, 0, 0, 0], 8),
        (channels_last, HALF, [1, 1, 1, 1], 8),
        (shifted, HALF, [1, 1, 1, 1], 1),
        (spread, HALF, [-1, -1, -1, 1], 1),
    ],
)
def test_layouts_that_allow_wide_loads_are_recognised(attn, layout, dtype, units, align):
    # a length of 64: in NCHW rows of another length than a multiple of 8 cannot be aligned
    tensors = [*layout(64, 40, dtype)]
    tensors.append(torch.empty_like(tensors[0]))
    assert attn._layout(*tensors)[:2] == (units, align)


@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 3),
    strides=st.tuples(*[st.integers(0, 64)] * 4),
    scaled=st.sampled_from([1, 8]),
    offset=st.sampled_from([0, 1, 8]),
)
def test_strides_handed_over_are_those_of_the_tensor(sizes, strides, scaled, offset):
    from tdpm_ext.kernels import triton_attn

    batch, heads, length = sizes
    strides = [stride * scaled for stride in strides[:3]] + [max(1, strides[3])]
    storage = torch.empty(offset + 4 * 64 * 8 * 3 + 64 * 32, dtype=HALF)
    t = storage.as_strided((batch, heads, length, 32), strides, offset)
    (unit,), align, told = triton_attn._layout(t)
    assert align in (1, 8)
    for axis, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if axis == 2 + unit and unit >= 0:
            assert stride == 1 or size == 1
        elif size > 1:
            assert told[axis] * align == stride
    assert align == 1 or (t.data_ptr() % 16 == 0 and unit >= 0)


def test_offsets_beyond_32_bits_take_the_64_bit_path(attn, monkeypatch):
    q, k, v = packed(33, 40)
    mask = bool_mask(2, 2, 33, 33)
    tiles = tiling.tiles_for(40, 4, 33, 33, True)
    assert attn._reach(tiles, (q, k, v), mask.stride()[:3]) < 2**31
    far = torch.empty_strided((1, 1, 33, 40), (0, 0, 2**27, 1), device="meta")
    assert attn._reach(tiles, (q, far, v), mask.stride()[:3]) >= 2**31
    assert attn._reach(tiles, (q, k, v), (0, 0, 2**26)) >= 2**31
    narrow = run(attn, q, k, v, mask=mask)
    monkeypatch.setattr(attn, "INT32", 1)  # as if these tensors reached so far
    assert torch.equal(run(attn, q, k, v, mask=mask), narrow)


# Tiles and limits


@given(
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from(list(tiling.TYPES)),
    q_len=st.integers(1, 1 << 16) | st.integers(1, 64).map(lambda n: 64 * n),
    kv_len=st.integers(1, 1 << 16) | st.integers(1, 64).map(lambda n: 64 * n),
    masked=st.booleans(),
)
def test_tiles_are_legal_and_known_to_the_compile_gate(head_dim, dtype, q_len, kv_len, masked):
    from tdpm_ext.kernels import triton_attn

    tiles = tiling.tiles_for(head_dim, dtype.itemsize, q_len, kv_len, masked)
    first, rest = tiling.PARTS[head_dim]
    for size in (tiles.block_m, tiles.block_n, first, *[rest] * (rest > 0)):
        assert size >= 16 and size & (size - 1) == 0  # 16 is the least length of a product
    assert 0 <= first + rest - head_dim < 16
    gate = {
        (v.constexprs["BLOCK_M"], v.constexprs["BLOCK_N"], v.num_warps, v.num_stages)
        for v in triton_attn.aot_variants(80)
        if v.constexprs["DIM"] == head_dim and v.signature["q"] == f"*{tiling.TYPES[dtype]}"
    }
    assert (tiles.block_m, tiles.block_n, tiles.num_warps, tiles.num_stages) in gate


@given(batch=st.integers(1, 64), heads=st.integers(1, 32), q_len=st.integers(1, 1 << 14), half=st.booleans())
def test_the_grid_covers_every_query_once(batch, heads, q_len, half):
    launched = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.update(constants, grid=grid, tiles=args[9], heads=args[8])

    from tdpm_ext.kernels import triton_attn

    q = torch.empty((batch, heads, q_len, 40), dtype=HALF if half else SINGLE, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_attn, "attention_kernel", Kernel())
        triton_attn._attention_into(q, q, q, q, None, None)
    (programs,) = launched["grid"]
    tiles, block = launched["tiles"], launched["BLOCK_M"]
    assert programs == tiles * batch * heads and launched["heads"] == heads
    assert (tiles - 1) * block < q_len <= tiles * block
    assert launched["EVEN_M"] == (q_len % block == 0)


@pytest.mark.parametrize("cc", ARCHS)
def test_variants_cover_every_head_dimension_and_dtype(cc):
    from tdpm_ext.kernels import triton_attn

    variants = triton_attn.aot_variants(cc)
    assert len({variant.name for variant in variants}) == len(variants)
    covered = {(v.constexprs["DIM"], v.signature["q"], v.constexprs["MASK"]) for v in variants}
    types = [f"*{name}" for name in tiling.TYPES.values()]
    assert covered == {(dim, kind, mask) for dim in HEAD_DIMS for kind in types for mask in (0, 2)}
    assert all(v.uses_mma == (v.signature["q"] != "*fp32") and v.vector_loads > 0 for v in variants)


def test_products_of_the_two_parts_are_added_not_chained(tmp_path, monkeypatch):
    """Two products into one accumulator are compiled wrongly for compute capability 10.3 by Triton 3.6 to 3.8.

    Triton turns the plain sum of two products into just that, so look at what it makes of the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from tdpm_ext.kernels import triton_attn

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (variant,) = [v for v in triton_attn.aot_variants(100) if v.name == "attention/40/fp16/self/128x64"]
    source = triton.compiler.ASTSource(variant.kernel, variant.signature, dict(variant.constexprs))
    compiled = triton.compile(source, target=GPUTarget("cuda", 100, 32), options={"enable_fp_fusion": True})
    products = re.findall(r"(%\S+) = tt\.dot (%\S+), (%\S+), (%\S+?),? ", compiled.asm["ttir"])
    assert len(products) == 4
    assert not {result for result, *_ in products} & {accumulator for *_, accumulator in products}


def meta(*shape, dtype=HALF):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_what_is_supported_has_no_reasons_against_it():
    q, k = meta(2, 8, 4096, 40), meta(2, 8, 77, 40)
    for mask in (None, meta(2, 1, 1, 77, dtype=torch.bool), meta(77), meta(4096, 77, dtype=SINGLE)):
        assert tiling.supported(q, k, k, mask, cc=80) == []


@pytest.mark.parametrize(
    ("q", "k", "mask", "cc", "reason"),
    [
        (meta(1, 1, 4, 64), meta(1, 1, 4, 64), None, 75, "needs compute capability 8.0, this GPU has 7.5"),
        (meta(1, 1, 4, 48), meta(1, 1, 4, 48), None, 80, "not 48"),
        (meta(1, 4, 64), meta(1, 4, 64), None, 80, "each must be [B, H, L, D]"),
        (meta(1, 1, 4, 64, dtype=torch.float64), meta(1, 1, 4, 64, dtype=torch.float64), None, 80, "torch.float64"),
        (meta(1, 1, 4, 64), meta(1, 1, 4, 64, dtype=SINGLE), None, 80, "torch.float16, torch.float32"),
        (meta(2, 1, 4, 64), meta(1, 1, 4, 64), None, 80, "(2, 1, 4, 64), (1, 1, 4, 64)"),
        (meta(1, 1, 4, 64), meta(1, 1, 4, 64), meta(4, 5), 80, "broadcastable to (1, 1, 4, 4)"),
        (meta(1, 1, 4, 64), meta(1, 1, 4, 64), meta(4, 4, dtype=torch.int64), 80, "the mask is torch.int64"),
        (meta(1, 1, 4, 64), meta(1, 1, 4, 64), torch.zeros(4, 4), 80, "different devices"),
        (meta(2**15, 2**10, 64, 64), meta(2**15, 2**10, 64, 64), None, 80, "queries in all"),
    ],
)
def test_what_is_not_supported_is_said(q, k, mask, cc, reason):
    (found,) = tiling.supported(q, k, k, mask, cc=cc)
    assert reason in found


def test_a_call_that_cannot_be_done_raises_with_every_reason(attn):
    t = torch.zeros(1, 1, 4, 48, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64.*not 48.*mask has shape"):
        attn.attention(t, t, t, mask=torch.zeros(3, 3))


# On a GPU


@pytest.fixture
def compiled():
    from tdpm_ext.kernels import triton_attn

    return triton_attn


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(tiling.TYPES), ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_compiled_every_head_dimension(compiled, head_dim, dtype):
    for lengths in ((256, 512), (4096, 77), (130, 77), (1, 1)):
        q, k, v = (t.cuda() for t in inputs(*lengths, head_dim, dtype))
        out = compiled.attention(q, k, v)
        check(out, q, k, v)
        assert torch.equal(out, compiled.attention(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(tiling.TYPES), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_strides(compiled, layout, dtype):
    for length in (64, 256):
        q, k, v = (t.to("cuda") for t in layout(length, 40, dtype))
        check(compiled.attention(q, k, v), q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(tiling.TYPES), ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_compiled_masks(compiled, head_dim, dtype):
    q, k, v = (t.cuda() for t in inputs(100, 77, head_dim, dtype))
    mask = bool_mask(2, 1, 100, 77).cuda()
    mask[:, :, ::3] = False
    for allowed in (mask, torch.zeros(mask.shape, dtype=dtype, device="cuda").masked_fill_(~mask, -math.inf)):
        out = compiled.attention(q, k, v, mask=allowed)
        assert out[:, :, ::3].abs().max() == 0
        check(out, q, k, v, mask=allowed)


# A fault in the kernel is found


FAULTS = {  # what goes wrong: (line of the kernel, what stands there instead)
    "keys beyond the end are scored": ("columns < last_column, scores", "columns <= last_column, scores"),
    "values beyond the end are read": ("v_d, present, DIM, EVEN_N, True", "v_d, present, DIM, True, True"),
    "columns beyond the head are read": ("mask=columns < DIM, other", "mask=columns < 48, other"),
    "queries beyond the end are written": ("inside = rows[:, None] < last_row", "inside = rows[:, None] <= last_row"),
    "the mask is dropped": ("!= 0, scores, float", "!= 2, scores, float"),
    "half of the grid": ("(count * batch * heads,)", "(count * batch * heads // 2,)"),
    "no rescaling": ("total = total * shrink", "total = total"),
    "no scale": ("scale * LOG2E.value", "LOG2E.value"),
    "keys of another head": ("k += _head(batch, head, k_b", "k += _head(batch, 0 * head, k_b"),
    "second part of the head left out": (", 1.0, scores)", ", 0.0, scores)"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN, which is the point
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_caught(fault, tmp_path: Path):
    faulty = load_interpreted("triton_attn", changed(tmp_path, "triton_attn.py", *FAULTS[fault]))
    with pytest.raises(AssertionError):
        for q_len, kv_len, mask in ((33, 77, None), (33, 77, bool_mask(2, 1, 33, 77)), (33, 64, None)):
            q, k, v = inputs(q_len, kv_len, 40, heads=2)
            check(run(faulty, q, k, v, mask=mask), q, k, v, mask=mask)
