"""What machine code must look like: limits per GPU generation, hard rules, and the comparison with a baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

REGISTER_FILE = 65536  # 32-bit registers of one multiprocessor, on every generation below
RESERVED_SHARED = 1024  # bytes that the driver takes of each block's share, from compute capability 8.0 on
MAX_REGISTERS = {"streaming": 128, "other": 255}  # per thread; 255 is what the instruction encoding can name
MIN_STREAMING_OCCUPANCY = 0.25  # of the warps that fit: fewer do not cover the latency of memory


@dataclass(frozen=True)
class Card:
    """Limits of one GPU generation: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".

    Sizes in bytes: `shared_block` is the most that one block may ask for, `shared_sm` what a multiprocessor has.
    """

    shared_block: int
    shared_sm: int
    warps: int
    blocks: int


CARDS: dict[int, Card] = {
    80: Card(163 * 1024, 164 * 1024, 64, 32),
    86: Card(99 * 1024, 100 * 1024, 48, 16),
    89: Card(99 * 1024, 100 * 1024, 48, 24),
    90: Card(227 * 1024, 228 * 1024, 64, 32),
    100: Card(227 * 1024, 228 * 1024, 64, 32),
    120: Card(99 * 1024, 100 * 1024, 48, 24),
}


def occupancy(cc: int, registers: int, shared: int, num_warps: int) -> float:
    """Fraction of the multiprocessor's warps that can be resident, limited by registers, shared memory and blocks."""
    card = CARDS[cc]
    per_warp = -(-max(registers, 1) * 32 // 256) * 256  # registers are handed out to warps in units of 256
    blocks = min(
        REGISTER_FILE // per_warp // num_warps,
        card.shared_sm // (shared + RESERVED_SHARED),
        card.warps // num_warps,
        card.blocks,
    )
    return blocks * num_warps / card.warps


def broken_rules(cc: int, facts: Mapping[str, Any]) -> Iterator[str]:
    """Every hard rule that one compiled variant breaks, in words.

    Args:
        cc: compute capability as in ``CARDS``.
        facts: one result of `aot_compile.inspect`, with the wishes of its Variant.
    """
    if "error" in facts:
        yield f"does not compile: {facts['error']}"
        return
    card = CARDS[cc]
    if facts["stack"] or facts["local"] or facts["spills"]:
        yield (
            f"spills registers: {facts['stack']} bytes of stack, {facts['local']} of local memory, "
            f"{facts['spills']} instructions that touch them; make the tile smaller or use more warps"
        )
    if facts["shared"] > card.shared_block:
        yield f"wants {facts['shared']} bytes of shared memory per block; sm_{cc} has {card.shared_block}"
    if facts["fp64"]:
        yield f"computes in double precision: {facts['fp64']} instructions; some Python float was not cast to float32"
    if facts["uses_mma"] and not facts["mma"]:
        yield "has no tensor-core instruction; its dot products run on the ordinary units"
    if facts["wide_loads"] < facts["vector_loads"]:
        yield (
            f"loads 16 bytes at once in {facts['wide_loads']} of {facts['loads']} global loads; "
            f"{facts['vector_loads']} wanted: see the alignment hints and which axis is contiguous"
        )
    cap = MAX_REGISTERS["streaming" if facts["streaming"] else "other"]
    if facts["registers"] > cap:
        yield f"uses {facts['registers']} registers per thread; the cap is {cap}"
    if facts["occupancy"] == 0:
        yield f"cannot be launched on sm_{cc}: not one block fits on a multiprocessor"
    elif facts["streaming"] and facts["occupancy"] < MIN_STREAMING_OCCUPANCY:
        yield f"fills {facts['occupancy']:.0%} of the warps; a streaming kernel needs {MIN_STREAMING_OCCUPANCY:.0%}"


# what the baseline keeps of a measurement, and how much worse each may become: (relative, absolute), the larger counts
TOLERANCES: dict[str, tuple[float, float]] = {
    "registers": (0.0, 8),
    "shared": (0.0, 0),
    "instructions": (0.1, 16),
}
NEVER_LESS = ("occupancy", "wide_loads", "mma")
KEPT = (*TOLERANCES, *NEVER_LESS)


def regressions(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """How the measurement ``now`` of a variant is worse than its committed one, in words."""
    if "error" in now:
        return  # said by broken_rules
    for name, (relative, absolute) in TOLERANCES.items():
        if now[name] > before[name] + max(relative * before[name], absolute):
            yield f"{name} rose from {before[name]} to {now[name]}"
    for name in NEVER_LESS:
        if now[name] < before[name] - 1e-6:
            yield f"{name.replace('_', ' ')} fell from {before[name]} to {now[name]}"
