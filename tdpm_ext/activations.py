"""What a denoiser itself sees in pictures: the activations of its blocks, as features to compare pictures by.

They know what the checkpoint was trained on, cost one evaluation, and need no weights of others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRID = 2  # cells per side in which activations are averaged
WIDEST = 1024  # features; more are mixed down to so many


def outer_blocks(model: nn.Module) -> list[nn.Module]:
    """The entries of the outermost ``ModuleList``s: what networks call their blocks or levels."""
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [block for child in model.children() for block in outer_blocks(child)]


class Activations:
    """Pictures [B, C, H, W] -> features [B, F]: means of the blocks' activations on a coarse grid.

    Args:
        model: ``model(x, sigma, **extra) -> denoised``, a module with blocks.
        sigma: noise level that the pictures are shown at, without noise: about a fifth of the data's std.
        extra: conditions, one row each ([1, ...]), the same for every picture.
        batch: pictures a call. seed: of the mixing matrix of a wide network.
    """

    def __init__(self, model: nn.Module, sigma: float, extra: dict | None = None, *, batch: int = 64, seed: int = 0):
        self.model, self.sigma, self.extra, self.batch, self.seed = model, sigma, extra or {}, batch, seed
        self.mix: Tensor | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Features on the CPU, float32. Raises ValueError where the model shows no activations of these pictures."""
        out = torch.cat([self._of(part) for part in x.split(self.batch)])
        if out.shape[1] > WIDEST and self.mix is None:
            generator = torch.Generator().manual_seed(self.seed)
            self.mix = torch.randn(out.shape[1], WIDEST, generator=generator) / out.shape[1] ** 0.5
        return out if self.mix is None else out @ self.mix

    def _of(self, x: Tensor) -> Tensor:
        blocks = outer_blocks(self.model)
        seen: list[list[Tensor]] = [[] for _ in blocks]
        hooks = [
            block.register_forward_hook(lambda module, given, found, own=own: own.append(found))
            for block, own in zip(blocks, seen, strict=True)
        ]
        try:
            weight = next(self.model.parameters(), x)
            x = x.to(weight.device)
            extra = {k: v.expand(len(x), *v.shape[1:]) if isinstance(v, Tensor) else v for k, v in self.extra.items()}
            self.model(x, x.new_full((len(x),), self.sigma), **extra)
        finally:
            for hook in hooks:
                hook.remove()
        # An accelerated model may run a batch in parts, or more than once to see what is faster, and guidance doubles
        # it: whatever came last are these pictures.
        known = (own for own in seen if own and all(isinstance(f, Tensor) and f.ndim == 4 for f in own))
        maps = [f[-len(x) :].float() for f in map(torch.cat, known) if len(f) >= len(x)]
        if not maps:
            raise ValueError("this denoiser shows no blocks with activations [B, C, H, W]")
        return torch.cat([F.adaptive_avg_pool2d(f, GRID).flatten(1) for f in maps], 1).cpu()


def activations_of(
    model: Callable, sigma: float, shape: tuple[int, ...], extra: dict, **settings
) -> Activations | None:
    """`Activations` of a model that shows any, else None: closed forms, graphs that run without their modules."""
    if not isinstance(model, nn.Module) or len(shape) != 3 or not outer_blocks(model):
        return None
    found = Activations(model, sigma, extra, **settings)
    try:
        found(torch.zeros(1, *shape))
    except (ValueError, TypeError):  # no activations; or it cannot be called without what was left out of extra
        return None
    return found
