"""What every implicit prior offers, and how a budget is planned from its calibration table."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import torch

from tdpm_ext.plan import Plan
from tdpm_ext.schedule import karras

DEFAULT_SIGMA_MIN = 0.02
HISTORY_RATIO = 1.6


class ImplicitPrior:
    """Draws the noisy picture at an intermediate noise level; the denoiser does the rest.

    Attributes:
        kind: name in the registry.
        shape: shape of one picture, (C, H, W) or any other.
        sigma_trunc: where the chain is cut when neither plan nor caller says otherwise; noise std in data units.
        sigma_max: the level at which the host's untruncated chain would have started from the same z.
        coupled: the same z gives (nearly) the picture that the untruncated sampler gives.
        prior_nfe: network calls inside one draw; they count against the user's budget.
        ready: False while a prior that works on a network has not been given it (`LearnedPrior.bind`).
        knows_past: `start` gives denoised estimates although there is no closed form.
        conditions: arguments of the model that a draw takes too; None: all of them.
        card: what the prior was fitted for (source, fingerprints, cond_scale, num_classes...), JSON.
        plans: objective -> budget -> `Plan`, filled by `calibrate`.
    """

    kind: ClassVar[str]
    coupled: bool = True
    prior_nfe: int = 0
    ready: bool = True
    knows_past: bool = False
    conditions: tuple[str, ...] | None = ("class_cond",)

    def __init__(self, shape: tuple[int, ...], sigma_trunc: float, sigma_max: float = 80.0, card: dict | None = None):
        self.shape = tuple(int(n) for n in shape)
        self.sigma_trunc, self.sigma_max = float(sigma_trunc), float(sigma_max)
        if not 0 < self.sigma_trunc < math.inf or not 0 < self.sigma_max < math.inf:
            raise ValueError(f"sigma_trunc {sigma_trunc} and sigma_max {sigma_max} must be positive and finite")
        self.card = dict(card or {})
        self.plans: dict[str, dict[int, Plan]] = {}

    def denoise(self, x: torch.Tensor, sigma: float, **cond) -> torch.Tensor:
        """E[x_0 | x] under the prior's own model of the data. x [B, *shape] at noise level sigma."""
        raise NotImplementedError(f"prior kind {self.kind!r} has no closed-form denoiser")

    def transport(self, x: torch.Tensor, sigma_from: float, sigma_to: float, **cond) -> torch.Tensor:
        """Move x [B, *shape] along the prior's own probability-flow ODE; keeps the seed."""
        raise NotImplementedError(f"prior kind {self.kind!r} has no closed-form transport")

    def sample(self, z: torch.Tensor, sigma: float | None = None, **cond) -> torch.Tensor:
        """Draw x [B, *shape] at noise level ``sigma`` (default ``sigma_trunc``) from unit noise z [B, *shape]."""
        self.check(z)
        sigma = self.sigma_trunc if sigma is None else sigma
        return self.transport(z * self.sigma_max, self.sigma_max, sigma, **cond)

    def start(self, z: torch.Tensor, sigma: float, history: tuple[float, ...] = (), **cond):
        """Draw x at ``sigma`` and the denoised estimates at the higher levels in ``history`` (nearest first).

        Returns:
            (x, [(level, denoised), ...] nearest first): what a multistep solver needs to run at full order
            from its first step.
        """
        self.check(z)
        x, at, seen = z * self.sigma_max, self.sigma_max, []
        for level in sorted(history, reverse=True):
            x, at = self.transport(x, at, level, **cond), level
            seen.insert(0, (level, self.denoise(x, level, **cond)))
        return self.transport(x, at, sigma, **cond), seen

    def cuts(self, std: float) -> list[float]:
        """Noise levels worth trying as ``sigma_trunc`` for pictures of that std, rising."""
        ratios = (1.5, 2, 2.8, 4, 5.6, 8, 11, 16, 23, 32, 45)
        # none: data about as wide as the whole noise range
        return [std * r for r in ratios if std * r < 0.7 * self.sigma_max] or [0.5 * self.sigma_max]

    def starts_at(self, sigma: float) -> bool:
        """Whether a draw at ``sigma`` can be had."""
        return 0 < sigma < math.inf

    def may_cut(self, sigma: float) -> bool:
        """Whether calibration may cut there: where a draw can be had, and where fitting or training has looked."""
        return self.starts_at(sigma)

    def check(self, x: torch.Tensor) -> None:
        """Raise ``ValueError`` when x does not hold pictures of this prior's shape."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"pictures of shape {tuple(x.shape[1:])} given; this prior was fitted for {self.shape}")

    def plan_for(self, budget: int, objective: str = "fidelity") -> Plan:
        """The plan for ``budget`` evaluations: calibrated, interpolated between calibrated ones, or a default."""
        if budget < 1:
            raise ValueError(f"a budget of {budget} evaluations: give 1 or more")
        table = self.plans.get(objective) or {}
        if not table:
            return default_plan(self.sigma_trunc, budget)
        if budget in table:
            return table[budget]
        known = sorted(table)
        k = bisect_left(known, budget)
        if k in (0, len(known)):
            return resize_plan(table[known[min(k, len(known) - 1)]], budget)
        low, high = table[known[k - 1]], table[known[k]]
        share = (budget - known[k - 1]) / (known[k] - known[k - 1])
        plan = blend_plans(resize_plan(low, budget), resize_plan(high, budget), share)
        return replace(plan, error=(1 - share) * low.error + share * high.error)

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors and a JSON-able config from which `from_state` rebuilds the prior (card and plans apart)."""
        raise NotImplementedError(f"prior kind {self.kind!r} cannot be saved")

    @classmethod
    def from_state(cls, tensors: dict[str, torch.Tensor], config: dict) -> ImplicitPrior:
        """Rebuild from `state`; raises ``ValueError`` that says what is wrong."""
        raise NotImplementedError(f"prior kind {cls.kind!r} cannot be loaded")


