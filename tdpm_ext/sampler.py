"""The ``tdpm`` sampler: k-diffusion's calling convention, with the first part of the chain replaced by a prior.

Zheng, He, Chen and Zhou, "Truncated Diffusion Probabilistic Models and Diffusion-based Adversarial Auto-Encoders"
(arXiv 2202.09671). The prior draws x at ``sigma_trunc`` from the host's own noise; the unchanged denoiser runs only
the steps below it.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from tdpm_ext import inner_solver, route
from tdpm_ext.decide import INITS, decide, seeded_noise, unit_noise
from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.schedule import check_sigmas
from tdpm_ext.solver import device_of, solve

log = logging.getLogger("tdpm_ext")
SCHEDULES = ("prior", "respace", "cut")
OBJECTIVES = ("fidelity", "quality")
_ACTIVE = contextvars.ContextVar("tdpm_prior", default=None)


class use_prior:  # noqa: N801 (a context manager, read as a verb)
    """``with use_prior(prior):`` the prior that ``sample_tdpm`` takes when none is passed; ``None`` switches it off.

    Nests, and one object may be entered again. Holds for the current thread or task only.
    """

    def __init__(self, prior):
        self._prior = prior
        self._tokens: list[contextvars.Token] = []

    def __enter__(self):
        self._tokens.append(_ACTIVE.set(self._prior))
        return self._prior

    def __exit__(self, *exception) -> None:
        _ACTIVE.reset(self._tokens.pop())


def active_prior():
    """The prior of the innermost ``use_prior``, or None."""
    return _ACTIVE.get()


@torch.no_grad()
def sample_tdpm(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    *,
    prior=None,
    sigma_trunc=None,
    steps=None,
    schedule="prior",
    solver=None,
    init="auto",
    objective="fidelity",
    noise_sampler=None,
    generator=None,
):
    """Sample with a truncated chain, or with the ordinary solver where the prior does not apply (the log says why).

    Args:
        model: ``model(x, sigma, **extra_args) -> denoised``; sigma is [B]. It sees x in the dtype it was passed in.
        x: [B, *shape], 3 to 5 dimensions, at noise level ``sigmas[0]``. Half precision is integrated in float32.
        sigmas: [n+1] noise std in data units, decreasing; the last is 0 or where the host wants to stop.
        extra_args: keyword arguments for the model; a tensor ``class_cond`` also conditions the prior.
        callback: called once per step with a dict of x, i, sigma, sigma_hat, denoised. ``i`` always ends at n - 1,
            also when fewer steps are run, so that the host's progress bar fills.
        disable: hides the progress bar.
        prior: an ``ImplicitPrior``; by default the one of ``use_prior``. Passing it (or having it active) says, where
            the host itself does not tell, that x is fresh noise.
        sigma_trunc: where to cut, instead of what the prior's table says.
        steps: budget of network evaluations, prior included; by default ``len(sigmas) - 1``. It is never exceeded.
        schedule: "prior": the prior's calibrated sigmas; "respace": the host's schedule moved to start at
            ``sigma_trunc``, same count; "cut": the host's sigmas below ``sigma_trunc``, fewer calls.
        solver: a k-diffusion sampler that takes ``sigmas`` (or its name) to run below ``sigma_trunc``, instead of the
            built-in multistep solver. One that calls the model twice per step gets half the steps. Where the prior
            does not apply it runs on the host's sigmas and makes the calls it always makes, unless ``steps`` is given.
        init: "auto": the prior replaces x exactly when x is fresh noise at a level above ``sigma_trunc``; "always":
            also over an image or a mask, and an error where it cannot; "never": the ordinary solver.
        objective: which calibration table to use, "fidelity" or "quality".
        noise_sampler: ``noise_sampler(sigma, sigma_next) -> noise``, for a ``solver`` that takes one.
        generator: a ``torch.Generator``, or one per picture: noise for such a solver when there is no
            ``noise_sampler``, and the prior's z where ``init="always"`` meets an x without noise.

    Returns:
        [B, *shape] at the last sigma, in x's dtype.

    Raises:
        ValueError: NaN, infinite or negative sigmas; an unknown option; ``init="always"`` that cannot be met.
    """
    levels = check_sigmas(sigmas)
    _check_options(schedule, init, objective, steps, sigma_trunc)
    inner = None if solver is None else inner_solver.resolve(solver)
    if 0 in levels[:-1].tolist():
        raise ValueError("sigma 0 stands before the end of the schedule: only the last sigma may be 0")
    if len(levels) < 2:
        log.info("tdpm: nothing to do, the schedule has %d sigmas", len(levels))
        return x
    asked = prior is not None and init != "never"
    prior = active_prior() if prior is None else prior
    extra_args = {} if extra_args is None else extra_args
    budget = len(levels) - 1 if steps is None else steps
    plan = None if prior is None else route.plan_for(prior, budget, objective, sigma_trunc, inner, levels)
    cut_at = None if plan is None else plan.sigma_trunc
    verdict = decide(model, x, levels, prior=prior, sigma_trunc=cut_at, budget=budget, init=init, extra_args=extra_args)
    dtype, x = x.dtype, x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    history = ()
    if verdict.use_prior:
        way = route.truncated(levels, plan, schedule, budget - prior.prior_nfe, inner, noise_sampler)
        z = unit_noise(model, x, levels[0].item(), extra_args, generator)
        x, history = start_from(prior, z, way, extra_args)
        log.info("tdpm: prior used, sigma_trunc=%.4g, %d calls%s", cut_at, way.calls + prior.prior_nfe, way.note)
    else:
        way = route.ordinary(levels, steps, inner)
        level = logging.WARNING if asked else logging.INFO
        text = "tdpm: prior not used: %s; ordinary solver, %d calls%s"
        log.log(level, text, verdict.reason, way.calls, way.note)
    if way.sigmas is not levels:
        extra_args = _with_sample_sigmas(extra_args, way.sigmas)
    model = model if dtype == x.dtype else _HalfModel(model, dtype)
    callback = _shifted(callback, len(levels) - len(way.sigmas))
    shared = (model, x, way.sigmas, extra_args, callback, disable)
    if way.solver is None:
        return solve(*shared, orders=way.orders, history=history, weights=way.weights).to(dtype)
    return inner_solver.run(way.solver, *shared, noise_sampler, generator).to(dtype)


@torch.no_grad()
def sample(
    model,
    prior,
    shape: Sequence[int] | None = None,
    steps: int = 4,
    seed: int | Sequence[int] = 0,
    extra_args: dict | None = None,
    *,
    objective: str = "fidelity",
    sigma_trunc: float | None = None,
    batch: int = 64,
    device: str | torch.device | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """Draw pictures without a host: noise from one CPU generator per picture, so a seed is a picture in any batch.

    Args:
        model: ``model(x, sigma, **extra_args) -> denoised``.
        shape: [B, *prior.shape]; by default one picture per seed.
        steps: network evaluations per picture, the prior's own included.
        seed: of the first picture, counting up; or one seed per picture.
        extra_args: for the model. A tensor whose first dimension is B is split with the pictures.
        objective: which calibration table to use, "fidelity" or "quality".
        sigma_trunc: where to cut, instead of what the prior's table says.
        batch: pictures per model call.
        device: where to sample; by default where a ``torch.nn.Module`` model is, else the CPU.
        disable: hides the progress bar over batches (it appears only when there is more than one).

    Returns:
        float32 [B, *prior.shape].

    Raises:
        ValueError: a shape the prior was not fitted for, seeds that do not match it, or a budget below the prior's own.
    """
    seeds = seeds_of(prior, shape, seed)
    check_budget(prior, steps, objective, sigma_trunc)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is {batch!r}: give a whole number of at least 1")
    plan = route.plan_for(prior, steps, objective, sigma_trunc)
    way = route.follow(plan)
    extra_args = {} if extra_args is None else extra_args
    log.info("tdpm: prior used, sigma_trunc=%.4g, %d calls", plan.sigma_trunc, way.calls + prior.prior_nfe)
    device = device_of(model) if device is None else device
    done = []
    starts = range(0, len(seeds), batch)
    for first in tqdm(starts, disable=disable or len(starts) < 2, desc="tdpm", unit="batch"):
        span = slice(first, first + batch)
        own_args = {
            name: value[span] if isinstance(value, torch.Tensor) and value.shape[:1] == (len(seeds),) else value
            for name, value in extra_args.items()
        }
        z = seeded_noise(prior.shape, seeds[span]).to(device)
        x, history = start_from(prior, z, way, own_args)
        steps_of = {"orders": way.orders, "history": history, "weights": way.weights}
        done.append(solve(model, x, way.sigmas, own_args, None, True, **steps_of))
    return torch.cat(done)


def start_from(prior, z, way: route.Route, extra_args: dict, *, branch: str | None = None):
    """(x at sigma_trunc, history for ``solve``): what the prior knows of z without a call of the model.

    ``branch``, if given, is what the prior's own ``branch`` said of the conditions.
    """
    cond = conditions_of(prior, extra_args) | ({} if branch is None else {"branch": branch})
    sigma, *_ = way.sigmas.tolist()
    if branch is not None or (way.solver is None and way.history and _knows_past(prior)):
        return prior.start(z, sigma, way.history, **cond)
    return prior.sample(z, sigma, **cond), ()


def conditions_of(prior, extra_args: dict) -> dict:
    """What of the model's arguments also conditions the prior."""
    names = getattr(prior, "conditions", ("class_cond",))
    return {
        name: value
        for name, value in extra_args.items()
        if names is None or (name in names and isinstance(value, torch.Tensor))
    }


