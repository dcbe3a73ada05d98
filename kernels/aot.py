"""Compile every kernel for every GPU generation, without a GPU, and check the machine code.

    python -m tdpm_ext.kernels.aot [--full] [--arch sm_90 ...] [--json] [--update-baseline]

Each kernel module lists its variants: what a launch on that generation can look like. Each is compiled with Triton's
own compiler and assembler; the result must have no spills, fit the card's shared memory, use tensor cores and 16-byte
loads where the variant says so, never compute in double precision, and be no worse than the committed baseline
(``aot_baseline.json``). Results are cached by kernel source, Triton version and target.

By default every kernel is compiled for every generation in every dtype, and its configurations take turns; ``--full``
compiles every configuration for every generation, and so does ``--update-baseline``, so that whoever changes a kernel
has seen them all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from tdpm_ext.kernels.aot_compile import (
    Built,
    MissingCompiler,
    build,
    cache_key,
    default_cache,
    inspect,
    triton_version,
)
from tdpm_ext.kernels.aot_report import failures, read_baseline, summary, table, write_baseline
from tdpm_ext.kernels.aot_rules import CARDS
from tdpm_ext.kernels.variant import Variant

MODULES = tuple(f"{__package__}.{name}" for name in ("triton_norm", "triton_attn", "triton_step"))
CHUNK = 4  # variants that one task of a worker compiles: few, so that the workers finish together
KEEP = 4000  # results in the cache file; older ones go


def collect(cc: int, modules: Sequence[str] = MODULES) -> dict[str, tuple[str, Variant]]:
    """Variants of generation ``cc``: cache key -> (module, variant). Of identical ones only the first stays."""
    found: dict[str, tuple[str, Variant]] = {}
    names: set[str] = set()
    for module in modules:
        for variant in importlib.import_module(module).aot_variants(cc):
            key = cache_key(variant, cc)
            if key in found:
                continue
            if variant.name in names:
                raise ValueError(f"{module}: two different variants for sm_{cc} have the name {variant.name!r}")
            names.add(variant.name)
            found[key] = (module, variant)
    return found


def rotation(found: dict[int, dict[str, tuple[str, Variant]]]) -> dict[int, set[str]]:
    """Which cache keys to compile when not all are: generation -> keys.

    Variants of one kernel and one set of pointer types take turns: together they reach every generation, and each
    reaches one at least.
    """
    archs = list(found)
    groups: dict[tuple, dict[str, dict[int, str]]] = {}
    for cc, variants in found.items():
        for key, (_, variant) in variants.items():
            types = sorted({kind for kind in variant.signature.values() if kind.startswith("*")})
            group = groups.setdefault((variant.kernel.__name__, *types), {})
            group.setdefault(variant.name, {})[cc] = key
    chosen: dict[int, set[str]] = {cc: set() for cc in archs}
    for start, members in enumerate(groups.values()):
        times = -(-len(archs) // len(members))
        for turn, keys in enumerate(members.values()):
            for time_ in range(times):
                cc = archs[(start + turn + time_ * (len(archs) // times)) % len(archs)]
                if cc in keys:
                    chosen[cc].add(keys[cc])
    return chosen


_collect = lru_cache(maxsize=None)(lambda cc, module: collect(cc, [module]))


def _build(task: tuple[int, str, list[str]]) -> tuple[int, dict[str, Built]]:
    """One worker's task (generation, module, cache keys): kernels do not travel between processes, their names do."""
    cc, module, keys = task
    variants = _collect(cc, module)
    with tempfile.TemporaryDirectory(prefix="tdpm-aot-") as folder:  # nothing here ever runs: not for Triton's cache
        os.environ["TRITON_CACHE_DIR"] = folder
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth faster; the instructions are the same
        return cc, {key: build(variants[key][1], cc) for key in keys}


def _inspect(task: tuple[int, dict[str, Built]]) -> dict[str, dict[str, Any]]:
    cc, built = task
    return dict(zip(built, inspect(list(built.values()), cc), strict=True))


def compile_all(tasks: Sequence[tuple[int, str, list[str]]], jobs: int) -> dict[str, dict[str, Any]]:
    """Run the ``tasks`` of `_build` in ``jobs`` processes; returns cache key -> measurement."""
    # A forked worker has Triton imported already. The parent compiles nothing itself, so no thread is lost by forking.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    built: dict[int, dict[str, Built]] = {}
    found: dict[str, dict[str, Any]] = {}
    with multiprocessing.get_context(method).Pool(max(1, min(jobs, len(tasks)))) as pool:
        for cc, some in pool.imap_unordered(_build, tasks):
            built.setdefault(cc, {}).update(some)
        for some in pool.imap_unordered(_inspect, built.items()):  # the disassembler starts once per generation
            found.update(some)
    return found


