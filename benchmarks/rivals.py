"""k-diffusion's own samplers at a fixed number of network evaluations, and the search for their best settings.

Whatever is claimed against "the rival" is claimed against the best of these five samplers with sigma_max and rho
tuned for that very count. Every arm starts from the same unit noise ``z``, one generator per seed, scaled by its
own sigma_max, and the evaluations are counted, not assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from tqdm import tqdm

from tdpm_ext.optional import import_k_diffusion

# evaluations that n steps cost; the two-stage samplers save the second stage of the last step, which goes to zero
RIVALS: dict[str, Callable[[int], int]] = {
    "euler": lambda n: n,
    "heun": lambda n: 2 * n - 1,
    "dpm_2": lambda n: 2 * n - 1,
    "lms": lambda n: n,
    "dpmpp_2m": lambda n: n,
}
SIGMA_MAXES = (80.0, 40.0, 20.0, 10.0)
RHOS = (3.0, 7.0)


class RivalRun(NamedTuple):
    """``x`` the finished pictures [N, C, H, W]; ``nfe`` denoiser calls made per picture."""

    x: torch.Tensor
    nfe: int


@dataclass
class Tuning:
    """``rows``: every setting tried, JSON-able; ``best``: score name -> budget -> the row with the lowest score."""

    rows: list[dict] = field(default_factory=list)
    best: dict[str, dict[int, dict]] = field(default_factory=dict)


class CountCalls:
    """Wraps a denoiser and counts how often it is called."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, x, sigma, **kwargs):
        self.calls += 1
        return self.model(x, sigma, **kwargs)


def noise_for(seeds: Iterable[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Unit noise [len(seeds), *shape], one CPU generator per seed: independent of batch size and device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds])


def steps_for(name: str, budget: int) -> int:
    """The most steps of sampler ``name`` that cost at most ``budget`` evaluations."""
    if name not in RIVALS:
        raise ValueError(f"unknown rival {name!r}: choose from {', '.join(RIVALS)}")
    if budget < 1:
        raise ValueError(f"budget must be at least 1 evaluation, not {budget}")
    return max(n for n in range(1, budget + 1) if RIVALS[name](n) <= budget)


def karras_sigmas(n: int, sigma_max: float, sigma_min: float, rho: float) -> torch.Tensor:
    """k-diffusion's own schedule: [n + 1], decreasing, last 0; one step starts at sigma_max."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, not sigma_min={sigma_min}, sigma_max={sigma_max}")
    return _k_sampling().get_sigmas_karras(n, sigma_min, sigma_max, rho=rho)


def _k_sampling():
    return import_k_diffusion().sampling


def in_batches(run: Callable[[torch.Tensor, dict], torch.Tensor], z: torch.Tensor, extra_args: dict | None, batch: int):
    """Call ``run(z_part, extra_args_part)`` on ``batch`` pictures at a time and join the results.

    Tensors in ``extra_args`` whose first dimension is the number of pictures are divided with them.
    """
    count, extra_args = len(z), extra_args or {}
    parts = []
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        divided = {
            k: v[part] if isinstance(v, torch.Tensor) and v.ndim and len(v) == count else v
            for k, v in extra_args.items()
        }
        parts.append(run(z[part], divided))
    return torch.cat(parts)


def run_rival(
    model,
    name: str,
    budget: int,
    sigma_max: float,
    rho: float,
    z: torch.Tensor,
    sigma_min: float = 0.02,
    extra_args: dict | None = None,
    batch: int = 128,
) -> RivalRun:
    """Sample with one of k-diffusion's samplers, spending at most ``budget`` evaluations per picture.

    Args:
        model: denoiser ``model(x, sigma, **extra_args)``, sigma [B].
        name: key of ``RIVALS``.
        sigma_max, sigma_min, rho: Karras schedule, noise standard deviation in data units; then a last step to 0.
        z: unit noise [N, C, H, W] on the model's device; the start is ``z * sigma_max``.
        extra_args: keyword arguments for the model; per-picture tensors are divided with the batch.

    Raises:
        ValueError: unknown sampler, no budget, bad schedule. RuntimeError: the sampler overspent.
    """
    sigmas = karras_sigmas(steps_for(name, budget), sigma_max, sigma_min, rho).to(z.device, torch.float32)
    return run_sampler(model, name, sigmas, z, extra_args, batch, budget)


def run_sampler(model, name, sigmas, z, extra_args=None, batch=128, budget=None) -> RivalRun:
    """One of k-diffusion's samplers on any ``sigmas`` [n + 1] from ``z * sigmas[0]``; see ``run_rival``."""
    sampler = getattr(_k_sampling(), f"sample_{name}")
    most = 0

    def run(z_part, args):
        nonlocal most
        counted = CountCalls(model)
        x = sampler(counted, z_part * sigmas[0], sigmas, extra_args=args, disable=True)
        most = max(most, counted.calls)
        return x

    x = in_batches(run, z, extra_args, batch)
    if budget is not None and most > budget:
        raise RuntimeError(f"{name} made {most} evaluations with a budget of {budget}")
    return RivalRun(x, most)


