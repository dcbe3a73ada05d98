"""Fit a prior inside the web UI: the sampler is given the model under the user's prompt and guidance, and fits one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tdpm_ext.calibrate import BUDGETS, calibrate
from tdpm_ext.decide import read_host
from tdpm_ext.fit import DRAWS, fit_prior
from tdpm_ext.hosts import a1111_priors
from tdpm_ext.hosts.a1111_priors import CARD, Pick
from tdpm_ext.priors.io import save_prior

REQUEST = "tdpm_fit"  # attribute of a processing job that asks for a fit


@dataclass(frozen=True)
class Request:
    """What to fit: the file's name in ``models/tdpm``, how many draws, and budgets to calibrate (none: do not)."""

    name: str
    draws: int = DRAWS
    budgets: tuple[int, ...] = BUDGETS
    samples: int | None = None


def request(name: str, draws: int = DRAWS, **options) -> Request:
    """A checked `Request`.

    Raises:
        ValueError: the name is no plain file name. OSError: the folder cannot be made.
    """
    name = str(name).strip().removesuffix(".safetensors")
    if not name or Path(name).name != name or name in (a1111_priors.AUTOMATIC, a1111_priors.NONE):
        raise ValueError(f"{name!r} cannot be the name of a prior: give a plain file name")
    a1111_priors.folder().mkdir(parents=True, exist_ok=True)
    return Request(f"{name}.safetensors", int(draws), **options)


def fit(wanted: Request, model, x: torch.Tensor, levels: torch.Tensor, extra_args: dict) -> Pick:
    """Fit, calibrate and save a prior from the model that a sampler was given; it is used at once.

    Args:
        model: the web UI's denoiser: guidance, LoRA and ControlNet are in it.
        x: [B, ...] of the job; B is the batch that its prompts are for. levels: its sigmas.
    """
    if read_host(model, extra_args).flow:
        return Pick(wanted.name, None, "a rectified-flow model has no prior: its x is not data + sigma * noise")
    denoiser = _Batched(model, len(x), x, extra_args)
    table = getattr(getattr(model, "inner_model", None), "sigmas", None)
    low, high = (float(table[0]), float(table[-1])) if isinstance(table, torch.Tensor) else (0.02, float(levels[0]))
    shape = tuple(x.shape[1:])
    prior = fit_prior("mixture", denoiser=denoiser, shape=shape, sigma_max=high, draws=wanted.draws)
    prior.sigma_trunc = min(prior.sigma_trunc, 0.5 * high)
    scale = float(extra_args.get("cond_scale", 1.0))
    prior.card |= {"cond_scale": scale, CARD: {"checkpoint": a1111_priors.checkpoint()}}
    if wanted.budgets:
        calibrate(prior, denoiser, wanted.budgets, sigma_min=low, samples=wanted.samples)
        prior.card["calibrated_cond_scale"] = scale
    save_prior(prior, a1111_priors.folder() / wanted.name)
    model.step = 0
    return a1111_priors.read(wanted.name)


class _Batched:
    """The job's model for any number of rows: it takes exactly as many as its prompts are for.

    Its count of calls moves prompts and refiner along, so it is held at the first step.
    """

    def __init__(self, model, rows: int, like: torch.Tensor, extra_args: dict):
        self._model, self._rows, self._like, self._extra_args = model, rows, like, extra_args

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        out = []
        for k in range(0, len(x), self._rows):
            rows = [min(i, len(x) - 1) for i in range(k, k + self._rows)]  # the last row fills up a short batch
            self._model.step = 0
            made = self._model(x[rows].to(self._like), sigma[rows].to(self._like), **self._extra_args)
            out.append(made.to(x))
        return torch.cat(out)[: len(x)]
