"""`raw`: the network emits x at ``sigma_trunc`` itself, noise and all: the paper's own form of the prior."""

from __future__ import annotations

from torch import Tensor

from tdpm_ext.priors.generator import GeneratorPrior
from tdpm_ext.priors.learned import LearnedPrior, Start
from tdpm_ext.priors.registry import register_prior
from tdpm_ext.priors.shared import SharedPrior
from tdpm_ext.schedule import CLOSE

NETWORKS = {"generator": GeneratorPrior, "shared": SharedPrior}


@register_prior("raw")
class RawPrior(LearnedPrior):
    """A `GeneratorPrior` or `SharedPrior` whose answer is taken as x at ``sigma_trunc``, which is therefore fixed."""

    def __init__(self, inner: GeneratorPrior | SharedPrior):
        options = {"sigma_max": inner.sigma_max, "base": inner.base, "noise": inner.noise, "coupled": inner.coupled}
        super().__init__(inner.shape, inner.sigma_trunc, inner.sigma_init, card=inner.card, **options)
        self.inner, self.uses_guess = inner, inner.uses_guess

    @property
    def ready(self) -> bool:
        return self.inner.ready

    @property
    def network(self):
        return self.inner.network

    def bind(self, model, checkpoint: str | None = None) -> RawPrior:
        super().bind(model, checkpoint)
        self.inner.card = self.card
        self.inner.bind(model, checkpoint)
        return self

    def emit(self, start: Start, **cond) -> Tensor:
        return self.inner.emit(start, **cond)

    def lower(self, picture: Tensor, start: Start, z: Tensor, sigma: float | Tensor) -> Tensor:
        return picture

    def cuts(self, std: float) -> list[float]:
        return [self.sigma_trunc]

    knows_past = False  # what it emits is no picture

    def starts_at(self, sigma: float) -> bool:
        return abs(sigma / self.sigma_trunc - 1) <= CLOSE

    def _range(self) -> str:
        return f"at its own sigma_trunc {self.sigma_trunc:g} alone"

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return self.inner.parameters()

    def state(self) -> tuple[dict[str, Tensor], dict]:
        tensors, config = self.inner.state()
        return tensors, {**config, "network": self.inner.kind}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict) -> RawPrior:
        kind = NETWORKS.get(config.get("network"))
        if kind is None:
            raise ValueError(f"the network is {config.get('network')!r}: one of {', '.join(NETWORKS)}")
        return cls(kind.from_state(tensors, config))
