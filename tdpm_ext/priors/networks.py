"""Small networks for learned priors: a condition's embedding, a generator, and low-rank changes to a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conditioning(nn.Module):
    """Noise level and condition -> one vector of ``width``.

    Args:
        num_classes: labels 0 .. num_classes - 1; ``num_classes`` itself stands for "no label".
        cond_width: of an embedding [B, cond_width] (of a text, say) in place of labels. Both 0: no condition.
    """

    def __init__(self, num_classes: int, cond_width: int, width: int):
        super().__init__()
        if num_classes and cond_width:
            raise ValueError(f"num_classes {num_classes} and cond_width {cond_width}: give one of the two")
        self.num_classes, self.cond_width = num_classes, cond_width
        self.level = nn.Linear(8, width)
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.vector = nn.Linear(cond_width, width) if cond_width else None
        self.mix = nn.Linear(width, width)
        self.register_buffer("octaves", 2.0 ** torch.arange(4) * 0.5, persistent=False)

    def forward(self, sigma: Tensor, cond: Tensor | None) -> Tensor:
        """sigma [B], cond int64 [B] or float [B, cond_width] or None -> [B, width]."""
        angles = sigma.log()[:, None] * self.octaves
        h = self.level(torch.cat([angles.sin(), angles.cos()], 1))
        if self.labels is not None:
            missing = torch.full(sigma.shape, self.num_classes, dtype=torch.long, device=sigma.device)
            h = h + self.labels(missing if cond is None else cond)
        elif self.vector is not None and cond is not None:
            h = h + self.vector(cond)
        return F.silu(self.mix(F.silu(h)))
