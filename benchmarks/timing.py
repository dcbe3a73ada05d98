"""Clocks, interleaved timing, the description of the machine, and the format of a latency report.

Timing rules, the same for every arm: all arms live in one process and take turns, in an order that rotates, so that
a slow minute of the machine hits them alike; the first rounds are thrown away; minimum, median and 90th percentile
are over rounds. On CUDA a run is timed between two events on the stream and ends with a synchronisation.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Hashable
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import records

SCHEMA_NAME = "tdpm-latency/1"


class Clock:
    """Times a call on one device, in milliseconds."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


class Stopwatch:
    """Wraps callables and adds up the wall time inside the outermost of them; synchronises around each call."""

    def __init__(self, clock: Clock):
        self.clock, self.depth = clock, 0
        self.reset()

    def reset(self) -> None:
        self.ms, self.calls = 0.0, 0

    def wrap(self, call: Callable) -> Callable:
        def timed(*args, **kwargs):
            if self.depth:
                return call(*args, **kwargs)
            self.clock.synchronise()
            self.depth, begin = 1, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.clock.synchronise()
                self.depth, self.calls = 0, self.calls + 1
                self.ms += (time.perf_counter() - begin) * 1e3

        return timed

    @contextmanager
    def methods_of(self, thing, names: tuple[str, ...]):
        """Time these methods of one object while the block runs."""
        for name in names:
            setattr(thing, name, self.wrap(getattr(thing, name)))
        try:
            yield self
        finally:
            for name in names:
                delattr(thing, name)


def interleave(
    arms: dict[Hashable, Callable[[], object]],
    clock: Clock,
    rounds: int,
    warmup: int,
    progress: str | None = None,
    excluded: Stopwatch | None = None,
) -> dict[Hashable, list[float]]:
    """Time every arm ``rounds`` times, taking turns: name -> milliseconds [rounds].

    Args:
        warmup: rounds run before and thrown away.
        progress: title of a progress bar, or None for none.
        excluded: what this watch counts during a call is taken off its time.
    """
    times: dict[Hashable, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in tqdm(range(-warmup, rounds), desc=progress, disable=progress is None, unit="round"):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if excluded:
                excluded.reset()
            ms = clock.time(arms[name])
            if turn >= 0:
                times[name].append(ms - excluded.ms if excluded else ms)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Runs, minimum, median and 90th percentile of milliseconds."""
    return {
        "runs": len(times),
        "min_ms": float(min(times)),
        "p50_ms": float(np.percentile(times, 50)),
        "p90_ms": float(np.percentile(times, 90)),
    }


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """Highest memory in MiB during one call: allocated on CUDA, resident for the process on a CPU (Linux only)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        reset.write_text("5")  # sets the high-water mark back to what is resident now
    except OSError:
        return None
    call()
    marks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(marks[0]) / 1024 if marks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _commit() -> str | None:
    """The commit of the working tree, with "+" when it has uncommitted changes; None outside a repository."""
    commit = records.git("rev-parse", "HEAD")
    return commit + "+" * bool(records.git("status", "--porcelain")) if commit else None


def environment(device: torch.device) -> dict:
    """What the figures were taken on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "name": gpu or records.processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "k_diffusion": records.version("k-diffusion"),
        "tdpm_ext": records.version("tdpm-ext"),
        "commit": _commit(),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017 (Python 3.10)
        "command": " ".join(["python", *sys.argv]),
    }


def validate(report: dict) -> None:
    """Raise ``ValueError`` listing what in ``report`` is not as the schema of results says."""
    found = records.problems(report)
    if not found and report["schema"] != SCHEMA_NAME:
        found = [f"report.schema is {report['schema']!r}, not {SCHEMA_NAME!r}"]
    if not found and report["speedups"] and not report["agreed"]:
        found = ["report.speedups is filled although the outputs disagree"]
    if found:
        raise ValueError("not a valid latency report: " + "; ".join(found[:10]))


def write_report(report: dict, path: Path) -> None:
    """Validate, then write atomically."""
    validate(report)
    records.write(report, path)
