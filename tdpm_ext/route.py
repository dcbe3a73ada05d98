"""Which sigmas are run, with which orders and history, inside which budget of network evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tdpm_ext import inner_solver
from tdpm_ext.plan import Plan
from tdpm_ext.schedule import cut, respace


@dataclass(frozen=True)
class Route:
    """What is run.

    Attributes:
        sigmas: float64 [n+1] on the CPU.
        solver: somebody else's sampler function, or None for our own multistep solver.
        orders, history, weights: how our own solver steps along them, as in ``Plan``.
        note: what the log should add.
    """

    sigmas: torch.Tensor
    solver: Callable | None = None
    orders: int | Sequence[int] = 2
    history: tuple[float, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    note: str = ""

    @property
    def calls(self) -> int:
        """Network evaluations."""
        return inner_solver.calls_of(self.solver, self.sigmas)


def plan_for(prior, budget: int, objective: str, sigma_trunc: float | None, solver=None, levels=None) -> Plan:
    """The prior's plan for what the budget leaves to the network, moved to ``sigma_trunc`` if that is given.

    Args:
        budget: network evaluations the user pays for; the prior's own count.
        solver: a sampler that may need two evaluations per step, so that fewer steps fit.
        levels: the host's sigmas; None means that the chain ends at 0.
    """
    ends_at_zero = levels is None or levels[-1].item() == 0
    steps = inner_solver.steps_within(solver, budget - prior.prior_nfe, ends_at_zero)
    plan = prior.plan_for(max(1, steps), objective)
    if sigma_trunc is None or sigma_trunc == plan.sigma_trunc:
        return plan
    moved = tuple(respace(plan.sigmas, sigma_trunc).tolist())
    history = tuple(sigma * sigma_trunc / plan.sigma_trunc for sigma in plan.history)
    return replace(plan, sigmas=moved, history=history, weights=())


def follow(plan: Plan) -> Route:
    """The plan as it stands."""
    return replace(_along(plan, torch.tensor(plan.sigmas, dtype=torch.float64)), weights=plan.weights)


def truncated(levels: torch.Tensor, plan: Plan, schedule: str, calls: int, solver=None, noise_sampler=None) -> Route:
    """From ``plan.sigma_trunc`` down to the host's end in at most ``calls`` network evaluations.

    Args:
        levels: float64 [n+1] the host's sigmas.
        schedule: "prior", "respace" or "cut".
        noise_sampler: the host's; it knows nothing below the host's last non-zero sigma.
    """
    steps, solver, note = _affordable(solver, calls, levels)
    if schedule == "prior":
        reason = _no_own_sigmas(levels, plan, solver, noise_sampler)
        if reason is None and plan.steps <= steps:
            return _checked(replace(follow(plan), solver=solver, note=note))
        note += f" (the host's schedule re-spaced: {reason})" if reason else ""
    if schedule == "cut":
        sigmas = cut(levels, plan.sigma_trunc)
        sigmas = sigmas if len(sigmas) <= steps + 1 else respace(sigmas, plan.sigma_trunc, steps)
    else:
        sigmas = respace(levels, plan.sigma_trunc, steps)
    return _checked(_along(plan, sigmas, solver, note))


def ordinary(levels: torch.Tensor, steps: int | None, solver=None) -> Route:
    """The host's own sigmas; fewer of them only where an explicit budget ``steps`` asks for that."""
    if steps is None or not bool((levels.diff() < 0).all()):
        return _checked(Route(levels, solver))
    most, solver, note = _affordable(solver, steps, levels)
    if len(levels) - 1 <= most:
        return _checked(Route(levels, solver, note=note))
    return _checked(Route(respace(levels, levels[0].item(), most), solver, note=f"{note} (re-spaced to {steps} calls)"))


def _along(plan: Plan, sigmas: torch.Tensor, solver=None, note: str = "") -> Route:
    """The plan's way of stepping on these sigmas; its orders belong to its own count, else order 2."""
    orders = plan.orders if len(sigmas) == len(plan.sigmas) else 2
    return Route(sigmas, solver, orders, plan.history, note=note)


def _affordable(solver, calls: int, levels: torch.Tensor) -> tuple[int, Callable | None, str]:
    """How many steps fit, and with which solver: one step of ours where not even one of ``solver`` fits."""
    steps = inner_solver.steps_within(solver, calls, levels[-1].item() == 0)
    if steps >= 1:
        return steps, solver, ""
    return calls, None, " (the solver needs more than one call: built-in solver used)"


def _checked(route: Route) -> Route:
    """Replace the samplers that fail on one step to 0; every sampler returns the denoised picture there."""
    if route.solver is None or not inner_solver.fails_on(route.solver, route.sigmas):
        return route
    return replace(route, solver=None, note=f"{route.note} (the solver fails on one step to 0: built-in solver used)")


def _no_own_sigmas(levels: torch.Tensor, plan: Plan, solver, noise_sampler) -> str | None:
    """Why the prior's calibrated sigmas do not fit this host."""
    if levels[-1].item() > 0:
        return f"it ends at sigma {levels[-1].item():.4g}"
    if noise_sampler is not None and inner_solver.takes_noise(solver) and plan.steps > 1:
        lowest = levels[levels > 0].min().item()
        if plan.sigmas[-2] < lowest:
            return f"its noise sampler ends at sigma {lowest:.4g}"
    return None
