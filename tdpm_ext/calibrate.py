"""Choose, for each budget, where to cut, at which sigmas to evaluate, and at which order to step.

`fidelity` wants the picture that the untruncated checkpoint gives from the same seed: candidates are tried on a
stand-in made of reference trajectories, the best on the checkpoint itself. `quality` wants pictures that are
distributed like the data: short runs are compared with pictures by Frechet distances in fixed random features and in
the checkpoint's own activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tdpm_ext.distance import MOST, AsSeenBy, FeatureDistance
from tdpm_ext.pictures import class_sequence, load_pictures
from tdpm_ext.plan import MAX_WEIGHT, Plan
from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.reference import StandIn, Trajectories, run_batched
from tdpm_ext.schedule import karras
from tdpm_ext.solver import device_of, rows_of, solve, step_weights
from tdpm_ext.surface import Point, Surface

BUDGETS = (2, 3, 4, 5, 6, 8)
OBJECTIVES = ("fidelity", "quality")
SAMPLES = {"fidelity": 48, "quality": 384}  # seeds
RHOS = (1.0, 2.0, 3.0, 5.0, 7.0)
FEW = 4  # evaluations
RIDGE = 2e-3  # pull of fitted weights towards the usual ones, relative to the estimates' spread
HISTORY = (1.6, 2.56)  # levels of the seeded estimates, as multiples of sigma_trunc


def calibrate(
    prior: ImplicitPrior,
    model: Callable[..., torch.Tensor],
    budgets: Sequence[int] = BUDGETS,
    *,
    objective: str = "fidelity",
    data=None,
    extra_args: dict | None = None,
    num_classes: int = 0,
    features: Callable[[torch.Tensor], torch.Tensor] | None = None,
    samples: int | None = None,
    sigma_min: float = 0.02,
    seed: int = 0,
    batch: int = 64,
    progress: bool = True,
) -> ImplicitPrior:
    """Fill ``prior.plans[objective]`` with a plan per budget; returns the same prior.

    Args:
        model: ``model(x, sigma, **extra_args) -> denoised``.
        budgets: evaluations to plan for, the prior's own included; others are interpolated later.
        objective: ``fidelity`` (no data needed) or ``quality`` (needs ``data``).
        data: pictures in the form `fit_prior` takes.
        num_classes: sample with ``class_cond`` running through the classes, for ``quality`` in the proportions of
            ``data`` where it has labels; 0: unconditionally.
        features: maps pictures [B, *shape] to vectors [B, F] for ``quality``; default: fixed random convolutions and
            the model's own activations, where it shows any.
        samples: seeds used (default 48 for fidelity; 384 for quality, half of them beyond 4 evaluations).

    Raises:
        ValueError: unknown objective, no data for quality, a budget below 1, a denoiser that gives NaN.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
    own = prior.prior_nfe
    budgets = sorted({int(b) - own for b in budgets})
    if not budgets or budgets[0] < 1:
        given = [b + own for b in budgets]
        raise ValueError(f"budgets {given}: give one or more numbers of evaluations, each at least {1 + own}")
    if objective == "quality" and data is None:
        raise ValueError("objective 'quality' compares with pictures: give data=; 'fidelity' needs none")
    samples = SAMPLES[objective] if samples is None else samples
    if samples < 2:
        raise ValueError(f"samples={samples}: calibration compares runs from several seeds, give 2 or more")
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    z = torch.randn(samples, *prior.shape, generator=generator).to(device)
    extra = dict(extra_args or {})
    data = load_pictures(data, limit=MOST) if objective == "quality" and isinstance(data, (str, Path)) else data
    if num_classes:
        labels = getattr(data, "labels", None) if objective == "quality" else None
        extra["class_cond"] = class_sequence(labels, num_classes, samples).to(device)
    job = _Job(prior, model, z, extra, sigma_min, batch, progress)
    if objective == "fidelity":
        plans = _fidelity(job, budgets)
    else:
        first = rows_of(extra_args or {}, slice(1), samples)  # one condition for all: only the pictures shall differ
        given = features and FeatureDistance(data, features)
        plans = _quality(job, budgets, given or AsSeenBy(model, data, first, batch=batch, seed=seed))
    prior.plans[objective] = {**prior.plans.get(objective, {}), **plans}
    prior.card["calibrated_cond_scale"] = float(extra.get("cond_scale", 1.0))
    return prior


