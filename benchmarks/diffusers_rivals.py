"""diffusers' own schedulers on any denoiser and any noise levels, through one loop.

    run_scheduler(model, "unipc", sigmas, z, options={"solver_order": 3})

A scheduler knows its noise levels from a table of betas. Each run gives it a table that holds exactly the levels of
``sigmas``, through its public ``trained_betas``; nothing inside it is replaced. The denoiser is asked at the level that
the scheduler itself computes from that table, and its estimate is handed over in the form the scheduler wants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.rivals import CountCalls, RivalRun, in_batches

SMALLEST = 1e-3  # noise std of the table's first entry: where DEIS, which cannot reach zero, ends


@dataclass(frozen=True)
class Scheduler:
    """How one diffusers scheduler is set up.

    Attributes:
        kind: class name in diffusers.
        options: fixed constructor arguments.
        prediction: what it is handed: the denoised "sample", the noise ("epsilon"), or velocity ("v_prediction").
        extra: calls beyond one per step (PNDM takes its second level twice).
        spare: the table starts with a level that is never sampled from (``SMALLEST``).
        variance: "exploding" for schedulers that hold x0 + sigma * noise, else "preserving".
        random: draws noise in its steps.
    """

    kind: str
    options: tuple[tuple[str, object], ...] = ()
    prediction: str = "sample"
    extra: int = 0
    spare: bool = True
    variance: str = "preserving"
    random: bool = False

    def evaluations(self, steps: int) -> int:
        return steps + (self.extra if steps > 1 else 0)


_MULTISTEP = (("timestep_spacing", "leading"),)
_WHOLE_TABLE = (("timestep_spacing", "trailing"),)
SCHEDULERS: dict[str, Scheduler] = {
    "euler": Scheduler("EulerDiscreteScheduler", _WHOLE_TABLE, spare=False, variance="exploding"),
    "ddim": Scheduler(
        "DDIMScheduler", (*_WHOLE_TABLE, ("clip_sample", False), ("set_alpha_to_one", True)), spare=False
    ),
    "dpmpp": Scheduler(
        "DPMSolverMultistepScheduler",
        (*_MULTISTEP, ("algorithm_type", "dpmsolver++"), ("final_sigmas_type", "zero")),
    ),
    "unipc": Scheduler("UniPCMultistepScheduler", (*_MULTISTEP, ("final_sigmas_type", "zero"))),
    "deis": Scheduler("DEISMultistepScheduler", _MULTISTEP),
    "pndm": Scheduler(
        "PNDMScheduler", (*_WHOLE_TABLE, ("skip_prk_steps", True), ("set_alpha_to_one", True)),
        prediction="epsilon", extra=1, spare=False,
    ),
    "ipndm": Scheduler("IPNDMScheduler", prediction="v_prediction", spare=False),
    "lcm": Scheduler("LCMScheduler", (("clip_sample", False), ("set_alpha_to_one", True)), random=True),
}  # fmt: skip


def betas_for(sigmas: list[float]) -> list[float]:
    """The betas of a table whose entries have these noise levels, ascending and above 0, in order."""
    kept = [1.0, *(1 / (1 + s**2) for s in sigmas)]
    return [1 - after / before for before, after in zip(kept[:-1], kept[1:], strict=True)]


def make(name: str, sigmas: torch.Tensor, options: dict | None = None):
    """The scheduler with its timesteps set, and the denoiser's level at each call.

    Args:
        name: key of ``SCHEDULERS``.
        sigmas: [n + 1] decreasing, the last one 0.
        options: further constructor arguments, as ``solver_order``.

    Returns:
        (scheduler, [(timestep, sigma)]): sigma is what the scheduler's own table says.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}: choose from {', '.join(SCHEDULERS)}")
    levels = [float(s) for s in sigmas]
    if len(levels) < 2 or levels[-1] != 0 or any(a <= b for a, b in zip(levels[:-1], levels[1:], strict=True)):
        raise ValueError(f"{name} needs decreasing sigmas that end in 0, not {levels}")
    how, steps = SCHEDULERS[name], len(levels) - 1
    import diffusers

    arguments = {**dict(how.options), **(options or {})}
    kind = getattr(diffusers, how.kind)
    if name == "ipndm":  # its betas are the noise levels themselves, in variance-preserving units, 0 included
        scheduler = kind(num_train_timesteps=steps, trained_betas=[s / math.hypot(1, s) for s in levels], **arguments)
        scheduler.set_timesteps(steps)
        exact = (scheduler.betas.double() / scheduler.alphas.double()).tolist()
        return scheduler, list(zip(scheduler.timesteps, exact, strict=False))
    table = ([min(SMALLEST, levels[-2] / 2)] if how.spare else []) + levels[-2::-1]
    scheduler = kind(
        num_train_timesteps=len(table), trained_betas=betas_for(table), prediction_type=how.prediction, **arguments
    )
    if name == "lcm":
        scheduler.set_timesteps(original_inference_steps=len(table), timesteps=list(range(steps, 0, -1)))
    else:
        scheduler.set_timesteps(steps)
    return scheduler, _levels(scheduler)


