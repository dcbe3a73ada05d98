"""What rows are conditioned on: class labels, or captions. Either way a row carries one whole number.

Data, teacher, losses and discriminators pass these numbers on; only here do they become the denoiser's arguments.
``count`` itself stands for "nothing given", so that dropping a condition is the same for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdpm_ext.checkpoints import fingerprint_tensors
from tdpm_ext.text import Text, no_text
from tdpm_ext.text_denoiser import joined, text_args


class Classes:
    """Labels 0 .. count - 1, or none at all (count 0)."""

    width = 0  # of embeddings: there are none
    argument = "class_cond"

    def __init__(self, count: int):
        self.count = count

    def numbers(self, first: int, rows: int, device) -> Tensor | None:
        """The labels of rows ``first`` and on, all classes in turn; None where there are none."""
        return torch.arange(first, first + rows, device=device) % self.count if self.count else None

    def args(self, labels: Tensor | None) -> dict[str, Tensor]:
        """What the denoiser takes for labels int64 [B]."""
        return {} if labels is None else {"class_cond": labels}

    def seen(self, labels: Tensor | None) -> Tensor | None:
        """What a discriminator's own layers see of the condition: labels [B], or embeddings [B, width]."""
        return labels

    def facts(self) -> dict:
        return {"num_classes": self.count}


class Captions(Classes):
    """Encoded captions [N]: number i is the i-th, N is no caption."""

    argument = "text_pooled"

    def __init__(self, text: Text, device: torch.device | str = "cpu"):
        super().__init__(len(text))
        self.width = text.pooled.shape[1]
        self.digest = fingerprint_tensors(text_args(text))[:16]
        self.text = joined(text, no_text(1, self.width)).to(device)

    def args(self, labels: Tensor | None) -> dict[str, Tensor]:
        return {} if labels is None else text_args(self.text.take(labels))

    def seen(self, labels: Tensor | None) -> Tensor | None:
        return None if labels is None else self.text.pooled[labels]

    def facts(self) -> dict:
        return {"captions": self.count, "text": self.digest}
