"""Fit a prior that knows the prompt: from pictures and their embeddings, or from the checkpoint and prompts alone.

    prior = fit_text_prior("text_lowrank", latents, pooled)                                 # no guidance
    prior = fit_text_prior("text_mixture", denoiser=model, text=text, shape=(4, 16, 16), cond_scale=4)

Guidance changes what the denoiser's chain ends in, so a prior for a guidance scale other than 1 is fitted from the
guided checkpoint itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpm_ext.fit import DRAWS, draw_from_denoiser, provenance
from tdpm_ext.priors import em
from tdpm_ext.priors.gaussian import default_sigma_trunc, unshrink
from tdpm_ext.priors.mixture import HELD_OUT, MIXTURE_AXES, MixturePrior
from tdpm_ext.priors.moments import MAX_FULL, Batches, Moments, full_moments, one_thread, sketch_moments
from tdpm_ext.priors.text import MAX_LOG_SPREAD, TextLowRankPrior, TextMixturePrior

KINDS = ("text_lowrank", "text_mixture")
TEXT_AXES = 48  # leading principal axes of the embeddings that parameters are regressed on
RANK = 256
PIECE = 128  # pictures at a time
PULLS = (1e-4, 1e-3, 1e-2, 1e-1)  # ridges tried for the weights' regression


def fit_text_prior(
    kind: str,
    data=None,
    pooled: Tensor | None = None,
    *,
    denoiser: Callable[..., Tensor] | None = None,
    text: dict[str, Tensor] | None = None,
    shape: tuple[int, ...] | None = None,
    sigma_max: float = 80.0,
    cond_scale: float = 1.0,
    components: int | None = None,
    rank: int | None = None,
    checkpoint: str | None = None,
    draws: int | None = None,
    seed: int = 0,
    progress: bool = True,
):
    """Fit ``text_lowrank`` or ``text_mixture``.

    Args:
        data: pictures or latents [N, *shape] in the denoiser's units; pooled: their embeddings [N, D].
        denoiser: instead of data, ``model(x, sigma, cond_scale=..., **text) -> denoised``; text: its arguments, one
            row per prompt, ``text_pooled`` among them; shape: of one picture.
        cond_scale: guidance that will be used. Other than 1 it needs ``denoiser``.
        components, rank: of the mixture and of the covariance; None chooses.
        checkpoint: fingerprint to record. draws: pictures drawn from the denoiser, prompts in turn (default: 1,024,
            or one per prompt where there are more).

    Raises:
        ValueError: an unknown kind, neither or both sources, rows that do not match, guidance without a denoiser.
    """
    _check(kind, data, pooled, denoiser, text, shape, cond_scale, components)
    stop = 0.0
    if denoiser is not None:
        draws = max(DRAWS, len(text["text_pooled"])) if draws is None else draws
        turn = torch.arange(draws) % len(text["text_pooled"])
        extra = {name: value[turn.to(value.device)] for name, value in text.items()}
        if cond_scale != 1.0:
            extra["cond_scale"] = cond_scale
        options = {"sigma_max": sigma_max, "count": draws, "seed": seed, "progress": progress}
        data, _, stop = draw_from_denoiser(denoiser, tuple(shape), extra_args=extra, **options)
        pooled = extra["text_pooled"]
    batches = Batches(data, pooled.detach().cpu().float(), progress)
    axes = TextAxes.fit(pooled.detach().cpu())
    if kind == "text_lowrank":
        prior, moments = _fit_lowrank(batches, axes, rank, sigma_max, stop, seed)
    else:
        prior, moments = _fit_mixture(batches, axes, components, rank, sigma_max, stop, seed)
    prior.card = provenance(moments, denoiser is not None, checkpoint, cond_scale, stop, seed)
    prior.card |= {"text_axes": axes.matrix.shape[1], "components": getattr(prior, "components", 0)}
    return prior


def _check(kind, data, pooled, denoiser, text, shape, cond_scale, components) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} does not know prompts: choose one of {', '.join(KINDS)}")
    if components is not None and (kind != "text_mixture" or components < 1):
        raise ValueError(f"components={components}: a text_mixture takes 1 or more, text_lowrank none")
    if (data is None) == (denoiser is None):
        raise ValueError("give either data (pictures or latents) or denoiser (the checkpoint itself), one of the two")
    if denoiser is None:
        if not isinstance(pooled, Tensor) or pooled.ndim != 2 or len(pooled) != len(data):
            raise ValueError(f"pooled must be [{len(data)}, D], one embedding per picture")
        if cond_scale != 1.0:
            raise ValueError(
                f"cond_scale={cond_scale:g} changes what the chain ends in, which pictures do not show: fit from the "
                "denoiser with text="
            )
    elif shape is None or text is None or "text_pooled" not in text:
        raise ValueError("fitting from a denoiser needs shape= and text= with text_pooled, one row per prompt")


@dataclass(frozen=True)
class TextAxes:
    """Leading principal axes of embeddings: ``mean`` [D], ``matrix`` [D, T] that also whitens."""

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(cls, pooled: Tensor, most: int = TEXT_AXES) -> TextAxes:
        e = pooled.double()
        if not bool(e.isfinite().all()):
            raise ValueError("an embedding holds NaN or infinity")
        mean = e.mean(0)
        with one_thread():
            _, singular, axes = torch.linalg.svd(e - mean, full_matrices=False)
        spread = singular / math.sqrt(len(e))
        keep = int((spread > 1e-6 * spread[0].clamp_min(1e-300)).sum())
        keep = max(1, min(most, keep, len(e) // 10))
        return cls(mean, axes[:keep].T / spread[:keep].clamp_min(1e-300))

    def __call__(self, pooled: Tensor) -> Tensor:
        return (pooled.double() - self.mean) @ self.matrix

    def tensors(self) -> dict[str, Tensor]:
        return {"text_mean": self.mean.float(), "text_axes": self.matrix.float()}


def _pieces(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches in pieces of which a few fit into memory in double precision."""
    for x, pooled in batches:
        yield from zip(x.split(PIECE), pooled.split(PIECE), strict=True)


