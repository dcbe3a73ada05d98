"""What a learned prior is trained on: four losses behind two calls, ``discriminator(...)`` and ``generator(...)``.

Adversarial losses compare noised pictures: ``real`` and ``fake`` are [B, ...] at noise levels ``sigma`` [B], both
noised alike by the caller, and ``disc(x, sigma, cond) -> [B]`` scores them (or, both alike, lists of features that
``disc.see`` made of them, which ``disc.judge`` scores). Nothing here draws a random number or owns
an optimizer, and every mean is over rows, so that the gradient over a batch is the mean of those over its halves
(`ConditionalTransport` excepted: it compares every row with every other).

    loss = Relativistic(gamma=0.1)
    loss.discriminator(disc, real, fake, sigma, cond, step).total.backward()
    loss.generator(disc, real, fake, sigma, cond).backward()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Seen = Tensor | list[Tensor]  # pictures, or what a discriminator on fixed features has `see`n of them
LOSSES = ("relativistic", "non_saturating", "transport")


class DiscriminatorLoss(NamedTuple):
    """``total`` to minimise; the scores [B] of real and fake pictures; the mean squared gradient norm (NaN: not
    measured at this step)."""

    total: Tensor
    real: Tensor
    fake: Tensor
    penalty: Tensor


def noised(clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """clean [B, ...] + sigma [B] * noise [B, ...]."""
    return clean + sigma.reshape(-1, *[1] * (clean.ndim - 1)) * noise


def squared_gradient(scores: Tensor, seen: Sequence[Tensor]) -> Tensor:
    """|d score / d seen|^2 of each row, [B], over all tensors [B, ...] in ``seen``; differentiable, for a penalty."""
    gradients = torch.autograd.grad(scores.sum(), seen, create_graph=True)
    return torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)


def scored(disc: Callable, x: Seen, sigma: Tensor, cond) -> tuple[Tensor, list[Tensor]]:
    """(scores [B], what they were computed from, ready for a penalty); nothing flows back to x.

    A discriminator on fixed features judges what it has seen, a list of features; its slope is measured there.
    """
    if isinstance(x, Tensor):
        x = x.detach().requires_grad_()
        return disc(x, sigma, cond), [x]
    seen = [feature.detach().requires_grad_() for feature in x]
    return disc.judge(seen, sigma, cond), seen


def _scores(disc: Callable, x: Seen, sigma: Tensor, cond) -> Tensor:
    return disc(x, sigma, cond) if isinstance(x, Tensor) else disc.judge(x, sigma, cond)


def _unmeasured(like: Tensor) -> Tensor:
    return torch.full((), math.nan, device=like.device)


class Relativistic:
    """Each fake is to look more real than its real partner; R1 and R2 hold the discriminator's slope on both.

    d: softplus(D(fake) - D(real)) + gamma / 2 (|grad D(real)|^2 + |grad D(fake)|^2), g: softplus(D(real) - D(fake)),
    pair by pair, so row i of ``real`` should have the condition of row i of ``fake``. Jolicoeur-Martineau 2018 (arXiv
    1807.00734); with both penalties Huang, Gokaslan, Kuleshov and Tompkin 2024 (arXiv 2501.05441).

    Args:
        gamma: weight of the penalties, above or at 0; the squared norm is a sum over a picture's entries.
    """

    name = "relativistic"

    def __init__(self, gamma: float = 0.1):
        self.gamma = _not_negative("gamma", gamma)

    def discriminator(
        self, disc: Callable, real: Seen, fake: Seen, sigma: Tensor, cond=None, step: int = 0
    ) -> DiscriminatorLoss:
        """``fake`` is taken as it stands: no gradient flows to what made it."""
        (real_scores, real), (fake_scores, fake) = (scored(disc, x, sigma, cond) for x in (real, fake))
        slopes = squared_gradient(real_scores, real).mean() + squared_gradient(fake_scores, fake).mean()
        total = F.softplus(fake_scores - real_scores).mean() + 0.5 * self.gamma * slopes
        return DiscriminatorLoss(total, real_scores.detach(), fake_scores.detach(), 0.5 * slopes.detach())

    def generator(self, disc: Callable, real: Seen, fake: Seen, sigma: Tensor, cond=None) -> Tensor:
        with torch.no_grad():
            real_scores = _scores(disc, real, sigma, cond)
        return F.softplus(real_scores - _scores(disc, fake, sigma, cond)).mean()


class NonSaturating:
    """The classic loss with a lazy R1 penalty, scaled so that laziness does not weaken it.

    d: softplus(D(fake)) + softplus(-D(real)), and every ``every`` steps + every * gamma / 2 * |grad D(real)|^2;
    g: softplus(-D(fake)). Goodfellow et al. 2014; R1: Mescheder, Geiger and Nowozin 2018 (arXiv 1801.04406); lazy
    regularisation: Karras et al. 2019 (arXiv 1912.04958).

    Args:
        gamma: weight of the penalty, above or at 0. every: steps from one penalty to the next, 1 or more.
    """

    name = "non_saturating"

    def __init__(self, gamma: float = 0.1, every: int = 8):
        self.gamma = _not_negative("gamma", gamma)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}: give the steps between two penalties, a whole number of at least 1")
        self.every = every

    def discriminator(
        self, disc: Callable, real: Seen, fake: Seen, sigma: Tensor, cond=None, step: int = 0
    ) -> DiscriminatorLoss:
        """``step`` counts from 0 and says whether this one carries the penalty."""
        (real_scores, seen), (fake_scores, _) = (scored(disc, x, sigma, cond) for x in (real, fake))
        total = F.softplus(fake_scores).mean() + F.softplus(-real_scores).mean()
        penalty = _unmeasured(total)
        if step % self.every == 0:
            slope = squared_gradient(real_scores, seen).mean()
            total = total + 0.5 * self.gamma * self.every * slope
            penalty = slope.detach()
        return DiscriminatorLoss(total, real_scores.detach(), fake_scores.detach(), penalty)

    def generator(self, disc: Callable, real: Seen, fake: Seen, sigma: Tensor, cond=None) -> Tensor:
        return F.softplus(-_scores(disc, fake, sigma, cond)).mean()


class ConditionalTransport(nn.Module):
    """Bidirectional transport between two batches in the critic's features; its navigator is trained beside the prior.

    Zheng and Zhou, "Exploiting Chain Rule and Bayes' Theorem to Compare Probability Distributions" (arXiv
    2012.14100), one of the two divergences of the TDPM paper. Each fake is sent to the reals near it and each real to
    the fakes near it, softly, by a learned distance; the cost is 1 - cosine of the critic's features. The critic
    (``disc.features(x, sigma, cond) -> [B, F]``) raises the cost, prior and navigator lower it.

    Args:
        features: F. rho: weight of real -> fake (covers every mode); 1 - rho: of fake -> real. width: of the navigator.
    """

    name = "transport"

    def __init__(self, features: int, rho: float = 0.5, width: int = 64):
        super().__init__()
        if not 0 <= rho <= 1:
            raise ValueError(f"rho is {rho!r}: give the weight of one of the two directions, from 0 to 1")
        self.rho = rho
        self.navigator = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, 1))

    def cost(self, real: Tensor, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        """Transport cost of features [N, F] and [M, F].

        Args:
            labels: int64 [N] (then N = M, and row i of both has the same one): transport stays inside a class.
        """
        # normalised first, so that neither side can win by scale alone
        real, fake = F.normalize(real, dim=1), F.normalize(fake, dim=1)
        expense = 1 - fake @ real.T  # [M, N]
        apart = self.navigator((fake[:, None] - real[None]).square() * real.shape[1])[..., 0]
        if labels is not None:
            apart = apart.masked_fill(labels[:, None] != labels[None], math.inf)
        to_real = (torch.softmax(-apart, 1) * expense).sum(1).mean()
        to_fake = (torch.softmax(-apart, 0) * expense).sum(0).mean()
        return self.rho * to_fake + (1 - self.rho) * to_real

    def discriminator(self, disc, real: Seen, fake: Seen, sigma: Tensor, cond=None, step: int = 0) -> DiscriminatorLoss:
        """The critic's step; ``real`` and ``fake`` stand for distances to the other batch in place of scores."""
        real_features, fake_features = (disc.features(_detached(x), sigma, cond) for x in (real, fake))
        cost = self.cost(real_features, fake_features, _labels(cond))
        return DiscriminatorLoss(-cost, cost.detach()[None], -cost.detach()[None], _unmeasured(cost))

    def generator(self, disc, real: Seen, fake: Seen, sigma: Tensor, cond=None) -> Tensor:
        return self.cost(disc.features(real, sigma, cond), disc.features(fake, sigma, cond), _labels(cond))