def _knows_past(prior) -> bool:
    return getattr(prior, "knows_past", False) or _has_closed_form(prior)


def _has_closed_form(prior) -> bool:
    """Whether the prior has a denoiser and a flow of its own; a learned one may have neither."""
    return all(getattr(type(prior), name) is not getattr(ImplicitPrior, name) for name in ("denoise", "transport"))


class _HalfModel:
    """A half-precision model inside a float32 integration: casts on the way in and out, otherwise transparent."""

    def __init__(self, model, dtype: torch.dtype):
        self._model, self._dtype = model, dtype

    def __call__(self, x, sigma, **kwargs):
        return self._model(x.to(self._dtype), sigma.to(self._dtype), **kwargs).float()

    def __getattr__(self, name):
        return getattr(self._model, name)


def _shifted(callback, skipped: int):
    """Number the steps so that the last one is the host's last."""
    if callback is None or skipped == 0:
        return callback
    return lambda info: callback({**info, "i": max(0, info["i"] + skipped)})


def _with_sample_sigmas(extra_args: dict, sigmas: torch.Tensor) -> dict:
    """``model_options.transformer_options.sample_sigmas`` tells the host the sigmas to expect; copies, never edits."""
    options = extra_args.get("model_options")
    transformer = options.get("transformer_options") if isinstance(options, dict) else None
    told = transformer.get("sample_sigmas") if isinstance(transformer, dict) else None
    if not isinstance(told, torch.Tensor):
        return extra_args
    transformer = {**transformer, "sample_sigmas": sigmas.to(told)}
    return {**extra_args, "model_options": {**options, "transformer_options": transformer}}


