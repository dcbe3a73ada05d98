"""Compile every kernel for every GPU generation, without a GPU, and check the machine code.

    python -m tdpm_ext.kernels.aot [--arch sm_90 ...] [--json] [--update-baseline]

Each kernel module lists its variants: what a launch on that generation can look like. Each is compiled with Triton's
own compiler and assembler; the result must have no spills, fit the card's shared memory, use tensor cores and 16-byte
loads where the variant says so, never compute in double precision, and be no worse than the committed baseline
(``aot_baseline.json``). Results are cached by kernel source, Triton version and target.
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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdpm_ext.kernels.aot_compile import MissingCompiler, cache_key, default_cache, measure, triton_version
from tdpm_ext.kernels.aot_rules import CARDS, KEPT, broken_rules, regressions
from tdpm_ext.kernels.variant import Variant

MODULES = tuple(f"{__package__}.{name}" for name in ("triton_norm", "triton_attn", "triton_step"))
BASELINE = Path(__file__).with_name("aot_baseline.json")
CHUNK = 6  # variants that one task of a worker compiles: few enough to share evenly, enough to disassemble together
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


def _work(task: tuple[int, str, list[str]]) -> list[tuple[str, dict[str, Any]]]:
    """One worker's task (generation, module, cache keys): kernels do not travel between processes, their names do."""
    cc, module, keys = task
    variants = {key: variant for key, (_, variant) in collect(cc, [module]).items()}
    with tempfile.TemporaryDirectory(prefix="tdpm-aot-") as folder:  # nothing here ever runs: not for Triton's cache
        os.environ["TRITON_CACHE_DIR"] = folder
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth faster; the instructions are the same
        return list(zip(keys, measure([variants[key] for key in keys], cc), strict=True))


