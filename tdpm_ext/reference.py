"""Reference trajectories of a checkpoint, and a network-free stand-in for it near them.

One long run per seed gives the state x(sigma) and the denoised estimate D(sigma) at every level. Near that run the
denoiser is replaced by its expansion D(x) ~ D(x_ref) + J (x - x_ref), where J = v / (v + sigma^2) along the principal
axes is the Jacobian of the moment-matched Gaussian. Thousands of schedules can be tried against it in seconds; the
few best are then run for real.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import torch
from tqdm.auto import tqdm

from tdpm_ext.schedule import karras
from tdpm_ext.solver import rows_of, solve

STEPS = 60
RHO = 7.0


@torch.no_grad()
def run_batched(model, x: torch.Tensor, sigmas, extra: dict, batch: int, callback=None, **options) -> torch.Tensor:
    """`solve` in slices of ``batch`` rows; tensors in ``extra`` with one entry per row are sliced alike."""
    out = []
    for k in range(0, len(x), batch):
        rows = slice(k, k + batch)
        mine = rows_of(extra, rows, len(x))
        history = [(s, d[rows]) for s, d in options.get("history", ())]
        out.append(solve(model, x[rows], sigmas, mine, callback, True, **{**options, "history": history}))
    return torch.cat(out)


class Trajectories:
    """Long runs from the seeds ``z``: levels [n], states and denoised [n, B, *shape], final pictures [B, *shape]."""

    def __init__(self, model, z, sigma_max, sigma_min, extra, *, steps: int = STEPS, batch: int = 64, progress=True):
        sigmas = karras(steps, sigma_max, sigma_min, RHO)
        self.levels = sigmas[:-1].tolist()
        states, denoised, finals = [], [], []
        with tqdm(total=steps * math.ceil(len(z) / batch), desc="reference", disable=not progress) as bar:
            for k in range(0, len(z), batch):
                xs, ds = [], []

                def keep(info, xs=xs, ds=ds):
                    xs.append(info["x"].clone())
                    ds.append(info["denoised"])
                    bar.update()

                rows = z[k : k + batch]
                mine = rows_of(extra, slice(k, k + batch), len(z))
                finals.append(solve(model, rows * sigma_max, sigmas, mine, keep, True))
                states.append(torch.stack(xs))
                denoised.append(torch.stack(ds))
        self.states, self.denoised = torch.cat(states, 1), torch.cat(denoised, 1)
        self.final = torch.cat(finals)
        self.ascending = [-math.log(s) for s in self.levels]
        if not bool(self.final.isfinite().all()):
            raise ValueError("the reference run gave NaN or infinity: check the checkpoint, its units and sigma_max")

    def place(self, sigma: float) -> tuple[int, float]:
        """Index of the level above ``sigma`` and how far, in log sigma, it lies towards the next one."""
        u = -math.log(sigma)
        k = min(max(bisect_left(self.ascending, u) - 1, 0), len(self.levels) - 2)
        share = (u - self.ascending[k]) / (self.ascending[k + 1] - self.ascending[k])
        return k, min(max(share, 0.0), 1.0)

    def state(self, sigma: float) -> torch.Tensor:
        """x at any level: a short step from the level above, with the estimate at its middle."""
        k, share = self.place(sigma)
        ratio = sigma / self.levels[k]
        return ratio * self.states[k] + (1 - ratio) * torch.lerp(self.denoised[k], self.denoised[k + 1], share / 2)


class StandIn:
    """The expansion of the denoiser about its reference trajectories, in the prior's principal axes.

    Calls like a model: ``stand_in(c, sigma) -> denoised coordinates``.
    """

    def __init__(self, trajectories: Trajectories, prior):
        self.axes = getattr(prior, "tensors", {})
        t = trajectories
        self.levels, self.place = t.levels, t.place
        self.states = torch.stack([self.rotate(x) for x in t.states])
        self.denoised = torch.stack([self.rotate(x) for x in t.denoised])
        self.final = self.rotate(t.final)
        spread = float(t.final.var(0).mean())
        self.variances = self.axes.get("variances", torch.tensor(spread))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1).float().cpu()
        return (flat - self.axes["mean"]) @ self.axes["basis"] if "basis" in self.axes else flat

    def at(self, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(state, denoised) of the reference at any level, the latter interpolated in log sigma."""
        k, share = self.place(sigma)
        denoised = torch.lerp(self.denoised[k], self.denoised[k + 1], share)
        ratio = sigma / self.levels[k]
        state = ratio * self.states[k] + (1 - ratio) * 0.5 * (self.denoised[k] + denoised)
        return state, denoised

    def __call__(self, c: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = float(sigma[0])
        state, denoised = self.at(level)
        return denoised + (self.variances / (self.variances + level**2)) * (c - state)
