"""The arms of the latency benchmark: how each is called, the gate that their outputs pass before any timing, and what
the samplers alone cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks import timing
from benchmarks.metrics import paired_rmse
from benchmarks.rivals import CountCalls, karras_sigmas, noise_for, reference_run
from tdpm_ext import sample, sample_tdpm
from tdpm_ext.optional import import_k_diffusion

RIVAL = "dpmpp_2m"
PRIOR_METHODS = ("start", "sample", "denoise", "transport")
LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # rmse between two routes to one picture


@dataclass
class Setup:
    """A denoiser, a prior for it, and how both are called."""

    model: Callable
    prior: object
    device: torch.device
    classes: int = 0
    cond_scale: float = 1.0
    objective: str = "fidelity"
    sigma_max: float = 80.0
    sigma_min: float = 0.02
    limit: float = 1e-3
    seconds: float | None = None  # that fitting and calibrating the prior took, if known

    def noise(self, count: int, seed: int) -> torch.Tensor:
        return noise_for(range(seed, seed + count), self.prior.shape).to(self.device)

    def arguments(self, count: int) -> dict:
        args = {"class_cond": torch.arange(count, device=self.device) % self.classes} if self.classes else {}
        return args | ({"cond_scale": self.cond_scale} if self.cond_scale != 1 else {})


@dataclass(frozen=True)
class Arm:
    """One sampler at one budget."""

    sampler: str  # "tdpm" or a k-diffusion sampler with one evaluation per step
    budget: int

    @property
    def name(self) -> str:
        return f"{self.sampler}@{self.budget}"

    def ready(self, setup: Setup, z: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Everything but the sampling done: the returned call starts from noise and ends with pictures."""
        sigmas = karras_sigmas(self.budget, setup.sigma_max, setup.sigma_min, 7.0).to(z.device, torch.float32)
        args, x = setup.arguments(len(z)), z * setup.sigma_max
        if self.sampler == "tdpm":
            options = {"prior": setup.prior, "objective": setup.objective, "init": "always", "disable": True}
            return lambda: sample_tdpm(setup.model, x, sigmas, args, **options)
        sampler = getattr(import_k_diffusion().sampling, f"sample_{self.sampler}")
        return lambda: sampler(setup.model, x, sigmas, extra_args=args, disable=True)


def plain_dpmpp_2m(model, x, sigmas, args: dict) -> torch.Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, written out once more in float64, to check the timed one against."""
    x, sigmas, before, step_before = x.double(), sigmas.tolist(), None, None
    for sigma, to in zip(sigmas[:-1], sigmas[1:], strict=True):
        level = torch.full((len(x),), sigma, device=x.device)
        denoised = estimate = model(x.float(), level, **args).double()
        step = torch.log(torch.tensor(sigma / to)).item() if to else None
        if before is not None and to:
            estimate = denoised + (denoised - before) * step / (2 * step_before)
        x = (to / sigma) * x + (1 - to / sigma) * estimate
        before, step_before = denoised, step
    return x.float()


def other_route(arm: Arm, setup: Setup, z: torch.Tensor, seed: int) -> torch.Tensor:
    """The same pictures by code that shares as little as possible with the timed call."""
    args = setup.arguments(len(z))
    if arm.sampler != "tdpm":
        sigmas = karras_sigmas(arm.budget, setup.sigma_max, setup.sigma_min, 7.0)
        return plain_dpmpp_2m(setup.model, z * setup.sigma_max, sigmas, args)
    shape, seeds = (len(z), *setup.prior.shape), range(seed, seed + len(z))
    options = {"objective": setup.objective, "device": setup.device, "disable": True, "batch": max(1, len(z) // 2)}
    return sample(setup.model, setup.prior, shape, arm.budget, list(seeds), args, **options)


def check_outputs(arms: list[Arm], setup: Setup, count: int, seed: int) -> tuple[list[dict], dict[str, float]]:
    """The gate: rows of checks, and each arm's rmse to the 60-evaluation pictures."""
    z, checks, rmses = setup.noise(count, seed), [], {}
    model, args = setup.model, setup.arguments(count)
    reference = reference_run(model, z, 60, setup.sigma_max, setup.sigma_min, args).cpu()

    def check(arm: Arm, what: str, value: float, limit: float) -> None:
        checks.append({"arm": arm.name, "check": what, "value": value, "limit": limit, "ok": value <= limit})

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        """Capped, because a report holds finite numbers only."""
        finite = bool(torch.isfinite(a).all() and torch.isfinite(b).all())
        return min(paired_rmse(a.cpu(), b.cpu()), 1e6) if finite else 1e6

    for arm in arms:
        counted = CountCalls(model)
        x = arm.ready(replace(setup, model=counted), z)()
        check(arm, "evaluations within the budget", counted.calls, arm.budget)
        check(arm, "repeated run", distance(x, arm.ready(setup, z)()), setup.limit)
        check(arm, "alone and in a batch", distance(x[:1], arm.ready(setup, z[:1])()), setup.limit)
        check(arm, "another route", distance(x, other_route(arm, setup, z, seed)), setup.limit)
        rmses[arm.name] = distance(x, reference)
    unrelated = distance(reference, reference.roll(1, 0)) if count > 1 else float(reference.std())
    for arm in (a for a in arms if a.sampler == "tdpm"):
        check(arm, "nearer to its seed's picture than another seed's", rmses[arm.name], 0.9 * unrelated)
        if setup.objective == "fidelity":
            rival = f"{RIVAL}@{arm.budget}"
            check(arm, f"rmse to the reference against {rival}", rmses[arm.name], 1.02 * rmses[rival])
    return checks, rmses


def time_overhead(prior, steps: tuple[int, ...], rounds: int, progress: bool = True) -> list[dict]:
    """Microseconds per step of the samplers alone: one picture, a model that returns a stored tensor, on the CPU.

    The time inside the prior is measured in the same calls and taken off.
    """
    denoised = torch.zeros(1, *prior.shape)
    setup = Setup(lambda x, sigma, **_: denoised, prior, torch.device("cpu"))
    z, clock, calls = setup.noise(1, 0), timing.Clock(setup.device), {}
    for n in steps:
        for sampler in ("euler", RIVAL, "tdpm"):
            calls[sampler, n] = Arm(sampler, n).ready(setup, z)
        sigmas = karras_sigmas(n, setup.sigma_max, setup.sigma_min, 7.0)
        unused = partial(sample_tdpm, setup.model, z * setup.sigma_max, sigmas, prior=prior, init="never", disable=True)
        calls["tdpm, prior not used", n] = unused
        prior.plans.setdefault("fidelity", {}).setdefault(n, prior.plan_for(n))  # looked up, as when calibrated
    with timing.Stopwatch(clock).methods_of(prior, PRIOR_METHODS) as inside:
        title = "overhead" if progress else None
        times = timing.interleave(calls, clock, rounds, 1 + rounds // 5, title, excluded=inside)
    found = {key: timing.summary(ms) for key, ms in times.items()}
    rows = []
    for (sampler, n), one in found.items():
        per_step = {f"{key}_us_per_step": one[f"{key}_ms"] * 1e3 / n for key in ("min", "p50")}
        fewest, most = (found[sampler, m]["min_ms"] for m in (min(steps), max(steps)))
        further = (most - fewest) * 1e3 / max(1, max(steps) - min(steps))
        rows.append({"arm": sampler, "steps": n, "runs": one["runs"], "further_step_us": further} | per_step)
    return rows