class _Job:
    """One prior, one checkpoint, one set of seeds."""

    def __init__(self, prior, model, z, extra, sigma_min, batch, progress):
        self.prior, self.model, self.z, self.extra = prior, model, z, extra
        self.sigma_min, self.batch, self.progress = sigma_min, batch, progress
        self.cond = {k: v for k, v in extra.items() if prior.conditions is None or k in prior.conditions}

    def part(self, count: int) -> _Job:
        """The same job for the first ``count`` seeds."""
        extra = rows_of(self.extra, slice(count), len(self.z))
        return _Job(self.prior, self.model, self.z[:count], extra, self.sigma_min, self.batch, self.progress)

    def start(self, sigma_trunc: float, history: Sequence[float]):
        """The prior's draw and history for all seeds, in slices."""
        xs, seen = [], []
        for k in range(0, len(self.z), self.batch):
            cond = rows_of(self.cond, slice(k, k + self.batch), len(self.z))
            x, past = self.prior.start(self.z[k : k + self.batch], sigma_trunc, tuple(history), **cond)
            xs.append(x)
            seen.append(past)
        merged = [(s, torch.cat([past[j][1] for past in seen])) for j, (s, _) in enumerate(seen[0])]
        return torch.cat(xs), merged

    def run(self, plan: Plan) -> torch.Tensor:
        """The plan on the checkpoint itself: final pictures [B, *shape]."""
        x, history = self.start(plan.sigma_trunc, plan.history)
        way = {"orders": plan.orders, "history": history, "weights": plan.weights}
        return run_batched(self.model, x, plan.sigmas, self.extra, self.batch, **way)


def make_plan(sigma_trunc: float, last: float, budget: int, rho: float, order: int, points: int) -> Plan:
    """A Karras-shaped plan; ``points`` estimates of history at fixed ratios above the cut."""
    sigmas = tuple(karras(budget, sigma_trunc, min(last, 0.9 * sigma_trunc), rho).tolist())
    return Plan(sigmas, (order,) * budget, tuple(h * sigma_trunc for h in HISTORY[:points]))


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).double().square().mean().sqrt())


# -- fidelity ------------------------------------------------------------------------------------------------------


