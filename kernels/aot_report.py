"""What the compile gate says: failures, the comparison with the committed baseline, the table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tdpm_ext.kernels.aot_rules import KEPT, broken_rules, regressions

BASELINE = Path(__file__).with_name("aot_baseline.json")


def failures(report: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
    """Every reason why the gate does not pass, one line each; [] when it does.

    Args:
        report: what `aot.run` returned.
        baseline: the committed measurements ({"triton", "results"}); None leaves the comparison out. One taken with
            another Triton is not compared: its compiler may rightly choose other code.
    """
    found = []
    for arch, variants in report["results"].items():
        cc = int(arch.removeprefix("sm_"))
        known = None
        if baseline is not None and baseline["triton"] == report["triton"]:
            known = baseline["results"].get(arch, {})
            gone = [name for name in known if name not in report["variants"][arch]]
            found += [f"{arch} {name}: in the baseline, but no longer a variant" for name in gone]
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
    """Keep the measurements of a full ``report``, one line per variant; other generations stay as they were."""
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
    order = dict.fromkeys(name for names in report["variants"].values() for name in names)
    names = [name for name in order if any(name in variants for variants in results.values())]
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


def summary(report: dict[str, Any], baseline: dict[str, Any] | None, updated: bool) -> Iterator[str]:
    """Two lines under the table: how much was compiled, and what it was compared with."""
    total, possible = (sum(map(len, report[part].values())) for part in ("results", "variants"))
    cached = total - report["compiled"]
    yield f"{total} of {possible} possible compilations with Triton {report['triton']}, {cached} of them cached"
    yield f"{report['seconds']} s; {_about_baseline(report, baseline, updated)}"


def _about_baseline(report: dict[str, Any], baseline: dict[str, Any] | None, updated: bool) -> str:
    if updated:
        return "this is the new baseline"
    if baseline is None:
        return "not compared with a baseline"
    if baseline["triton"] != report["triton"]:
        return f"the baseline is of Triton {baseline['triton']}: hard rules only"
    return "compared with the baseline"
