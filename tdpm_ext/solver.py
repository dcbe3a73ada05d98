"""The one sampling loop of our own: a variable-step exponential multistep solver with a seeded history.

Written in lambda = -log(sigma), the probability-flow ODE is dx/dlambda = D(x, sigma) - x, so a step from
sigma_a to sigma_b solves exactly for a denoised estimate that is a polynomial in lambda:

    x_b = (sigma_b / sigma_a) x_a + sum_j w_j D_j,        sum_j w_j = 1 - sigma_b / sigma_a

where D_0 is the newest estimate and D_1, D_2 older ones. The weights depend on sigmas alone: they are computed
once, in float64, before the loop, and the loop itself never waits for the device. Order 2 is the update of
DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, as in k-diffusion's `sample_dpmpp_2m`); order 3 integrates the
quadratic through three estimates exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain

import torch
from tqdm.auto import trange

CLOSEST = 1e-4  # older estimates nearer than this share of the step, in lambda, count as the same one


def step_weights(sigmas: Sequence[float], order: int) -> list[float]:
    """Weights of the denoised estimates for one step.

    Args:
        sigmas: (sigma_b, sigma_a, older...): where the step ends, where it starts, where older estimates are.
        order: 1 to 3: at most so many estimates are used, fewer where ``sigmas`` holds fewer, repeats or turns.

    Returns:
        One weight per estimate, newest first; they sum to 1 - sigma_b / sigma_a.
    """
    end, start, *older = sigmas
    # A step to zero has an infinite length in lambda: only the newest estimate counts.
    if end <= 0 or end == start:
        return [1.0 - end / start]
    h = math.log(start / end)  # negative where the step rises (unsampling)
    distances = _distances(h, [math.log(s / start) for s in older[: order - 1]])
    weight = 1.0 - end / start
    if not distances:
        return [weight]
    if len(distances) == 1:
        half = 0.5 * weight * h / distances[0]
        return [weight + half, -half]
    return _third_order(h, *distances)


def _distances(h: float, distances: list[float]) -> list[float]:
    """How far back in lambda the usable older estimates lie, in the direction of the step.

    An estimate is of use behind the step, at a distance from the one before it: after a turn, or where a level
    repeats, extrapolation would amplify rounding, so the order falls instead.
    """
    usable, last = [], 0.0
    for u in distances:
        if (u - last) / h < CLOSEST:
            break
        usable.append(u)
        last = u
    return usable


def _third_order(h: float, u1: float, u2: float) -> list[float]:
    """Exact weights of the quadratic through estimates at lambda = 0, -u1, -u2 over a step of length h.

    Moments m_k = integral over [0, h] of e^(s - h) s^k ds, then Lagrange's basis polynomials.
    """
    m0 = -math.expm1(-h)
    # The recursions cancel for small h; the series is exact there to double precision.
    if abs(h) < 0.05:
        m1 = sum((-1) ** k * h ** (k + 2) / math.factorial(k + 2) for k in range(9))
        m2 = sum(2 * (-1) ** k * h ** (k + 3) / math.factorial(k + 3) for k in range(9))
    else:
        m1 = h - m0
        m2 = h * h - 2 * m1
    w1 = (m2 + u2 * m1) / (u1 * (u1 - u2))
    w2 = (m2 + u1 * m1) / (u2 * (u2 - u1))
    return [m0 - w1 - w2, w1, w2]


def expand_orders(orders: int | Sequence[int], steps: int) -> list[int]:
    """One order per step; an int stands for all of them."""
    orders = [orders] * steps if isinstance(orders, int) else list(orders)
    if len(orders) != steps or any(o not in (1, 2, 3) for o in orders):
        raise ValueError(f"orders {orders} given for {steps} steps: one of 1, 2, 3 for each step, or a single int")
    return orders


@lru_cache
def all_weights(values: tuple, orders: tuple[int, ...], known: tuple, fitted: tuple) -> list[list[float]]:
    """Weights of every step; a schedule is used again and again, so they are kept."""
    rows = []
    for i, order in enumerate(orders):
        seen = [*values[i::-1], *known][:3]
        if fitted and len(fitted[i]) <= len(seen):
            rows.append([(1.0 - values[i + 1] / values[i]) * share for share in fitted[i]])
        else:
            rows.append(step_weights([values[i + 1], *seen], order))
    return rows


def device_of(model) -> torch.device:
    """Where a module's tensors are; the CPU for plain functions."""
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, torch.nn.Module) else ()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _fused_update(x: torch.Tensor) -> Callable | None:
    """`tdpm_ext.kernels.sampler_step` for CUDA tensors: the whole update in one launch. None elsewhere."""
    if not x.is_cuda:
        return None
    from tdpm_ext.kernels.ops import sampler_step

    return sampler_step


