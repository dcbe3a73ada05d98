"""Latent pictures: any auto-encoder with ``encode`` and ``decode``, and its scaling factor, behind one interface.

space = LatentSpace(vae)                        # this package's, diffusers' AutoencoderKL, TAESD, ...
latents = space.encode(pictures)                # what the denoiser and its priors see: fit_prior("lowrank", latents)
pictures = space.decode(tdpm.sample(model, prior, steps=4))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm


class LatentSpace:
    """Scaled latents of an auto-encoder, in batches.

    Args:
        autoencoder: ``encode(pictures)`` gives a tensor, or what diffusers gives (``latent_dist``, of which the mean
            is taken, or ``latents``); ``decode(latents)`` a tensor or an object with ``sample``.
        scaling_factor: latents times this have a standard deviation of about 1. None reads it from
            ``autoencoder.config.scaling_factor`` or ``autoencoder.scaling_factor``.
        shift_factor: subtracted before scaling; None reads it in the same way, 0 where there is none.
        batch: pictures at a time.

    Raises:
        ValueError: no scaling factor is given or found, or it is not a positive number.
        TypeError: no ``encode`` or no ``decode``.
    """

    def __init__(
        self, autoencoder, scaling_factor: float | None = None, shift_factor: float | None = None, batch: int = 64
    ):
        for name in ("encode", "decode"):
            if not callable(getattr(autoencoder, name, None)):
                raise TypeError(f"{type(autoencoder).__name__} has no {name}(): it is not an auto-encoder")
        self.autoencoder, self.batch = autoencoder, batch
        found = _setting(autoencoder, "scaling_factor") if scaling_factor is None else scaling_factor
        if found is None:
            raise ValueError(
                f"{type(autoencoder).__name__} does not say its scaling factor: give scaling_factor=, 1 over the "
                "standard deviation of its latents"
            )
        if not isinstance(found, int | float) or not 0 < found < math.inf:
            raise ValueError(f"scaling_factor is {found!r}; it must be a positive, finite number")
        self.scaling_factor = float(found)
        shift = _setting(autoencoder, "shift_factor") if shift_factor is None else shift_factor
        self.shift_factor = float(shift or 0.0)

    def encode(self, pictures: Tensor, progress: bool = False) -> Tensor:
        """Pictures float [N, C, H, W] in [-1, 1] -> scaled latents float32 [N, c, h, w] on the pictures' device."""
        if not pictures.is_floating_point():
            raise ValueError(f"encode takes float pictures in [-1, 1], not {pictures.dtype}: apply to_unit first")

        def one(part: Tensor) -> Tensor:
            return (_latents(self.autoencoder.encode(part)).float() - self.shift_factor) * self.scaling_factor

        return self._batched(one, pictures, "encode", progress)

    def decode(self, latents: Tensor, progress: bool = False) -> Tensor:
        """Scaled latents [N, c, h, w] -> pictures float32 [N, C, H, W], clamped to [-1, 1], on the latents' device."""

        def one(part: Tensor) -> Tensor:
            out = self.autoencoder.decode(part / self.scaling_factor + self.shift_factor)
            return _first(out, "sample").float().clamp(-1, 1)

        return self._batched(one, latents, "decode", progress)

    @torch.no_grad()
    def _batched(self, function, data: Tensor, verb: str, progress: bool) -> Tensor:
        like = next(self.autoencoder.parameters(), data) if isinstance(self.autoencoder, nn.Module) else data
        if not len(data):
            raise ValueError(f"nothing to {verb}: the batch is empty")
        parts = tqdm(data.split(self.batch), desc=verb, disable=not progress, unit="batch")
        return torch.cat([function(part.to(like.device, like.dtype)).to(data.device) for part in parts])


def _setting(autoencoder, name: str):
    """A setting from the config where it has it (None included: diffusers warns of the other way), or an attribute."""
    config = getattr(autoencoder, "config", None)
    if isinstance(config, dict):
        return config[name] if name in config else getattr(autoencoder, name, None)
    return getattr(config, name) if hasattr(config, name) else getattr(autoencoder, name, None)


def _latents(encoded) -> Tensor:
    distribution = getattr(encoded, "latent_dist", None)
    if distribution is not None:
        return distribution.mean
    return _first(encoded, "latents")


def _first(out, name: str) -> Tensor:
    """The tensor itself, the attribute ``name``, or the first of a tuple: the ways in which models return one."""
    if isinstance(out, Tensor):
        return out
    found = getattr(out, name, None)
    found = out[0] if found is None and isinstance(out, tuple | list) and out else found
    if not isinstance(found, Tensor):
        raise TypeError(f"the auto-encoder returned {type(out).__name__}, neither a tensor nor one with .{name}")
    return found
