"""One network call by several means, each against the plain module: for networks whose weights do not matter.

What a baseline costs once (its first call: compiling, tuning, repacking weights) stands apart from its later calls,
and with it the number of pictures after which that is paid back. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import networks, records, timing
from tdpm_ext import kernels

SCHEMA = "tdpm-calls/1"
BASELINES = ("eager", "channels_last", "compile", "accelerate")
LIMITS = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}  # rms difference over the output's own rms


def ready(name: str, model: nn.Module) -> nn.Module:
    """``model`` by the means ``name``; a copy where it has to be changed."""
    if name == "eager":
        return model
    if name == "compile":
        return torch.compile(model)
    own = copy.deepcopy(model)
    if name == "channels_last":
        return own.to(memory_format=torch.channels_last)
    kernels.accelerate(own)
    return own


def break_even(first_s: float, eager_first_s: float, eager_ms: float, own_ms: float, batch: int) -> int | None:
    """Pictures after which what the first call cost more than the plain one's is paid back; None: never."""
    saved = (eager_ms - own_ms) / batch
    extra = max(0.0, first_s - eager_first_s) * 1e3
    return None if saved <= 0 else int(-(-extra // saved))


def first_calls(calls: dict[str, Callable], clock: timing.Clock) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Seconds of the first call of each, and what it returned."""
    seconds, outputs = {}, {}
    for name, call in calls.items():
        clock.synchronise()
        begin = time.perf_counter()
        outputs[name] = call()
        clock.synchronise()
        seconds[name] = time.perf_counter() - begin
    return seconds, outputs


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict:
    """The record: a row per batch size and baseline."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    network, clock, rows = networks.NETWORKS[args.network], timing.Clock(device), []
    model = networks.build(args.network, args.device, dtype)
    models = {name: ready(name, model) for name in dict.fromkeys(("eager", *args.baselines))}
    for batch in args.batch:
        torch.manual_seed(args.seed)
        with networks.defaults(args.device, dtype):
            given, named = network.inputs(batch)
        calls = {name: lambda m=m, a=given, k=named: m(*a, **k) for name, m in models.items()}
        first, outputs = first_calls(calls, clock)
        scale = outputs["eager"].float().square().mean().sqrt()
        errors = {n: float((x - outputs["eager"]).float().square().mean().sqrt() / scale) for n, x in outputs.items()}
        wrong = [name for name, error in errors.items() if not error <= LIMITS[dtype]]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} differ from the plain call by {errors}: nothing was timed")
        times = timing.interleave(calls, clock, args.rounds or 9, 1, f"{args.network}, batch {batch}")
        medians = {name: statistics.median(ms) for name, ms in times.items()}
        for name in models:
            paid = break_even(first[name], first["eager"], medians["eager"], medians[name], batch)
            rows.append({
                "baseline": name, "batch": batch, **timing.summary(times[name]),
                "p50_ms_per_picture": medians[name] / batch, "ratio": medians["eager"] / medians[name],
                "first_s": first[name], "break_even_pictures": None if name == "eager" else paid,
                "peak_mib": timing.peak_memory(calls[name], device), "error": errors[name],
            })  # fmt: skip
    where = timing.environment(device)
    where["command"] = records.command("latency.py", args.given)
    label = f"{network.title} with random weights: latency only. {'GPU' if device.type == 'cuda' else 'CPU'} figures"
    return {"schema": SCHEMA, "network": args.network, "label": label, "dtype": args.dtype, "calls": rows,
            "environment": where}  # fmt: skip


def show(record: dict) -> str:
    """The record as text."""
    lines = [f"{record['label']}: {record['environment']['name']}, {record['environment']['threads']} thread(s)"]
    lines.append("baseline        batch       min       p50       p90  per picture   ratio   first s  paid back after")
    for r in record["calls"]:
        times = f"{r['min_ms']:9.1f} {r['p50_ms']:9.1f} {r['p90_ms']:9.1f} {r['p50_ms_per_picture']:12.2f}"
        paid = r["break_even_pictures"]
        after = "" if r["baseline"] == "eager" else "never" if paid is None else f"{paid} pictures"
        lines.append(f"{r['baseline']:14} {r['batch']:6d} {times} {r['ratio']:7.2f} {r['first_s']:9.2f}  {after}")
    return "\n".join(lines)
