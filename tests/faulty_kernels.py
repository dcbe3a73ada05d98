"""Small Triton kernels for the tests of the compile gate: some right, the others each wrong in one way."""

from __future__ import annotations

import triton
import triton.language as tl

from tdpm_ext.kernels.variant import Variant


@triton.jit
def scale_kernel(x, y, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, (tl.load(x + at, at < n, 0.0) * factor).to(y.dtype.element_ty), at < n)


@triton.jit
def outer_kernel(x, y, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Keeps a whole tile of float32 alive over a loop."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(n):
        tile += tl.load(x + i * ROWS + rows) * tl.load(x + i * COLUMNS + columns)
    tl.store(y + rows * COLUMNS + columns, tile)


@triton.jit
def matmul_kernel(a, b, c, depth, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    rows, columns, inner = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, DEPTH)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, depth, DEPTH):
        left = tl.load(a + rows * depth + start + inner[None, :])
        right = tl.load(b + (start + inner[:, None]) * SIZE + columns)
        total += tl.dot(left, right, input_precision="ieee")
    tl.store(c + rows * SIZE + columns, total)


def scale(name: str, kind: str = "fp16", factor: str = "fp32", block: int = 1024, aligned: bool = True) -> Variant:
    return Variant(
        name=name,
        kernel=scale_kernel,
        signature={"x": f"*{kind}", "y": f"*{kind}", "n": "i32", "factor": factor, "BLOCK": "constexpr"},
        constexprs={"BLOCK": block},
        aligned=("x", "y", "n") if aligned else (),
        num_warps=4,
        num_stages=2,
        vector_loads=1,
        streaming=True,
    )


def matmul(name: str, kind: str, size: int, stages: int) -> Variant:
    return Variant(
        name=name,
        kernel=matmul_kernel,
        signature={
            "a": f"*{kind}", "b": f"*{kind}", "c": "*fp32", "depth": "i32", "SIZE": "constexpr", "DEPTH": "constexpr",
        },
        constexprs={"SIZE": size, "DEPTH": 64},
        aligned=("a", "b", "c", "depth"),
        num_warps=8 if size > 64 else 4,
        num_stages=stages,
        uses_mma=True,
    )  # fmt: skip


def aot_variants(cc: int) -> list[Variant]:
    """Two right variants, one of them twice, and the wrong ones, which are only tried on sm_86."""
    right = [scale("scale"), scale("scale again"), matmul("pipelined", "fp16", 128, 6)]
    if cc != 86:
        return right
    spilling = Variant(
        name="spilling",
        kernel=outer_kernel,
        signature={"x": "*fp32", "y": "*fp32", "n": "i32", "ROWS": "constexpr", "COLUMNS": "constexpr"},
        constexprs={"ROWS": 128, "COLUMNS": 128},
        aligned=("x", "y"),
        num_warps=1,
        num_stages=1,
    )
    wrong = [
        scale("narrow", aligned=False),
        scale("double", kind="fp32", factor="fp64"),
        scale("odd block", block=1000),
        matmul("scalar", "fp32", 16, 1),
        spilling,
    ]
    return [*right, *wrong]
