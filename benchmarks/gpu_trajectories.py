"""Whole trajectories on one GPU: from noise to picture in four steps, five ways to run the same network.

Arms: eager; channels_last (attention is torch's fused one in both); torch.compile(mode="reduce-overhead") of the
channels_last network; accelerate, with a CUDA graph for each call; accelerate with all four steps in one graph. All
live in one process and take turns in rotating order. The first call is given apart: it compiles and captures. An arm
that strays from a more precise run by more than 1.5 times what the eager arm does gets no speed-up. Memory is the peak
allocated during one call, with the weights of all arms in it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import networks, timing
from tdpm_ext.kernels import accelerate
from tdpm_ext.kernels.graphs import GraphedTrajectory

STEPS = 4
SLACK = 1.5
SIGMAS = (14.6, 3.0, 0.9, 0.3, 0.0)  # any will do: the time does not depend on them
TIMESTEPS = (999.0, 749.0, 499.0, 249.0)
ARMS = ("eager", "channels_last", "compile", "accelerate", "one graph")


def trajectory(name: str, model: nn.Module, noise: Tensor, kwargs: dict, prompt: Tensor | None) -> Tensor:
    """Four Euler steps. Stable Diffusion's network predicts noise, the others the denoised picture."""
    x = noise * SIGMAS[0]
    levels = torch.tensor(SIGMAS[:-1] if prompt is None else TIMESTEPS, device=x.device, dtype=x.dtype)
    for i, (sigma, below) in enumerate(zip(SIGMAS, SIGMAS[1:], strict=False)):
        level = levels[i].repeat(len(x))
        if prompt is None:
            denoised = model(x, level, **kwargs)
            x = denoised + (x - denoised) * (below / sigma)
        else:
            x = x + model(x / (1 + sigma**2) ** 0.5, level, prompt) * (below - sigma)
    return x


def prepare(arm: str, model: nn.Module) -> Callable:
    """The model as the arm runs it; the model given stays as it is."""
    if arm == "eager":
        return model
    model = copy.deepcopy(model)
    if arm in ("accelerate", "one graph"):
        accelerate(model, graphs="auto" if arm == "accelerate" else "off")
        return model
    model = model.to(memory_format=torch.channels_last)
    return torch.compile(model, mode="reduce-overhead") if arm == "compile" else model


def measure(
    name: str, batch: int, device: torch.device, dtype: torch.dtype, *, rounds: int, arms: tuple[str, ...] = ARMS
) -> list[dict]:
    """Rows for one network: one per arm."""
    model = networks.build(name, device.type, dtype)
    generator = torch.Generator().manual_seed(0)
    with networks.defaults(device.type, dtype):
        (x, *rest), kwargs = networks.NETWORKS[name].inputs(batch)
    noise = torch.randn(x.shape, generator=generator).to(x)
    prompt = torch.randn(rest[1].shape, generator=generator).to(x) if len(rest) > 1 else None
    with torch.inference_mode():
        truth = _truth(name, model, noise, kwargs, prompt)
        rows, calls, own = [], {}, None
        for arm in arms:
            row, call = _first(name, arm, model, (noise, kwargs, prompt), truth)
            own = row["error"] if own is None else own
            row |= {"network": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "steps": STEPS}
            row["agrees"] = row["error"] <= SLACK * own + 2 * torch.finfo(dtype).eps * truth.abs().max().item()
            rows.append(row)
            calls[arm] = call
        clock = timing.Clock(device)
        times = timing.interleave(calls, clock, rounds, 3, f"{name} trajectory, batch {batch}")
        for row in rows:
            row |= _quantiles(times[row["arm"]])
            row["peak_mib"] = timing.peak_memory(calls[row["arm"]], device)
            eager = float(np.percentile(times[arms[0]], 50))
            row["speedup"] = eager / row["p50_ms"] if row["agrees"] else None
    return rows


def _truth(name: str, model: nn.Module, noise: Tensor, kwargs: dict, prompt: Tensor | None) -> Tensor:
    """The same in float32; float32 itself in float64."""
    dtype = torch.float64 if noise.dtype == torch.float32 else torch.float32
    wide = copy.deepcopy(model).to(dtype)
    kwargs = {key: value.to(dtype) for key, value in kwargs.items()}
    return trajectory(name, wide, noise.to(dtype), kwargs, None if prompt is None else prompt.to(dtype))


def _first(name: str, arm: str, model: nn.Module, given: tuple, truth: Tensor) -> tuple[dict, Callable]:
    """The arm's first call: its row so far, and what to call from now on."""
    begin = time.perf_counter()
    ready = prepare(arm, model)

    def run(noise: Tensor, kwargs: dict, prompt: Tensor | None) -> Tensor:
        return trajectory(name, ready, noise, kwargs, prompt)

    whole = GraphedTrajectory(run, watch=(ready,)) if arm == "one graph" else run

    def call() -> Tensor:
        found = whole(*given)
        return found.clone() if arm == "compile" else found

    found = call()
    error = (found.to(truth.dtype) - truth).abs().max().item()  # waits for the GPU
    first_ms = (time.perf_counter() - begin) * 1e3
    return {"arm": arm, "first_ms": first_ms, "error": error}, call


def _quantiles(times: list[float]) -> dict:
    points = {f"p{q}_ms": float(np.percentile(times, q)) for q in (50, 90, 99)}
    return {"runs": len(times), "min_ms": float(min(times)), **points}
