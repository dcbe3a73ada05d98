"""What the Triton attention can do and how it is cut into tiles: pure functions of shapes, dtypes and lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A head dimension as one power of two, or as two: products of a matrix unit are at least 16 long.
PARTS = {32: (32, 0), 40: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0), 160: (128, 32)}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MASK_TYPES = (torch.bool, *TYPES)
MIN_CC = 80
MAX_ROWS = 2**31 - 256  # counted in 32 bits


@dataclass(frozen=True)
class Tiles:
    """How one launch is cut: queries of a program, keys of a step, warps per program, software-pipelining depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Chosen so that no GPU generation spills registers, with margin where it could be had (`tdpm_ext.kernels.aot` holds
# that), not by timing. What is compared takes registers: the large tiles are for calls that fill them and have no mask.
# float32 has no tensor cores, its products run on the ordinary units.
LARGE = {
    **dict.fromkeys((32, 40, 64, 80), Tiles(128, 64, 8, 3)),
    96: Tiles(128, 32, 8, 3),
    128: Tiles(128, 64, 8, 2),
    160: Tiles(128, 32, 8, 2),
}
SMALL = {
    **dict.fromkeys((32, 40, 64), Tiles(64, 32, 4, 2)),
    **dict.fromkeys((80, 96, 128), Tiles(64, 32, 8, 2)),
    160: Tiles(64, 16, 8, 2),
}
LARGE_SINGLE = dict.fromkeys(PARTS, Tiles(32, 16, 4, 1))
SMALL_SINGLE = {**dict.fromkeys(PARTS, Tiles(32, 16, 8, 1)), 160: Tiles(32, 16, 4, 1)}


def tiles_for(head_dim: int, itemsize: int, q_len: int, kv_len: int, masked: bool) -> Tiles:
    """The tile sizes of a launch.

    Args:
        head_dim: a key of ``PARTS``.
        itemsize: bytes per element.
        q_len: number of queries.
        kv_len: number of keys.
        masked: whether a mask is read.
    """
    large, small = (LARGE_SINGLE, SMALL_SINGLE) if itemsize == 4 else (LARGE, SMALL)
    tiles = large[head_dim]
    fills = q_len % tiles.block_m == 0 and kv_len % tiles.block_n == 0
    return tiles if fills and not masked else small[head_dim]


def supported(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, *, cc: int
) -> list[str]:
    """Every reason why the kernel cannot do this call on a GPU of compute capability ``cc`` / 10; [] if it can.

    Reads shapes, dtypes and devices only, so meta tensors do. Strides and scale may be anything.
    """
    if cc < MIN_CC:
        return [f"needs compute capability {MIN_CC / 10}, this GPU has {cc / 10}", *unsupported(q, k, v, mask)]
    return unsupported(q, k, v, mask)


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> list[str]:
    """`supported` without a look at the GPU."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        return [f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dimensions; each must be [B, H, L, D]"]
    reasons = []
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in TYPES:
        reasons.append(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be one of {_names(TYPES)}")
    if head_dim not in PARTS:
        reasons.append(f"has head dimensions {', '.join(map(str, PARTS))}, not {head_dim}")
    if k.shape != v.shape or k.shape != (batch, heads, kv_len, head_dim):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        reasons.append(f"q, k, v have shapes {shapes}; they must be [B, H, Lq, D], [B, H, Lk, D], [B, H, Lk, D]")
    if mask is not None:
        reasons += _mask_reasons(mask, (batch, heads, q_len, kv_len))
    if len({t.device for t in (q, k, v, mask) if t is not None}) > 1:
        reasons.append("the tensors are on different devices")
    if max(kv_len, batch * heads * q_len) > MAX_ROWS:
        reasons.append(f"takes at most {MAX_ROWS} queries in all, and as many keys")
    return reasons


def _mask_reasons(mask: torch.Tensor, shape: tuple[int, ...]) -> list[str]:
    reasons = []
    if mask.dtype not in MASK_TYPES:
        reasons.append(f"the mask is {mask.dtype}; it must be one of {_names(MASK_TYPES)}")
    missing = 4 - mask.ndim
    if missing < 0 or any(size not in (1, full) for size, full in zip(mask.shape, shape[missing:], strict=True)):
        reasons.append(f"the mask has shape {tuple(mask.shape)}; it must be broadcastable to {shape}")
    return reasons


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
