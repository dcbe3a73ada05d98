"""Training the toy study's networks: a denoiser, and priors against noised points, alone or together with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.toy_nets import ToyCritic, ToyDenoiser, ToyGenerator, denoising_loss, log_uniform
from tdpm_ext.training.losses import adversarial_loss, noised

SIGMA_MIN, SIGMA_MAX = 0.01, 160.0  # noise levels of the denoiser: those of the DDPM table and a little more
LEVELS = (0.02, 1.5)  # noise levels that a prior is judged at in training, and that the joint network denoises
SIGMA_INIT = 2.5  # level at which the joint network is called as a generator
RAW_SIGMA = 0.33883  # of the raw prior: the paper's 100th step of the linear table
BETAS, EMA = (0.0, 0.99), 0.995


@dataclass(frozen=True)
class Training:
    """Steps and batch of every training."""

    denoiser_steps: int = 8000
    denoiser_batch: int = 512
    learning_rate: float = 3e-3
    prior_steps: int = 1500
    prior_batch: int = 128
    prior_rate: float = 2e-3
    gamma: float = 0.05


@dataclass
class _Average:
    """A network and the running mean of its weights, which is what is kept."""

    net: nn.Module
    rate: float
    steps: int
    betas: tuple[float, float] = (0.9, 0.99)
    mean: nn.Module = field(init=False)

    def __post_init__(self):
        self.mean = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.net.parameters(), self.rate, self.betas, fused=True)

    def step(self, loss: torch.Tensor, at: int) -> None:
        """One update at a rate that warms up and then falls along a cosine to a tenth."""
        self.optimizer.zero_grad()
        loss.backward()
        rise, fall = min(1.0, (at + 1) / 100), 0.55 + 0.45 * math.cos(math.pi * at / self.steps)
        self.optimizer.param_groups[0]["lr"] = self.rate * rise * fall
        self.optimizer.step()
        with torch.no_grad():
            share = max(1 - EMA, 1 / (at + 1))
            torch._foreach_lerp_(list(self.mean.parameters()), list(self.net.parameters()), share)


def _drawer(points: torch.Tensor, batch: int, generator: torch.Generator) -> Callable[[], torch.Tensor]:
    return lambda: points[torch.randint(len(points), (batch,), generator=generator)]


def train_denoiser(points: torch.Tensor, how: Training, seed: int) -> ToyDenoiser:
    """A denoiser for all noise levels from ``SIGMA_MIN`` to ``SIGMA_MAX``."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = _Average(ToyDenoiser(), how.learning_rate, how.denoiser_steps)
    draw = _drawer(points, how.denoiser_batch, generator)
    for i in tqdm(range(how.denoiser_steps), desc="denoiser", leave=False):
        sigma = log_uniform(how.denoiser_batch, SIGMA_MIN, SIGMA_MAX, generator)
        noise = torch.randn(how.denoiser_batch, 2, generator=generator)
        model.step(denoising_loss(model.net, draw(), sigma, noise), i)
    return model.mean


@dataclass(frozen=True)
class Adversary:
    """What is compared with what in training a prior.

    Attributes:
        levels: lowest and highest noise level; equal for a single one.
        noise_fakes: the noise is added to what the prior gives (else that is noisy already).
        noise_reals: ... to the data (a GAN compares clean points).
    """

    levels: tuple[float, float]
    noise_fakes: bool = True
    noise_reals: bool = True


ADVERSARIES = {
    "generator": Adversary(LEVELS),
    "shared": Adversary(LEVELS),
    "raw": Adversary((RAW_SIGMA, RAW_SIGMA), noise_fakes=False),
    "gan": Adversary((LEVELS[0], LEVELS[0]), noise_fakes=False, noise_reals=False),
}


def train_prior(
    points: torch.Tensor, kind: str, how: Training, seed: int, denoiser: ToyDenoiser | None = None
) -> nn.Module:
    """A prior of one of the kinds in ``ADVERSARIES``, from scratch; "shared" goes on from ``denoiser`` if it is given.

    "shared" is one network that denoises below ``LEVELS[1]`` and, called at ``SIGMA_INIT``, is the generator.
    """
    rule, joint = ADVERSARIES[kind], kind == "shared"
    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(1000 + seed)
    net = ToyDenoiser() if joint else ToyGenerator()
    if joint and denoiser is not None:
        net.load_state_dict(denoiser.state_dict())
    prior = _Average(net, how.prior_rate, how.prior_steps, BETAS)
    critic = _Average(ToyCritic(), how.prior_rate, how.prior_steps, BETAS)
    loss, draw = adversarial_loss("relativistic", gamma=how.gamma), _drawer(points, how.prior_batch, generator)

    def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sigma = log_uniform(how.prior_batch, *rule.levels, generator)
        z, a, b = torch.randn(3, how.prior_batch, 2, generator=generator)
        real, fake = draw(), generate(prior.net, z)
        real = noised(real, sigma, a) if rule.noise_reals else real
        return real, noised(fake, sigma, b) if rule.noise_fakes else fake, sigma

    for i in tqdm(range(how.prior_steps), desc=kind, leave=False):
        with torch.no_grad():
            real, fake, sigma = pair()
        critic.step(loss.discriminator(critic.net, real, fake, sigma, step=i).total, i)
        real, fake, sigma = pair()
        total = loss.generator(critic.net, real, fake, sigma)
        if joint:
            levels = log_uniform(how.prior_batch, SIGMA_MIN, LEVELS[1], generator)
            noise = torch.randn(how.prior_batch, 2, generator=generator)
            total = total + denoising_loss(prior.net, draw(), levels, noise)
        prior.step(total, i)
    return prior.mean


def generate(net: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """What a prior's network makes of unit noise z [B, 2]; a denoiser is called at ``SIGMA_INIT``."""
    return net(z) if isinstance(net, ToyGenerator) else net(SIGMA_INIT * z, z.new_full([len(z)], SIGMA_INIT))
