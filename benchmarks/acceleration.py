"""What `accelerate(model)` gives on this machine: one call of a checkpoint's network, eager against each tier.

    python benchmarks/acceleration.py                             # the shipped checkpoint, exact tier
    python benchmarks/acceleration.py --tiers exact half compile  # the opt-in tiers too: compiling takes minutes

All arms take turns in one process, and the ratio is that of the medians; what a tier's first call costs stands apart.
`error` is the largest difference of one call, `rmse` that of whole pictures from the same seeds (tdpm, four
evaluations, in data units from -1 to 1). Half precision and Inductor are used only where a measurement at the first
call finds them faster; the notes say what was found.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import records, timing  # noqa: E402
from tdpm_ext import load_prior, open_checkpoint, sample  # noqa: E402
from tdpm_ext.kernels import accelerate  # noqa: E402

ASSETS = ROOT / "assets" / "fashion-mnist"
LEVEL = 1.3  # the noise level of the timed call; the network does the same work at every level


def inputs(checkpoint, batch: int) -> tuple:
    """x, sigma and labels of one call, every picture of another class."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *checkpoint.shape, generator=generator) * LEVEL
    labels = torch.arange(batch) % checkpoint.num_classes if checkpoint.num_classes else None
    return x, torch.full((batch,), LEVEL), labels


def measure(checkpoint, prior, tiers: list[str], batches: list[int], rounds: int, progress: bool) -> list[dict]:
    """A row for every tier and batch size."""
    models = {"eager": checkpoint.model} | {tier: copy.deepcopy(checkpoint.model) for tier in tiers}
    handles = {tier: accelerate(models[tier], precision=tier) for tier in tiers}
    rows = []
    for batch in batches:
        call = inputs(checkpoint, batch)
        first, outputs = {}, {}
        for name, model in models.items():
            begin = time.perf_counter()
            outputs[name] = model(*call)
            first[name] = time.perf_counter() - begin
        arms = {name: lambda model=model, call=call: model(*call) for name, model in models.items()}
        title = f"batch {batch}" if progress else None
        times = timing.interleave(arms, timing.Clock(torch.device("cpu")), rounds, 2, title)
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name in models:
            rows.append(
                {
                    "tier": name,
                    "batch": batch,
                    **timing.summary(times[name]),
                    "ratio": medians["eager"] / medians[name],
                    "best_ratio": min(times["eager"]) / min(times[name]),
                    "first_s": first[name],
                    "error": (outputs[name] - outputs["eager"]).abs().max().item(),
                    "rmse": picture_error(checkpoint, prior, models["eager"], models[name], batch),
                    "notes": [note for note in handles[name].notes if f"({batch}," in note] if name in handles else [],
                }
            )
    return rows


def picture_error(checkpoint, prior, eager, model, batch: int) -> float:
    """Root mean square difference of finished pictures from the same seeds."""
    labels = torch.arange(batch) % checkpoint.num_classes if checkpoint.num_classes else None
    extra = {} if labels is None else {"class_cond": labels}
    a, b = (sample(m, prior, steps=4, seed=list(range(batch)), extra_args=extra, disable=True) for m in (eager, model))
    return (a - b).square().mean().sqrt().item()


def summarise(rows: list[dict]) -> list[dict]:
    """The median ratio of each tier over the batch sizes, and its worst."""
    tiers = dict.fromkeys(row["tier"] for row in rows)
    ratios = {tier: [row["ratio"] for row in rows if row["tier"] == tier] for tier in tiers if tier != "eager"}
    return [{"tier": tier, "median_ratio": statistics.median(r), "worst_ratio": min(r)} for tier, r in ratios.items()]


def print_report(report: dict) -> None:
    print(f"\n{report['environment']['name']}, {report['environment']['threads']} thread(s), CPU; one network call")
    print("tier      batch   p50 ms   min ms   ratio   (of minima)   first call s   error     rmse of pictures")
    for r in report["rows"]:
        times = f"{r['p50_ms']:8.2f} {r['min_ms']:8.2f} {r['ratio']:7.2f} {r['best_ratio']:13.2f}"
        print(f"{r['tier']:8} {r['batch']:6d} {times} {r['first_s']:14.2f}   {r['error']:.1e}   {r['rmse']:.1e}")
    for s in report["summary"]:
        print(f"{s['tier']}: {s['median_ratio']:.2f} x eager (median over batch sizes), worst {s['worst_ratio']:.2f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ASSETS / "denoiser.safetensors")
    parser.add_argument("--prior", type=Path, default=ASSETS / "prior.safetensors")
    parser.add_argument("--tiers", nargs="+", default=["exact"], choices=("exact", "half", "compile"))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each arm (default 15)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--json", type=Path, help="write the report here as well")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if min(*args.batches, args.rounds, args.threads, 10**9) < 1:
        parser.error("--batches, --rounds and --threads take numbers of at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    checkpoint = open_checkpoint(args.checkpoint)
    prior = load_prior(args.prior, expect_shape=checkpoint.shape)
    with torch.no_grad():
        rows = measure(checkpoint, prior, args.tiers, args.batches, args.rounds, not args.quiet)
    environment = timing.environment(torch.device("cpu"))
    environment["command"] = records.command("acceleration.py", argv)
    report = {"schema": "tdpm-accelerate/1", "environment": environment, "rows": rows, "summary": summarise(rows)}
    print_report(report)
    if args.json:
        records.write(report, args.json)
        print(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