@lru_cache
def default_plan(sigma_trunc: float, budget: int) -> Plan:
    """An uncalibrated plan: Karras sigmas of rho 3 below sigma_trunc, order 2, one history point.

    The last evaluation stands higher when there are few: a final step from 0.02 would waste one of three.
    """
    last = min(max(DEFAULT_SIGMA_MIN, min(0.3, sigma_trunc / 4) / budget), sigma_trunc / 2)
    sigmas = karras(budget, sigma_trunc, last, 3.0).tolist()
    return Plan(tuple(sigmas), (2,) * budget, (HISTORY_RATIO * sigma_trunc,))


def resize_plan(plan: Plan, budget: int) -> Plan:
    """The same curve of log sigma against progress, sampled at another number of steps; ends where it ended."""
    if budget == plan.steps:
        return plan
    if plan.steps == 1:  # one step says nothing about a curve
        return replace(default_plan(plan.sigma_trunc, budget), history=plan.history)
    old = [math.log(s) for s in plan.sigmas[:-1]]
    sigmas = []
    for i in range(budget):
        at = i * (len(old) - 1) / max(1, budget - 1)
        k = min(int(at), len(old) - 2)
        sigmas.append(math.exp(old[k] + (at - k) * (old[k + 1] - old[k])))
    orders = tuple(plan.orders[min(i * plan.steps // budget, plan.steps - 1)] for i in range(budget))
    return Plan(tuple([*sigmas, 0.0]), orders, plan.history)


def blend_plans(low: Plan, high: Plan, share: float) -> Plan:
    """Between two plans of equal length: log sigmas interpolated, orders and history of the nearer."""
    pairs = zip(low.sigmas[:-1], high.sigmas[:-1], strict=True)
    sigmas = [math.exp((1 - share) * math.log(a) + share * math.log(b)) for a, b in pairs]
    near = low if share < 0.5 else high
    history = tuple(h / near.sigmas[0] * sigmas[0] for h in near.history)
    return Plan(tuple([*sigmas, 0.0]), near.orders, history)
