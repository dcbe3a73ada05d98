"""Attention forward in Triton: non-causal, self or cross, read through any strides, written in the queries' layout.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867) in the tiling of FlashAttention-2 (Dao, arXiv 2307.08691).
What is particular here:

- Head dimensions are powers of two or sums of two: 40 = 32 + 16 (8 of them padding), 80 = 64 + 16, 96 = 64 + 32,
  160 = 128 + 32. Each part has products of its own; padded to the next power of two, they would waste a third of the
  matrix units and spill registers.
- The scale times log2(e) is folded into one multiply-subtract in front of `exp2`.
- Strides are arguments. The `*_UNIT` constants say which of them is 1, `ALIGN` that all others are multiples of 16
  bytes: so told, the compiler loads 16 bytes at a time from packed [B, L, 3, H, D] and from NCHW inputs alike.

Needs compute capability 8.0: below it Triton has no tensor-core path. float32 is computed in float32, not in TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tdpm_ext.kernels.attention_tiles import PARTS, TYPES, Tiles, tiles_for, unsupported
from tdpm_ext.kernels.variant import Variant

LOG2E = tl.constexpr(1.4426950408889634)
NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2
INT32 = 2**31
SIZES = ["q_len", "kv_len", "heads", "tiles"]
STRIDES = [f"{tensor}_{axis}" for tensor in "qkvo" for axis in "bhld"] + ["m_b", "m_h", "m_l"]


@triton.jit
def _strides(stride_l, stride_d, UNIT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """Elements from row to row and from column to column, with what the compiler may know of them."""
    if WIDE:
        stride_l = stride_l.to(tl.int64)
        stride_d = stride_d.to(tl.int64)
    if UNIT == 1:
        return stride_l * ALIGN, 1
    if UNIT == 0:
        return 1, stride_d * ALIGN
    return stride_l * ALIGN, stride_d * ALIGN


@triton.jit
def _head(batch, head, stride_b, stride_h, ALIGN: tl.constexpr):
    """Offset of one head's first element, in 64 bits: a tensor may have more than 2^31 elements."""
    return (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * ALIGN


@triton.jit
def _tile(base, rows, columns, stride_l, stride_d, length, DIM: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr):
    """A tile in which rows from `length` on and columns from `DIM` on are 0; what lies there is not read."""
    pointers = base + rows * stride_l + columns * stride_d
    if EVEN and WHOLE:
        return tl.load(pointers)
    if EVEN:
        return tl.load(pointers, mask=columns < DIM, other=0.0)
    if WHOLE:
        return tl.load(pointers, mask=rows < length, other=0.0)
    return tl.load(pointers, mask=(rows < length) & (columns < DIM), other=0.0)


@triton.jit
def _limited(
    scores, mask, scale_log2, rows, columns, m_l, last_row, last_column,
    EVEN_N: tl.constexpr, MASK: tl.constexpr, PRESCALED: tl.constexpr,
):  # fmt: skip
    """Scores with the mask applied, and -inf for keys that are not there; times ``scale_log2`` if PRESCALED."""
    if PRESCALED:
        scores = scores * scale_log2
    if MASK != 0:
        given = mask + rows * m_l + columns
        inside = (rows < last_row) & (columns < last_column)
        if MASK == 1:
            scores = tl.where(tl.load(given, mask=inside, other=0) != 0, scores, float("-inf"))
        else:
            scores = scores + tl.load(given, mask=inside, other=float("-inf")).to(tl.float32) * LOG2E
    elif not EVEN_N:
        scores = tl.where(columns < last_column, scores, float("-inf"))
    return scores


@triton.jit
def _softmax(scores, peak, scale_log2, MASK: tl.constexpr, PRESCALED: tl.constexpr):
    """Weights relative to the highest score so far, what that makes of earlier weights, and that score."""
    highest = tl.max(scores, 1)
    if not PRESCALED:  # with the subtraction below, one multiply-subtract
        highest = highest * scale_log2
        scores = scores * scale_log2
    new_peak = tl.maximum(peak, highest)
    origin = new_peak
    if MASK != 0:  # rows that may attend to nothing so far: exp2(-inf - 0) is 0, where -inf + inf would be NaN
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    return tl.exp2(scores - origin[:, None]), tl.exp2(peak - origin), new_peak


@triton.jit
def _write(out, acc, share, rows, columns, stride_l, stride_d, inside):
    tl.store(out + rows * stride_l + columns * stride_d, (acc * share).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES + STRIDES)
def attention_kernel(
    q, k, v, mask, out, scale_log2,
    q_len, kv_len, heads, tiles,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, o_b, o_h, o_l, o_d, m_b, m_h, m_l,
    DIM: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, O_UNIT: tl.constexpr, ALIGN: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, MASK: tl.constexpr, PRESCALED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all keys."""
    program = tl.program_id(0)
    batch = program // tiles // heads
    head = program // tiles % heads
    first_row = program % tiles * BLOCK_M
    q_l, q_d = _strides(q_l, q_d, Q_UNIT, ALIGN, WIDE)
    k_l, k_d = _strides(k_l, k_d, K_UNIT, ALIGN, WIDE)
    v_l, v_d = _strides(v_l, v_d, V_UNIT, ALIGN, WIDE)
    o_l, o_d = _strides(o_l, o_d, O_UNIT, ALIGN, WIDE)
    row = first_row.to(tl.int64)
    q += _head(batch, head, q_b, q_h, ALIGN) + row * q_l
    k += _head(batch, head, k_b, k_h, ALIGN)
    v += _head(batch, head, v_b, v_h, ALIGN)
    out += _head(batch, head, o_b, o_h, ALIGN) + row * o_l
    if MASK != 0:
        mask += _head(batch, head, m_b, m_h, 1) + row * m_l

    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    first = tl.arange(0, FIRST)
    last_row = q_len - first_row
    whole: tl.constexpr = FIRST + REST == DIM
    q0 = _tile(q, rows[:, None], first[None, :], q_l, q_d, last_row, DIM, EVEN_M, True)
    acc0 = tl.zeros([BLOCK_M, FIRST], tl.float32)
    if REST > 0:
        rest = FIRST + tl.arange(0, REST)
        q1 = _tile(q, rows[:, None], rest[None, :], q_l, q_d, last_row, DIM, EVEN_M, whole)
        acc1 = tl.zeros([BLOCK_M, REST], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    for start in range(0, kv_len, BLOCK_N):
        present = kv_len - start
        k0 = _tile(k, columns[None, :], first[:, None], k_l, k_d, present, DIM, EVEN_N, True)
        scores = tl.dot(q0, k0, input_precision="ieee")
        if REST > 0:
            k1 = _tile(k, columns[None, :], rest[:, None], k_l, k_d, present, DIM, EVEN_N, whole)
            # A plain sum would become one product that accumulates onto the other, which Triton 3.6 to 3.8 may compile
            # wrongly for compute capability 10.3; one of the form x * 1 + y is left alone, and costs the same.
            scores = tl.fma(tl.dot(q1, k1, input_precision="ieee"), 1.0, scores)
        scores = _limited(
            scores, mask, scale_log2, rows[:, None], columns[None, :], m_l, last_row, present, EVEN_N, MASK, PRESCALED
        )
        weights, shrink, peak = _softmax(scores, peak, scale_log2, MASK, PRESCALED)
        total = total * shrink + tl.sum(weights, 1)

        v0 = _tile(v, columns[:, None], first[None, :], v_l, v_d, present, DIM, EVEN_N, True)
        weights = weights.to(v0.dtype)
        acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision="ieee")
        if REST > 0:
            v1 = _tile(v, columns[:, None], rest[None, :], v_l, v_d, present, DIM, EVEN_N, whole)
            acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision="ieee")
        # The products fit in 32 bits unless WIDE; pointers have 64.
        k += BLOCK_N * k_l
        v += BLOCK_N * v_l
        if MASK != 0:
            mask += BLOCK_N

    share = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]  # a row that may attend to nothing gives 0
    inside = rows[:, None] < last_row
    _write(out, acc0, share, rows[:, None], first[None, :], o_l, o_d, inside)
    if REST > 0:
        _write(out, acc1, share, rows[:, None], rest[None, :], o_l, o_d, inside & (rest[None, :] < DIM))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``softmax(scale * q k^T + mask) v``; arguments and result as of `reference.attention`, no gradients.

    Any strides are read in place. Softmax and sums are in float32; the weights of the values are rounded to the
    inputs' dtype, as the tensor cores want them.

    Raises:
        ValueError: the kernel cannot do the call; the message has every reason.
    """
    # the compute capability is the caller's to check (`registry`): asking the device would cost more than the rest
    reasons = unsupported(q, k, v, mask)
    if reasons:
        raise ValueError("Triton attention cannot do this call: " + "; ".join(reasons))
    out = torch.empty_like(q)
    with torch.cuda.device_of(q):
        _attention_into(out, q, k, v, scale, mask)
    return out


def _attention_into(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    mask: torch.Tensor | None,
) -> None:
    batch, heads, q_len, head_dim = q.shape
    if out.numel() == 0:
        return
    tiles = tiles_for(head_dim, q.element_size(), q_len, k.shape[2], mask is not None)
    scale = head_dim**-0.5 if scale is None else float(scale)
    units, align, strides = _layout(q, k, v, out)
    kind, mask_strides = NO_MASK, (0, 0, 0)
    if mask is not None:
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
        mask = _rows_of(mask.view(torch.uint8) if kind == BOOL_MASK else mask, k.shape[2])
        mask = mask.expand(batch, heads, q_len, k.shape[2])
        mask_strides = mask.stride()[:3]
    count = triton.cdiv(q_len, tiles.block_m)
    attention_kernel[(count * batch * heads,)](
        q, k, v, mask, out, scale * LOG2E.value, q_len, k.shape[2], heads, count, *strides, *mask_strides,
        DIM=head_dim, FIRST=PARTS[head_dim][0], REST=PARTS[head_dim][1], BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        Q_UNIT=units[0], K_UNIT=units[1], V_UNIT=units[2], O_UNIT=units[3], ALIGN=align,
        EVEN_M=q_len % tiles.block_m == 0, EVEN_N=k.shape[2] % tiles.block_n == 0, MASK=kind,
        # a scale that is not positive turns the order of the scores around
        PRESCALED=kind == ADDED_MASK or scale <= 0, WIDE=_reach(tiles, (q, k, v, out), mask_strides) >= INT32,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _rows_of(mask: torch.Tensor, kv_len: int) -> torch.Tensor:
    """``mask`` with its last axis full and contiguous, which most masks have: there it costs few registers."""
    if mask.ndim == 0 or mask.shape[-1] != kv_len:
        mask = mask.expand(*mask.shape[:-1], kv_len)
    return mask if mask.stride(-1) == 1 or kv_len == 1 else mask.contiguous()


def _layout(*tensors: torch.Tensor) -> tuple[list[int], int, list[int]]:
    """(which stride of each tensor is 1: 1 its last, 0 the sequence's, -1 neither; ALIGN; strides in units of it)."""
    wide = 16 // tensors[0].element_size()
    units, strides = [], []
    for t in tensors:
        # a stride along an axis of size 1 is never used, and may be anything
        found = [stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True)]
        unit = 1 if found[3] == 1 else 0 if found[2] == 1 else -1
        wide = wide if unit >= 0 and t.data_ptr() % 16 == 0 else 1
        if any(stride % wide for axis, stride in enumerate(found) if axis != 2 + unit):
            wide = 1
        units.append(unit)
        strides.append(found)
    return units, wide, [stride // wide for found in strides for stride in found]


def _reach(tiles: Tiles, tensors: tuple[torch.Tensor, ...], mask_strides: tuple[int, ...]) -> int:
    """The largest offset within a tile, in elements."""
    rows = max(tiles.block_m, tiles.block_n)
    matrices = [(t.stride(2) * (t.shape[2] > 1), t.stride(3)) for t in tensors]
    most = max(rows * along + 2 * t.shape[3] * across for t, (along, across) in zip(tensors, matrices, strict=True))
    return max(most, rows * (mask_strides[2] + 1))


def aot_variants(cc: int) -> list[Variant]:
    """What launches on a GPU of compute capability ``cc`` / 10 look like, for every head dimension and dtype.

    Self-attention that fills its tiles, and what takes most registers: ragged ends and a mask that is added. In
    float16 also cross-attention to 77 keys; in bfloat16 that differs from it in types only.
    """
    variants = []
    for head_dim in PARTS:
        for dtype in TYPES:
            variants.append(_variant(head_dim, dtype, 4096, 4096))
            variants.append(_variant(head_dim, dtype, 4095, 77, masked=True))
        variants.append(_variant(head_dim, torch.float16, 4096, 77))
    return variants


def _variant(head_dim: int, dtype: torch.dtype, q_len: int, kv_len: int, masked: bool = False) -> Variant:
    tiles = tiles_for(head_dim, dtype.itemsize, q_len, kv_len, masked)
    pointer = f"*{TYPES[dtype]}"
    pointers = {"q": pointer, "k": pointer, "v": pointer, "out": pointer}
    even_m, even_n = q_len % tiles.block_m == 0, kv_len % tiles.block_n == 0
    constants = {
        "DIM": head_dim, "FIRST": PARTS[head_dim][0], "REST": PARTS[head_dim][1],
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "ALIGN": 16 // dtype.itemsize,
        "Q_UNIT": 1, "K_UNIT": 1, "V_UNIT": 1, "O_UNIT": 1, "EVEN_M": even_m, "EVEN_N": even_n,
        "MASK": ADDED_MASK if masked else NO_MASK, "PRESCALED": masked, "WIDE": False,
    }  # fmt: skip
    if masked:
        pointers["mask"] = pointer
    else:
        constants["mask"] = None
    kinds = {
        **pointers,
        **dict.fromkeys(SIZES + STRIDES, "i32"),
        **dict.fromkeys(constants, "constexpr"),
        "scale_log2": "fp32",
    }
    # q, k and v are loaded somewhere in the code each, 16 bytes per thread where a tile has so much for all of them
    sizes = [rows * PARTS[head_dim][0] * dtype.itemsize for rows in (tiles.block_m, tiles.block_n, tiles.block_n)]
    case = "masked" if masked else "self" if even_n else "cross"
    return Variant(
        name=f"attention/{head_dim}/{TYPES[dtype]}/{case}/{tiles.block_m}x{tiles.block_n}",
        kernel=attention_kernel,
        signature={name: kinds[name] for name in attention_kernel.arg_names},
        constexprs=constants,
        aligned=tuple(pointers),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        uses_mma=dtype != torch.float32,
        vector_loads=sum(size // (16 * 32 * tiles.num_warps) for size in sizes),
    )
