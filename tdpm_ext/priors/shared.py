"""`shared`: the denoiser itself is the generator, called once at ``sigma_init`` with weights of its own or a LoRA."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tdpm_ext.priors.learned import LearnedPrior, Start, level_like
from tdpm_ext.priors.registry import register_prior

ALIKE = 2e-3  # relative difference of a tensor's rms that rounding the same weights to half precision can make
MAX_RANK = 1024


class LowRank(nn.Module):
    """weight + up @ down, the weight seen as a matrix [outputs, everything else]."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator | None = None):
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        down = torch.randn(rank, columns, generator=generator) * columns**-0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(torch.zeros(rows, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


@register_prior("shared")
class SharedPrior(LearnedPrior):
    """The denoiser at ``sigma_init`` with changed weights; no added parameters, or a LoRA's few.

    `create` makes one to train; a loaded one needs `bind` with the denoiser that it was trained on.

    Args:
        changes: full: {parameter: its new value}; LoRA: {layer.weight.down: [rank, rest], layer.weight.up: [out,
            rank]}.
        rank: 0: full.
        about: {"parameters": count, "rms": of each tensor}, by which the right denoiser is known again.
    """

    def __init__(self, changes: dict[str, Tensor], rank: int, about: dict, shape, sigma_trunc, sigma_init, **options):
        super().__init__(shape, sigma_trunc, sigma_init, **options)
        self.changes, self.rank, self.about = changes, rank, about
        self.network: nn.Module | None = None
        self.one = False  # prior and denoiser are the same weights
        self._layers: dict[str, LowRank] = {}

    @classmethod
    def create(cls, model: nn.Module, shape, sigma_trunc, sigma_init, *, rank: int = 0, seed: int = 0, **options):
        """A prior to train: its network starts as ``model``, which stays as it is."""
        prior = cls({}, rank, describe(model), shape, sigma_trunc, sigma_init, **options)
        if rank == 0:
            names = [name for name, _ in model.named_parameters()]
            prior.network = own_copy(model, names)
            for parameter in prior.network.parameters():
                parameter.requires_grad_(True)
            return prior
        generator = torch.Generator().manual_seed(seed)
        prior.network = own_copy(model, [f"{name}.weight" for name, _ in adaptable(model)])
        for name, layer in adaptable(prior.network):
            prior._layers[name] = LowRank(layer.weight, rank, generator)
            parametrize.register_parametrization(layer, "weight", prior._layers[name])
        return prior

    @classmethod
    def joint(cls, model: nn.Module, shape, sigma_trunc, sigma_init, **options):
        """A prior that *is* the denoiser, for training both at once: the paper's shared form."""
        prior = cls({}, 0, {}, shape, sigma_trunc, sigma_init, **options)
        prior.network, prior.one = model, True
        return prior

    @property
    def ready(self) -> bool:
        return self.network is not None

    def bind(self, model: nn.Module, checkpoint: str | None = None) -> SharedPrior:
        super().bind(model, checkpoint)
        if not isinstance(model, nn.Module):
            raise ValueError(f"a shared prior changes the weights of a torch module; {type(model).__name__} is none")
        self._recognise(model)
        if self.one:
            self.network = model
            return self
        targets = {name: value for name, value in model.named_parameters()}
        changed = {}
        for name in {key.rsplit(".", 1)[0] for key in self.changes} if self.rank else self.changes:
            old = targets.get(name)
            new = self._changed(name, old)
            if old is None or new.shape != old.shape:
                raise ValueError(f"the denoiser has no parameter {name} of shape {tuple(new.shape)}")
            changed[name] = new.to(old)
        self.network = own_copy(model, list(changed))
        mine = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, value in changed.items():
                mine[name].copy_(value)
        return self

    def _changed(self, name: str, old: Tensor | None) -> Tensor:
        if not self.rank:
            return self.changes[name]
        up, down = (self.changes[f"{name}.{part}"].float() for part in ("up", "down"))
        change = up @ down
        if old is None or change.numel() != old.numel():
            return change
        return (old.detach().float().cpu().reshape(change.shape) + change.cpu()).reshape(old.shape)

    def _recognise(self, model: nn.Module) -> None:
        here = describe(model)
        if here["parameters"] != self.about["parameters"] or len(here["rms"]) != len(self.about["rms"]):
            counts = f"{here['parameters']:,} parameters, and the prior's had {self.about['parameters']:,}"
            raise ValueError(f"this is not the denoiser that the shared prior was trained on: it has {counts}")
        pairs = zip(here["rms"], self.about["rms"], strict=True)
        worst = max((abs(a - b) / max(a, b, 1e-12) for a, b in pairs), default=0.0)
        if worst > ALIKE:
            raise ValueError(
                f"this is not the denoiser that the shared prior was trained on: the size of a weight tensor differs "
                f"by {worst:.1%}; bind the checkpoint {self.card.get('checkpoint') or 'it was trained on'}"
            )

    def emit(self, start: Start, **cond) -> Tensor:
        return self.network(start.x, level_like(start.x, self.sigma_init), **cond)

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        if self.rank:
            return [tensor for layer in self._layers.values() for tensor in (layer.down, layer.up)]
        return list(self.network.parameters())

    def weights(self) -> dict[str, Tensor]:
        if self.changes or self.one:
            return self.changes
        if self.rank:
            parts = {"down", "up"}
            return {f"{n}.weight.{p}": getattr(layer, p) for n, layer in self._layers.items() for p in sorted(parts)}
        return dict(self.network.named_parameters())

    def state(self) -> tuple[dict[str, Tensor], dict]:
        tensors, config = super().state()
        about = describe(self.network) if self.one and self.network is not None else self.about
        return tensors, {**config, "rank": self.rank, "about": about, "one": self.one}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict) -> SharedPrior:
        options, changes = cls.settings(tensors, config)
        rank, about = config.get("rank"), config.get("about")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= MAX_RANK:
            raise ValueError(f"the rank is {rank!r}: a whole number from 0 (all weights) to {MAX_RANK}")
        known = isinstance(about, dict) and isinstance(about.get("rms"), list)
        if not known or not all(isinstance(v, (int, float)) for v in [about.get("parameters"), *about["rms"]]):
            raise ValueError("the config does not say which denoiser the weights belong to")
        if bool(changes) == bool(config.get("one")):
            raise ValueError("a shared prior has changed weights, or is one with its denoiser and has none")
        if rank:
            _check_pairs(changes, rank)
        prior = cls(changes, rank, about, **options)
        prior.one = not changes
        return prior


def _check_pairs(changes: dict[str, Tensor], rank: int) -> None:
    layers = {name.rsplit(".", 1)[0] for name in changes}
    if set(changes) != {f"{layer}.{part}" for layer in layers for part in ("down", "up")}:
        raise ValueError("a low-rank change is a pair of tensors, NAME.down and NAME.up")
    for layer in layers:
        up, down = changes[f"{layer}.up"], changes[f"{layer}.down"]
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != rank or down.shape[0] != rank:
            raise ValueError(f"{layer}: up {tuple(up.shape)} and down {tuple(down.shape)} are not of rank {rank}")


def adaptable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers that a LoRA changes: convolutions and linear layers, by name."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def own_copy(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy of ``model`` that owns the named parameters and shares all others, and every buffer, with it."""
    own = set(names)
    shared = [p for name, p in model.named_parameters() if name not in own]
    memo = {id(tensor): tensor for tensor in (*shared, *model.buffers())}
    twin = copy.deepcopy(model, memo).eval()
    for name, parameter in twin.named_parameters():
        if name in own:
            parameter.requires_grad_(False)
    return twin


@torch.no_grad()
def describe(model: nn.Module) -> dict:
    """What tells one denoiser from another whatever precision it is held in: parameter count, rms of each tensor."""
    tensors = list(model.parameters())
    sizes = torch.stack([tensor.float().square().mean().sqrt() for tensor in tensors]).tolist() if tensors else []
    return {"parameters": sum(tensor.numel() for tensor in tensors), "rms": [float(f"{size:.6g}") for size in sizes]}
