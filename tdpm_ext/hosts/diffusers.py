"""diffusers: any pipeline of an epsilon, v or x0 model, from a prior.

    from tdpm_ext.hosts import diffusers as tdpm_diffusers

    tdpm_diffusers.fit(pipe, "cats.safetensors", prompt=["a cat", "a kitten"], guidance_scale=5.0)
    with tdpm_diffusers.attach(pipe, "cats.safetensors"):
        pictures = pipe("a cat", num_inference_steps=4, guidance_scale=5.0).images

``attach`` puts a scheduler into the pipeline; everything else of it (guidance, LoRA, ControlNet, callbacks, previews)
stays its own. ``sample`` is the same for one call; ``euler_inputs`` touches nothing at all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch

from tdpm_ext import route
from tdpm_ext.calibrate import BUDGETS
from tdpm_ext.calibrate import calibrate as run_calibration
from tdpm_ext.decide import seeded_noise
from tdpm_ext.fit import DRAWS, fit_prior
from tdpm_ext.hosts import Handle
from tdpm_ext.hosts.diffusers_denoiser import PipelineDenoiser, fingerprint, refuse, refuse_prior
from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.priors.io import load_prior, save_prior
from tdpm_ext.sampler import OBJECTIVES, SCHEDULES

log = logging.getLogger("tdpm_ext")
INITS = ("auto", "never")


def attach(
    pipe,
    prior: ImplicitPrior | str | os.PathLike,
    *,
    sigma_trunc: float | None = None,
    schedule: str = "prior",
    init: str = "auto",
    objective: str = "fidelity",
    any_model: bool = False,
) -> Handle:
    """Put a ``tdpm`` scheduler into a pipeline: ``num_inference_steps`` is then the budget of network evaluations.

    The pipeline's own noise (its ``generator``, or ``latents=`` as unit noise) decides which picture is made. Where
    the prior does not apply (image to image, inpainting, ``denoising_end``, another resolution) the pipeline runs the
    ordinary multistep solver on its own schedule and the log says why.

    Args:
        pipe: a diffusers pipeline of an epsilon, v or x0 model.
        prior: a prior, or the file of one.
        sigma_trunc, schedule, objective: as in ``sample_tdpm``. init: "auto", or "never" for the ordinary solver.
        any_model: accept a prior that was fitted for another network.

    Returns:
        A handle; ``undo()``, or leaving it as a context manager, puts the pipeline's scheduler back.

    Raises:
        ValueError: a flow-matching or otherwise unsuitable scheduler, a prior for another network or other latents, an
            unknown option. PriorFileError (a ValueError): a damaged file.
    """
    from tdpm_ext.hosts.diffusers_scheduler import Options, TDPMScheduler

    for name, value, known in (
        ("schedule", schedule, SCHEDULES),
        ("init", init, INITS),
        ("objective", objective, OBJECTIVES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}")
    refuse(pipe)
    prior = _opened(prior)
    refuse_prior(pipe, prior, any_model)
    before = pipe.scheduler
    ours = TDPMScheduler.from_config(before.config).bind(prior, Options(sigma_trunc, schedule, init, objective), pipe)

    def undo() -> None:
        if pipe.scheduler is ours:
            pipe.scheduler = before
        else:
            log.warning("the pipeline's scheduler was replaced after attach; it is left as it is")

    pipe.scheduler = ours
    return Handle("diffusers", undo)


def sample(
    pipe,
    prior: ImplicitPrior | str | os.PathLike,
    *,
    seeds: Sequence[int] | None = None,
    sigma_trunc: float | None = None,
    schedule: str = "prior",
    init: str = "auto",
    objective: str = "fidelity",
    any_model: bool = False,
    **call,
):
    """``pipe(**call)`` from a prior; afterwards the pipeline is as it was.

    Args:
        seeds: one per picture, each with a CPU generator of its own, so that a seed is a picture in any batch. With a
            single prompt as many pictures are made as there are seeds.
        call: what the pipeline takes.

    Returns:
        What the pipeline returns.

    Raises:
        ValueError: as ``attach``; or ``seeds`` beside ``generator`` or ``latents``.
    """
    if seeds is not None:
        if taken := {"generator", "latents"} & set(call):
            raise ValueError(f"seeds and {', '.join(sorted(taken))} both say which noise to use: give one of them")
        call["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        if isinstance(call.get("prompt"), str):
            call.setdefault("num_images_per_prompt", len(call["generator"]))
    options = {"sigma_trunc": sigma_trunc, "schedule": schedule, "init": init, "objective": objective}
    with attach(pipe, prior, any_model=any_model, **options):
        return pipe(**call)


def euler_inputs(
    pipe,
    prior: ImplicitPrior | str | os.PathLike,
    steps: int,
    seeds: Sequence[int],
    *,
    sigma_trunc: float | None = None,
    objective: str = "fidelity",
) -> dict:
    """``latents=`` and ``sigmas=`` for a pipeline with diffusers' own Euler scheduler: ``pipe(prompt, **inputs)``.

    Nothing is put into the pipeline, but plain Euler steps follow the prior, without the multistep history and the
    fitted weights that ``attach`` brings; ``attach`` gives the better pictures.

    Args:
        steps: network evaluations, the prior's own included.
        seeds: one per picture.

    Returns:
        {"latents": float32 [len(seeds), *prior.shape] on the pipeline's device, "sigmas": [n + 1] ending in 0}.

    Raises:
        ValueError: the scheduler is not ``EulerDiscreteScheduler``, or as ``attach``; a budget below the prior's own.
    """
    refuse(pipe)
    name = type(pipe.scheduler).__name__
    if name != "EulerDiscreteScheduler":
        raise ValueError(f"latents and sigmas suit EulerDiscreteScheduler, this pipeline has {name}: use attach()")
    prior = _opened(prior)
    refuse_prior(pipe, prior, any_model=False)
    if steps <= prior.prior_nfe:
        raise ValueError(f"steps={steps}, but the prior itself makes {prior.prior_nfe} network calls: give more steps")
    way = route.follow(route.plan_for(prior, steps, objective, sigma_trunc))
    z = seeded_noise(prior.shape, seeds).to(pipe.device)
    x = prior.sample(z, way.sigmas[0].item())
    sigmas = way.sigmas.tolist()
    probe = type(pipe.scheduler).from_config(pipe.scheduler.config)  # the pipeline's own is left alone
    probe.set_timesteps(sigmas=sigmas)
    return {"latents": x / float(probe.init_noise_sigma), "sigmas": sigmas}


def fit(
    pipe,
    output: str | os.PathLike | None = None,
    *,
    kind: str = "mixture",
    components: int | None = None,
    rank: int | None = None,
    draws: int = DRAWS,
    budgets: Sequence[int] = BUDGETS,
    samples: int | None = None,
    batch: int = 8,
    seed: int = 0,
    progress: bool = True,
    **call,
) -> ImplicitPrior:
    """Fit a prior from a pipeline itself, under the given conditioning and guidance; calibrate and save it.

    No pictures are needed: the network is sampled for a few steps, through the pipeline's own call, so that whatever
    the call does to it (guidance, LoRA, ControlNet, adapters) is in the prior.

    Args:
        output: the ``.safetensors`` file to write; None: only return the prior.
        kind, components, rank, draws: as in ``fit_prior``.
        budgets: network evaluations to calibrate for, with the objective "fidelity"; empty: do not calibrate.
        samples: seeds used in calibration. batch: pictures at a time in the pipeline.
        call: what the pipeline takes: ``prompt`` (one, or a list that the draws go through in turn) or embeddings,
            ``guidance_scale``, ``height``, ``width`` ... Steps, latents, generators and output type are set here.

    Raises:
        ValueError: as ``attach``; or the pipeline starts from a picture, or the call sets what is set here.
    """
    if output is not None and not os.access(os.path.dirname(os.path.abspath(output)), os.W_OK):
        raise PermissionError(f"{os.path.dirname(os.path.abspath(output))} is missing or cannot be written to")
    denoiser = PipelineDenoiser(pipe, batch=batch, **call)
    prior = fit_prior(
        kind,
        denoiser=denoiser,
        shape=denoiser.shape,
        sigma_max=denoiser.sigma_max,
        components=components,
        rank=rank,
        draws=draws,
        checkpoint=denoiser.fingerprint,
        seed=seed,
        progress=progress,
    )
    prior.sigma_trunc = min(prior.sigma_trunc, 0.5 * denoiser.sigma_max)  # wide data: the cut must lie inside the table
    prior.card |= {"host": "diffusers", "cond_scale": denoiser.cond_scale, "model": type(denoiser.network).__name__}
    if budgets:
        options = {"samples": samples, "sigma_min": denoiser.sigma_min, "seed": seed, "progress": progress}
        run_calibration(prior, denoiser, budgets, **options)
        prior.card["calibrated_cond_scale"] = denoiser.cond_scale
    if output is not None:
        save_prior(prior, output)
    return prior


def _opened(prior) -> ImplicitPrior:
    return load_prior(prior) if isinstance(prior, str | os.PathLike) else prior


__all__ = ["attach", "euler_inputs", "fingerprint", "fit", "sample"]