def _levels(scheduler) -> list[tuple[torch.Tensor, float]]:
    kept = scheduler.alphas_cumprod.double()
    return [(t, float(((1 - kept[int(t)]) / kept[int(t)]).sqrt())) for t in scheduler.timesteps]


def prediction_of(kind: str, x: torch.Tensor, denoised: torch.Tensor, sigma: float, alpha: float) -> torch.Tensor:
    """The denoised estimate of ``x`` (= alpha (x0 + sigma noise)) as the scheduler wants it."""
    if kind == "sample":
        return denoised
    noise = (x / alpha - denoised) / sigma
    return noise if kind == "epsilon" else alpha * (noise - sigma * denoised)


def run_scheduler(
    model: Callable,
    name: str,
    sigmas: torch.Tensor,
    z: torch.Tensor,
    extra_args: dict | None = None,
    batch: int = 128,
    options: dict | None = None,
    seeds: list[int] | None = None,
) -> RivalRun:
    """Sample with a diffusers scheduler.

    Args:
        model: denoiser ``model(x, sigma, **extra_args)`` for x = x0 + sigma * noise, sigma [B].
        name: key of ``SCHEDULERS``.
        sigmas: [n + 1] decreasing noise std in data units, the last one 0.
        z: unit noise [N, C, H, W]; the start is ``z * sigmas[0]``.
        seeds: one per picture, for schedulers that draw noise (default 0 .. N - 1).

    Raises:
        ValueError: unknown scheduler, sigmas that do not decrease to 0.
    """
    seeds = list(range(len(z))) if seeds is None else list(seeds)
    arguments = {**(extra_args or {}), _SEEDS: torch.tensor(seeds)}
    with _quiet():
        return _run(model, lambda: make(name, sigmas, options), SCHEDULERS[name], z, arguments, batch)


_SEEDS = "__seeds__"  # divided with the batch like any per-picture argument, and taken out before the model is called


def _run(model, make_scheduler: Callable, how: Scheduler, z: torch.Tensor, arguments: dict, batch: int) -> RivalRun:
    most = 0

    def part(z_part: torch.Tensor, args: dict) -> torch.Tensor:
        nonlocal most
        generators = [torch.Generator().manual_seed(0x5EED + int(s)) for s in args.pop(_SEEDS)]
        scheduler, levels = make_scheduler()
        counted = CountCalls(model)
        x = None
        for t, sigma in levels:
            alpha = 1.0 if how.variance == "exploding" else 1 / math.hypot(1, sigma)
            if x is None:
                x = z_part * (sigma * alpha)
            x = _step(scheduler, how, counted, x, t, sigma, alpha, args, generators)
        most = max(most, counted.calls)
        return x

    return RivalRun(in_batches(part, z, arguments, batch), most)


def _step(scheduler, how: Scheduler, model, x, t, sigma: float, alpha: float, args: dict, generators) -> torch.Tensor:
    scheduler.scale_model_input(x, t)  # the Euler scheduler insists on the call; what it returns is for its own U-Nets
    denoised = model(x / alpha, torch.full((len(x),), sigma, device=x.device, dtype=x.dtype), **args)
    output = prediction_of(how.prediction, x, denoised, sigma, alpha)
    given = {"generator": generators} if how.random else {}
    return scheduler.step(output, t, x, return_dict=False, **given)[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """LCM warns of timesteps that its 50-step table lacks; the table here is another one."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# The baselines of the original paper's 50x claim. Nobody samples like this any more: straw men, and labelled so.
STRAW_MEN = {
    "straw man: DDIM, 250 steps": ("DDIMScheduler", 250, {"clip_sample": False}),
    "straw man: DDPM, 1000 steps": ("DDPMScheduler", 1000, {"clip_sample": False}),
}


def run_straw_man(model, name: str, z, extra_args=None, batch: int = 128, seeds=None) -> RivalRun:
    """One of ``STRAW_MEN``: the 1000-entry linear table (sigma 157 to 0.01), every or every fourth step of it."""
    if name not in STRAW_MEN:
        raise ValueError(f"unknown straw man {name!r}: there are {', '.join(STRAW_MEN)}")
    kind, steps, options = STRAW_MEN[name]
    how = Scheduler(kind, random=kind == "DDPMScheduler")

    def scheduler():
        import diffusers

        made = getattr(diffusers, kind)(1000, 1e-4, 0.02, "linear", prediction_type="sample", **options)
        made.set_timesteps(steps)
        return made, _levels(made)

    seeds = list(range(len(z))) if seeds is None else list(seeds)
    return _run(model, scheduler, how, z, {**(extra_args or {}), _SEEDS: torch.tensor(seeds)}, batch)
