"""A diffusers pipeline as a denoiser, and what a pipeline must have to be one."""

from __future__ import annotations

import hashlib
import json

import torch

KINDS = ("epsilon", "v_prediction", "sample")
DISTILLED = ("LCM", "TCD", "CM")
SAMPLED = 64  # numbers of each tensor that a fingerprint looks at
OURS = (
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "latents",
    "generator",
    "num_images_per_prompt",
    "output_type",
    "return_dict",
    "callback_on_step_end",
)


class PipelineDenoiser:
    """``denoiser(x, sigma) -> denoised`` through a pipeline's own call; x = data + sigma * noise, as in k-diffusion.

    Every evaluation is one step of the pipeline, so that guidance, LoRA, ControlNet and adapters are in it; its
    scheduler and progress bar are put back after each. Row i of a batch has prompt i modulo the number of prompts.

    Args:
        pipe: a diffusers pipeline. batch: rows at a time in it.
        call: its conditioning: prompts, embeddings, guidance, size ...

    Attributes:
        shape: of one picture's latents. sigma_max, sigma_min: the ends of the scheduler's table.
        cond_scale: guidance. fingerprint: of the network's weights. network: the U-Net or transformer.

    Raises:
        ValueError: an unsuitable pipeline or call.
    """

    def __init__(self, pipe, *, batch: int = 8, **call):
        from tdpm_ext.hosts.diffusers_scheduler import EvaluationScheduler, starts_from_picture

        refuse(pipe)
        if starts_from_picture(pipe):
            raise ValueError(f"{type(pipe).__name__} starts from a picture: fit with a pipeline that starts from noise")
        if taken := sorted(set(call) & set(OURS)):
            raise ValueError(f"{', '.join(taken)} cannot be given: the prior's fit sets them")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch is {batch!r}: give a whole number of at least 1")
        self._pipe, self._batch, self._call = pipe, batch, call
        self._scheduler = EvaluationScheduler.from_config(pipe.scheduler.config)
        self.network = network_of(pipe)
        self.fingerprint = fingerprint(pipe)
        table = self._scheduler.table()
        self.sigma_min, self.sigma_max = table[0].item(), table[-1].item()
        self.shape = tuple(self._evaluate(None, 0, self.sigma_max).shape[1:])
        scale = getattr(pipe, "guidance_scale", call.get("guidance_scale"))
        self.cond_scale = float(scale) if isinstance(scale, int | float) else 1.0

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Denoised pictures [B, *shape] in x's dtype, on its device. sigma: [B], all alike."""
        if len(sigma.unique()) != 1:
            raise ValueError("a pipeline runs all rows at one noise level: give equal sigmas")
        level = float(sigma.flatten()[0])
        parts = [self._evaluate(x, k, level) for k in range(0, len(x), self._batch)]
        return torch.cat(parts).to(x)

    def _evaluate(self, x: torch.Tensor | None, start: int, sigma: float) -> torch.Tensor:
        """float32 denoised rows from ``start`` on; ``x=None`` evaluates the pipeline's own noise for one row."""
        pipe, scheduler = self._pipe, self._scheduler
        scheduler.x, scheduler.sigma = None, sigma
        given = {"num_inference_steps": 1, "output_type": "latent", "return_dict": False}
        if x is None:
            rows = 1
            given["generator"] = torch.Generator().manual_seed(0)
        else:
            scheduler.x = x[start : start + self._batch].float()
            rows = len(scheduler.x)
            given["latents"] = torch.zeros(rows, *self.shape, dtype=scheduler.dtype, device=pipe.device)
        before, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", None)
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**{**(bar or {}), "disable": True})
        try:
            pipe(**conditioning_of(self._call, start, rows), **given)
        finally:
            pipe.scheduler = before
            if bar is None:
                del pipe._progress_bar_config
            else:
                pipe._progress_bar_config = bar
        return scheduler.result


def conditioning_of(call: dict, start: int, rows: int) -> dict:
    """The call's arguments for ``rows`` rows of a batch from row ``start`` on.

    A prompt is repeated, a list of prompts or labels and a batch of embeddings or masks is gone through in turn;
    everything else is for all rows.
    """

    def expanded(name: str, value):
        if isinstance(value, str) and "prompt" in name:
            value = [value]
        if isinstance(value, list | tuple) and value and ("prompt" in name or name == "class_labels"):
            return [value[(start + i) % len(value)] for i in range(rows)]
        if isinstance(value, torch.Tensor) and name.endswith(("_embeds", "_mask")) and len(value):
            return value[[(start + i) % len(value) for i in range(rows)]]
        return value

    return {name: expanded(name, value) for name, value in call.items()}


def network_of(pipe) -> torch.nn.Module:
    """The U-Net or transformer that denoises.

    Raises:
        ValueError: there is none.
    """
    network = getattr(pipe, "unet", None)
    network = getattr(pipe, "transformer", None) if network is None else network
    if network is None:
        raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer: tdpm has nothing to run")
    return network


def fingerprint(pipe) -> str:
    """16 hex digits that name the network's weights: names, shapes, and some numbers of each tensor in half precision.

    LoRA layers beside the weights leave it as it is, as does running the network in float16; fusing LoRA changes it.
    """
    digest = hashlib.sha256()
    tensors = network_of(pipe).state_dict()
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if "lora_" not in name}
    for name in sorted(plain):
        flat = plain[name].detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]
        digest.update(json.dumps([name, list(plain[name].shape)]).encode())
        digest.update(some.to(torch.float16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse(pipe) -> None:
    """Raise ``ValueError`` with the reason where a pipeline's model is not one of epsilon, v or x0 on a beta table."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler: tdpm takes its place and needs its configuration")
    name, config = type(scheduler).__name__, scheduler.config
    kind = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or kind == "flow_prediction":
        reason = "its model is a rectified-flow model (SD3, Flux ...), whose x is not data + sigma * noise"
    elif name.startswith(DISTILLED):
        reason = "its model was distilled for a few-step sampler of its own"
    elif config.get("timestep_type") == "continuous":
        reason = "its model takes log sigma instead of a step index"
    elif "beta_schedule" not in config and config.get("trained_betas") is None:
        reason = "it has no table of betas"
    elif kind not in KINDS:
        reason = f"its model predicts {kind!r}; tdpm knows {', '.join(KINDS)}"
    else:
        network_of(pipe)
        return
    raise ValueError(f"tdpm cannot run {type(pipe).__name__} with {name}: {reason}")


def refuse_prior(pipe, prior, any_model: bool) -> None:
    """Raise ``ValueError`` that says both sides where a prior was fitted for other latents or another network."""
    channels = getattr(getattr(getattr(pipe, "vae", None), "config", None), "latent_channels", None)
    if isinstance(channels, int) and prior.shape[0] != channels:
        raise ValueError(f"the prior makes {prior.shape[0]} channels, the pipeline's latents have {channels}")
    fitted = prior.card.get("checkpoint")
    if any_model or fitted is None or fitted == (own := fingerprint(pipe)):
        return
    raise ValueError(
        f"the prior was fitted for network {fitted}, the pipeline's is {own}: fit one for it (fit(pipe, ...)), or pass "
        "any_model=True if the difference is small, such as a fused LoRA"
    )
