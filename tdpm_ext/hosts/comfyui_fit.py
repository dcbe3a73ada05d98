"""Fit a prior inside ComfyUI: from the loaded MODEL itself, under a prompt and a guidance scale, without pictures."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tdpm_ext import fit as fitting
from tdpm_ext import reference
from tdpm_ext.calibrate import calibrate
from tdpm_ext.hosts import comfyui_model
from tdpm_ext.hosts.comfyui_priors import FOLDER, Pick, read
from tdpm_ext.priors.io import save_prior

log = logging.getLogger("tdpm_ext")
SAMPLES = 16  # seeds that calibration runs
PROBE = 40  # pictures evaluated to find the data's std before anything is drawn
TRIALS = 14  # runs of the checkpoint per budget, at most, that calibration makes


@dataclass(frozen=True)
class Job:
    """What to fit.

    Attributes:
        model: ComfyUI's ``ModelPatcher``.
        positive, negative, cfg: the prompt and guidance under which the prior will hold.
        shape: [C, H, W] of one latent.
        kind: of prior.
        draws: latents drawn from the model to take moments of.
        budgets: numbers of steps to calibrate for; none leaves the prior's default noise levels.
        batch: latents per call of the model.
    """

    model: object
    positive: list
    negative: list
    cfg: float
    shape: tuple[int, ...]
    kind: str = "mixture"
    draws: int = 256
    budgets: tuple[int, ...] = ()
    seed: int = 0
    batch: int = 8


def fit(job: Job):
    """The prior, fitted and calibrated; progress and interruption are ComfyUI's.

    Raises:
        ValueError: a rectified-flow model, or a model that gives NaN.
    """
    facts = comfyui_model.facts_of(job.model)
    if facts.flow:
        raise ValueError(
            f"{facts.family} is a rectified-flow model, whose x is not data + sigma * noise: no prior can be fitted"
        )
    sampling = job.model.get_model_object("model_sampling")
    sigma_max, sigma_min = float(sampling.sigma_max), float(sampling.sigma_min)

    def run(denoiser):
        options = {"denoiser": denoiser, "shape": job.shape, "sigma_max": sigma_max, "draws": job.draws}
        prior = fitting.fit_prior(job.kind, **options, checkpoint=facts.checkpoint, seed=job.seed, progress=False)
        prior.sigma_trunc = min(prior.sigma_trunc, sigma_max / 2)  # wide data: the chain must begin above the cut
        prior.card["cond_scale"] = job.cfg
        prior.card["comfyui"] = {
            "family": facts.family,
            "latent": facts.latent,
            "prediction": facts.prediction,
            "prompt": comfyui_model.prompt_hash(job.positive),
        }
        if job.budgets:
            options = {"samples": SAMPLES, "seed": job.seed + 1, "sigma_min": sigma_min, "progress": False}
            prior = calibrate(prior, denoiser, job.budgets, **options)
            prior.card["calibrated_cond_scale"] = job.cfg
        return prior

    return with_denoiser(job, sigma_max, run)


def with_denoiser(job: Job, sigma_max: float, run: Callable):
    """``run(denoiser)`` inside of ComfyUI's own sampling, where model, prompts, LoRAs and ControlNets are loaded.

    ``denoiser(x, sigma)`` takes and gives latents [B, *shape] on the CPU, in the model's own (scaled) units.
    """
    import comfy.model_management
    import comfy.samplers
    import comfy.utils

    total = PROBE + job.draws * fitting.DRAW_STEPS
    total += SAMPLES * (reference.STEPS + TRIALS * sum(job.budgets)) if job.budgets else 0
    bar, made = comfy.utils.ProgressBar(total), []

    def inside(model_k, x, sigmas, extra_args=None, callback=None, disable=None):
        told = extra_args["model_options"]["transformer_options"]

        def denoiser(latents, sigma, **_):
            parts = []
            for part, level in zip(latents.split(job.batch), sigma.split(job.batch), strict=True):
                comfy.model_management.throw_exception_if_processing_interrupted()
                told["sample_sigmas"] = torch.stack([level[0], torch.zeros_like(level[0])]).to(x)
                parts.append(model_k(part.to(x), level.to(x), **extra_args).to(latents))
                bar.update(len(part) if bar.current + len(part) < total else 0)
            return torch.cat(parts)

        made.append(run(denoiser))
        return x

    guider = comfy.samplers.CFGGuider(job.model)
    guider.set_conds(job.positive, job.negative)
    guider.set_cfg(job.cfg)
    nothing = torch.zeros(job.batch, *job.shape)
    solver = comfy.samplers.KSAMPLER(inside)
    guider.sample(nothing, nothing.clone(), solver, torch.tensor([sigma_max, 0.0]), disable_pbar=True, seed=job.seed)
    bar.update_absolute(total)
    return made[0]


def fit_and_save(job: Job, name: str) -> Pick:
    """Fit, and save as ``models/tdpm/NAME.safetensors``; a folder that cannot be written costs the file, not the work.

    Raises:
        ValueError: a name that is no plain file name.
    """
    path = target(name)
    if (reason := _unwritable(path.parent)) is not None:
        log.warning("tdpm: %s: the fitted prior is used in this session and not saved", reason)
        return Pick(path.name, fit(job))
    prior = fit(job)
    try:
        save_prior(prior, path)
    except OSError as error:
        log.warning("tdpm: %s: the fitted prior is used in this session and not saved", error.strerror or error)
        return Pick(path.name, prior)
    log.info("tdpm: saved models/%s/%s, sigma_trunc %.4g", FOLDER, path.name, prior.sigma_trunc)
    return read(path.name)


def target(name: str) -> Path:
    """Where a prior of that name is saved; a workflow may come from anywhere, so nothing leaves the folder."""
    import folder_paths

    name = name.strip().removesuffix(".safetensors")
    if not name or name.startswith(".") or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name) or len(name) > 100:
        raise ValueError(f"name is {name!r}: give a plain file name of up to 100 characters, without folders")
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}.safetensors"


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be saved there, found out before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    effective = {"effective_ids": True} if os.access in os.supports_effective_ids else {}
    return None if os.access(folder, os.W_OK, **effective) else f"{folder} cannot be written to"
