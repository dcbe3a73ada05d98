"""Schedulers for diffusers pipelines: the truncated chain, and one evaluation of the pipeline's network.

A scheduler is where every pipeline class, with its guidance, LoRA, ControlNet and callbacks, hands its noise over and
takes its next x from; so ``tdpm`` is one. This module imports diffusers and is itself imported only when needed.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput

from tdpm_ext import route
from tdpm_ext.decide import decide
from tdpm_ext.sampler import start_from
from tdpm_ext.schedule import check_sigmas
from tdpm_ext.solver import all_weights, expand_orders

log = logging.getLogger("tdpm_ext")


@dataclass(frozen=True)
class Options:
    """The options of ``sample_tdpm`` that have a meaning in a pipeline."""

    sigma_trunc: float | None = None
    schedule: str = "prior"
    init: str = "auto"
    objective: str = "fidelity"


class KScheduler(EulerDiscreteScheduler):
    """diffusers' Euler scheduler, whose x is data + sigma * noise, with the conversions both classes below need."""

    def table(self) -> torch.Tensor:
        """Sigma at each training step index, ascending; float64 [num_train_timesteps] on the CPU."""
        alphas = self.alphas_cumprod.double().cpu()
        return ((1 - alphas) / alphas).sqrt()

    def timesteps_at(self, sigmas, device) -> torch.Tensor:
        """float32 [n] what the network is told for each sigma: its fractional index in the table."""
        table = self.table().log().numpy()
        indices = np.interp(np.log(sigmas), table, np.arange(len(table)))  # linear in log sigma, clamped to the ends
        return torch.tensor(indices, dtype=torch.float32, device=device)

    def denoised(self, model_output: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """float32 [B, ...] what the network's output says the picture is. x: float32, at noise level ``sigma``."""
        if model_output.shape[1] == 2 * x.shape[1]:  # a learned variance rides along
            model_output = model_output.chunk(2, dim=1)[0]
        model_output = model_output.float()
        kind = self.config.prediction_type
        if kind == "epsilon":
            return x - sigma * model_output
        if kind == "v_prediction":
            return x / (sigma**2 + 1) - model_output * (sigma / (sigma**2 + 1) ** 0.5)
        return model_output  # "sample"; other kinds are refused before

    def scaled(self, x: torch.Tensor, sigma: float, dtype: torch.dtype) -> torch.Tensor:
        """The network's input for x."""
        self.is_scale_input_called = True
        return (x / (sigma**2 + 1) ** 0.5).to(dtype)


class TDPMScheduler(KScheduler):
    """Runs the chain below ``sigma_trunc`` from a prior with the calibrated multistep solver.

    A pipeline's initial latents are unit noise times ``init_noise_sigma``; here that is 1, so the first x that comes in
    is z, and the prior's draw takes its place before the network sees it. Where the prior does not apply (a picture
    under the noise, another resolution, a chain that stops early) it is an ordinary order-2 multistep scheduler
    (DPM-Solver++(2M)) on the pipeline's own sigmas, and the log says why.
    """

    prior = None
    options = Options()
    _pipe = staticmethod(lambda: None)
    _fresh = None  # what the first x that comes in is: "prior": z; "noise": z still to be scaled; None: x itself

    def bind(self, prior, options: Options, pipe) -> TDPMScheduler:
        """Take a prior, and the pipeline whose calls are judged. Returns itself."""
        self.prior, self.options, self._pipe = prior, options, weakref.ref(pipe)
        return self

    @property
    def init_noise_sigma(self):
        """1 while noise is awaited for the prior; else what diffusers' Euler scheduler says."""
        return 1.0 if self._fresh == "prior" else super().init_noise_sigma

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None):
        """As in diffusers. ``num_inference_steps`` is the budget of network evaluations; it is never exceeded."""
        given = {"device": device, "timesteps": timesteps, "sigmas": sigmas}
        super().set_timesteps(num_inference_steps, **given)
        self.is_scale_input_called = False
        self._fresh, self._drawn, self._past, self._first = None, None, [], None
        self._levels, self._host_timesteps = check_sigmas(self.sigmas), self.timesteps
        if 0 in self._levels[:-1].tolist():
            raise ValueError("sigma 0 stands before the end of the schedule: only the last sigma may be 0")
        levels = self._levels.clone()
        if timesteps is None and sigmas is None:  # fresh noise has no level of its own, whatever the spacing starts at
            levels[0] = max(levels[0].item(), self.table()[-1].item())
        reason, way = self._decide(levels)
        if way is None:
            self._way = route.ordinary(self._levels, None)
            level = logging.INFO if self.prior is None or self.options.init == "never" else logging.WARNING
            log.log(level, "tdpm: prior not used: %s; ordinary solver, %d calls", reason, self._way.calls)
            return
        self._way, self._fresh = way, "prior"
        self.sigmas = way.sigmas.float()
        self.timesteps = self.timesteps_at(way.sigmas[:-1].tolist(), self.timesteps.device)
        self.num_inference_steps = len(self.timesteps)

    def set_begin_index(self, begin_index: int = 0):
        """Pipelines that start from a picture skip the first steps; then the prior stays out."""
        if begin_index > 0 and self._fresh == "prior":
            self._fall_back("the pipeline skips the first steps (image to image)")
        super().set_begin_index(begin_index)

    def add_noise(self, original_samples, noise, timesteps):
        """Noise over a picture; then the prior stays out."""
        if self._fresh == "prior":
            self._fall_back("x holds a picture under the noise (image to image)")
        return super().add_noise(original_samples, noise, timesteps)

    def scale_model_input(self, sample, timestep):
        """The network's input: x over sqrt(sigma^2 + 1); on the first step the prior's draw instead of the noise."""
        if self.step_index is None:
            self._init_step_index(timestep)
        if self._fresh == "prior" and tuple(sample.shape[1:]) != self.prior.shape:
            shapes = f"x has shape {tuple(sample.shape[1:])} and the prior was fitted for {self.prior.shape}"
            self._fall_back(shapes, timestep)
            self._fresh = "noise"
        x = self._here(sample)
        return self.scaled(x, self.sigmas[self.step_index].item(), sample.dtype)

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """One step of the solver; ``sample`` of the first step, still noise, is what the prior's draw replaced."""
        if not self.is_scale_input_called:
            raise ValueError("the pipeline does not ask its scheduler for the network's input: tdpm cannot run there")
        if self.step_index is None:
            self._init_step_index(timestep)
        if self._first is None:
            self._first = self.step_index
            values = tuple(self._way.sigmas[self._first :].tolist())
            orders = tuple(expand_orders(self._way.orders, len(values) - 1))
            known = tuple(level for level, _ in self._drawn[2]) if self._fresh == "prior" else ()
            self._rows = all_weights(values, orders, known, self._way.weights)
        x = self._here(sample)
        if self._fresh == "prior":
            self._past = [denoised for _, denoised in self._drawn[2]]
        self._fresh = self._drawn = None
        here, there = self._way.sigmas[self.step_index].item(), self._way.sigmas[self.step_index + 1].item()
        denoised = self.denoised(model_output, x, here)
        row = self._rows[self.step_index - self._first]
        update = row[0] * denoised
        for weight, old in zip(row[1:], self._past, strict=False):
            update.add_(old, alpha=weight)
        x = update.add_(x, alpha=there / here) if there else update
        self._past = [denoised, *self._past[:1]]
        self._step_index += 1
        x = x.to(model_output.dtype)
        if not return_dict:
            return x, denoised
        return EulerDiscreteSchedulerOutput(prev_sample=x, pred_original_sample=denoised)

    def _decide(self, levels: torch.Tensor):
        """(reason, None) or (reason, the way to go)."""
        prior, options, pipe = self.prior, self.options, self._pipe()
        if prior is None:
            return "no prior is attached", None
        if reason := _picture_in(pipe):
            return reason, None
        budget = len(levels) - 1
        plan = route.plan_for(prior, budget, options.objective, options.sigma_trunc, None, levels)
        shape = torch.empty(1, *prior.shape, device="meta")  # the latents do not exist yet; judged when they come
        facts = {"prior": prior, "sigma_trunc": plan.sigma_trunc, "budget": budget, "init": options.init}
        verdict = decide(None, shape, levels, **facts)
        if not verdict.use_prior:
            return verdict.reason, None
        return verdict.reason, route.truncated(levels, plan, options.schedule, budget - prior.prior_nfe)

    def _tell(self) -> None:
        """Say that the prior is used, and whether for another guidance than it was fitted at."""
        fitted, used = self.prior.card.get("cond_scale"), getattr(self._pipe(), "guidance_scale", None)
        note, calls = "", self._way.calls + self.prior.prior_nfe
        if self.prior.card.get("source") == "denoiser" and isinstance(used, int | float) and fitted not in (None, used):
            note = f" (the prior was fitted at guidance {fitted:g}, this run has {used:g})"
        log.info("tdpm: prior used, sigma_trunc=%.4g, %d calls%s", self._way.sigmas[0].item(), calls, note)

    def _here(self, sample: torch.Tensor) -> torch.Tensor:
        """float32 x [B, ...] at the current sigma."""
        if self._fresh is None:
            return sample.float()
        if self._fresh == "noise":
            return sample.float() * float(super().init_noise_sigma)
        noise, times = _distinct(sample)
        if self._drawn is None or not torch.equal(self._drawn[0], noise):
            if self._first is not None:
                raise ValueError("the pipeline changes x between network input and step: tdpm cannot run there")
            if self._drawn is None:
                self._tell()
            self._drawn = (noise, *start_from(self.prior, noise.float(), self._way, {}))
        x = self._drawn[1]
        return x if times == 1 else x.repeat(times, *[1] * (x.ndim - 1))

    def _fall_back(self, reason: str, timestep=None) -> None:
        """The ordinary schedule after all.

        Pipelines ask for the timesteps before they make their latents, so by now they hold the tensor, or a slice of
        it: it is rewritten in place, and where that did not reach the loop's ``timestep`` there is no way back.
        """
        steps = len(self.timesteps)
        self._way, self._fresh = route.ordinary(self._levels, steps), None
        self.sigmas = self._way.sigmas.float()
        same = len(self._host_timesteps) == steps
        own = self._host_timesteps if same else self.timesteps_at(self._way.sigmas[:-1].tolist(), self.timesteps.device)
        self.timesteps.copy_(own)
        log.warning("tdpm: prior not used: %s; ordinary solver, %d calls", reason, self._way.calls)
        if timestep is not None:
            told = float(torch.as_tensor(timestep).flatten()[0])
            if told != self.timesteps[self.step_index].item():
                raise ValueError(f"the prior cannot be used: {reason}. Undo tdpm for this call, or use another prior")


