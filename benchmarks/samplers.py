"""Every sampler that tdpm is compared with, under one name each, and every noise schedule they are tuned over.

    s = SAMPLERS["diffusers:unipc"]
    x, nfe = s.run(model, sigmas_for("karras-7", s.steps_within(6), 80.0), z, options={"solver_order": 3})

k-diffusion's have their own names (``dpmpp_2m``), diffusers' carry a prefix. All run as their libraries ship them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks import diffusers_rivals
from benchmarks.rivals import CountCalls, RivalRun, in_batches
from tdpm_ext import schedule
from tdpm_ext.optional import import_k_diffusion

SIGMA_MAXES = (80.0, 40.0, 20.0, 10.0, 5.0)
SIGMA_MINS = (0.02, 0.1)  # of the last level before 0
KARRAS = (7.0, 5.0, 3.0)
SEEDS = "__seeds__"


@dataclass(frozen=True)
class Sampler:
    """One rival.

    Attributes:
        name: as in ``SAMPLERS``. library: whose code runs.
        evaluations: denoiser calls that n steps cost.
        least: fewest steps it can take.
        options: settings of its own that the search tries, besides the noise levels.
        random: draws noise on the way, so that a seed's picture is not that of the noise-free trajectory.
        call: ``call(model, sigmas, z, extra_args, batch, options, seeds) -> RivalRun``.
    """

    name: str
    library: str
    evaluations: Callable[[int], int]
    call: Callable[..., RivalRun]
    options: tuple[dict, ...] = field(default=({},))
    least: int = 1
    random: bool = False

    def steps_within(self, budget: int) -> int:
        """The most steps that cost at most ``budget`` evaluations; 0 if none does."""
        return max((n for n in range(self.least, budget + 1) if self.evaluations(n) <= budget), default=0)

    def run(self, model, sigmas, z, extra_args=None, batch=128, options=None, seeds=None, budget=None) -> RivalRun:
        """Pictures from unit noise ``z`` [N, C, H, W], started at ``z * sigmas[0]``.

        Args:
            sigmas: [n + 1] decreasing, the last one 0. extra_args: of the model; per-picture tensors are divided.
            options: one of ``self.options``. seeds: one per picture, for samplers that draw noise.
            budget: raise RuntimeError if more evaluations than this were made.
        """
        sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
        seeds = list(range(len(z))) if seeds is None else list(seeds)
        out = self.call(model, sigmas, z, extra_args or {}, batch, options or {}, seeds)
        if budget is not None and out.nfe > budget:
            raise RuntimeError(f"{self.name} made {out.nfe} evaluations with a budget of {budget}")
        return out


def _k_diffusion(name: str, model, sigmas, z, extra_args, batch, options, seeds) -> RivalRun:
    sampling = import_k_diffusion().sampling
    sampler, levels, most = getattr(sampling, f"sample_{name}"), sigmas.to(z.device, torch.float32), 0

    def run(part: torch.Tensor, args: dict) -> torch.Tensor:
        nonlocal most
        own = [0x5EED + int(s) for s in args.pop(SEEDS)]
        x, given = part * levels[0], dict(options)
        if name in _BROWNIAN:  # one Brownian path per picture, so that a picture does not depend on its batch
            given["noise_sampler"] = _brownian(x, sigmas, own)
        elif name in _WHITE:
            generators = [torch.Generator().manual_seed(s) for s in own]
            given["noise_sampler"] = lambda _sigma, _next: torch.stack(
                [torch.randn(x.shape[1:], generator=g) for g in generators]
            ).to(x)
        counted = CountCalls(model)
        out = sampler(counted, x, levels, extra_args=args, disable=True, **given)
        most = max(most, counted.calls)
        return out

    x = in_batches(run, z, {**extra_args, SEEDS: torch.tensor(seeds)}, batch)
    return RivalRun(x, most)


def _brownian(x: torch.Tensor, sigmas: torch.Tensor, seeds: list[int]) -> Callable:
    """k-diffusion's Brownian noise, drawn on the CPU: a seed gives the same noise on every device."""
    levels = sigmas.float()
    tree = import_k_diffusion().sampling.BrownianTreeNoiseSampler(
        x.cpu(), levels[levels > 0].min(), levels[0], seed=seeds
    )
    return lambda sigma, following: tree(sigma.cpu(), following.cpu()).to(x)


def _diffusers(name: str, model, sigmas, z, extra_args, batch, options, seeds) -> RivalRun:
    return diffusers_rivals.run_scheduler(model, name, sigmas, z, extra_args, batch, options, seeds)


# noise over intervals that do not overlap is white, and drawn so; only dpmpp_sde looks twice at one interval
_WHITE = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")
_BROWNIAN = ("dpmpp_sde",)
_ETAS = ({"eta": 0.5}, {"eta": 1.0})


def _one(n: int) -> int:
    return n


def _two(n: int) -> int:  # the second stage of the last step, which goes to zero, is saved
    return 2 * n - 1