@torch.no_grad()
def solve(
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor | Sequence[float],
    extra_args: dict | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
    *,
    orders: int | Sequence[int] = 2,
    history: Sequence[tuple[float, torch.Tensor]] = (),
    weights: Sequence[Sequence[float]] = (),
) -> torch.Tensor:
    """Run the denoiser down ``sigmas``; one evaluation per step.

    Args:
        model: ``model(x, sigma, **extra_args) -> denoised``; sigma has shape [B].
        x: [B, ...] at noise level ``sigmas[0]``.
        sigmas: [n+1] noise std in data units, normally decreasing and ending in 0 (other ends are legal).
        callback: gets a dict with x, i, sigma, sigma_hat, denoised before each update.
        disable: hides the progress bar.
        orders: 1 to 3, or one per step. The first steps use as many estimates as there are.
        history: (sigma, denoised) pairs above ``sigmas[0]``, nearest first, known without a network call.
            With none and ``orders=2`` the result equals k-diffusion's ``sample_dpmpp_2m``.
        weights: a row per step, summing to 1: how the newest and the older estimates are mixed, instead of by
            ``orders``. A row that asks for more estimates than there are gives way to the step's order.

    Returns:
        x at ``sigmas[-1]``; unchanged when there is no step to make.

    Raises:
        ValueError: a sigma that is NaN, infinite or negative, or 0 before the end; orders that do not fit.
    """
    values = torch.as_tensor(sigmas, dtype=torch.float64).tolist()
    if not all(0 < s < math.inf for s in values[:-1]) or not all(0 <= s < math.inf for s in values[-1:]):
        raise ValueError(f"sigmas {values[:12]}: give finite numbers above 0; only the last may be 0")
    steps = max(0, len(values) - 1)
    orders = expand_orders(orders, steps)
    if weights and len(weights) != steps:
        raise ValueError(f"{len(weights)} rows of weights for {steps} steps: give one per step")
    extra_args = extra_args or {}
    past = [d for _, d in history][:2]
    fitted = tuple(tuple(row) for row in weights)
    rows = all_weights(tuple(values), tuple(orders), tuple(float(s) for s, _ in history)[:2], fitted)
    ones = x.new_ones([x.shape[0]])
    fused = _fused_update(x)
    for i in range(steps) if disable else trange(steps, disable=disable):
        sigma = ones * values[i]  # filled on the device: copying levels there would wait, and bar CUDA graphs
        denoised = model(x, sigma, **extra_args)
        if callback is not None:
            level = sigma[0] if len(sigma) else x.new_tensor(values[i])
            callback({"x": x, "i": i, "sigma": level, "sigma_hat": level, "denoised": denoised})
        if fused and denoised.dtype == x.dtype and denoised.shape == x.shape:
            weight, *older = rows[i][: 1 + len(past)]
            x, _ = fused(x, denoised, past[: len(older)], a=values[i + 1] / values[i], b=weight, c=older)
        else:
            update = rows[i][0] * denoised
            for weight, old in zip(rows[i][1:], past, strict=False):
                update = update.add_(old, alpha=weight)
            x = update.add_(x, alpha=values[i + 1] / values[i]) if values[i + 1] else update
        past = [denoised, *past[:1]]
    return x


def rows_of(extra: dict, rows: slice | torch.Tensor, total: int) -> dict:
    """Arguments for some rows of a batch of ``total``: tensors with one entry per row are sliced, the rest stays."""
    return {n: v[rows] if isinstance(v, torch.Tensor) and v.shape[:1] == (total,) else v for n, v in extra.items()}