class _Residuals:
    """Batches with the prompt's own mean taken off, and their phi: what the moments are taken of."""

    def __init__(self, batches: Batches, axes: TextAxes, mean: Tensor, shift: Tensor):
        self.batches, self.axes, self.mean, self.shift = batches, axes, mean, shift

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, pooled in _pieces(self.batches):
            phi = self.axes(pooled)
            yield x - (self.mean + phi @ self.shift).float().reshape(x.shape), phi


def _regress(batches: Batches, axes: TextAxes) -> tuple[Tensor, Tensor, int]:
    """Mean [d] of the data, and the change of it [T, d] per unit of each text axis, shrunk."""
    total, cross, square, count = 0.0, 0.0, 0.0, 0
    for x, pooled in _pieces(batches):
        flat, phi = x.flatten(1).double(), axes(pooled)
        total, cross = total + flat.sum(0), cross + phi.T @ flat
        square, count = square + flat.square().sum(), count + len(x)
    mean, slope = total / count, cross / count  # phi is centred and white, so the columns do not mix
    left = float(square / count - mean.square().sum() - slope.square().sum()) * count / max(1, count - len(slope))
    return mean, _shrunk(slope, max(left, 0.0) / count), count


def _shrunk(slope: Tensor, noise: float) -> Tensor:
    """Positive-part James-Stein: each row [n] by how far it exceeds ``noise``, its squared length by chance."""
    length = slope.square().sum(1, keepdim=True).clamp_min(1e-300)
    return slope * (1 - noise / length).clamp_min(0)


