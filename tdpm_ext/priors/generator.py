"""`generator`: a network of its own makes the clean picture, in a call cheaper than half of the denoiser's."""

from __future__ import annotations

import torch
from torch import Tensor

from tdpm_ext.priors.learned import LearnedPrior, Start, level_like
from tdpm_ext.priors.networks import Generator
from tdpm_ext.priors.registry import register_prior

LIMIT = 4096  # largest width of an untrusted file


@register_prior("generator")
class GeneratorPrior(LearnedPrior):
    """z -> clean picture by a separate `Generator`; the base's estimate is its first guess.

    Args:
        network: the generator; others as in `LearnedPrior`.
        cond_name: the argument of the model that holds the condition: "class_cond" (labels int64 [B]), or one that
            holds embeddings [B, E] or [B, L, E] (averaged over L).
    """

    uses_guess = True

    def __init__(self, network: Generator, shape, sigma_trunc, sigma_init, *, cond_name="class_cond", **options):
        super().__init__(shape, sigma_trunc, sigma_init, **options)
        self.network, self.cond_name = network, cond_name
        self.stored = torch.float32

    def emit(self, start: Start, *, cond_scale: float = 1.0, **cond) -> Tensor:
        condition = cond.get(self.cond_name)
        if condition is not None and condition.ndim == 3:
            condition = condition.mean(1)
        network, sigma = self._on(start.x), level_like(start.x, self.sigma_init)
        if condition is None or cond_scale == 1.0:
            return network(start.x, sigma, condition, start.guess)
        free = network(start.x, sigma, None, start.guess)
        return free + cond_scale * (network(start.x, sigma, condition, start.guess) - free)

    def _on(self, x: Tensor) -> Generator:
        if next(self.network.parameters()).device != x.device:
            self.network.to(x.device)
        return self.network

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return list(self.network.parameters())

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.to(self.stored) for name, tensor in self.network.state_dict().items()}

    def state(self) -> tuple[dict[str, Tensor], dict]:
        tensors, config = super().state()
        return tensors, {**config, "cond_name": self.cond_name, "generator": self.network.options}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict) -> GeneratorPrior:
        options, weights = cls.settings(tensors, config)
        about, name = config.get("generator"), config.get("cond_name")
        if not isinstance(about, dict) or not isinstance(name, str):
            raise ValueError("the config lacks the generator's description")
        for key in ("num_classes", "cond_width", "width", "depth"):
            value = about.get(key)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LIMIT:
                raise ValueError(f"the generator's {key} is {value!r}: a whole number up to {LIMIT}")
        with torch.device("meta"):  # nothing is allocated before the shapes have been compared with the file
            network = Generator(options["shape"], **about)
        wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        found = {key: tuple(value.shape) for key, value in weights.items()}
        if wanted != found:
            odd = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
            raise ValueError(f"the weights do not fit the generator's description: {', '.join(odd[:4])}")
        network = Generator(options["shape"], **about)
        network.load_state_dict({key: value.float() for key, value in weights.items()})
        prior = cls(network.eval().requires_grad_(False), **options, cond_name=name)
        prior.stored = next(iter(weights.values())).dtype
        return prior
