"""The shipped checkpoint from noise to pictures on one GPU: tdpm at 4 evaluations against dpmpp_2m at 4, 8 and 50.

Each sampler runs the plain network (eager), the accelerated one (accelerate: a CUDA graph for each call), and tdpm
also as one CUDA graph (Trajectory: prior, calls and updates). Same seeds and classes for all, float32 without TF32,
arms in turns, wall time of a call that ends with the device done, the prior's time within. ``rmse`` is to the
checkpoint's own 60-evaluation pictures. An arm whose pictures differ from its eager run's gets no times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.arms import RIVAL, Arm, Setup
from benchmarks.metrics import paired_rmse
from benchmarks.networks import CHECKPOINT
from benchmarks.rivals import reference_run
from tdpm_ext import Trajectory, load_prior, open_checkpoint
from tdpm_ext.kernels import accelerate

BUDGET, AGAINST, BATCHES = 4, (4, 8, 50), (1, 16, 64)
LIMIT = 1e-3  # rmse between two ways of running one sampler


def measure(device: torch.device, *, rounds: int, batches: tuple[int, ...] = BATCHES) -> list[dict]:
    """A row for every batch size, sampler and way of running it."""
    opened = open_checkpoint(CHECKPOINT, device)
    prior = load_prior(CHECKPOINT.with_name("prior.safetensors"), device, expect_checkpoint=opened.fingerprint)
    setup = Setup(opened.model, prior, device, opened.num_classes)
    fast = replace(setup, model=copy.deepcopy(opened.model))
    accelerate(fast.model)
    draw = Trajectory(copy.deepcopy(opened.model), prior, BUDGET)
    accelerate(draw.model, graphs="off")
    rows = []
    for batch in batches:
        z, args = setup.noise(batch, 0), setup.arguments(batch)
        reference = reference_run(setup.model, z, 60, setup.sigma_max, setup.sigma_min, args)
        calls: dict[tuple[str, int, str], Callable[[], Tensor]] = {}
        for arm in [Arm("tdpm", BUDGET), *(Arm(RIVAL, n) for n in AGAINST)]:
            calls[arm.sampler, arm.budget, "eager"] = arm.ready(setup, z)
            calls[arm.sampler, arm.budget, "accelerate"] = arm.ready(fast, z)
        calls["tdpm", BUDGET, "one graph"] = lambda z=z, args=args: draw.from_noise(z, args)
        rows += _rows(calls, reference, device, batch, rounds)
    if draw.reasons:
        raise RuntimeError(f"the trajectory was no graph: {'; '.join(draw.reasons)}")
    return rows


def _rows(calls: dict, reference: Tensor, device: torch.device, batch: int, rounds: int) -> list[dict]:
    plain, rows, agreeing = {}, [], {}
    for (sampler, steps, way), call in calls.items():
        pictures = call()
        plain.setdefault((sampler, steps), pictures)
        drift = paired_rmse(pictures.cpu(), plain[sampler, steps].cpu())
        row = {"sampler": sampler, "steps": steps, "way": way, "batch": batch, "drift": drift}
        row["rmse"] = paired_rmse(pictures.cpu(), reference.cpu())
        rows.append(row | dict.fromkeys(("runs", "min_ms", "p50_ms", "p90_ms", "ms_per_picture")))
        if drift <= LIMIT:
            agreeing[sampler, steps, way] = call
    times = timing.interleave(agreeing, timing.Clock(device), rounds, 3, f"pictures, batch {batch}")
    for row in rows:
        found = times.get((row["sampler"], row["steps"], row["way"]))
        if found:
            row |= timing.summary(found) | {"ms_per_picture": float(np.median(found)) / batch}
    return rows


def lines(rows: list[dict]) -> list[str]:
    """The rows as a table."""
    out = [f"{'ms from noise to pictures':34}{'batch':>6}{'p50':>9}{'p90':>9}{'a picture':>11}{'rmse':>8}"]
    for row in rows:
        name = f"{row['sampler']} at {row['steps']}, {row['way']}"
        if row["p50_ms"] is None:
            out.append(f"{name:34}{row['batch']:6}  not timed: rmse {row['drift']:.2g} to its eager run")
            continue
        times = f"{row['p50_ms']:9.2f}{row['p90_ms']:9.2f}{row['ms_per_picture']:11.3f}"
        out.append(f"{name:34}{row['batch']:6}{times}{row['rmse']:8.3f}")
    return out
