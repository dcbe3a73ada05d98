"""What the kernels and `accelerate` save: launches and bytes, counted without a GPU; times, where there is one.

    python benchmarks/kernels.py                       # counts; writes benchmarks/results/kernels.json and .png
    python benchmarks/kernels.py --networks cifar10 --no-inductor      # one network, half a minute
    make gpu                                           # the same on a CUDA GPU, with times

Counts are exact under the rules at the top of `traffic.py`, on fake CUDA tensors, for one call of the network:
  launches   kernels; for eager a floor, one per ATen call
  bytes      all that is read and written, each kernel's inputs once
  chain      of that, GroupNorm with what surrounds it: embedding added, scale, shift, activation
  passes     chain with every pass over an input counted, also those that a cache may serve
  floor      chain of an ideal kernel: each normalised picture read once and written once
Arms: eager, as the library wrote it; accelerate, at a noise level and prompt seen before; inductor, the schedule that
torch.compile would run (A100, weights in channels_last). Times in the column "modelled" are bytes over the stated
bandwidth, nothing else: no measurement, and no launch costs.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# without this folder, in which files have the names of packages that diffusers looks for
sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != HERE), str(ROOT)]

from benchmarks import inductor_schedule, kernel_figure, records, traffic  # noqa: E402
from benchmarks.networks import NETWORKS  # noqa: E402

SCHEMA = "tdpm-kernels/1"
BANDWIDTH = 2039.0  # GB/s: data sheet of the A100 SXM 80 GB, for which choices and the Inductor schedule are made
CC = 80
# Launches of k-diffusion's CIFAR U-Net in eager without its preconditioning, and without copies and fills: what the
# promise was made against. Counted as here, with both, it is 448, and 466 with the preconditioning.
PROMISED = 427
BARS = {"chain": 0.70, "launches": 0.5}


def count_row(name: str, arm: str, launches: list[traffic.Launch], batch: int, dtype: torch.dtype) -> dict:
    """One row of the report."""
    whole, chain = traffic.totals(launches), traffic.totals([entry for entry in launches if entry.chain])
    counted = arm in traffic.ARMS  # Inductor's kernels do not say what belongs to a norm
    by_op = Counter()
    for entry in launches:
        by_op[entry.op] += entry.launches
    return {
        "network": name,
        "arm": arm,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "launches": whole["launches"],
        "network_launches": None,  # without k-diffusion's preconditioning
        "bytes": whole["once"],
        "chain_launches": chain["launches"] if counted else None,
        "chain_bytes": chain["once"] if counted else None,
        "chain_passes": chain["passes"] if counted else None,
        "chain_floor": traffic.chain_floor(launches) if counted else None,
        "by_op": dict(by_op.most_common()),
    }


def count_all(names: list[str], batch: int, dtype: torch.dtype, inductor: bool) -> tuple[list[dict], list[str]]:
    """Rows for every network and arm, and what could not be counted."""
    rows, notes = [], []
    for name in names:
        for arm in traffic.ARMS:
            launches = traffic.count(name, arm, batch=batch, dtype=dtype, cc=CC)
            row = count_row(name, arm, launches, batch, dtype)
            if name == "cifar10":
                inner = traffic.count(name, arm, batch=batch, dtype=dtype, cc=CC, inner=True)
                row["network_launches"] = traffic.totals(inner)["launches"]
            rows.append(row)
        if not inductor:
            continue
        try:
            rows.append(
                count_row(name, "inductor", inductor_schedule.count(name, batch=batch, dtype=dtype), batch, dtype)
            )
        except inductor_schedule.NotCounted as error:
            notes.append(f"{name}: Inductor is not counted: {error}")
    return rows, notes


def modelled(rows: list[dict], bandwidth: float) -> list[dict]:
    """Milliseconds that memory traffic alone would take: bytes / bandwidth."""
    found = []
    for row in rows:
        for what in ("bytes", "chain_bytes", "chain_passes", "chain_floor"):
            if row[what] is not None:
                ms = row[what] / (bandwidth * 1e9) * 1e3
                found.append({"network": row["network"], "arm": row["arm"], "what": what, "modelled_ms": ms})
    return found


def bars(rows: list[dict]) -> list[dict]:
    """The two promises about counts, as far as the rows say something about them."""
    at = {(row["network"], row["arm"]): row for row in rows}
    found = []
    if ("sd15", "accelerate") in at:
        ours, eager = at["sd15", "accelerate"], at["sd15", "eager"]
        for what in ("chain_passes", "chain_bytes"):
            found.append(_bar(f"sd15: {what}, accelerate / eager", ours[what] / eager[what], BARS["chain"]))
    if ("cifar10", "accelerate") in at:
        ours, eager = at["cifar10", "accelerate"], at["cifar10", "eager"]
        share = ours["network_launches"] / PROMISED
        found.append(_bar(f"cifar10: launches of the network, accelerate / {PROMISED}", share, BARS["launches"]))
        share = ours["launches"] / eager["launches"]
        found.append(_bar("cifar10: launches of the denoiser, accelerate / eager", share, BARS["launches"]))
    return found


def _bar(what: str, value: float, limit: float) -> dict:
    return {"bar": what, "value": round(value, 4), "limit": limit, "holds": value <= limit}


def print_report(report: dict) -> None:
    """The report as tables."""
    print(f"\n{report['label']}")
    times = {(m["network"], m["arm"], m["what"]): m["modelled_ms"] for m in report["modelled"]}
    for name in dict.fromkeys(row["network"] for row in report["counts"]):
        rows = [row for row in report["counts"] if row["network"] == name]
        print(f"\n{NETWORKS[name].title}, batch {rows[0]['batch']}, {rows[0]['dtype']}")
        heads = ("launches", "bytes", "modelled", "chain", "passes", "floor", "modelled")
        print(f"{'':12}{''.join(f'{head:>11}' for head in heads)}")
        for row in rows:
            cells = [_megabytes(row[key]) for key in ("bytes", "chain_bytes", "chain_passes", "chain_floor")]
            whole, chain = (times.get((name, row["arm"], key)) for key in ("bytes", "chain_passes"))
            cells = [str(row["launches"]), cells[0], _milliseconds(whole), *cells[1:], _milliseconds(chain)]
            print(f"{row['arm']:12}{''.join(f'{cell:>11}' for cell in cells)}")
    print(f"\nmodelled: bytes / {report['settings']['bandwidth_gb_s']:.0f} GB/s; not a measurement")
    for bar in report["bars"]:
        print(f"{'holds' if bar['holds'] else 'FAILS'}  {bar['bar']}: {bar['value']:.3f}, at most {bar['limit']}")
    for note in report["notes"]:
        print(note)


def _megabytes(n: int | None) -> str:
    return "-" if n is None else f"{n / 1e6:.1f} MB"


def _milliseconds(ms: float | None) -> str:
    return "-" if ms is None else f"{ms * 1e3:.3g} us" if ms < 1 else f"{ms:.2f} ms"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS), help="which (default: all)")
    add("--batch", type=int, default=1, help="pictures per call (default: 1)")
    add("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    add("--no-inductor", action="store_true", help="leave the slow arm out")
    add("--bandwidth", type=float, default=BANDWIDTH, help=f"GB/s of the modelled times (default: {BANDWIDTH:.0f})")
    add("--json", type=Path, default=records.RESULTS / "kernels.json", help="write the report here")
    add("--figure", type=Path, help="draw it here (default: beside the JSON)")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.bandwidth <= 0:
        parser.error("--batch is at least 1, --bandwidth more than 0")
    return args


def measure(args: argparse.Namespace, argv: list[str] | None) -> dict:
    """The whole report."""
    dtype = getattr(torch, args.dtype)
    rows, notes = count_all(args.networks, args.batch, dtype, not args.no_inductor)
    return {
        "schema": SCHEMA,
        "label": "counted, without a GPU: launches and bytes of one call",
        "command": records.command("kernels.py", argv),
        "environment": records.environment(),
        "settings": {"batch": args.batch, "dtype": args.dtype, "cc": CC, "bandwidth_gb_s": args.bandwidth},
        "counts": rows,
        "modelled": modelled(rows, args.bandwidth),
        "bars": bars(rows),
        "notes": notes,
    }


def main(argv: list[str] | None = None) -> int:
    """Count, print, write; 1 if a promise about the counts does not hold."""
    args = parse(argv)
    try:
        report = measure(args, argv)
    except (ImportError, ValueError, OSError) as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    records.write(report, args.json)
    kernel_figure.draw_counts(report, args.figure or args.json.with_suffix(".png"))
    print_report(report)
    return 0 if all(bar["holds"] for bar in report["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
