"""What a step looks at, as a function of (seed, step) alone: pictures, noise and levels of the whole batch.

An interrupted run, an uninterrupted one, and one that is spread over several processes therefore see the same numbers.
Steps are drawn in blocks, because a closed-form base moves a thousand rows in hardly more time than ten.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tdpm_ext.pictures import to_unit
from tdpm_ext.training.conditions import Captions, Classes
from tdpm_ext.training.options import Options
from tdpm_ext.training.teacher import Teacher

BLOCK_ROWS = 4096
KEPT_ON_DEVICE = 0.25  # share of a GPU's memory that pictures may take


class Batch(NamedTuple):
    """Rows of one step. ``labels`` int64 [B] or None; the rest [B, ...], None where it is not used.

    ``real`` clean pictures; ``x``, ``guess``, ``past`` the prior's `Start`; ``z`` its unit noise; ``sigma`` [B]
    levels of comparison; ``noise`` for the reals, ``extra`` for finished fakes; ``target`` what regression aims at;
    ``level`` [B] and ``hidden`` (noise) for the denoising loss.
    """

    labels: Tensor | None
    real: Tensor | None
    x: Tensor
    guess: Tensor | None
    past: Tensor | None
    z: Tensor
    sigma: Tensor
    noise: Tensor
    extra: Tensor
    target: Tensor | None
    level: Tensor | None
    hidden: Tensor | None

    def rows(self, span: slice) -> Batch:
        return Batch(*(None if value is None else value[span] for value in self))


class Data:
    """Pictures and teacher on the device, and the batch of any step.

    Args:
        images: uint8 [N, *shape] or float in [-1, 1]; None: the teacher's finished pictures take their place.
        labels: int64 [N] or None; with captions the number of each picture's own. conditions: what they stand for.
    """

    def __init__(
        self, options: Options, prior, device, images: Tensor | None, labels: Tensor | None, teacher: Teacher | None,
        conditions: Classes,
    ):  # fmt: skip
        self.options, self.prior, self.device, self.teacher = options, prior, device, teacher
        self.conditions = conditions
        if images is None and teacher is not None:
            images, labels = teacher.final, teacher.labels
        if images is None and (options.adversarial or options.denoising):
            raise ValueError("no pictures to learn from: give data, or teacher trajectories to take their place")
        if conditions.count and images is not None and labels is None:
            raise ValueError(
                f"the denoiser takes {conditions.count} labels, the pictures have none: put them into folders"
            )
        if images is not None and len(images) < 2:
            raise ValueError(f"{len(images)} pictures are too few to learn from")
        self.images = images if images is None or not _fits(images, device) else images.to(device)
        self.labels = None if labels is None else labels.to(device)
        self.block = max(1, BLOCK_ROWS // options.batch) if device.type == "cuda" else 1
        self._drawn: tuple[int, list[Batch]] = (-1, [])

    def batch(self, step: int) -> Batch:
        """The whole batch of ``step``, whatever process asks."""
        block, at = divmod(step, self.block)
        if self._drawn[0] != block:
            self._drawn = (block, self._draw(block))
        return self._drawn[1][at]

    def _draw(self, block: int) -> list[Batch]:
        o, rows = self.options, self.block * self.options.batch
        random = torch.Generator(self.device).manual_seed(o.seed * 1_000_000_007 + block)
        draw = {"generator": random, "device": self.device}
        shape = (rows, *self.prior.shape)
        labels = real = target = level = hidden = None
        if self.images is not None:
            index = torch.randint(len(self.images), (rows,), **draw)
            real = self._pictures(index)
            labels = self.labels[index] if self.conditions.count else None
        z = torch.randn(shape, **draw)
        if self.teacher is not None and o.regression:
            index = torch.randint(len(self.teacher.z), (rows,), **draw)
            if real is not None and self.conditions.count:
                real = self._partners(real, labels, index)
            z, labels, target = self.teacher.z[index], self.teacher.labels, self.teacher.target[index]
            labels = None if labels is None else labels[index]
        elif labels is not None and o.label_dropout:
            dropped = torch.rand(rows, **draw) < o.label_dropout
            labels = torch.where(dropped, self.conditions.count, labels)
        if o.denoising:
            level, hidden = self._denoising_levels(rows, draw), torch.randn(shape, **draw)
        cond = self.conditions.args(labels)
        start = self.prior.begin(z, **cond)
        low, high = o.levels
        sigma = low * torch.exp(torch.rand(rows, **draw) * math.log(high / low))
        noise, extra = torch.randn(shape, **draw), torch.randn(shape, **draw)
        whole = Batch(labels, real, *start, z, sigma, noise, extra, target, level, hidden)
        return [whole.rows(slice(k * o.batch, (k + 1) * o.batch)) for k in range(self.block)]

    def _pictures(self, index: Tensor) -> Tensor:
        some = self.images[index.to(self.images.device)].to(self.device)
        return to_unit(some) if some.dtype == torch.uint8 else some

    def _partners(self, real: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """A real partner for every trajectory: its caption's own picture, or one of its class (the pictures in another
        order, where that class was drawn at all)."""
        wanted = self.teacher.labels[index]
        if isinstance(self.conditions, Captions):  # the teacher's finished pictures lie in the order of its rows
            return self._pictures(index if self.images is self.teacher.final else wanted)
        order, places = labels.argsort(stable=True), labels.sort()[0].contiguous()
        first = torch.searchsorted(places, wanted.contiguous())
        count = torch.searchsorted(places, wanted.contiguous(), right=True) - first
        turn = torch.arange(len(wanted), device=wanted.device) % count.clamp_min(1)
        return real[order[(first + turn).clamp_max(len(order) - 1)]]

    def _denoising_levels(self, rows: int, draw: dict) -> Tensor:
        """Levels for the denoising loss: lognormal, and whatever lies above ``sigma_trunc`` is trained at it."""
        level = torch.exp(torch.randn(rows, **draw) * 1.3 - 0.8)
        return level.clamp_max(self.options.sigma_trunc)


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    memory = torch.cuda.get_device_properties(device).total_memory
    return images.numel() * images.element_size() < KEPT_ON_DEVICE * memory
