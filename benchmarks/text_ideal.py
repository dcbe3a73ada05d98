"""The ideal denoiser of captioned pictures: exact, no network, so that only a sampler's own errors remain.

The data are N pictures with weights that depend on the prompt: w_i(e) ~ exp(sharpness * cos(e, e_i)). The posterior
mean is then a softmax over all pictures, as in ``tdpm_ext.ideal``, with these log weights added. What it draws are
pictures of the set, by how near their captions are: a test of samplers and priors, not a model that invents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHARPNESS = 20.0  # the weights of a held-out caption are worth nine pictures (median of 1 over their sum of squares)


class TextIdealDenoiser(nn.Module):
    """``model(x, sigma, text_pooled=None, cond_scale=1.0) -> denoised`` over pictures [N, ...], embeddings [N, D]."""

    def __init__(self, pictures: Tensor, pooled: Tensor, sharpness: float = SHARPNESS):
        super().__init__()
        if len(pictures) != len(pooled) or pooled.ndim != 2:
            raise ValueError(f"{len(pictures)} pictures and embeddings {list(pooled.shape)}: give [N, ...] and [N, D]")
        flat = pictures.reshape(len(pictures), -1).float()
        self.shape, self.sharpness = tuple(pictures.shape[1:]), sharpness
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("data", flat - flat.mean(0))
        self.register_buffer("half_norms", 0.5 * (flat - flat.mean(0)).square().sum(1))
        self.register_buffer("centre", pooled.float().mean(0))
        self.register_buffer("pooled", F.normalize(pooled.float() - self.centre, dim=1))

    def forward(self, x: Tensor, sigma: Tensor, text_pooled: Tensor | None = None, cond_scale: float = 1.0) -> Tensor:
        """x [B, ...], sigma a number or [B] -> denoised; guidance: away + cond_scale * (towards - away)."""
        y = x.reshape(len(x), -1).float() - self.mean
        scale = torch.as_tensor(sigma, device=x.device).float().reshape(-1, 1).square().reciprocal()
        logits = torch.addmm(-self.half_norms, y, self.data.T) * scale
        if text_pooled is None:
            out = logits.softmax(1) @ self.data
        else:
            likeness = F.normalize(text_pooled.float() - self.centre, dim=1) @ self.pooled.T
            out = (logits + self.sharpness * likeness).softmax(1) @ self.data
            if cond_scale != 1.0:
                away = logits.softmax(1) @ self.data
                out = away + cond_scale * (out - away)
        return (out + self.mean).reshape(x.shape).to(x.dtype)
