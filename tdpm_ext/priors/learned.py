"""What learned priors share: one network call at ``sigma_init``, and the way from its answer to any lower noise level.

The call starts where a closed-form prior leaves off: ``base`` carries the host's noise z along its own flow to
``sigma_init`` (without a base, x there is sigma_init * z), so the seed keeps its picture and the network has only to
turn x at sigma_init into a clean picture g. From there

    x(sigma) = g + sigma * n,    n = z in another order ("fresh"), or (x(sigma_init) - g) / sigma_init ("kept").

Fresh noise is what the paper's prior needs: it is exactly white, and sigma_trunc stays free after training. Kept noise
is a step of the probability-flow ODE: with a g that was trained for it, the untruncated sampler's own path. Where a
base knows an estimate above sigma_init, the step is of second order, as a multistep solver's with a seeded history:
with the denoiser's own weights it is the step that the closed-form prior's plan would make.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tdpm_ext.priors.base import HISTORY_RATIO, ImplicitPrior
from tdpm_ext.priors.closed_form import ClosedFormPrior
from tdpm_ext.priors.registry import get_prior
from tdpm_ext.priors.text import TextLowRankPrior
from tdpm_ext.schedule import CLOSE

NOISES = ("fresh", "kept")
BASE, NETWORK = "base.", "network."  # what names of tensors in a file begin with
SETTINGS = ("sigma_init", "sigma_max", "noise", "coupled")


class Start(NamedTuple):
    """What is known of the picture without a network call.

    ``x`` [B, *shape] at ``sigma_init``; the base's estimates of the picture there (``guess``) and at the level
    `HISTORY_RATIO` times higher (``past``), where they are used.
    """

    x: Tensor
    guess: Tensor | None = None
    past: Tensor | None = None


class LearnedPrior(ImplicitPrior):
    """A prior that calls a network once; ``emit`` is the part that is trained.

    Args:
        shape: of one picture.
        sigma_trunc: where the chain is cut by default; any level up to ``sigma_init`` may be asked for.
        sigma_init: noise level of the call, data units.
        base: closed-form prior that leads to ``sigma_init``; None: x there is sigma_init * z.
        noise: "fresh" or "kept", see above.
        coupled: the same z gives (nearly) the untruncated sampler's picture.
    """

    prior_nfe = 1
    conditions = None  # everything the host passes to the model also goes to the network
    uses_guess = False

    def __init__(
        self,
        shape: tuple[int, ...],
        sigma_trunc: float,
        sigma_init: float,
        *,
        sigma_max: float = 80.0,
        base: ClosedFormPrior | None = None,
        noise: str = "fresh",
        coupled: bool = False,
        card: dict | None = None,
    ):
        super().__init__(shape, sigma_trunc, sigma_max if base is None else base.sigma_max, card)
        self.sigma_init, self.base, self.noise, self.coupled = float(sigma_init), base, noise, bool(coupled)
        if noise not in NOISES:
            raise ValueError(f"noise is {noise!r}: choose one of {', '.join(NOISES)}")
        if not self.sigma_trunc <= self.sigma_init <= self.sigma_max:
            levels = f"sigma_trunc {self.sigma_trunc:g}, sigma_init {sigma_init:g}, sigma_max {self.sigma_max:g}"
            raise ValueError(f"{levels}: they must not fall in this order")
        if base is not None and base.shape != self.shape:
            raise ValueError(f"the base was fitted for {base.shape}, this prior is for {self.shape}")

    @property
    def ready(self) -> bool:
        """Whether there is a network to call; where not, `bind` gives it one."""
        return True

    def bind(self, model, checkpoint: str | None = None) -> LearnedPrior:
        """Give the prior the network it works on; returns the prior.

        Args:
            model: ``model(x, sigma, **cond) -> denoised``.
            checkpoint: its fingerprint; a prior trained for another one is an error.

        Raises:
            ValueError: another checkpoint than the prior was trained for.
        """
        trained = self.card.get("checkpoint")
        if checkpoint is not None and trained is not None and checkpoint != trained:
            raise ValueError(f"this {self.kind} prior was trained for checkpoint {trained}, not for {checkpoint}")
        return self

    def emit(self, start: Start, **cond) -> Tensor:
        """The network's clean picture [B, *shape]; differentiable."""
        raise NotImplementedError(f"prior kind {self.kind!r} has no network")

    @torch.no_grad()
    def begin(self, z: Tensor, **cond) -> Start:
        """What the network is called on, from unit noise z [B, *shape]; costs no network call."""
        self.check(z)
        if self.base is None:
            return Start(z * self.sigma_init, None)
        known = {name: cond[name] for name in self.base.conditions if name in cond}
        kept = self.noise == "kept" and self.sigma_init * HISTORY_RATIO < self.base.sigma_max
        above = (self.sigma_init * HISTORY_RATIO,) if kept else ()
        x, seen = self.base.start(z, self.sigma_init, above, **known)
        guess = self.base.denoise(x, self.sigma_init, **known) if self.uses_guess else None
        return Start(x, guess, seen[0][1] if seen else None)

    def lower(self, picture: Tensor, start: Start, z: Tensor, sigma: float | Tensor) -> Tensor:
        """From the network's answer to noise level sigma (one for all, or [B]); differentiable."""
        if isinstance(sigma, Tensor):
            sigma = sigma.to(start.x).reshape(-1, *[1] * (start.x.ndim - 1))
        if self.noise == "fresh":
            return picture + sigma * shuffled(z)
        share = sigma / self.sigma_init
        x = picture + share * (start.x - picture)
        if start.past is None:
            return x
        length = -share.log() if isinstance(share, Tensor) else -math.log(share)
        return x + 0.5 * (1 - share) * length / math.log(HISTORY_RATIO) * (picture - start.past)

    @torch.no_grad()
    def sample(self, z: Tensor, sigma: float | None = None, **cond) -> Tensor:
        """Draw x [B, *shape] at ``sigma`` (default ``sigma_trunc``, at most ``sigma_init``) from unit noise z.

        Raises:
            ValueError: a level above ``sigma_init``, or a prior without its network (see `bind`).
        """
        return self.start(z, self.sigma_trunc if sigma is None else sigma, **cond)[0]

    @property
    def knows_past(self) -> bool:
        """On the checkpoint's own path, the network's picture is the estimate that the step before this one made."""
        return self.noise == "kept"

    @torch.no_grad()
    def start(self, z: Tensor, sigma: float, history: tuple[float, ...] = (), **cond):
        """As in `ImplicitPrior.start`, but the estimates are those at its own levels, whatever ``history`` asks for:
        the network's picture at ``sigma_init`` and the base's above it; none with fresh noise."""
        sigma = self._level(sigma)
        begun = self.begin(z, **cond)
        picture = self.emit(begun, **cond)
        seen = [(self.sigma_init, picture), (self.sigma_init * HISTORY_RATIO, begun.past)] if self.knows_past else []
        return self.lower(picture, begun, z, sigma), [(s, d) for s, d in seen if d is not None and s > sigma]

    def starts_at(self, sigma: float) -> bool:
        return 0 < sigma <= self.sigma_init * (1 + CLOSE)

    def cuts(self, std: float) -> list[float]:
        """Noise levels worth trying as ``sigma_trunc``, rising; the one that was trained among them."""
        tried = [self.sigma_init * share for share in (0.06, 0.1, 0.15, 0.22, 0.33, 0.5, 0.75)]
        return sorted(sigma for sigma in {*tried, self.sigma_trunc} if self.may_cut(sigma))

    def may_cut(self, sigma: float) -> bool:
        """Not below the least noise under which an adversarial loss has compared pictures: what was left in them there
        no loss has seen, and a calibration's own noise decides."""
        training = self.card.get("training")
        lowest = training.get("sigma_low") if isinstance(training, dict) and training.get("adversarial") else None
        lowest = min(lowest, self.sigma_trunc) if self.noise == "fresh" and isinstance(lowest, (int, float)) else 0.0
        return self.starts_at(sigma) and sigma >= lowest * (1 - CLOSE)

    def _level(self, sigma: float) -> float:
        if not self.ready:
            raise ValueError(f"this {self.kind} prior has no network yet: call prior.bind(model) once after loading")
        sigma = float(sigma)
        if not self.starts_at(sigma):
            raise ValueError(f"sigma {sigma:g} asked for: this {self.kind} prior draws {self._range()}")
        return sigma

    def _range(self) -> str:
        return f"at levels above 0, up to its sigma_init {self.sigma_init:g}"

    # -- files ---------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """What was trained, by name; stored as it stands."""
        return {}

    def state(self) -> tuple[dict[str, Tensor], dict]:
        config = {name: getattr(self, name) for name in SETTINGS}
        tensors = {NETWORK + name: tensor for name, tensor in self.weights().items()}
        if self.base is not None:
            own, base = self.base.state()
            tensors |= {BASE + name: tensor for name, tensor in own.items()}
            config["base"] = {"kind": self.base.kind, **base}
        return tensors, config

    @classmethod
    def settings(cls, tensors: dict[str, Tensor], config: dict) -> tuple[dict, dict[str, Tensor]]:
        """(arguments for ``__init__``, the network's own tensors) from what `state` gave; the file is untrusted."""
        missing = [name for name in ("shape", "sigma_trunc", *SETTINGS) if name not in config]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        network = {name[len(NETWORK) :]: t for name, t in tensors.items() if name.startswith(NETWORK)}
        base, own = config.get("base"), {name[len(BASE) :]: t for name, t in tensors.items() if name.startswith(BASE)}
        if base is not None:
            kind = get_prior(base.get("kind"))
            if not issubclass(kind, ClosedFormPrior | TextLowRankPrior):
                raise ValueError(f"the base is of kind {kind.kind!r}: closed-form kinds alone can be one")
            base = kind.from_state(own, {**base, "shape": config["shape"]})
        options = {name: config[name] for name in ("noise", "coupled")}
        options |= {name: float(config[name]) for name in ("sigma_trunc", "sigma_init", "sigma_max")}
        return {"shape": tuple(config["shape"]), "base": base, **options}, network


def shuffled(z: Tensor) -> Tensor:
    """Unit noise [B, ...] made of z: its entries in another, fixed order, with fixed signs.

    White like z, a function of the seed alone, and blind to what g saw in z: no pattern of g survives the order.
    """
    order, signs = _order(z[0].numel(), z.device)
    flat = z.flatten(1)[:, order] * signs.to(z.dtype)
    return flat.reshape(z.shape)


@lru_cache(maxsize=8)
def _order(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    numbers = random.Random(count)  # Python promises the same sequence everywhere; torch.randperm does not
    keys = torch.tensor([numbers.random() for _ in range(count)], dtype=torch.float64)
    signs = [1.0 if numbers.random() < 0.5 else -1.0 for _ in range(count)]
    return keys.argsort(stable=True).to(device), torch.tensor(signs, device=device)


def level_like(x: Tensor, sigma: float) -> Tensor:
    """One noise level for every row of x."""
    return torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