def compile_all(tasks: Sequence[tuple[int, str, list[str]]], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run ``tasks`` in ``jobs`` processes; yields (cache key, measurement) as they come."""
    # A forked worker has Triton imported already. The parent compiles nothing itself, so no thread is lost by forking.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with multiprocessing.get_context(method).Pool(max(1, min(jobs, len(tasks)))) as pool:
        for results in pool.imap_unordered(_work, tasks):
            yield from results


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
    archs: Sequence[int], *, jobs: int | None = None, cache: Path | None = None, modules: Sequence[str] = MODULES
) -> dict[str, Any]:
    """Compile and measure every variant for the generations ``archs``.

    Args:
        archs: compute capabilities, as in `aot_rules.CARDS` (80, 90, ...).
        jobs: processes; None = one per CPU.
        cache: folder of the result cache; None = the user's (`aot_compile.default_cache`).
        modules: importable names of the modules whose ``aot_variants`` to compile.

    Returns:
        {"triton", "seconds", "compiled" (how many were not cached), "results": {"sm_90": {name: measurement}}}.
    """
    started, version = time.monotonic(), triton_version()
    found = {cc: collect(cc, modules) for cc in archs}
    with open_cache(cache or default_cache()) as known:
        tasks = []
        for cc, variants in found.items():
            for module in modules:
                missing = [key for key, (origin, _) in variants.items() if origin == module and key not in known]
                tasks += [(cc, module, missing[i : i + CHUNK]) for i in range(0, len(missing), CHUNK)]
        fresh = dict(compile_all(tasks, jobs or os.cpu_count() or 1)) if tasks else {}
        known.update((key, facts) for key, facts in fresh.items() if "error" not in facts)
        measured = {**known, **fresh}
    results = {
        f"sm_{cc}": {variant.name: {**measured[key], **_wishes(variant)} for key, (_, variant) in variants.items()}
        for cc, variants in found.items()
    }
    return {
        "triton": version,
        "seconds": round(time.monotonic() - started, 1),
        "compiled": len(fresh),
        "results": results,
    }


def _wishes(variant: Variant) -> dict[str, Any]:
    names = ("num_warps", "num_stages", "uses_mma", "vector_loads", "streaming")
    return {name: getattr(variant, name) for name in names}


def failures(report: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
    """Every reason why the gate does not pass, one line each; [] when it does.

    Args:
        report: what `run` returned.
        baseline: the committed measurements ({"triton", "results"}); None leaves the comparison out. One taken with
            another Triton is not compared: its compiler may rightly choose other code.
    """
    found = []
    for arch, variants in report["results"].items():
        cc = int(arch.removeprefix("sm_"))
        known = None
        if baseline is not None and baseline["triton"] == report["triton"]:
            known = baseline["results"].get(arch, {})
            found += [
                f"{arch} {name}: in the baseline, but no longer compiled" for name in known if name not in variants
            ]
        for name, facts in variants.items():
            said = list(broken_rules(cc, facts))
            if known is not None:
                said += regressions(known[name], facts) if name in known else ["not in the baseline"]
            found += [f"{arch} {name}: {line}" for line in said]
    return found


def read_baseline(path: Path = BASELINE) -> dict[str, Any] | None:
    """The committed measurements, or None where there are none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_baseline(report: dict[str, Any], path: Path = BASELINE) -> None:
    """Keep the measurements of ``report``, one line per variant; generations that it lacks stay as they were."""
    old = read_baseline(path)
    results = old["results"] if old and old["triton"] == report["triton"] else {}
    for arch, variants in report["results"].items():
        results[arch] = {name: {key: facts[key] for key in KEPT} for name, facts in sorted(variants.items())}
    archs = []
    for arch, variants in sorted(results.items(), key=lambda item: int(item[0].removeprefix("sm_"))):
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(facts)}" for name, facts in variants.items())
        archs.append(f'  "{arch}": {{\n{lines}\n  }}')
    text = f'{{\n "triton": "{report["triton"]}",\n "results": {{\n' + ",\n".join(archs) + "\n }\n}\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def table(report: dict[str, Any]) -> Iterator[str]:
    """The measurements as text: one line per variant, a column per GPU generation."""
    results = report["results"]
    names = list(dict.fromkeys(name for variants in results.values() for name in variants))
    width = max([len(name) for name in names], default=0)
    yield f"{'variant':{width}}  warps  16-byte loads  tensor  " + "  ".join(f"{arch:^16}" for arch in results)
    yield f"{'':{width}}                              " + "  ".join(f"{'regs  shared  occ':16}" for _ in results)
    for name in names:
        rows = [variants.get(name) for variants in results.values()]
        first = next(facts for facts in rows if facts is not None)
        loads = _span(rows, "wide_loads") + " of " + _span(rows, "loads")
        cells = "  ".join(f"{_cell(facts):16}" for facts in rows)
        yield f"{name:{width}}  {first['num_warps']:5}  {loads:>13}  {_span(rows, 'mma'):>6}  {cells}".rstrip()


def _span(rows: Iterable[dict[str, Any] | None], key: str) -> str:
    values = sorted({facts[key] for facts in rows if facts and key in facts})
    return "-" if not values else str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def _cell(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return "-"
    if "error" in facts:
        return "ERROR"
    return f"{facts['registers']:4} {facts['shared'] / 1024:5.1f}K {facts['occupancy']:4.0%}"


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
    made.add_argument("--json", action="store_true", help="print all measurements as JSON instead of a table")
    made.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per CPU)")
    made.add_argument("--cache", type=Path, metavar="DIR", help="folder of the result cache")
    made.add_argument("--update-baseline", action="store_true", help="accept what was measured as the new baseline")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gate; returns the exit status."""
    options = parser().parse_args(argv)
    try:
        report = run(options.arch or list(CARDS), jobs=options.jobs, cache=options.cache)
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
        total = sum(len(variants) for variants in report["results"].values())
        print(f"\n{total} compilations with Triton {report['triton']}, {report['compiled']} of them not cached")
        print(f"{report['seconds']} s; {_about_baseline(report, baseline, options.update_baseline and not failed)}")
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


def _about_baseline(report: dict[str, Any], baseline: dict[str, Any] | None, updated: bool) -> str:
    if updated:
        return "this is the new baseline"
    if baseline is None:
        return "not compared with a baseline"
    if baseline["triton"] != report["triton"]:
        return f"the baseline is of Triton {baseline['triton']}: hard rules only"
    return "compared with the baseline"


if __name__ == "__main__":
    sys.exit(main())
