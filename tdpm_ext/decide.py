"""When does the prior replace the host's x, and from which unit noise?

Hosts do not say "this is text to image": it is read from the attributes that ComfyUI and A1111/Forge hang on the
model they pass to a sampler. The picture belongs to the user: in doubt the prior stays out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from tdpm_ext.schedule import CLOSE

INITS = ("auto", "always", "never")
SAME_SCALE = 1e-3  # hosts' two ways of scaling noise count as one when they differ by less
_CHAIN = 6  # wrappers followed inwards through ``.inner_model``


@dataclass(frozen=True)
class Decision:
    """``use_prior``: x is replaced. ``reason``: why, or why not, for the log."""

    use_prior: bool
    reason: str


@dataclass(frozen=True)
class Host:
    """What the calling program shows of the job.

    Attributes:
        name: "comfyui", "a1111" (also Forge and reForge) or "unknown".
        noise: unit noise [B, ...] that went into x, where the host keeps it.
        latent: the picture [B, ...] under the noise; None when there is none.
        masked: part of the picture is to be kept.
        second_pass: the hires pass.
        flow: x is an interpolation of data and noise (rectified flow), not data + sigma * noise.
        streams: latents packed into one tensor.
        hidden: the host is known to have these facts, but a wrapper around the model hides them.
    """

    name: str = "unknown"
    noise: torch.Tensor | None = None
    latent: torch.Tensor | None = None
    masked: bool = False
    second_pass: bool = False
    flow: bool = False
    streams: int = 1
    hidden: bool = False


def read_host(model, extra_args: dict) -> Host:
    """Read the host's attributes; whatever is missing counts as unknown."""
    chain = _chain(model)
    shared = {
        "masked": extra_args.get("denoise_mask") is not None,
        "flow": any(_is_flow(link) for link in chain),
        "streams": max(len(getattr(link, "latent_shapes", None) or ()) for link in chain) or 1,
    }
    if hasattr(model, "init_latent"):  # first: reForge's has ComfyUI's attributes too, empty
        shared["masked"] |= getattr(model, "mask", None) is not None
        second = bool(getattr(getattr(model, "p", None), "is_hr_pass", False))
        return Host("a1111", latent=_tensor(model.init_latent), second_pass=second, **shared)
    for link in chain:
        if hasattr(link, "noise") and hasattr(link, "latent_image"):
            return Host("comfyui", noise=_tensor(link.noise), latent=_picture(link.latent_image), **shared)
    if "model_options" in extra_args or "denoise_mask" in extra_args:
        return Host("comfyui", hidden=True, **shared)
    return Host(**shared)


def decide(model, x, levels, *, prior, sigma_trunc, budget, init="auto", extra_args=None) -> Decision:
    """Whether the prior's draw at ``sigma_trunc`` takes the place of the host's x.

    Args:
        model: what the host passed to the sampler.
        x: [B, *shape] the host's noisy picture.
        levels: float64 [n+1] the host's sigmas on the CPU, at least two.
        prior: the prior at hand, or None.
        sigma_trunc: where the chain would be cut (unused without a prior).
        budget: network evaluations the user pays for.
        init: "auto" decides by the rules below; "always" overrides what concerns the picture (mask, image, noise)
            and raises where the prior cannot be used; "never" keeps x.

    Raises:
        ValueError: ``init="always"`` and the prior cannot be used; the message says why.
    """
    if init == "never":
        return Decision(False, "init='never'")
    host = read_host(model, extra_args or {})
    if reason := _cannot(x, levels, prior, sigma_trunc, budget, host):
        if init == "always":
            raise ValueError(f"init='always' cannot be met: {reason}")
        return Decision(False, reason)
    if init == "always":
        return Decision(True, "init='always'")
    if reason := _should_not(host):
        return Decision(False, reason)
    return Decision(True, "fresh noise" if host.name != "unknown" else "the caller gives fresh noise")


def _cannot(x, levels, prior, sigma_trunc, budget, host: Host) -> str | None:
    """Reasons that no option overrides."""
    if prior is None:
        return "no prior was passed and none is active: pass prior= or use use_prior(prior)"
    if not getattr(prior, "ready", True):
        return f"the {prior.kind} prior has no network yet: call prior.bind(model) once after loading it"
    heights = levels.tolist()
    if any(low >= high for high, low in pairwise(heights)):
        return "the sigmas do not fall strictly (unsampling?): the prior starts a falling schedule"
    if host.flow:
        return "the model is a rectified-flow model, whose x is not data + sigma * noise"
    if host.streams > 1:
        return f"the latent packs {host.streams} streams into one tensor"
    if tuple(x.shape[1:]) != tuple(prior.shape):
        return f"x has shape {tuple(x.shape[1:])} and the prior was fitted for {tuple(prior.shape)}"
    if budget <= prior.prior_nfe:
        return f"the prior itself makes {prior.prior_nfe} network calls and the budget is {budget}"
    first, last = heights[0], heights[-1]
    if first < sigma_trunc * (1 - CLOSE):
        return f"the chain starts at sigma {first:.4g}, below sigma_trunc {sigma_trunc:.4g}"
    if last >= sigma_trunc * (1 - CLOSE):
        return f"the segment ends at sigma {last:.4g}, not below sigma_trunc {sigma_trunc:.4g}"
    return None


