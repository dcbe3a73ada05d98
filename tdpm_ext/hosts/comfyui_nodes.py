"""ComfyUI's nodes. Their names, inputs and options are only ever added to: saved workflows refer to them."""

from __future__ import annotations

import logging

import torch

from tdpm_ext import route
from tdpm_ext.decide import INITS
from tdpm_ext.hosts import comfyui, comfyui_accelerate, comfyui_fit, comfyui_model, comfyui_priors
from tdpm_ext.hosts.comfyui_priors import AUTOMATIC, OPTION, Pick
from tdpm_ext.sampler import OBJECTIVES, SCHEDULES

log = logging.getLogger("tdpm_ext")
CATEGORY = "sampling/tdpm"
BUILT_IN = "built-in"
KINDS = ("mixture", "lowrank", "gaussian")
# ComfyUI's samplers that run on given sigmas and whose number of model calls is known, so that steps mean steps
SOLVERS = ("euler", "euler_ancestral", "heun", "dpm_2", "lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "ipndm")

PRIOR = {"tooltip": "Which prior to use. Not connected: the model's own, or the file found automatically."}
SIGMA_TRUNC = {
    "default": 0.0,
    "min": 0.0,
    "max": 1000.0,
    "step": 0.01,
    "tooltip": "Noise level at which the prior takes over from the sampler. 0: what the prior was calibrated for.",
}
OBJECTIVE = {
    "default": OBJECTIVES[0],
    "tooltip": "fidelity: the picture that many steps give for this seed. quality: needs a prior calibrated for it.",
}


class LoadTDPMPrior:
    """Puts a prior on a MODEL, for the sampler ``tdpm`` in any KSampler."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "TDPM_PRIOR")
    OUTPUT_TOOLTIPS = ("The model; any KSampler with sampler tdpm uses the prior.", "The prior, for TDPM Sampler.")
    DESCRIPTION = "Choose the prior that the sampler tdpm starts from. Files are those in models/tdpm."

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = "A file in models/tdpm. automatic: the one that was fitted for this very checkpoint and size."
        files = [AUTOMATIC, *comfyui_priors.list_files()]
        model = ("MODEL", {"tooltip": "The model to sample with."})
        return {"required": {"model": model, "prior_name": (files, {"default": AUTOMATIC, "tooltip": tooltip})}}

    @classmethod
    def IS_CHANGED(cls, model=None, prior_name=AUTOMATIC):
        """A file written anew is read anew, and a new file may change what is found."""
        return comfyui_priors.versions(None if prior_name == AUTOMATIC else prior_name)

    def load(self, model, prior_name):
        pick = Pick(AUTOMATIC) if prior_name == AUTOMATIC else comfyui_priors.read(prior_name)
        if pick.reason:
            log.warning("tdpm: %s", pick.reason)
        return with_prior(model, pick), pick


class FitTDPMPrior:
    """Fits a prior from the loaded MODEL under a prompt."""

    CATEGORY = CATEGORY
    FUNCTION = "fit"
    OUTPUT_NODE = True
    RETURN_TYPES = ("MODEL", "TDPM_PRIOR")
    OUTPUT_TOOLTIPS = ("The model with the new prior on it.", "The prior, for TDPM Sampler.")
    DESCRIPTION = (
        "Make a prior for this model, size, prompt and cfg. Needs no pictures: the model is sampled. "
        "Run it once; the file in models/tdpm is found from then on. A prior serves other prompts too, less exactly."
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to make a prior for, LoRAs included."}),
                "positive": ("CONDITIONING", {"tooltip": "The prompt, or a general one if the prior is for many."}),
                "negative": ("CONDITIONING", {"tooltip": "The negative prompt you will use."}),
                "latent_image": ("LATENT", {"tooltip": "Only its size counts: a prior is made for one size."}),
                "cfg": _number(7.0, 0.0, 100.0, 0.1, "The cfg you will sample with."),
                "draws": _whole(256, 16, 8192, "How many latents are drawn. More: better and slower (7 steps each)."),
                "calibrate_steps": (
                    "STRING",
                    {"default": "4, 6, 8", "tooltip": "Step counts to tune for. Empty: no tuning, much faster."},
                ),
                # not "seed", which the page would change after every run: each queue would fit again
                "fit_seed": _whole(0, 0, 2**63 - 1, "Everything random in the fit follows from it."),
                "batch": _whole(8, 1, 256, "Latents at a time; lower it when memory runs out."),
                "name": ("STRING", {"default": "prior", "tooltip": "File name in models/tdpm; replaced if there."}),
            },
            "optional": {
                "kind": (
                    list(KINDS),
                    {"default": KINDS[0], "tooltip": "Kind of prior. gaussian: only for small latents."},
                )
            },
        }

    def fit(
        self, model, positive, negative, latent_image, cfg, draws, calibrate_steps, fit_seed, batch, name, kind=KINDS[0]
    ):
        import comfy.sample

        shape = tuple(comfy.sample.fix_empty_latent_channels(model, latent_image["samples"]).shape[1:])
        budgets = step_counts(calibrate_steps)
        job = comfyui_fit.Job(model, positive, negative, cfg, shape, kind, draws, budgets, fit_seed, batch)
        pick = comfyui_fit.fit_and_save(job, name)
        text = f"{pick.name}: sigma_trunc {pick.prior.sigma_trunc:.4g}"
        return {"ui": {"text": [text]}, "result": (with_prior(model, pick), pick)}


class SamplerTDPM:
    """The sampler with its options, for SamplerCustom and SamplerCustomAdvanced."""

    CATEGORY = CATEGORY
    FUNCTION = "get_sampler"
    RETURN_TYPES = ("SAMPLER",)
    DESCRIPTION = "The tdpm sampler with options, for SamplerCustom. A KSampler with sampler tdpm uses the defaults."

    @classmethod
    def INPUT_TYPES(cls):
        schedule = (
            "prior: the noise levels the prior was calibrated for. respace: the host's schedule from sigma_trunc on, "
            "same number of steps. cut: the host's steps below sigma_trunc only, fewer calls."
        )
        init = (
            "auto: the prior starts the picture when there is nothing but noise. always: also over a picture or mask. "
            "never: an ordinary sampler."
        )
        solver = "Steps below sigma_trunc. built-in knows the prior and is best; heun and dpm_2 make half the steps."
        return {
            "required": {
                "sigma_trunc": ("FLOAT", SIGMA_TRUNC),
                "schedule": (list(SCHEDULES), {"default": SCHEDULES[0], "tooltip": schedule}),
                "init": (list(INITS), {"default": INITS[0], "tooltip": init}),
                "solver": ([BUILT_IN, *SOLVERS], {"default": BUILT_IN, "tooltip": solver}),
                "objective": (list(OBJECTIVES), OBJECTIVE),
            },
            "optional": {"prior": ("TDPM_PRIOR", PRIOR)},
        }

    def get_sampler(self, sigma_trunc, schedule, init, solver, objective, prior=None):
        import comfy.samplers

        options = {"sigma_trunc": sigma_trunc or None, "schedule": schedule, "init": init, "objective": objective}
        options |= {"solver": solver_function(solver), "prior": prior}
        return (comfy.samplers.KSAMPLER(comfyui.sample_tdpm, options),)


class TDPMScheduler:
    """The prior's calibrated noise levels as SIGMAS."""

    CATEGORY = CATEGORY
    FUNCTION = "get_sigmas"
    RETURN_TYPES = ("SIGMAS",)
    DESCRIPTION = (
        "The noise levels of a prior, from sigma_trunc down, for SamplerCustom with TDPM Sampler. "
        "Other samplers know nothing of the prior: do not connect them."
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to sample with."}),
                "steps": _whole(4, 1, 1000, "Model evaluations."),
                "sigma_trunc": ("FLOAT", SIGMA_TRUNC),
                "objective": (list(OBJECTIVES), OBJECTIVE),
            },
            "optional": {"prior": ("TDPM_PRIOR", PRIOR)},
        }

    def get_sigmas(self, model, steps, sigma_trunc, objective, prior=None):
        import comfy.samplers

        facts = comfyui_model.facts_of(model)
        pick = comfyui_priors.find(facts, None, prior, model.model_options.get(OPTION))
        if pick.prior is None:
            log.warning("tdpm: no noise levels of a prior: %s; the model's karras schedule instead", pick.reason)
            return (comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", steps),)
        plan = route.plan_for(pick.prior, steps, objective, sigma_trunc or None)
        return (torch.tensor(plan.sigmas, dtype=torch.float32),)


class TDPMAccelerate:
    """Fused kernels and remembered conditioning for the network of a MODEL."""

    CATEGORY = CATEGORY
    FUNCTION = "accelerate"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model; it runs accelerated, the one that came in does not.",)
    DESCRIPTION = (
        "Run the network faster without changing what it computes, for any sampler. The console says what was done; "
        "networks that are not known run as they are."
    )

    @classmethod
    def INPUT_TYPES(cls):
        from tdpm_ext.kernels.patch import PRECISIONS

        precision = (
            "exact: equal to rounding. half and compile: 16-bit or compiled network, each only where a measurement at "
            "the start of the run finds it faster."
        )
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to accelerate, LoRAs included."}),
                "precision": (list(PRECISIONS), {"default": PRECISIONS[0], "tooltip": precision}),
            }
        }

    def accelerate(self, model, precision):
        return (comfyui_accelerate.accelerated(model, precision),)