def _fidelity(job: _Job, budgets: list[int]) -> dict[int, Plan]:
    prior = job.prior
    trajectories = Trajectories(
        job.model, job.z, prior.sigma_max, job.sigma_min, job.extra, batch=job.batch, progress=job.progress
    )
    stand_in = StandIn(trajectories, prior)
    std = max(float(trajectories.final.std()), job.sigma_min)  # pictures that are all alike still need a cut
    cuts = prior.cuts(std)
    starts = {}
    for cut in tqdm(cuts, desc="prior", disable=not job.progress, leave=False):
        x, history = job.start(cut, [h * cut for h in HISTORY])
        starts[cut] = (stand_in.rotate(x), [(s, stand_in.rotate(d)) for s, d in history])
    plans = {}
    for budget in tqdm(budgets, desc="calibrating fidelity", disable=not job.progress):
        candidates = _search_stand_in(stand_in, starts, std, budget)
        scored = [(rmse(job.run(plan), trajectories.final), plan) for plan in candidates]
        scored.sort(key=lambda pair: pair[0])
        leaders = [_polish(job, trajectories.final, *scored[0])[1], *(plan for _, plan in scored[1:2])]
        # Weights are fitted on one half of the seeds; the other half decides whether they help.
        held = slice(len(job.z) // 2, None)
        final = [(plan, job.run(plan)) for plan in leaders]
        final += [fitted for plan in leaders if (fitted := _fit_weights(job, trajectories, plan))]
        errors = [rmse(x[held], trajectories.final[held]) for _, x in final]
        best = min(range(len(final)), key=errors.__getitem__)
        plans[budget] = replace(final[best][0], error=errors[best])
        if prior.prior_nfe:  # the stand-in knows nothing of a network's own error: its ranking is only a beginning
            plans[budget] = _walk(job, trajectories, held, [plans[budget], *(plan for _, plan in scored)])
    return plans


def _search_stand_in(stand_in: StandIn, starts: dict, std: float, budget: int, keep: int = 5) -> list[Plan]:
    """The most promising plans: a sweep of Karras shapes, then free sigmas by coordinate descent."""

    def score(plan: Plan, cut: float) -> float:
        c, history = starts[cut]
        out = solve(stand_in, c, plan.sigmas, disable=True, orders=plan.orders, history=history[: len(plan.history)])
        return rmse(out, stand_in.final)

    found = []
    for cut in starts:
        best = []
        for last in (0.03, 0.06, 0.12, 0.2, 0.3, 0.45):
            for rho in RHOS:
                for order in (2, 3):
                    plan = make_plan(cut, last * std / 0.5, budget, rho, order, 2)
                    best.append((score(plan, cut), cut, plan))
        best.sort(key=lambda item: item[0])
        found.append(best[0])
    found.sort(key=lambda item: item[0])
    refined = [_descend(lambda p, c=cut: score(p, c), value, plan) for value, cut, plan in found[:keep]]
    return [plan for _, plan in refined]


def _descend(score: Callable[[Plan], float], value: float, plan: Plan, rounds: int = 3) -> tuple[float, Plan]:
    """Coordinate descent over log sigma (the cut stays) and the order of each step."""
    for step in [0.3, 0.15, 0.08][:rounds]:
        for i in range(1, plan.steps):
            for factor in (math.exp(step), math.exp(-step)):
                moved = _moved(plan, i, factor)
                if moved and (new := score(moved)) < value:
                    value, plan = new, moved
        for i in range(plan.steps - 1):
            for order in (1, 2, 3):
                orders = tuple(order if j == i else o for j, o in enumerate(plan.orders))
                if orders != plan.orders and (new := score(Plan(plan.sigmas, orders, plan.history))) < value:
                    value, plan = new, Plan(plan.sigmas, orders, plan.history)
    return value, plan


def _moved(plan: Plan, i: int, factor: float) -> Plan | None:
    sigma = plan.sigmas[i] * factor
    if not plan.sigmas[i + 1] * 1.05 < sigma < (plan.sigmas[i - 1] / 1.05 if i else math.inf):
        return None
    history = plan.history if i else tuple(h * factor for h in plan.history)
    return Plan(tuple(sigma if j == i else s for j, s in enumerate(plan.sigmas)), plan.orders, history)


def _polish(job: _Job, target: torch.Tensor, value: float, plan: Plan) -> tuple[float, Plan]:
    """Real runs: the whole schedule a little higher or lower, its end, and plainer orders."""
    for trial in (_scaled(plan, 1.15, 0), _scaled(plan, 0.87, 0), _scaled(plan, 1.3, 1), _scaled(plan, 0.77, 1)):
        if trial and job.prior.may_cut(trial.sigma_trunc) and (new := rmse(job.run(trial), target)) < value:
            value, plan = new, trial
    return value, plan


def _walk(job: _Job, trajectories: Trajectories, held: slice, plans: list[Plan]) -> Plan:
    """From the best of ``plans`` (the first one's error is known) along one level at a time, weights fitted anew."""
    best, tried = plans[0], set()

    def attempt(plan: Plan | None) -> None:
        nonlocal best
        if plan is None or plan.sigmas in tried or not job.prior.may_cut(plan.sigma_trunc):
            return
        tried.add(plan.sigmas)
        if fitted := _fit_weights(job, trajectories, plan):
            error = rmse(fitted[1][held], trajectories.final[held])
            best = replace(fitted[0], error=error) if error < best.error else best

    for plan in plans:
        attempt(plan)
    for factor in (1.3, 1.3, 1.12):
        for i in range(best.steps):
            for share in (factor, 1 / factor):
                attempt(_moved(best, i, share))
    return best


def _fit_weights(job: _Job, trajectories: Trajectories, plan: Plan) -> tuple[Plan, torch.Tensor] | None:
    """Mix the estimates of each step so that it lands nearest the reference run, by least squares step after step.

    Two free numbers a step, from all entries of the first half of the seeds; drawn slightly towards the plan's own
    weights, which decide where the estimates hardly differ. Returns the plan and its final pictures for all seeds;
    None when a weight came out absurdly large.
    """
    fit = slice(0, max(1, len(job.z) // 2))
    x, history = job.start(plan.sigma_trunc, plan.history)
    levels, past, rows = [s for s, _ in history], [d for _, d in history], []
    for i, (here, there) in enumerate(pairwise(plan.sigmas)):
        denoised = run_batched(job.model, x, [here, 0.0], job.extra, job.batch)
        target = trajectories.final if there == 0 else trajectories.state(there)
        share = 1.0 - there / here
        known = [*plan.sigmas[i::-1], *levels][:3]
        usual = [w / share for w in step_weights([there, *known], plan.orders[i])]
        usual = torch.tensor([*usual, 0.0, 0.0][1 : len(known)], dtype=torch.float64)
        row = [1.0]
        if past:
            newest = denoised[fit].double().flatten()
            away = torch.stack([d[fit].double().flatten() - newest for d in past], 1)
            want = ((target[fit].double() - (there / here) * x[fit].double()) / share).flatten() - newest
            normal, moments = (away.T @ away).cpu(), (away.T @ want).cpu()
            # Never zero, so that estimates that do not differ at all leave the usual weights.
            ridge = (RIDGE * normal.trace() / len(normal) + 1e-12) * torch.eye(len(normal), dtype=torch.float64)
            fitted = torch.linalg.solve(normal + ridge, moments + ridge @ usual)
            row = [1.0 - float(fitted.sum()), *fitted.tolist()]
        x = (there / here) * x + share * sum(w * d for w, d in zip(row, [denoised, *past], strict=False))
        past = [denoised, *past[:1]]
        rows.append(tuple(row))
    if max(abs(w) for row in rows for w in row) > MAX_WEIGHT:
        return None
    return replace(plan, weights=tuple(rows)), x


def _scaled(plan: Plan, factor: float, keep: int) -> Plan | None:
    """All sigmas but the first ``keep`` times ``factor``; history moves with the cut."""
    sigmas = [s if i < keep else s * factor for i, s in enumerate(plan.sigmas)]
    if any(a <= b * 1.02 for a, b in zip(sigmas, sigmas[1:], strict=False)):
        return None
    ratio = sigmas[0] / plan.sigmas[0]
    return Plan(tuple(sigmas), plan.orders, tuple(h * ratio for h in plan.history))


# -- quality -------------------------------------------------------------------------------------------------------


def _quality(job: _Job, budgets: list[int], distance: FeatureDistance | AsSeenBy) -> dict[int, Plan]:
    """Cut and last sigma of least distance to pictures, started from the neighbouring budget's."""
    std = max(distance.std, job.sigma_min)
    plans: dict[int, Plan] = {}
    point = None
    for budget in tqdm(budgets, desc="calibrating quality", disable=not job.progress):
        # Long runs cost more and depend less on where they are cut: half the seeds will do there.
        surface = Surface(_scorer(job if budget <= FEW else job.part(len(job.z) // 2), distance, budget))
        found = [] if point is None else [surface.lowest(point)]
        if budget <= FEW or not found:  # one evaluation more can move the best cut to quite another valley
            rough = Surface(_scorer(job.part(max(2, len(job.z) // 3)), distance, budget))
            first = min(_first_points(job.prior, std), key=rough)
            if not found or rough(first) < rough(found[0]):
                found.append(surface.lowest(first))
        point = min(found, key=surface)
        plans[budget] = replace(make_plan(*point, budget, 3.0, 2, 2), error=surface(point))
        point = (point[0], 0.85 * point[1])  # more evaluations can end lower
    return plans


def _scorer(job: _Job, distance: FeatureDistance | AsSeenBy, budget: int) -> Callable[[Point], float]:
    """(cut, last sigma) -> distance of what that plan draws; infinite where there is no such plan."""
    known: dict[tuple[float, ...], float] = {}  # by sigmas: with one evaluation the last sigma is the cut

    def score(point: Point) -> float:
        cut, last = point
        if not job.prior.may_cut(cut) or last > 0.9 * cut:
            return math.inf
        plan = make_plan(cut, last, budget, 3.0, 2, 2)
        if plan.sigmas not in known:
            known[plan.sigmas] = distance(job.run(plan))
        return known[plan.sigmas]

    return score


def _first_points(prior: ImplicitPrior, std: float) -> list[Point]:
    """(cut, last sigma) to begin from; the last sigma is a share of std, and below the cut."""
    cuts = [std * c for c in (1.0, 2.2, 4.8)] if prior.prior_nfe == 0 else prior.cuts(std)[1::2] or prior.cuts(std)
    return [(cut, std * e) for cut in cuts for e in (0.06, 0.25, 0.8)]