@contextmanager
def open_cache(folder: Path) -> Iterator[dict[str, Any]]:
    """The cached measurements, written back on leaving. A second process waits, and then finds the first one's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "aot.json"
    with open(folder / "aot.lock", "w", encoding="utf-8") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except ImportError:
            pass  # Windows: two runs at once would compile twice, nothing worse
        try:
            cache = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            cache = {}
        before = len(cache)
        try:
            yield cache
        finally:
            if len(cache) != before:
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(dict(list(cache.items())[-KEEP:])), encoding="utf-8")
                os.replace(temporary, path)


def run(
    archs: Sequence[int],
    *,
    full: bool = True,
    jobs: int | None = None,
    cache: Path | None = None,
    modules: Sequence[str] = MODULES,
) -> dict[str, Any]:
    """Compile and measure the variants for the generations ``archs``.

    Args:
        archs: compute capabilities, as in `aot_rules.CARDS` (80, 90, ...).
        full: all variants for each; else those of `rotation`.
        jobs: processes; None = one per CPU.
        cache: folder of the result cache; None = the user's (`aot_compile.default_cache`).
        modules: importable names of the modules whose ``aot_variants`` to compile.

    Returns:
        {"triton", "seconds", "compiled" (how many were not cached), "variants": {"sm_90": [name, ...]} (all there
        are), "results": {"sm_90": {name: measurement}}}.
    """
    started, version = time.monotonic(), triton_version()
    found = {cc: collect(cc, modules) for cc in archs}
    chosen = {cc: set(variants) for cc, variants in found.items()} if full else rotation(found)
    with open_cache(cache or default_cache()) as known:
        tasks = []
        for cc, variants in found.items():
            for module in modules:
                missing = [
                    k for k, (origin, _) in variants.items() if origin == module and k in chosen[cc] - set(known)
                ]
                tasks += [(cc, module, missing[i : i + CHUNK]) for i in range(0, len(missing), CHUNK)]
        fresh = compile_all(tasks, jobs or os.cpu_count() or 1) if tasks else {}
        known.update((key, facts) for key, facts in fresh.items() if "error" not in facts)
        measured = {**known, **fresh}
    results = {
        f"sm_{cc}": {
            variant.name: {**measured[key], **_wishes(variant)}
            for key, (_, variant) in variants.items()
            if key in chosen[cc]
        }
        for cc, variants in found.items()
    }
    return {
        "triton": version,
        "seconds": round(time.monotonic() - started, 1),
        "compiled": len(fresh),
        "variants": {f"sm_{cc}": [v.name for _, v in variants.values()] for cc, variants in found.items()},
        "results": results,
    }


def _wishes(variant: Variant) -> dict[str, Any]:
    names = ("num_warps", "num_stages", "uses_mma", "vector_loads", "streaming")
    return {name: getattr(variant, name) for name in names}


def _arch(text: str) -> int:
    digits = text.removeprefix("sm_")
    if not digits.isdecimal() or int(digits) not in CARDS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(f'sm_{cc}' for cc in CARDS)}")
    return int(digits)


def parser() -> argparse.ArgumentParser:
    """The command line of ``python -m tdpm_ext.kernels.aot``."""
    made = argparse.ArgumentParser(
        prog="python -m tdpm_ext.kernels.aot",
        description="Compile every Triton kernel for every GPU generation, without a GPU, and check the machine code.",
        epilog="Exit status: 0 passed; 1 a kernel broke a rule or fell behind the baseline; 2 there is no compiler.",
    )
    made.add_argument("--arch", type=_arch, nargs="+", metavar="SM", help=f"of {', '.join(f'sm_{cc}' for cc in CARDS)}")
    made.add_argument("--full", action="store_true", help="every configuration for every generation")
    made.add_argument("--json", action="store_true", help="print all measurements as JSON instead of a table")
    made.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per CPU)")
    made.add_argument("--cache", type=Path, metavar="DIR", help="folder of the result cache")
    made.add_argument("--update-baseline", action="store_true", help="accept what --full measures as the new baseline")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gate; returns the exit status."""
    options = parser().parse_args(argv)
    try:
        full = bool(options.full or options.arch or options.update_baseline)
        report = run(options.arch or list(CARDS), full=full, jobs=options.jobs, cache=options.cache)
    except MissingCompiler as missing:
        print(missing, file=sys.stderr)
        return 2
    # what breaks a rule is never accepted as a baseline
    baseline = None if options.update_baseline else read_baseline()
    failed = failures(report, baseline)
    if options.update_baseline and not failed:
        write_baseline(report)
    if options.json:
        print(json.dumps({**report, "failures": failed}, indent=1))
    else:
        for line in table(report):
            print(line)
        print("", *summary(report, baseline, options.update_baseline and not failed), sep="\n")
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