class EvaluationScheduler(KScheduler):
    """One evaluation of a pipeline's network, guidance included, at an x and a sigma of the caller's choice.

    Set ``x`` (float32 [B, ...], or None for the pipeline's own noise) and ``sigma``, call the pipeline for one step
    with latents of x's shape, and read ``result`` (float32 [B, ...]) and ``dtype``, that of the latents.
    """

    x = None
    sigma = 1.0
    result = None
    dtype = torch.float32
    init_noise_sigma = 1.0

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None):
        """One step from ``sigma`` to 0, whatever is asked for."""
        self.num_inference_steps, self._step_index, self._begin_index = 1, 0, None
        self.sigmas = torch.tensor([self.sigma, 0.0])
        self.timesteps = self.timesteps_at([self.sigma], device)

    def scale_model_input(self, sample, timestep):
        """x instead of ``sample``."""
        self.dtype = sample.dtype
        return self.scaled(self._x(sample), self.sigma, sample.dtype)

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """The step to 0 is the denoised picture itself."""
        self.result = self.denoised(model_output, self._x(sample), self.sigma)
        x = self.result.to(model_output.dtype)
        return EulerDiscreteSchedulerOutput(x, self.result) if return_dict else (x, self.result)

    def _x(self, sample: torch.Tensor) -> torch.Tensor:
        x = sample.float() if self.x is None else self.x.to(sample.device)
        return x if len(x) == len(sample) else x.repeat(len(sample) // len(x), *[1] * (x.ndim - 1))


def starts_from_picture(pipe) -> bool:
    """Whether a pipeline class puts noise over a picture: image to image, inpainting, video to video."""
    return "strength" in inspect.signature(type(pipe).__call__).parameters


def _picture_in(pipe) -> str | None:
    """Why this call of the pipeline is not a whole chain from fresh noise, read off the pipeline."""
    if pipe is None:
        return None
    if starts_from_picture(pipe):
        return f"{type(pipe).__name__} starts from a picture (image to image)"
    end = getattr(pipe, "_denoising_end", None)
    if isinstance(end, float) and 0 < end < 1:
        return f"denoising_end={end:g} stops the chain early"
    return None


def _distinct(sample: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Guidance repeats the batch two or three times; the prior is drawn once: (rows, times)."""
    for times in (3, 2):
        if len(sample) % times == 0:
            parts = sample.chunk(times)
            if all(torch.equal(parts[0], part) for part in parts[1:]):
                return parts[0], times
    return sample, 1
