"""Compiles kernel variants for GPUs that are not here, and reads the machine code."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdpm_ext.kernels.aot_rules import occupancy
from tdpm_ext.kernels.variant import Variant

MEASURE_VERSION = 1  # part of every cache key: raise it when `inspect` learns or forgets something
OPTIONS = {"enable_fp_fusion": True}  # said aloud: Triton 3.10 turns its default off

# SASS mnemonics. A global load that bypasses the registers (LDGSTS) or is done by the copy engine is a load too.
LOAD = re.compile(r"^(LDG|LDGSTS)\b")
COPY_ENGINE = re.compile(r"^(UTMALDG|UBLKCP)\b")
WIDE = re.compile(r"\.(128|256)\b")
SPILL = re.compile(r"^(LDL|STL)\b")
TENSOR_CORE = re.compile(r"^(H|I|Q|O|HG|IG|QG|UTCH|UTCI|UTCQ|UTCO)MMA\b")
DOUBLE = re.compile(r"^D(ADD|MUL|FMA|SETP|MNMX)\b|\.F64\b|64H\b")
MNEMONIC = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


class MissingCompiler(RuntimeError):
    """Triton, or a tool that it brings along, is not here, so nothing can be compiled."""


def triton_version() -> str:
    """Version of the Triton that compiles; raises MissingCompiler, in words, where there is none."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise MissingCompiler("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it for this command")
    try:
        import triton
    except ImportError as error:
        raise MissingCompiler("Triton is not installed, so there is nothing to compile: pip install triton") from error
    return triton.__version__


def tool(name: str) -> str:
    """Path of ``cuobjdump`` or ``nvdisasm`` as bundled with Triton."""
    from triton import knobs

    try:
        return getattr(knobs.nvidia, name).path
    except RuntimeError as error:
        raise MissingCompiler(f"this Triton brings no {name}; install the wheel from PyPI") from error


def cache_key(variant: Variant, cc: int) -> str:
    """Digest of all that decides the machine code: the source and what it calls, types, constants, Triton, target."""
    facts = [
        MEASURE_VERSION,
        triton_version(),
        cc,
        variant.kernel.cache_key,
        [[name, variant.signature[name]] for name in variant.kernel.arg_names],
        sorted((name, repr(value)) for name, value in variant.constexprs.items()),
        sorted(variant.aligned),
        variant.num_warps,
        variant.num_stages,
        OPTIONS,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def compile_variant(variant: Variant, cc: int) -> tuple[bytes, int]:
    """Machine code (an ELF file) of ``variant`` for compute capability ``cc``, and its dynamic shared memory, bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature[name] for name in names},
        constexprs=dict(variant.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **OPTIONS}
    kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    return kernel.asm["cubin"], kernel.metadata.shared


def code_section(elf: bytes) -> bytes:
    """The instructions of the one kernel in an ELF file, without headers and relocations."""
    start = struct.unpack_from("<Q", elf, 0x28)[0]
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    names = sections[names_at][4]
    found = [s for s in sections if elf.startswith(b".text.", names + s[0])]
    if len(found) != 1:
        raise ValueError(f"expected one kernel in the compiled file, found {len(found)}")
    _, _, _, _, offset, length = found[0]
    return elf[offset : offset + length]


def disassemble(codes: Sequence[bytes], cc: int) -> list[list[str]]:
    """Mnemonics of each piece of code. One call for all: the disassembler takes half a second just to start."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        target = f"SM{cc}{'a' if cc >= 90 else ''}"
        command = [tool("nvdisasm"), "--binary", target, "--no-dataflow", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = ((int(address, 16), name) for address, name in MNEMONIC.findall(text))
    pieces, piece, end = [], [], 0
    for code in codes:
        end += len(code)
        pieces.append(piece := [])
        for address, name in lines:
            piece.append(name)
            if address + 16 == end:  # every instruction is 16 bytes long
                break
    if sum(map(len, pieces)) * 16 != end:
        raise ValueError(f"the disassembler read {sum(map(len, pieces))} instructions of {end // 16}")
    return pieces


def resources(elf: bytes) -> dict[str, int]:
    """REG, STACK, SHARED (static) and LOCAL of the kernel in an ELF file, as ``cuobjdump`` reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(elf)
        file.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of the kernel's resources: {text!r}")
    return dict(zip(("registers", "stack", "static_shared", "local"), map(int, found.groups()), strict=True))


def count_instructions(mnemonics: Sequence[str]) -> dict[str, int]:
    """What the gate asks of the instructions: how many in all, loads, wide loads, spills, tensor cores, fp64."""
    tally = Counter(mnemonics)

    def total(*patterns: re.Pattern[str]) -> int:
        return sum(n for name, n in tally.items() if all(p.search(name) for p in patterns))

    copies = total(COPY_ENGINE)
    return {
        "instructions": len(mnemonics) - tally["NOP"],
        "loads": total(LOAD) + copies,
        "wide_loads": total(LOAD, WIDE) + copies,
        "spills": total(SPILL),
        "mma": total(TENSOR_CORE),
        "fp64": total(DOUBLE),
    }


@dataclass(frozen=True)
class Built:
    """A compiled variant: machine code (an ELF file) and dynamic shared memory, bytes; or why there is none."""

    elf: bytes
    shared: int
    num_warps: int
    error: str = ""


def build(variant: Variant, cc: int) -> Built:
    """Compile ``variant`` for ``cc``; whatever goes wrong becomes the result's ``error``."""
    try:
        elf, shared = compile_variant(variant, cc)
    except Exception as error:  # the compiler raises of every kind; each is a failure of the gate
        said = " ".join(f"{error} {error.__cause__ or ''}".split())  # the end says what is wrong, the rest quotes
        return Built(b"", 0, variant.num_warps, f"{type(error).__name__}: ...{said[-300:]}")
    return Built(elf, shared, variant.num_warps)


def inspect(built: Sequence[Built], cc: int) -> list[dict[str, Any]]:
    """Describe the machine code of each for the gate; {"error": ...} for what did not compile."""
    compiled = [item for item in built if not item.error]
    code = iter(disassemble([code_section(item.elf) for item in compiled], cc) if compiled else [])
    results: list[dict[str, Any]] = []
    for item in built:
        if item.error:
            results.append({"error": item.error})
            continue
        facts = resources(item.elf) | {"shared": item.shared} | count_instructions(next(code))
        facts["occupancy"] = round(occupancy(cc, facts["registers"], item.shared, item.num_warps), 4)
        results.append(facts)
    return results


def default_cache() -> Path:
    """Where results are kept: ``$XDG_CACHE_HOME/tdpm_ext``, else ``~/.cache/tdpm_ext``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdpm_ext"