def check_budget(prior, steps, objective, sigma_trunc) -> None:
    """Raise ``ValueError`` for options of `sample` that cannot be, or a budget that the prior alone would use up."""
    _check_options("prior", "always", objective, steps, sigma_trunc)
    if steps <= prior.prior_nfe:
        raise ValueError(f"steps={steps}, but the prior itself makes {prior.prior_nfe} network calls: give more steps")


def seeds_of(prior, shape, seed) -> list[int]:
    """One seed per picture, checked against the shape."""
    several = not isinstance(seed, int)
    count = len(seed) if several else 1
    if shape is not None:
        if tuple(shape[1:]) != tuple(prior.shape) or len(shape) < 2 or shape[0] < 1:
            raise ValueError(f"shape {tuple(shape)}: the prior samples [B, {', '.join(map(str, prior.shape))}]")
        if several and count != shape[0]:
            raise ValueError(f"{count} seeds for {shape[0]} pictures: give one per picture, or a single first seed")
        count = shape[0]
    if count == 0:
        raise ValueError("no seeds: give at least one")
    return [int(one) for one in seed] if several else list(range(seed, seed + count))


def _check_options(schedule, init, objective, steps, sigma_trunc) -> None:
    choices = {"schedule": (schedule, SCHEDULES), "init": (init, INITS), "objective": (objective, OBJECTIVES)}
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps is {steps!r}: give a whole number of at least 1, or None")
    if sigma_trunc is not None and not 0 < float(sigma_trunc) < float("inf"):
        raise ValueError(f"sigma_trunc is {sigma_trunc!r}: give a finite number above 0, or None")