def _fit_lowrank(batches, axes, rank, sigma_max, stop, seed) -> tuple[TextLowRankPrior, Moments]:
    mean, shift, count = _regress(batches, axes)
    rest = _Residuals(batches, axes, mean, shift)
    full = rank is None and len(mean) <= MAX_FULL
    moments = full_moments(rest) if full else sketch_moments(rest, rank or RANK, seed)
    variances = unshrink(moments.variances, stop)
    floor = 1e-6 * float(moments.variances.mean()) + 1e-12
    logs, weighed = torch.zeros(axes.matrix.shape[1], len(variances), dtype=torch.float64), 0.0
    for x, phi in rest:
        squares = ((x.flatten(1).double() - moments.mean) @ moments.basis).square()
        logs += phi.T @ (squares + floor).log() / count
    # the logarithm of a squared Gaussian number varies by pi^2 / 2 whatever its scale
    spread = _shrunk(logs, len(variances) * (math.pi**2 / 2) / count)
    for x, phi in rest:
        squares = ((x.flatten(1).double() - moments.mean) @ moments.basis).square()
        limited = (phi @ spread).clamp(-MAX_LOG_SPREAD, MAX_LOG_SPREAD)
        weighed = weighed + (squares / limited.exp()).sum(0) / count
    variances = variances * (weighed / moments.variances.clamp_min(1e-300)).clamp(0.1, 1.0)
    tensors = {"mean": mean + moments.mean, "basis": moments.basis, "variances": variances}
    tensors = {name: value.float() for name, value in (tensors | {"shift": shift, "spread": spread}).items()}
    residual = float(unshrink(torch.tensor(moments.residual, dtype=torch.float64), stop))
    options = {"sigma_trunc": default_sigma_trunc(moments.std), "sigma_max": sigma_max}
    return TextLowRankPrior(tensors | axes.tensors(), moments.shape, residual, **options), moments


def _fit_mixture(batches, axes, components, rank, sigma_max, stop, seed) -> tuple[TextMixturePrior, Moments]:
    plain = Batches(batches.data, None, batches.progress)
    options = {"components": components, "rank": rank, "sigma_max": sigma_max, "denoised_at": stop, "seed": seed}
    mixture, moments = MixturePrior.fit(plain, axes=MIXTURE_AXES, **options)
    t = mixture.tensors
    covariances = torch.einsum("kqr,kr,ksr->kqs", *(t[n].double() for n in ("rotations", "spreads", "rotations")))
    q, noise = t["means"].shape[1], (0.5 * moments.std) ** 2
    shares, phi = [], []
    for x, pooled in batches:
        points = (x.flatten(1).double() - moments.mean) @ moments.basis[:, :q]
        shares.append(_responsibilities(points, t, covariances, noise))
        phi.append(axes(pooled))
    bias, slope = _softmax_regression(torch.cat(phi), torch.cat(shares), seed)
    tensors = {**t, **axes.tensors(), "log_weights": bias.float(), "text_weights": slope.float()}
    options = {"sigma_trunc": mixture.sigma_trunc, "sigma_max": sigma_max}
    return TextMixturePrior(tensors, moments.shape, mixture.residual, **options), moments


def _responsibilities(points: Tensor, t: dict[str, Tensor], covariances: Tensor, noise: float) -> Tensor:
    weights, means = t["log_weights"].double(), t["means"].double()
    return em.log_density(points, weights, means, covariances, noise, joint=True).softmax(1)


def _softmax_regression(phi: Tensor, shares: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """log weights ~ bias [K] + phi slope [T, K]; the ridge with the best held-out likelihood, infinite among them."""
    held = torch.rand(len(phi), generator=torch.Generator().manual_seed(seed)) < HELD_OUT
    constant = shares.mean(0).clamp_min(1e-6).log()
    none = (constant, torch.zeros(phi.shape[1], shares.shape[1], dtype=torch.float64))
    if shares.shape[1] == 1 or not bool(held.any()) or bool(held.all()):
        return none

    def likelihood(bias: Tensor, slope: Tensor, rows: Tensor) -> Tensor:
        return (shares[rows] * (bias + phi[rows] @ slope).log_softmax(1)).sum(1).mean()

    def fit(rows: Tensor, pull: float) -> tuple[Tensor, Tensor]:
        bias, slope = (value.clone().requires_grad_() for value in none)
        optimizer = torch.optim.LBFGS([bias, slope], max_iter=60, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = pull * slope.square().sum() - likelihood(bias, slope, rows)
            value.backward()
            return value

        optimizer.step(loss)
        return bias.detach(), slope.detach()

    with one_thread():
        scores = {pull: float(likelihood(*fit(~held, pull), held)) for pull in PULLS}
        best = max(scores, key=scores.get)
        if scores[best] <= float(likelihood(*none, held)):
            return none
        return fit(torch.ones_like(held), best)
