"""Run somebody else's k-diffusion sampler on given sigmas, inside a budget of network evaluations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch

from tdpm_ext.decide import draw
from tdpm_ext.optional import import_k_diffusion

_TWO_CALLS = {"heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"}  # per step, one on a step to 0
_NO_SINGLE_STEP = ("dpmpp_2m_sde", "dpmpp_3m_sde")  # fail on [sigma, 0] in k-diffusion 0.1.1 (unset variable)


def resolve(solver: str | Callable) -> Callable:
    """The sampler function behind a name ("dpmpp_2m", "sample_dpmpp_2m") or a callable.

    Raises:
        ValueError: unknown, or it takes no ``sigmas``. ImportError: a name, and k-diffusion cannot be imported.
    """
    if isinstance(solver, str):
        name = solver.removeprefix("sample_")
        if name in ("dpm_fast", "dpm_adaptive"):
            raise ValueError(f"solver {solver!r} places its own noise levels and takes no sigmas: choose another")
        found = getattr(import_k_diffusion().sampling, f"sample_{name}", None)
        if found is None or name == "tdpm":
            raise ValueError(f"no solver {solver!r} in k_diffusion.sampling: known are {', '.join(_known())}")
        return found
    if not callable(solver):
        raise ValueError(f"solver is {solver!r}: give a k-diffusion sampler, its name, or None")
    if _name(solver) == "tdpm":
        raise ValueError("solver=sample_tdpm would call itself: give another sampler, or None")
    if "sigmas" not in inspect.signature(solver).parameters:
        raise ValueError(f"solver {_name(solver)!r} takes no sigmas, so it cannot start at sigma_trunc: choose another")
    return solver


def steps_within(solver: Callable | None, calls: int, ends_at_zero: bool) -> int:
    """How many steps of ``solver`` (None: our own) make at most ``calls`` network calls; 0 when not even one fits."""
    if solver is None or _name(solver) not in _TWO_CALLS:
        return calls
    return (calls + 1) // 2 if ends_at_zero else calls // 2


def calls_of(solver: Callable | None, levels) -> int:
    """Network calls that ``solver`` makes on ``levels`` [n+1]."""
    steps = len(levels) - 1
    if solver is None or _name(solver) not in _TWO_CALLS:
        return steps
    return 2 * steps - int(levels[-1] == 0)


def fails_on(solver: Callable, levels) -> bool:
    """True for the samplers that crash on a single step to 0, where every sampler returns the denoised picture."""
    return len(levels) == 2 and levels[-1] == 0 and _name(solver).startswith(_NO_SINGLE_STEP)


def takes_noise(solver: Callable | None) -> bool:
    """True when the sampler accepts ``noise_sampler``."""
    return solver is not None and "noise_sampler" in inspect.signature(solver).parameters


def run(solver, model, x, levels, extra_args, callback, disable, noise_sampler=None, generator=None) -> torch.Tensor:
    """Call ``solver`` by k-diffusion's convention; noise goes to the samplers that take it."""
    options = {}
    if takes_noise(solver):
        if noise_sampler is None and generator is not None:
            like = x
            options["noise_sampler"] = lambda sigma, sigma_next: draw(like, generator)
        elif noise_sampler is not None:
            options["noise_sampler"] = noise_sampler
    sigmas = torch.as_tensor(levels).to(device=x.device, dtype=x.dtype)
    return solver(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)


def _known() -> list[str]:
    names = (name.removeprefix("sample_") for name in vars(import_k_diffusion().sampling) if name.startswith("sample_"))
    return sorted(name for name in names if name not in ("dpm_fast", "dpm_adaptive", "tdpm"))


def _name(solver: Callable) -> str:
    while isinstance(solver, functools.partial):
        solver = solver.func
    return getattr(solver, "__name__", type(solver).__name__).removeprefix("sample_")
