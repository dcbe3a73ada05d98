"""The arms of the toy study: DDPM and its ODE, truncated chains behind every prior, the one-shot GAN.

A draw takes unit noise of one seed and gives points and the evaluations that were counted, the prior's own among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.rivals import CountCalls
from benchmarks.toy_nets import ToyDenoiser
from benchmarks.toy_training import LEVELS, RAW_SIGMA, generate
from tdpm_ext.optional import import_k_diffusion
from tdpm_ext.priors.base import ImplicitPrior, default_plan
from tdpm_ext.sampler import sample_tdpm
from tdpm_ext.schedule import karras, vp_linear_sigmas
from tdpm_ext.solver import solve

TABLE = vp_linear_sigmas()
CUT_STEPS = (4, 49, 99, 199, 299, 399, 499, 599)  # of the linear table; the paper cuts at the first three
CUTS = tuple(TABLE[i].item() for i in CUT_STEPS)
SIGMA_MAXES = (80.0, 40.0, 20.0, 10.0, 5.0)
CLOSED, LEARNED = ("gaussian", "mixture"), ("generator", "shared", "raw")
TITLES = {
    "ancestral": "DDPM, ancestral",
    "ddim": "DDPM, ODE (DDIM)",
    "dpmpp_2m": "DPM-Solver++ 2M, tuned",
    **{kind: f"TDPM, {kind} prior" for kind in (*CLOSED, *LEARNED)},
    "gan": "GAN, one shot",
}


@dataclass(frozen=True)
class Draw:
    """``x`` [N, 2] and the network evaluations per point that made it."""

    x: torch.Tensor
    evaluations: int


@dataclass
class Arms:
    """Everything trained or fitted for one set and seed.

    Attributes:
        nets: "denoiser" and the kinds of ``ADVERSARIES``. priors: the closed-form ones.
    """

    nets: dict[str, nn.Module]
    priors: dict[str, ImplicitPrior]

    @torch.no_grad()
    def draw(self, arm: str, budget: int, count: int, seed: int, at: float | None = None) -> Draw:
        """``count`` points of ``arm`` within ``budget`` evaluations; ``at``: sigma_trunc, or a rival's sigma_max."""
        generator = torch.Generator().manual_seed(seed)
        z, noise = torch.randn(2, count, 2, generator=generator)
        if budget == 1:  # the GAN, or a prior that nothing follows
            return Draw(generate(self.nets[arm], z), 1)
        if arm in ("ancestral", "ddim"):
            return ddpm(self.nets["denoiser"], budget, z, generator if arm == "ancestral" else None)
        model = CountCalls(self.nets["shared" if arm == "shared" else "denoiser"])
        if arm == "dpmpp_2m":
            levels = karras(budget, at, 0.02).float()
            x = import_k_diffusion().sampling.sample_dpmpp_2m(model, z * at, levels, disable=True)
            return Draw(x, model.calls)
        if arm in self.priors:
            prior = self.priors[arm]
            levels = karras(budget, prior.sigma_max, 0.02)
            x = sample_tdpm(model, z * prior.sigma_max, levels, prior=prior, sigma_trunc=at, disable=True)
            return Draw(x, model.calls)
        x = generate(self.nets[arm], z)
        x = x if arm == "raw" else x + at * noise
        x = solve(model, x, default_plan(at, budget - 1).sigmas, disable=True)
        return Draw(x, model.calls + 1)


def ddpm(model: nn.Module, steps: int, z: torch.Tensor, generator: torch.Generator | None) -> Draw:
    """The linear table's chain at ``steps`` even levels up to its last; noise comes from ``generator``, if at all.

    In x0 + sigma * noise, k-diffusion's ancestral Euler step is the draw from DDPM's posterior q(x_s | x_t, x_0).
    """
    index = (len(TABLE) - torch.arange(steps) * len(TABLE) / steps).round().long() - 1
    levels = torch.cat([TABLE[index], torch.zeros(1)]).float()
    sampling, counted = import_k_diffusion().sampling, CountCalls(model)
    if generator is None:
        return Draw(sampling.sample_euler(counted, z * levels[0], levels, disable=True), counted.calls)
    x = sampling.sample_euler_ancestral(
        counted, z * levels[0], levels, disable=True,
        noise_sampler=lambda _sigma, _next: torch.randn(z.shape, generator=generator),
    )  # fmt: skip
    return Draw(x, counted.calls)


def choices(arm: str) -> tuple[float, ...]:
    """What ``at`` may be for an arm, tried at every budget; empty: nothing to choose."""
    if arm == "dpmpp_2m":
        return SIGMA_MAXES
    if arm == "raw":
        return (RAW_SIGMA,)
    if arm in LEARNED:
        return tuple(cut for cut in CUTS if LEVELS[0] <= cut <= LEVELS[1])
    return CUTS if arm in CLOSED else ()


@torch.no_grad()
def after_a_lost_part(
    model: ToyDenoiser, points: torch.Tensor, parts: torch.Tensor, sigma_trunc: float, steps: int, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the denoiser makes of an exact prior, and of one that never draws part 0: points [N, 2] each.

    Real points are noised to ``sigma_trunc`` and denoised in ``steps`` steps, so nothing but the loss differs.
    """
    generator = torch.Generator().manual_seed(seed)
    out = []
    for pool in (points, points[parts != 0]):
        x = pool[torch.randint(len(pool), (count,), generator=generator)]
        x = x + sigma_trunc * torch.randn(x.shape, generator=generator)
        out.append(solve(model, x, default_plan(sigma_trunc, steps).sigmas, disable=True))
    return tuple(out)
