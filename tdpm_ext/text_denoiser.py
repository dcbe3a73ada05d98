"""A k-diffusion U-Net with cross-attention, called with encoded prompts and guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdpm_ext.text import Text, no_text

if TYPE_CHECKING:
    from tdpm_ext.checkpoints import Checkpoint


class TextDenoiser(nn.Module):
    """``model(x, sigma, text_states=..., text_padding=..., text_pooled=..., cond_scale=4.0) -> denoised``.

    Takes a checkpoint whose U-Net attends to token states (``cross_cond_dim``) and, where it has ``mapping_cond_dim``,
    sees the pooled vector too. Without text it is unconditional: one zero state, as captions were dropped in training.
    ``dim`` is the width of the embeddings, ``shape`` that of one latent, ``styles`` the style phrases it knows.
    """

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        model = checkpoint.config["model"]
        self.dim = int(model.get("cross_cond_dim") or 0)
        self.pooled_dim = int(model.get("mapping_cond_dim") or 0)
        if not self.dim or self.pooled_dim not in (0, self.dim):
            raise ValueError(
                "this checkpoint takes no prompts: its network has no cross-attention to text"
                if not self.dim
                else f"this checkpoint's token states are {self.dim} wide, its pooled vector {self.pooled_dim}: "
                "prompts are encoded to one width"
            )
        self.model = checkpoint.model
        self.shape = checkpoint.shape

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        text_states: Tensor | None = None,
        text_padding: Tensor | None = None,
        text_pooled: Tensor | None = None,
        cond_scale: float = 1.0,
        negative_states: Tensor | None = None,
        negative_padding: Tensor | None = None,
        negative_pooled: Tensor | None = None,
    ) -> Tensor:
        """Denoised latents [B, C, H, W] in x's dtype.

        Args:
            x: data + sigma * noise. sigma: noise std, [B] or a number.
            text_states [B, L, D], text_padding [B, L] (1 where there is no token), text_pooled [B, D]: see `Text`.
            cond_scale: guidance, away + cond_scale * (towards - away), in one doubled batch. 1 = none.
            negative_*: a prompt to guide away from, instead of from no prompt.

        Raises:
            ValueError: embeddings of another width or count, or guidance without a prompt.
        """
        batch = len(x)
        if text_states is None:
            if cond_scale != 1.0:
                raise ValueError(f"cond_scale={cond_scale:g} guides towards a prompt: give text_states and the like")
            return self._denoise(x, sigma, no_text(batch, self.dim).to(x.device))
        text = Text(text_states, text_padding, text_pooled)
        self._check(text, batch, "text")
        if cond_scale == 1.0:
            return self._denoise(x, sigma, text)
        away = no_text(batch, self.dim).to(x.device)
        if negative_states is not None:
            away = Text(negative_states, negative_padding, negative_pooled)
            self._check(away, batch, "negative")
        sigma = torch.as_tensor(sigma, device=x.device).expand(batch)
        both = self._denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), joined(away, text))
        away, towards = both.chunk(2)
        return away + cond_scale * (towards - away)

    def _denoise(self, x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        pooled = {"mapping_cond": text.pooled} if self.pooled_dim else {}
        return self.model(x, sigma, cross_cond=text.states, cross_cond_padding=text.padding, **pooled)

    def _check(self, text: Text, batch: int, name: str) -> None:
        parts = {"states": (text.states, 3), "padding": (text.padding, 2), "pooled": (text.pooled, 2)}
        for part, (tensor, dims) in parts.items():
            if not isinstance(tensor, Tensor) or tensor.ndim != dims or len(tensor) != batch:
                given = list(tensor.shape) if isinstance(tensor, Tensor) else tensor
                raise ValueError(f"{name}_{part} is {given}; one row per picture is needed, {batch} in all")
        width = (text.states.shape[2], text.pooled.shape[1])
        if width != (self.dim, self.dim):
            raise ValueError(
                f"the prompts' embeddings are {width[0]} and {width[1]} wide, this checkpoint was trained with "
                f"{self.dim}: use its own text encoder"
            )


def joined(first: Text, second: Text) -> Text:
    """Two batches of prompts as one, the shorter padded."""
    longest = max(first.states.shape[1], second.states.shape[1])

    def padded(text: Text) -> tuple[Tensor, Tensor]:
        more = longest - text.states.shape[1]
        return F.pad(text.states, (0, 0, 0, more)), F.pad(text.padding, (0, more), value=1.0)

    (states, padding), (states2, padding2) = padded(first), padded(second)
    pooled = torch.cat([first.pooled, second.pooled.to(first.pooled)])
    return Text(torch.cat([states, states2.to(states)]), torch.cat([padding, padding2.to(padding)]), pooled)


def text_args(text: Text, negative: Text | None = None) -> dict[str, Tensor]:
    """`Text` as the keyword arguments of a `TextDenoiser`, for a sampler's ``extra_args``."""
    found = {"text_states": text.states, "text_padding": text.padding, "text_pooled": text.pooled}
    if negative is not None:
        found |= {
            "negative_states": negative.states, "negative_padding": negative.padding, "negative_pooled": negative.pooled
        }  # fmt: skip
    return found
