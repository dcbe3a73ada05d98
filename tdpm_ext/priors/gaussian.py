"""`gaussian`: mean and full covariance. Exact teleport for Gaussian data; pictures up to about 4,096 entries."""

from __future__ import annotations

import torch

from tdpm_ext.priors.closed_form import ClosedFormPrior, gaussian_tensors
from tdpm_ext.priors.moments import Batches, Moments, full_moments
from tdpm_ext.priors.registry import register_prior


def unshrink(variances: torch.Tensor, sigma: float) -> torch.Tensor:
    """Data variances from those of denoised estimates at ``sigma``: d = v^2 / (v + sigma^2), solved for v.

    Exact for Gaussian data: it undoes the shrinkage of a posterior mean towards the mean.
    """
    return 0.5 * (variances + (variances.square() + 4 * variances * sigma**2).sqrt())


def default_sigma_trunc(std: float) -> float:
    """A cautious cut before calibration: five times the data's std per entry."""
    return 5.0 * max(std, 1e-6)


def from_moments(cls, moments: Moments, sigma_max: float, denoised_at: float) -> ClosedFormPrior:
    """A prior of plain Gaussian coordinates from measured moments."""
    variances = unshrink(moments.variances, denoised_at)
    tensors = gaussian_tensors(moments.mean, moments.basis, variances)
    residual = float(unshrink(torch.tensor(moments.residual, dtype=torch.float64), denoised_at))
    sigma_trunc = default_sigma_trunc(moments.std)
    return cls(tensors, moments.shape, residual, sigma_trunc=sigma_trunc, sigma_max=sigma_max)


@register_prior("gaussian")
class GaussianPrior(ClosedFormPrior):
    """One Gaussian with full covariance."""

    @classmethod
    def fit(cls, batches: Batches, *, sigma_max: float = 80.0, denoised_at: float = 0.0, seed: int = 0):
        """Fit from batches; ``denoised_at`` says that they are denoised estimates at that sigma."""
        moments = full_moments(batches)
        return from_moments(cls, moments, sigma_max, denoised_at), moments
