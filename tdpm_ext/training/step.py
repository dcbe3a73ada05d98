"""One step of training: a pure function of the batch and the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from tdpm_ext.priors.learned import Start, level_like
from tdpm_ext.solver import all_weights
from tdpm_ext.training.conditions import Classes
from tdpm_ext.training.data import Batch
from tdpm_ext.training.losses import Regression, Seen, noised
from tdpm_ext.training.options import Options

STATS = ("discriminator", "prior", "real", "fake", "penalty", "regression", "denoising")


def adam(parameters: Sequence[Tensor], lr: float, betas: tuple[float, float]):
    """Adam with its state made at once, so that saving and restoring know every tensor from the start."""
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def finish(model, x: Tensor, levels: Sequence[float], cond: dict) -> Tensor:
    """The denoiser's steps down ``levels`` to 0, as `solver.solve` makes them, but with gradients."""
    levels, past = (*levels, 0.0), []
    rows = all_weights(tuple(levels), (2,) * (len(levels) - 1), (), ())
    for i, weights in enumerate(rows):
        past.insert(0, model(x, level_like(x, levels[i]), **cond))
        update = sum(weight * denoised for weight, denoised in zip(weights, past, strict=False))
        x = update + levels[i + 1] / levels[i] * x if levels[i + 1] else update
    return x


class Step:
    """Losses, gradients and updates of one batch.

    Args:
        model: the denoiser; trained too when ``options.denoising`` is above 0, else frozen.
        trained: parameters of the prior's side (and the denoiser's). average: makes gradients those of all processes.
        autocast: () -> context in which networks run. conditions: what the numbers of rows stand for.
    """

    def __init__(
        self,
        options: Options,
        model,
        prior,
        disc,
        loss,
        trained: list[Tensor],
        device: torch.device,
        average: Callable[[Sequence[Tensor]], None],
        autocast: Callable[[], AbstractContextManager],
        sigma_data: float,
        conditions: Classes,
    ):
        self.options, self.model, self.prior, self.disc, self.loss = options, model, prior, disc, loss
        self.average, self.autocast, self.sigma_data, self.device = average, autocast, sigma_data, device
        self.conditions = conditions
        self.regression = Regression(options.huber)
        self.trained = trained
        self.optimizer = adam(trained, options.lr, (0.0 if options.adversarial else 0.9, 0.99))
        self.judging = [] if disc is None else list(disc.parameters())
        self.disc_optimizer = None if disc is None else adam(self.judging, options.disc_lr, (0.0, 0.99))

    def __call__(self, batch: Batch, step: int) -> Tensor:
        """One update; returns float32 [len(STATS)], NaN where a term was not measured."""
        o, b = self.options, batch
        stats = dict.fromkeys(STATS, torch.full((), float("nan"), device=self.device))
        cond = self.conditions.args(b.labels)
        guided = cond if o.cond_scale == 1.0 else {**cond, "cond_scale": o.cond_scale}
        with self.autocast():
            start = Start(b.x, b.guess, b.past)
            emitted = self.prior.emit(start, **(guided if o.regression else cond)).float()
            final = None
            if o.finish:
                x = self.prior.lower(emitted, start, b.z, o.sigma_trunc)
                final = finish(self.model, x, o.finish, guided).float()
        total = 0.0
        if o.adversarial:
            fake = self.prior.lower(emitted, start, b.z, b.sigma) if final is None else noised(final, b.sigma, b.extra)
            real = noised(b.real, b.sigma, b.noise)
            if hasattr(self.disc, "see"):  # its features stand still: seen once, they serve both sides
                with self.autocast():
                    fake = self.disc.see(fake, b.sigma, b.labels)
                    with torch.no_grad():
                        real = self.disc.see(real, b.sigma, b.labels)
            self._judge(real, fake, b, step, stats)
            self.disc.requires_grad_(False)
            value = self.loss.generator(self.disc, real, fake, b.sigma, b.labels)
            self.disc.requires_grad_(True)
            stats["prior"] = value.detach()
            total = total + o.adversarial * value
        if o.regression:
            value = self.regression(self._prediction(emitted, final, start, b), b.target)
            stats["regression"] = value.detach()
            total = total + o.regression * value
        if o.denoising:
            value = self._denoising(b, cond)
            stats["denoising"] = value.detach()
            total = total + o.denoising * value
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * min(1.0, (step + 1) / max(1, o.warmup))
        self._update(total, self.optimizer, self.trained)
        return torch.stack([stats[name].float() for name in STATS])

    def _judge(self, real: Seen, fake: Seen, b: Batch, step: int, stats: dict) -> None:
        found = self.loss.discriminator(self.disc, real, fake, b.sigma, b.labels, step)
        self._update(found.total, self.disc_optimizer, self.judging)
        stats["discriminator"], stats["penalty"] = found.total.detach(), found.penalty
        stats["real"], stats["fake"] = found.real.mean(), found.fake.mean()

    def _prediction(self, emitted: Tensor, final: Tensor | None, start: Start, b: Batch) -> Tensor:
        if final is not None:
            return final
        if self.prior.noise == "fresh" and not self.options.kind.startswith("raw"):
            return emitted  # against the teacher's own denoised picture: its noise is not the prior's
        return self.prior.lower(emitted, start, b.z, self.options.sigma_trunc)

    def _denoising(self, b: Batch, cond: dict) -> Tensor:
        """Karras et al.'s weighted error of the denoiser (arXiv 2206.00364)."""
        with self.autocast():
            denoised = self.model(noised(b.real, b.level, b.hidden), b.level, **cond).float()
        weight = (b.level.square() + self.sigma_data**2) / (b.level * self.sigma_data).square()
        return (weight * (denoised - b.real).flatten(1).square().mean(1)).mean()

    def _update(self, value: Tensor, optimizer, parameters: list[Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.average(parameters)
        optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that an update changes, by a name that a file can hold."""
        groups = {"prior": (self.trained, self.optimizer), "disc": (self.judging, self.disc_optimizer)}
        found = {}
        for group, (parameters, optimizer) in groups.items():
            for i, parameter in enumerate(parameters):
                found[f"{group}.{i}"] = parameter.data
                found |= {f"{group}.{i}.{name}": value for name, value in optimizer.state[parameter].items()}
        return found


def mean_gradients(accelerator) -> Callable[[Sequence[Tensor]], None]:
    """Gradients averaged over processes, in one message; nothing for a single process."""

    def average(parameters: Sequence[Tensor]) -> None:
        if accelerator.num_processes == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.reshape(parameter.shape)

    return average


def scores_apart(stats: Tensor) -> float:
    """How far real scores lie above fake ones, in the units of a logit, over a window [n, len(STATS)]."""
    real, fake = (stats[:, STATS.index(name)].nanmean() for name in ("real", "fake"))
    return float(F.relu(real - fake))
