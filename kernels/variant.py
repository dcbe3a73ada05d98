"""One way to compile one kernel: what the no-GPU gate (`tdpm_ext.kernels.aot`) is told about each launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One configuration of a Triton kernel, as a launch would specialise it.

    Args:
        name: unique among the variants of one GPU generation, readable in a table ("group_norm_nchw/fp16/4096x8").
        kernel: the `triton.JITFunction`.
        signature: every argument of the kernel -> its type: "*fp16", "*bf16", "*fp32", "fp32", "i32", "i64",
            "constexpr".
        constexprs: value of every argument whose type is "constexpr".
        aligned: arguments (pointers, strides, sizes) that are divisible by 16 in this configuration.
        num_warps: warps per program.
        num_stages: software-pipelining depth.
        uses_mma: the machine code must contain tensor-core instructions.
        vector_loads: least number of 16-byte global loads that the machine code must contain.
        streaming: the kernel is bound by memory: its loads are expected to be 16 bytes wide.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    uses_mma: bool = False
    vector_loads: int = 0
    streaming: bool = False

    def __post_init__(self) -> None:
        arguments = set(self.kernel.arg_names)
        constants = {name for name, kind in self.signature.items() if kind == "constexpr"}
        for what, wrong in (
            ("signature must name the kernel's arguments", arguments ^ set(self.signature)),
            ("constexprs must be the arguments of type 'constexpr'", constants ^ set(self.constexprs)),
            ("aligned must name run-time arguments", set(self.aligned) - (arguments - constants)),
        ):
            if wrong:
                raise ValueError(f"variant {self.name}: {what}; wrong or missing: {', '.join(sorted(wrong))}")
