"""What a training run is: one value, checked once, kept as JSON beside the run so that it resumes as it began."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tdpm_ext.priors.learned import NOISES
from tdpm_ext.training.losses import LOSSES

KINDS = ("shared", "generator", "raw-shared", "raw-generator")
CRITICS = ("features", "own")


@dataclass(frozen=True)
class Options:
    """Everything that decides which weights come out. Levels are noise std in data units.

    Attributes:
        kind: one of ``KINDS``. rank: of a LoRA for the shared kinds; 0: all weights.
        width, depth: of a generator.
        adversarial: weight of the adversarial loss. loss: which one. gamma, every: of its penalty.
        regression: weight of the distance to the checkpoint's own trajectories. huber: see `losses.Regression`.
        denoising: weight of the denoising loss: above 0, the denoiser itself is trained too (joint training).
        sigma_init: level of the prior's call. sigma_trunc: where the chain is cut.
        sigma_low, sigma_high: range of noise levels at which pictures are compared (a raw prior: sigma_trunc alone).
        noise: what the prior adds on the way down, "fresh" or "kept".
        finish: levels of denoiser steps below ``sigma_trunc`` that the losses look through; (): none, the losses
            compare at noise levels right behind the prior. (sigma_trunc,): one step to the end.
        batch: pictures per step, over all processes.
        lr, disc_lr, ema: of prior and discriminator; ``ema`` is the largest decay of the weights' running mean.
        warmup: steps in which the prior's rate rises to ``lr``: a new discriminator has nothing to teach at first.
        critic: "features": heads on the frozen denoiser's activations; "own": a network of its own.
        disc_width: channels of the discriminator.
        label_dropout: share of rows without their label, so that guidance works.
        cond_scale: guidance of the frozen denoiser, the teacher and a prior trained by regression.
        teacher: trajectories drawn from the checkpoint; 0: none. teacher_steps: evaluations of each.
        seed: everything random follows from it and the step.
    """

    kind: str = "shared"
    rank: int = 0
    width: int = 48
    depth: int = 3
    adversarial: float = 1.0
    loss: str = "relativistic"
    gamma: float = 0.1
    every: int = 8
    regression: float = 0.0
    huber: float = 0.0
    denoising: float = 0.0
    sigma_init: float = 1.0
    sigma_trunc: float = 0.2
    sigma_low: float = 0.1
    sigma_high: float = 0.4
    noise: str = "fresh"
    finish: tuple[float, ...] = ()
    batch: int = 64
    lr: float = 2e-4
    disc_lr: float = 4e-4
    warmup: int = 100
    ema: float = 0.998
    critic: str = "features"
    disc_width: int = 48
    label_dropout: float = 0.1
    cond_scale: float = 1.0
    teacher: int = 0
    teacher_steps: int = 40
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "finish", tuple(float(s) for s in self.finish))
        choices = {"kind": KINDS, "loss": LOSSES, "noise": NOISES, "critic": CRITICS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(known)}")
        for name in ("width", "depth", "every", "batch", "disc_width", "teacher_steps"):
            self._whole(name, 1)
        for name in ("rank", "teacher", "warmup"):
            self._whole(name, 0)
        for name in ("sigma_init", "sigma_trunc", "sigma_low", "sigma_high", "lr", "disc_lr"):
            self._number(name, above=True)
        for name in ("adversarial", "regression", "denoising", "gamma", "huber"):
            self._number(name, above=False)
        for name in ("ema", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a share from 0 up to, not including, 1")
        self._check_together()

    def _check_together(self) -> None:
        if not self.adversarial and not self.regression:
            raise ValueError("nothing trains the prior: give adversarial or regression a weight above 0")
        if self.regression and not self.teacher:
            raise ValueError("regression needs the checkpoint's own trajectories: set teacher, 2048 or more")
        if self.regression and self.denoising:
            raise ValueError("regression follows a denoiser that stands still: train it jointly, or leave it out")
        if self.denoising and self.critic == "features":
            raise ValueError(
                "critic 'features' needs a denoiser that stands still: with denoising, set critic to 'own'"
            )
        if not self.sigma_trunc <= self.sigma_init:
            raise ValueError(f"sigma_trunc {self.sigma_trunc:g} above sigma_init {self.sigma_init:g}: let it be lower")
        if not self.sigma_low <= self.sigma_high:
            raise ValueError(f"sigma_low {self.sigma_low:g} above sigma_high {self.sigma_high:g}")
        falling = (*self.finish, 0.0)
        if any(a <= b for a, b in zip(falling, falling[1:], strict=False)):
            raise ValueError(f"finish {self.finish}: noise levels of denoiser steps, falling, all above 0")
        if self.finish and self.finish[0] != self.sigma_trunc:
            raise ValueError(f"finish begins at {self.finish[0]:g}: let it begin at sigma_trunc {self.sigma_trunc:g}")
        if self.rank and not self.kind.endswith("shared"):
            raise ValueError(f"rank {self.rank} is for a LoRA of the denoiser (kind shared), not for a {self.kind}")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")

    def _number(self, name: str, above: bool) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < 0 or (above and value == 0):
            raise ValueError(f"{name} is {value!r}: give a finite number {'above' if above else 'of at least'} 0")

    @property
    def levels(self) -> tuple[float, float]:
        """The range of noise levels at which pictures are compared."""
        if self.kind.startswith("raw") and not self.finish:
            return self.sigma_trunc, self.sigma_trunc
        return self.sigma_low, self.sigma_high

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def differs_from(self, path: Path) -> list[str]:
        """Settings that are not as in the file ``to_json`` wrote, as "name: there, here"."""
        there = json.loads(path.read_text(encoding="utf-8"))
        here = json.loads(self.to_json())
        names = [f.name for f in fields(self)]
        return [f"{n}: {there.get(n)!r} there, {here[n]!r} here" for n in names if there.get(n) != here[n]]