def _should_not(host: Host) -> str | None:
    """Reasons that concern the user's picture; ``init="always"`` overrides them."""
    if host.masked:
        return "a mask keeps part of the picture"
    if host.second_pass:
        return "this is the hires pass"
    if host.latent is not None:
        return "x holds a picture under the noise (image to image)"
    if host.noise is not None and not bool(host.noise.any()):
        return "no noise was added (second stage)"
    if host.hidden:
        return "a wrapper hides whether x is fresh noise; init='always' overrides"
    return None


def unit_noise(model, x, sigma, extra_args: dict, generator=None) -> torch.Tensor:
    """The unit noise z behind x, so that the host's seed keeps its picture.

    The host's own noise where it is visible. Otherwise x (less the picture under it, if known) over ``sigma``; a
    picture whose rms is more than 4 standard errors from ``sigma`` and nearer sqrt(1 + sigma^2) is divided by that
    (ComfyUI and A1111 scale so at full denoise). Each picture is judged alone, so its batch does not matter.

    Args:
        x: float32 or float64 [B, *shape].
        sigma: the host's first sigma.
        generator: where z comes from when x carries no noise; else ``extra_args["seed"]`` + index.

    Returns:
        [B, *shape] in x's dtype, on its device.

    Raises:
        ValueError: x carries no noise and there is neither a generator nor a seed.
    """
    host = read_host(model, extra_args)
    if host.noise is not None and host.noise.shape == x.shape and bool(host.noise.any()):
        return host.noise.to(x)
    under = host.latent if host.name == "a1111" and host.latent is not None else None
    noise = x - under.to(x) if under is not None and under.shape == x.shape else x
    if host.noise is not None or not bool(noise.any()):
        return _drawn(x, extra_args.get("seed"), generator)
    wide = (1 + sigma**2) ** 0.5
    if wide < sigma * (1 + SAME_SCALE):
        return noise / sigma
    rms = noise.flatten(1).square().mean(1).sqrt()
    odd = (rms / sigma - 1).abs() > 4 / (2 * noise[0].numel()) ** 0.5
    scale = torch.where(odd & ((rms - wide).abs() < (rms - sigma).abs()), wide, sigma)
    return noise / scale.view(-1, *[1] * (x.ndim - 1))


def seeded_noise(shape, seeds) -> torch.Tensor:
    """float32 [len(seeds), *shape] on the CPU, each picture from its own generator."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def _drawn(x, seed, generator) -> torch.Tensor:
    if generator is not None:
        return draw(x, generator)
    if isinstance(seed, int):
        return seeded_noise(x.shape[1:], range(seed, seed + len(x))).to(x)
    raise ValueError("x carries no noise for the prior to start from: pass generator=, or add noise")


def draw(x, generator) -> torch.Tensor:
    """Unit noise like x from one generator, or from a list with one per picture; on the generator's device first."""
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, device=generator.device).to(x)
    generators = list(generator)
    if len(generators) != len(x):
        raise ValueError(f"{len(generators)} generators for {len(x)} pictures: give one, or one per picture")
    rows = [torch.randn(x.shape[1:], generator=one, device=one.device) for one in generators]
    return torch.stack([row.to(x.device) for row in rows]).to(x)


def _chain(model) -> list:
    """The model and what it wraps, outermost first."""
    links = [model]
    while len(links) < _CHAIN and (inner := getattr(links[-1], "inner_model", None)) is not None:
        links.append(inner)
    return links


def _is_flow(link) -> bool:
    """ComfyUI: a model_sampling built on CONST. Forge: a predictor of type 'const'."""
    sampling = getattr(link, "model_sampling", None)
    if any(base.__name__ == "CONST" for base in type(sampling).__mro__):
        return True
    predictor = link
    for name in ("p", "sd_model", "forge_objects", "unet", "model", "predictor"):
        predictor = getattr(predictor, name, None)
    return getattr(predictor, "prediction_type", None) == "const"


def _tensor(value) -> torch.Tensor | None:
    return value if isinstance(value, torch.Tensor) else None


def _picture(latent) -> torch.Tensor | None:
    """ComfyUI's empty latent is exactly zero."""
    latent = _tensor(latent)
    return latent if latent is not None and bool(latent.any()) else None