class Regression:
    """Distance to a known answer: the checkpoint's own trajectory from the same noise. Keeps seed -> picture.

    Args:
        huber: 0: mean squared error. Above 0: sqrt(|difference|^2 / d + huber^2) - huber per picture, which follows
            the middle of several answers rather than their mean (pseudo-Huber, as in Song and Dhariwal, arXiv
            2310.14189).
    """

    name = "regression"

    def __init__(self, huber: float = 0.0):
        self.huber = _not_negative("huber", huber)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """prediction, target: [B, ...] -> the mean over the batch."""
        error = (prediction - target).flatten(1).square().mean(1)
        return ((error + self.huber**2).sqrt() - self.huber).mean() if self.huber else error.mean()


def _detached(x: Seen) -> Seen:
    return x.detach() if isinstance(x, Tensor) else [feature.detach() for feature in x]


def adversarial_loss(name: str, *, gamma: float = 0.1, every: int = 8, features: int = 0):
    """One of ``LOSSES`` by its name. ``features`` is the width of the critic's features, for "transport"."""
    if name == "relativistic":
        return Relativistic(gamma)
    if name == "non_saturating":
        return NonSaturating(gamma, every)
    if name == "transport":
        return ConditionalTransport(features)
    raise ValueError(f"adversarial loss {name!r}: choose one of {', '.join(LOSSES)}")


def _labels(cond) -> Tensor | None:
    """The class of each row, where the condition is one."""
    return cond if isinstance(cond, Tensor) and cond.ndim == 1 and not cond.is_floating_point() else None


def _not_negative(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}: give a finite number of at least 0")
    return float(value)
