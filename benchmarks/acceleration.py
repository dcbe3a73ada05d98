"""What `accelerate(model)` gives on this machine: one call of a checkpoint's network, eager against each tier.

    python benchmarks/acceleration.py                             # the shipped checkpoint, exact tier
    python benchmarks/acceleration.py --tiers exact half compile  # the opt-in tiers too

All arms take turns in one process, and the ratio is that of the medians; what a tier's first call costs stands apart.
With one thread, times are its CPU time, so that other programs on the machine count less; with several, they are the
clock's. `error` is the largest difference of one call, `rmse` that of whole pictures from the same seeds (tdpm, four
evaluations, in data units from -1 to 1). Half precision and compiled code are used only where a measurement at the
first call finds them faster; the notes say what was found. Inductor starts with an empty cache.

Last: what a fused operation of `tdpm_ext.kernels` costs on the CPU over torch's own, on arrays so small that nothing
but the call is left; CPU time of one thread, fastest and median of 15 runs of 1,000 calls.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import timeit
from pathlib import Path

import torch
import torch._inductor.utils
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import records, timing  # noqa: E402
from tdpm_ext import (  # noqa: E402
    kernels,  # noqa: E402
    load_prior,
    open_checkpoint,
    sample,
)

ASSETS = ROOT / "assets" / "fashion-mnist"
LEVEL = 1.3  # the noise level of the timed call; the network does the same work at every level


class ThreadTime(timing.Clock):
    """The CPU time of this thread, in milliseconds."""

    def time(self, call) -> float:
        begin = time.thread_time()
        call()
        return (time.thread_time() - begin) * 1e3


def inputs(checkpoint, batch: int) -> tuple:
    """x, sigma and labels of one call, every picture of another class."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *checkpoint.shape, generator=generator) * LEVEL
    labels = torch.arange(batch) % checkpoint.num_classes if checkpoint.num_classes else None
    return x, torch.full((batch,), LEVEL), labels


def measure(checkpoint, prior, tiers: list[str], batches: list[int], rounds: int, progress: bool) -> list[dict]:
    """A row for every tier and batch size."""
    models = {"eager": checkpoint.model} | {tier: copy.deepcopy(checkpoint.model) for tier in tiers}
    handles = {tier: kernels.accelerate(models[tier], precision=tier) for tier in tiers}
    rows, clock = [], (ThreadTime if torch.get_num_threads() == 1 else timing.Clock)(torch.device("cpu"))
    for batch in batches:
        call = inputs(checkpoint, batch)
        first, outputs = {}, {}
        for name, model in models.items():
            begin = time.perf_counter()
            outputs[name] = model(*call)
            first[name] = time.perf_counter() - begin
        arms = {name: lambda model=model, call=call: model(*call) for name, model in models.items()}
        title = f"batch {batch}" if progress else None
        times = timing.interleave(arms, clock, rounds, 2, title)
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
                    "notes": notes_of(handles.get(name), batch),
                }
            )
    return rows


def notes_of(handle, batch: int) -> list[str]:
    """What a tier's own measurements said: compiling is decided for each shape, half precision once for all."""
    return [n for n in handle.notes if n.startswith("half:") or f"for ({batch}," in n] if handle else []


def operation_costs(runs: int = 15, calls: int = 1000) -> list[dict]:
    """A row for each operation: microseconds of CPU time per call, torch's own way and ours."""
    g = torch.Generator().manual_seed(0)
    x, denoised = torch.randn(2, 1, 32, 2, 2, generator=g)
    scale, shift = torch.randn(2, 1, 32, generator=g)
    q, norm = torch.randn(1, 2, 4, 8, generator=g), torch.nn.GroupNorm(8, 32)

    def ada_gelu():
        return F.gelu(torch.addcmul(shift[:, :, None, None], F.group_norm(x, 8), scale[:, :, None, None] + 1))

    pairs = {
        "group_norm": (lambda: norm(x), lambda: kernels.group_norm(x, 8, norm.weight, norm.bias)),
        "group_norm with scale, shift, GELU": (
            ada_gelu,
            lambda: kernels.group_norm(x, 8, scale=scale, shift=shift, act="gelu"),
        ),
        "attention": (lambda: F.scaled_dot_product_attention(q, q, q), lambda: kernels.attention(q, q, q)),
        "sampler_step": (
            lambda: (3.0 * denoised).add_(x, alpha=2.0).add_(denoised, alpha=0.5),
            lambda: kernels.sampler_step(x, denoised, (denoised,), a=2.0, b=3.0, c=(0.5,)),
        ),
    }
    rows = []
    for name, ways in pairs.items():
        times: tuple[list[float], list[float]] = ([], [])
        for run in range(runs):
            for way, kept in list(zip(ways, times, strict=True))[:: 1 if run % 2 else -1]:
                kept.append(timeit.timeit(way, number=calls, timer=time.thread_time) / calls * 1e6)
        plain, ours = map(min, times)
        median = statistics.median(times[1]) - statistics.median(times[0])
        extra = {"extra_us": ours - plain, "median_extra_us": median}
        rows.append({"operation": name, "plain_us": plain, "ours_us": ours, **extra})
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
    for o in report["operations"]:
        times = f"torch {o['plain_us']:.1f} us, ours {o['ours_us']:.1f}"
        print(f"{o['operation']}: {times}: {o['extra_us']:+.1f} (medians {o['median_extra_us']:+.1f})")


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
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        rows = measure(checkpoint, prior, args.tiers, args.batches, args.rounds, not args.quiet)
        operations = operation_costs()
    environment = timing.environment(torch.device("cpu"))
    environment["command"] = records.command("acceleration.py", argv)
    parts = {"rows": rows, "summary": summarise(rows), "operations": operations}
    report = {"schema": "tdpm-accelerate/1", "environment": environment, **parts}
    print_report(report)
    if args.json:
        records.write(report, args.json)
        print(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