def tune(
    model,
    budgets: Iterable[int],
    z: torch.Tensor,
    objective_fn: Callable[[torch.Tensor], float | dict[str, float]],
    *,
    rivals: Iterable[str] = tuple(RIVALS),
    sigma_maxes: Iterable[float] = SIGMA_MAXES,
    rhos: Iterable[float] = RHOS,
    sigma_min: float = 0.02,
    extra_args: dict | None = None,
    batch: int = 128,
    progress: bool = True,
) -> Tuning:
    """Try every sampler with every setting at every budget; lower scores are better.

    Args:
        objective_fn: pictures [N, C, H, W] -> a score, or several by name (each gets its own winner, from one
            sweep). Pictures that are not finite get no score and cannot win.

    A setting that gives the same sigmas as one already run (rho does not matter below three steps; a two-stage
    sampler needs two more evaluations for one more step) is not run again.
    """
    budgets, settings = sorted(set(budgets)), [(m, r) for m in sigma_maxes for r in rhos]
    jobs = [(b, name, *s) for b in budgets for name in rivals for s in settings]
    tuning, known = Tuning(), {}
    for budget, name, sigma_max, rho in tqdm(jobs, desc="tune rivals", disable=not progress, unit="setting"):
        steps = steps_for(name, budget)
        sigmas = karras_sigmas(steps, sigma_max, sigma_min, rho).to(z.device, torch.float32)
        key = (name, *(f"{sigma:.5g}" for sigma in sigmas.tolist()))
        if key not in known:
            x, nfe = run_sampler(model, name, sigmas, z, extra_args, batch, budget)
            scores = objective_fn(x) if bool(torch.isfinite(x).all()) else {}
            known[key] = nfe, scores if isinstance(scores, dict) else {"score": float(scores)}
        nfe, scores = known[key]
        row = {"budget": budget, "sampler": name, "sigma_max": sigma_max, "rho": rho, "steps": steps, "nfe": nfe}
        row["scores"] = {k: float(v) for k, v in scores.items() if math.isfinite(v)}
        tuning.rows.append(row)
        for score, value in row["scores"].items():
            best = tuning.best.setdefault(score, {})
            if budget not in best or value < best[budget]["scores"][score]:
                best[budget] = row
    return tuning


def reference_run(
    model,
    z: torch.Tensor,
    steps: int = 60,
    sigma_max: float = 80.0,
    sigma_min: float = 0.02,
    extra_args: dict | None = None,
    batch: int = 128,
) -> torch.Tensor:
    """The picture that the checkpoint itself gives for ``z``: dpmpp_2m, ``steps`` evaluations, Karras sigmas, rho 7.

    Of the five samplers it is the nearest at 60 evaluations to the converged trajectory (heun, 200 steps). Rmse over
    24 pictures of a Fashion-MNIST U-Net: dpmpp_2m .0015, lms .0016 (its rho 3), dpm_2 .0029, heun .0049, euler .021.
    Nothing is cached.
    """
    return run_rival(model, "dpmpp_2m", steps, sigma_max, 7.0, z, sigma_min, extra_args, batch).x
