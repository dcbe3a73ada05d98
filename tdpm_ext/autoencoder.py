"""The adversarial auto-encoder view of a truncated chain: DDPM is to a VAE as TDPM is to an adversarial auto-encoder.

The encoder is fixed (diffusion up to ``sigma_trunc``), the decoder is learned (the denoiser's steps below it), and so
is the implicit prior over codes. Zheng, He, Chen and Zhou (arXiv 2202.09671), section 3. A code is a noisy picture of
the picture's own shape: ``sigma_trunc`` says how much of the picture it forgets.

    auto = AutoEncoder(model, prior, sigma_trunc=1.0)
    again = auto.reconstruct(pictures, steps=4)
    between = auto.interpolate(pictures[0], pictures[1], 9)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdpm_ext.decide import seeded_noise
from tdpm_ext.priors.base import ImplicitPrior, default_plan
from tdpm_ext.sampler import sample
from tdpm_ext.solver import solve

THROUGH = ("code", "prior")


class AutoEncoder:
    """A denoiser and an implicit prior as an auto-encoder.

    Args:
        model: ``model(x, sigma, **cond) -> denoised``.
        prior: of the codes; only ``sample`` and ``interpolate(..., through="prior")`` draw from it.
        sigma_trunc: noise level of the codes, data units; by default the prior's.

    Pictures are float [B, *prior.shape] in the denoiser's units; ``cond`` is handed to the denoiser and to the prior
    (``class_cond`` int64 [B], ``cond_scale``).
    """

    def __init__(self, model, prior: ImplicitPrior, sigma_trunc: float | None = None):
        self.model, self.prior = model, prior
        self.sigma_trunc = self._level(prior.sigma_trunc if sigma_trunc is None else sigma_trunc)

    def encode(self, x0: Tensor, sigma_trunc: float | None = None, seed: int | Sequence[int] = 0) -> Tensor:
        """x0 + sigma_trunc * noise: the codes [B, *shape].

        Args:
            seed: of the first picture's noise, counting up; or one per picture.

        Raises:
            ValueError: pictures of another shape, another number of seeds, a level that is not above 0.
        """
        self.prior.check(x0)
        seeds = list(range(seed, seed + len(x0))) if isinstance(seed, int) else [int(one) for one in seed]
        if len(seeds) != len(x0):
            raise ValueError(f"{len(seeds)} seeds for {len(x0)} pictures: give one per picture, or a single first seed")
        return x0 + self._level(sigma_trunc) * seeded_noise(self.prior.shape, seeds).to(x0)

    @torch.no_grad()
    def decode(self, x_trunc: Tensor, steps: int = 4, sigma_trunc: float | None = None, **cond) -> Tensor:
        """Pictures [B, *shape] from codes in ``steps`` evaluations of the denoiser.

        One step gives the mean of the pictures that the code may stand for, more steps come to one of them.
        """
        self.prior.check(x_trunc)
        if steps < 1:
            raise ValueError(f"steps={steps}: decoding takes one evaluation or more")
        plan = default_plan(self._level(sigma_trunc), steps)
        return solve(self.model, x_trunc, plan.sigmas, cond, disable=True, orders=plan.orders)

    def reconstruct(
        self, x0: Tensor, steps: int = 4, sigma_trunc: float | None = None, seed: int | Sequence[int] = 0, **cond
    ) -> Tensor:
        """What is left of pictures x0 [B, *shape] behind their codes: ``decode(encode(x0))``."""
        return self.decode(self.encode(x0, sigma_trunc, seed), steps, sigma_trunc, **cond)

    def sample(self, n: int, steps: int = 4, seed: int = 0, **cond) -> Tensor:
        """``n`` new pictures: codes drawn from the prior, and decoded; ``steps`` counts the prior's network calls too.

        The same as ``tdpm_ext.sample`` at this ``sigma_trunc``: a seed is a picture.
        """
        return sample(self.model, self.prior, (n, *self.prior.shape), steps, seed, cond, sigma_trunc=self.sigma_trunc)

    def latent(self, x_trunc: Tensor, sigma_trunc: float | None = None, **cond) -> Tensor:
        """The unit noise z [B, *shape] from which a closed-form prior draws these codes: the inverse of its flow.

        Raises:
            NotImplementedError: the prior has no closed-form flow.
        """
        self.prior.check(x_trunc)
        top = self.prior.sigma_max
        return self.prior.transport(x_trunc, self._level(sigma_trunc), top, **cond) / top

    def interpolate(
        self,
        first: Tensor,
        second: Tensor,
        count: int = 8,
        *,
        through: str = "code",
        sigma_trunc: float | None = None,
        steps: int = 8,
        seed: int = 0,
        **cond,
    ) -> Tensor:
        """``count`` pictures [count, *shape] from ``first`` to ``second`` ([*shape] both), ends included.

        Args:
            through: "code": a straight line between two codes with the same noise, so that every point has the noise
                level of a code. "prior": the codes' unit noises under a closed-form prior, along the great circle.
            cond: as elsewhere; ``class_cond`` int64 [count], one label for each picture of the row.

        Raises:
            ValueError: fewer than two pictures, or another ``through``.
            NotImplementedError: "prior", and the prior has no closed-form flow.
        """
        if count < 2 or through not in THROUGH:
            raise ValueError(f"count {count}, through {through!r}: give 2 or more, through one of {', '.join(THROUGH)}")
        ends = self.encode(torch.stack([first, second]), sigma_trunc, [seed, seed])
        share = torch.linspace(0, 1, count, dtype=ends.dtype, device=ends.device).reshape(-1, *[1] * first.ndim)
        if through == "code":
            codes = torch.lerp(ends[:1], ends[1:], share)
        else:
            labels = cond.get("class_cond")
            outer, whole = ({}, {}) if labels is None else ({"class_cond": labels[[0, -1]]}, {"class_cond": labels})
            z, top = great_circle(*self.latent(ends, sigma_trunc, **outer), share), self.prior.sigma_max
            codes = self.prior.transport(z * top, top, self._level(sigma_trunc), **whole)
        return self.decode(codes, steps, sigma_trunc, **cond)

    def _level(self, sigma_trunc: float | None) -> float:
        level = self.sigma_trunc if sigma_trunc is None else float(sigma_trunc)
        if not 0 < level < math.inf:
            raise ValueError(f"sigma_trunc is {sigma_trunc!r}: give a finite noise level above 0")
        return level


def great_circle(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Points between a and b [*shape] at ``share`` [N, 1, ...] of the angle between them: [N, *shape].

    Unit noise in many dimensions lies near a sphere, and a straight line would leave it.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-4:  # the same direction, or opposite ones: there is no single circle
        return torch.lerp(a[None], b[None], share)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