def _registry() -> dict[str, Sampler]:
    table: list[tuple] = [  # name, evaluations, options, fewest steps
        ("euler", _one, ({},), 1),
        ("heun", _two, ({},), 1),
        ("dpm_2", _two, ({},), 1),
        ("lms", _one, ({"order": 2}, {"order": 3}, {"order": 4}), 1),
        ("dpmpp_2m", _one, ({},), 1),
        ("euler_ancestral", _one, _ETAS, 1),
        ("dpm_2_ancestral", _two, _ETAS, 1),
        ("dpmpp_2s_ancestral", _two, _ETAS, 1),
        ("dpmpp_sde", _two, _ETAS, 1),
        # these two fail on a single step to 0; with eta 0 they are deterministic, and 3m is of third order
        ("dpmpp_2m_sde", _one, ({"eta": 0.0, "solver_type": "heun"}, {"eta": 0.5}, {"eta": 1.0}), 2),
        ("dpmpp_3m_sde", _one, ({"eta": 0.0}, {"eta": 0.5}, {"eta": 1.0}), 2),
    ]
    out = {}
    for name, evaluations, options, least in table:
        random = name in _WHITE + _BROWNIAN
        out[name] = Sampler(name, "k-diffusion", evaluations, partial(_k_diffusion, name), options, least, random)
    orders = ({"solver_order": 2}, {"solver_order": 3})
    chosen = {"dpmpp": orders, "unipc": orders, "deis": orders}  # unipc with solver_type bh1 gives NaN on a step to 0
    for name, how in diffusers_rivals.SCHEDULERS.items():
        full = f"diffusers:{name}"
        options = chosen.get(name, ({},))
        out[full] = Sampler(full, "diffusers", how.evaluations, partial(_diffusers, name), options, 1, how.random)
    return out


SAMPLERS: dict[str, Sampler] = _registry()


def grids(sigma_max: float) -> list[tuple[str, float]]:
    """All (grid, sigma_min) that the search tries at this ``sigma_max``; GITS comes with the denoiser, see ``gits``."""
    shaped = [f"karras-{rho:g}" for rho in KARRAS] + ["exponential"]
    return [(grid, low) for grid in shaped for low in SIGMA_MINS] + [("ays", 0.0)]


def sigmas_for(grid: str, steps: int, sigma_max: float, sigma_min: float = 0.02) -> torch.Tensor:
    """A schedule by name: "karras-RHO", "exponential" or "ays". float64 [steps + 1], decreasing, last 0."""
    if grid.startswith("karras-"):
        return schedule.karras(steps, sigma_max, sigma_min, float(grid.removeprefix("karras-")))
    if grid == "exponential":
        return schedule.exponential(steps, sigma_max, sigma_min)
    if grid == "ays":
        return schedule.align_your_steps(steps, sigma_max=sigma_max)
    raise ValueError(f"unknown grid {grid!r}: choose karras-RHO, exponential or ays")


def gits(model, z, sigma_max: float, steps, extra_args=None, sigma_min: float = 0.02, fine: int = 48) -> dict:
    """Levels chosen on the denoiser's own trajectories, in the manner of GITS (Chen et al., arXiv 2405.11326).

    On a fine trajectory from ``z * sigma_max``, the cost of a jump between two of its levels is the error of one Euler
    step there; the levels of the cheapest path with n jumps from the first level to 0 are the schedule.

    Args:
        z: unit noise of a few pictures [P, C, H, W]. steps: the counts n that are wanted.

    Returns:
        {n: float64 sigmas [n + 1], decreasing, last 0}.
    """
    levels = schedule.exponential(fine, sigma_max, sigma_min)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    x = import_k_diffusion().sampling.sample_dpmpp_2m(
        model, z * sigma_max, levels.to(z.device, torch.float32), extra_args=extra_args, disable=True,
        callback=lambda info: seen.append((info["x"].double(), info["denoised"].double())),
    )  # fmt: skip
    points = torch.stack([a for a, _ in seen] + [x.double()]).flatten(1)
    costs = torch.full((fine + 1, fine + 1), math.inf, dtype=torch.float64)
    for i, (at, denoised) in enumerate(seen):
        ratio = (levels[i + 1 :] / levels[i])[:, None].to(at.device)
        jumped = denoised.flatten() + ratio * (at - denoised).flatten()
        costs[i, i + 1 :] = (jumped - points[i + 1 :]).square().mean(1).sqrt().cpu()
    return {n: levels[_cheapest(costs, n)] for n in steps}


def _cheapest(costs: torch.Tensor, jumps: int) -> list[int]:
    """Indices of the cheapest path of ``jumps`` edges from the first to the last node, by dynamic programming."""
    best, before = torch.full((len(costs),), math.inf, dtype=torch.float64), []
    best[0] = 0
    for _ in range(jumps):
        best, source = (best[:, None] + costs).min(0)
        before.append(source)
    path = [len(costs) - 1]
    for source in reversed(before):
        path.append(int(source[path[-1]]))
    return path[::-1]
