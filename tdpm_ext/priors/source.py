"""`source`: any few-step model that is already there makes the clean picture; nothing is trained.

A Turbo, LCM or distilled denoiser, a GAN: whatever answers ``model(x, sigma, **cond)`` with a clean picture in the base
model's units. Its picture is noised to ``sigma_trunc``, and the base model's own steps end the chain.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdpm_ext.priors.learned import LearnedPrior, Start, level_like
from tdpm_ext.priors.registry import register_prior


@register_prior("source")
class SourcePrior(LearnedPrior):
    """One call of a borrowed model at ``sigma_init``. The file names the levels; `bind` brings the model.

    >>> prior = SourcePrior((4, 64, 64), sigma_trunc=0.9, sigma_init=14.6).bind(turbo)      # doctest: +SKIP
    >>> prior = SourcePrior((3, 32, 32), 0.3, 1.0).bind(lambda z, sigma, **cond: gan(z))    # doctest: +SKIP
    """

    def __init__(self, shape, sigma_trunc, sigma_init, **options):
        super().__init__(shape, sigma_trunc, sigma_init, **options)
        self.source: Callable[..., Tensor] | None = None

    @property
    def ready(self) -> bool:
        return self.source is not None

    def bind(self, model: Callable[..., Tensor], checkpoint: str | None = None) -> SourcePrior:
        """``model(x, sigma, **cond) -> clean picture`` is called once: x [B, *shape] at ``sigma_init``, sigma [B]."""
        super().bind(model, checkpoint)
        if not callable(model):
            raise ValueError(f"the source is {type(model).__name__}: give a callable model(x, sigma, **cond)")
        self.source = model
        return self

    def emit(self, start: Start, **cond) -> Tensor:
        picture = self.source(start.x, level_like(start.x, self.sigma_init), **cond)
        if not isinstance(picture, torch.Tensor) or picture.shape != start.x.shape:
            found = tuple(picture.shape) if isinstance(picture, torch.Tensor) else type(picture).__name__
            raise ValueError(f"the source gave {found} for pictures {tuple(start.x.shape)}: one clean picture per row")
        return picture

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict) -> SourcePrior:
        options, weights = cls.settings(tensors, config)
        if weights:
            raise ValueError(f"a source prior holds no weights, and this one has {len(weights)} tensors of them")
        return cls(**options)
