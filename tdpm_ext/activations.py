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
        sigma: noise level that the pictures are shown at, without noise: about half of the data's std.
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
        weight = next(self.model.parameters(), x)
        x = x.to(weight.device)
        extra = {k: v.expand(len(x), *v.shape[1:]) if isinstance(v, Tensor) else v for k, v in self.extra.items()}
        for _ in range(2):  # an accelerated model may run parts of its first call several times, to see what is faster
            seen = self._seen(x, extra)
            if len({len(f) for f in seen}) == 1 and len(seen[0]) in (len(x), 2 * len(x)):
                return torch.cat([f[-len(x) :] for f in seen], 1).cpu()  # of a guided batch, the half that came last
        raise ValueError("this denoiser shows no blocks with activations [B, C, H, W], one for each picture")

    def _seen(self, x: Tensor, extra: dict) -> list[Tensor]:
        """Of every block that gave activations, their means, in as many rows as it has run."""
        blocks = outer_blocks(self.model)
        found: list[list[Tensor | None]] = [[] for _ in blocks]
        hooks = [
            block.register_forward_hook(lambda module, given, out, own=own: own.append(_means(out)))
            for block, own in zip(blocks, found, strict=True)
        ]
        try:
            self.model(x, x.new_full((len(x),), self.sigma), **extra)
        finally:
            for hook in hooks:
                hook.remove()
        return [torch.cat(own) for own in found if own and all(f is not None for f in own)]


def _means(found) -> Tensor | None:
    """[B, C * GRID^2] of activations [B, C, H, W], taken at once: a fast path may use their memory again."""
    if not isinstance(found, Tensor) or found.ndim != 4:
        return None
    return F.adaptive_avg_pool2d(found.float(), GRID).flatten(1)


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
