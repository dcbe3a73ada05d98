"""Is the training well? Distance and coverage of a fixed set of seeds, and what the numbers say in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdpm_ext.distance import FeatureDistance
from tdpm_ext.pictures import spread_over
from tdpm_ext.sampler import sample
from tdpm_ext.training.conditions import Classes
from tdpm_ext.training.options import Options

SEEDS = 60_000_000  # of the pictures that are watched
NEIGHBOURS = 5
FALLING = 0.85  # share of the best coverage below which a warning is due
LOST = 0.5  # share of the best coverage that, seen twice running, ends a run
SATURATED = 12.0  # logits between real and fake: what reaches the prior from there on is noise


def coverage(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Share of real rows [N, D] with a fake row [M, D] nearer than their own ``neighbours``-th real neighbour.

    Naeem et al. 2020 (arXiv 2002.09797). A prior that drops a mode shows here before any distance tells.
    """
    if len(real) <= neighbours:
        raise ValueError(f"{len(real)} real rows: coverage with {neighbours} neighbours needs more")
    radii = torch.cdist(real, real).kthvalue(neighbours + 1, dim=1).values
    return float((torch.cdist(real, fake).min(1).values <= radii).double().mean())


@dataclass
class Health:
    """What was seen so far, and the verdicts drawn from it; goes into the saved state as it is.

    Attributes:
        best_distance, best_coverage: of all checks. low: checks running with a coverage that counts as lost.
        saturated: windows running with a saturated discriminator.
    """

    best_distance: float = math.inf
    best_coverage: float = 0.0
    low: int = 0
    saturated: int = 0
    said: list[str] = field(default_factory=list)

    def see_check(self, distance: float, covered: float) -> tuple[bool, str | None, bool]:
        """(is this the best so far, a warning or None, is the prior lost)."""
        best = distance < self.best_distance
        self.best_distance = min(distance, self.best_distance)
        self.best_coverage = max(covered, self.best_coverage)
        self.low = self.low + 1 if covered < LOST * self.best_coverage else 0
        if self.low >= 2:
            text = f"the prior collapsed: coverage {covered:.2f}, after {self.best_coverage:.2f} at its best"
            return best, text, True
        if covered < FALLING * self.best_coverage:
            return best, f"coverage fell to {covered:.2f} from {self.best_coverage:.2f}: modes are being dropped", False
        return best, None, False

    def see_scores(self, apart: float) -> str | None:
        """A warning once the discriminator has been saturated for three windows running."""
        self.saturated = self.saturated + 1 if apart > SATURATED else 0
        if self.saturated != 3:
            return None
        return (
            f"the discriminator tells real from fake by {apart:.0f} logits: it is saturated, and the prior learns "
            "little from it; a larger gamma or a smaller disc_lr keeps them in balance"
        )


class Watch:
    """Draws the same seeds again and again and compares them with pictures.

    Args:
        images: real pictures, uint8 or float [N, *shape]; at most ``count`` of them, spread evenly, give coverage.
    """

    def __init__(self, options: Options, images: Tensor, count: int, conditions: Classes, device: torch.device):
        self.options, self.count, self.device = options, count, device
        self.distance = FeatureDistance(images)
        some = images[spread_over(len(images), count)]
        self.bounded = some.dtype == torch.uint8  # latents are not
        some = some.float() / 127.5 - 1 if self.bounded else some
        self.real = self.distance.project(some)
        self.extra = conditions.args(conditions.numbers(0, count, device))
        if options.cond_scale != 1.0:
            self.extra["cond_scale"] = options.cond_scale

    def look(self, model, prior) -> tuple[float, float, Tensor]:
        """(distance, coverage, pictures [count, *shape]) of the prior followed by the run's own denoiser steps."""
        steps = prior.prior_nfe + max(1, len(self.options.finish))
        seeds = list(range(SEEDS, SEEDS + self.count))
        settings = {"sigma_trunc": self.options.sigma_trunc, "batch": 256, "device": self.device, "disable": True}
        pictures = sample(model, prior, steps=steps, seed=seeds, extra_args=self.extra, **settings)
        pictures = pictures.clamp(-1, 1) if self.bounded else pictures
        found = self.distance.project(pictures)
        return self.distance(pictures), coverage(self.real, found), pictures
