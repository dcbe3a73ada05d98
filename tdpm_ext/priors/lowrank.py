"""`lowrank`: leading principal axes from one streaming pass, isotropic elsewhere. For latents and large pictures."""

from __future__ import annotations

from tdpm_ext.priors.closed_form import ClosedFormPrior
from tdpm_ext.priors.gaussian import from_moments
from tdpm_ext.priors.moments import Batches, sketch_moments
from tdpm_ext.priors.registry import register_prior

DEFAULT_RANK = 256


@register_prior("lowrank")
class LowRankPrior(ClosedFormPrior):
    """One Gaussian: ``rank`` principal axes and an isotropic residual."""

    @classmethod
    def fit(
        cls, batches: Batches, *, rank: int | None = None, sigma_max: float = 80.0, denoised_at: float = 0.0, seed=0
    ):
        """Fit from batches, each read once; ``denoised_at`` says that they are denoised estimates at that sigma."""
        if rank is not None and rank < 1:
            raise ValueError(f"rank {rank}: give 1 or more")
        moments = sketch_moments(batches, rank or DEFAULT_RANK, seed)
        return from_moments(cls, moments, sigma_max, denoised_at), moments