def with_prior(model, pick: Pick):
    """A clone of the MODEL with the prior among its options; the original stays as it is."""
    model = model.clone()
    model.model_options[OPTION] = pick
    return model


def solver_function(name: str):
    """ComfyUI's own sampler of that name; None is the built-in solver."""
    import comfy.k_diffusion.sampling

    return None if name == BUILT_IN else getattr(comfy.k_diffusion.sampling, f"sample_{name}")


def step_counts(text: str) -> tuple[int, ...]:
    """``"4, 6, 8"`` -> (4, 6, 8).

    Raises:
        ValueError: anything but whole numbers from 1 to 100.
    """
    parts = text.replace(",", " ").split()
    if not all(part.isdecimal() and 1 <= int(part) <= 100 for part in parts):
        raise ValueError(f"calibrate_steps is {text!r}: give whole numbers from 1 to 100, such as 4, 6, 8, or nothing")
    return tuple(sorted({int(part) for part in parts}))


def _number(default: float, low: float, high: float, step: float, tooltip: str) -> tuple:
    return ("FLOAT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip})


def _whole(default: int, low: int, high: int, tooltip: str) -> tuple:
    return ("INT", {"default": default, "min": low, "max": high, "tooltip": tooltip})


NODE_CLASS_MAPPINGS = {
    "LoadTDPMPrior": LoadTDPMPrior,
    "FitTDPMPrior": FitTDPMPrior,
    "SamplerTDPM": SamplerTDPM,
    "TDPMScheduler": TDPMScheduler,
    "TDPMAccelerate": TDPMAccelerate,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadTDPMPrior": "Load TDPM Prior",
    "FitTDPMPrior": "Fit TDPM Prior",
    "SamplerTDPM": "TDPM Sampler",
    "TDPMScheduler": "TDPM Scheduler",
    "TDPMAccelerate": "TDPM Accelerate",
}
