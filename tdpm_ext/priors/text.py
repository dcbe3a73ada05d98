"""Priors that know the prompt: Gaussians and mixtures whose parameters are regressed from a pooled text embedding.

Embeddings are centred and whitened along their leading principal axes: phi(e) [T]. Then

    `text_lowrank`   x0 ~ N(mean + phi W, diag(v exp(phi S)) in the principal axes of what the regression leaves over)
    `text_mixture`   x0 ~ sum_k softmax(b + phi C)_k N_k, the components those of an unlabelled `mixture`

so both keep a closed-form denoiser and a flow that costs no network call. Without ``text_pooled`` phi is zero: the
average prompt. The coefficients are shrunk by how far they stand out of what chance alone would give (James & Stein
1961, positive part, one factor per text axis), so that a text axis which says nothing changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.priors.closed_form import ClosedFormPrior, sigma_level
from tdpm_ext.priors.registry import register_prior

TEXT_TENSORS = {"text_mean": 1, "text_axes": 2}
MAX_LOG_SPREAD = 2.0  # a prompt changes a variance by a factor of at most e^2


def embed(tensors: dict[str, Tensor], pooled: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """phi [B, T] of pooled embeddings [B, D]; zeros where no text is given.

    Raises ValueError for embeddings of another width than the prior was fitted with, or of another count.
    """
    axes = tensors["text_axes"]
    if pooled is None:
        return torch.zeros(batch, axes.shape[1], device=device)
    if pooled.ndim != 2 or pooled.shape[1] != axes.shape[0] or len(pooled) not in (1, batch):
        raise ValueError(
            f"text_pooled has shape {list(pooled.shape)}; this prior takes [{batch}, {axes.shape[0]}]: use the text "
            "encoder that it was fitted with"
        )
    phi = (pooled.to(device, torch.float32) - tensors["text_mean"]) @ axes
    return phi.expand(batch, -1)


def check_tensors(tensors: dict[str, Tensor], want: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Untrusted tensors as float32 on the CPU; ValueError unless exactly those of ``want`` with these shapes."""
    if set(tensors) != set(want):
        raise ValueError(f"tensors are {sorted(tensors)}; this kind has {sorted(want)}")
    for name, shape in want.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; wanted finite floats {list(shape)}")
    return {name: tensors[name].detach().cpu().float().contiguous() for name in want}


def _moved(prior, device: torch.device) -> dict[str, Tensor]:
    if device.type == "cpu":
        return prior.tensors
    if device not in prior.copies:
        prior.copies[device] = {name: value.to(device) for name, value in prior.tensors.items()}
    return prior.copies[device]


@register_prior("text_lowrank")
class TextLowRankPrior(ImplicitPrior):
    """One Gaussian per prompt; moves exactly along its probability flow.

    Args:
        tensors: mean [d], basis [d, R] (orthonormal), variances [R], text_mean [D], text_axes [D, T],
            shift [T, d] (W), spread [T, R] (S). residual: variance in every direction outside the basis.
    """

    conditions = ("text_pooled",)

    def __init__(self, tensors: dict[str, Tensor], shape, residual: float, **options):
        super().__init__(shape, **options)
        d, r = math.prod(self.shape), tensors["basis"].shape[-1] if "basis" in tensors else 0
        text = tensors["text_axes"].shape if "text_axes" in tensors else (0, 0)
        want = {"mean": (d,), "basis": (d, r), "variances": (r,), "text_mean": text[:1], "text_axes": tuple(text)}
        want |= {"shift": (text[-1], d), "spread": (text[-1], r)}
        self.tensors, self.residual = check_tensors(tensors, want), float(residual)
        if bool((self.tensors["variances"] < 0).any()) or not 0 <= self.residual < math.inf:
            raise ValueError("a variance is negative or not finite")
        self.copies: dict[torch.device, dict[str, Tensor]] = {}

    def _rows(self, x: Tensor, pooled: Tensor | None):
        """Coordinates [B, R], the rest [B, d], mean [B, d] and variances [B, R] of each row's own Gaussian."""
        self.check(x)
        t = _moved(self, x.device)
        phi = embed(t, pooled, len(x), x.device)
        mean = torch.addmm(t["mean"], phi, t["shift"])
        variances = t["variances"] * (phi @ t["spread"]).clamp(-MAX_LOG_SPREAD, MAX_LOG_SPREAD).exp()
        y = x.reshape(len(x), -1).float() - mean
        c = y @ t["basis"]
        return c, torch.addmm(y, c, t["basis"].T, alpha=-1), mean, variances, t["basis"]

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: float, text_pooled: Tensor | None = None, **_) -> Tensor:
        """x [B, *shape] at noise level sigma -> E[x_0 | x, prompt], of x's shape and dtype."""
        s2 = sigma_level(sigma) ** 2
        c, rest, mean, v, basis = self._rows(x, text_pooled)
        y = torch.addmm(mean, c * (v / (v + s2)), basis.T) + rest * (self.residual / (self.residual + s2))
        return y.reshape(x.shape).to(x.dtype)

    @torch.no_grad()
    def transport(
        self, x: Tensor, sigma_from: float, sigma_to: float, text_pooled: Tensor | None = None, **_
    ) -> Tensor:
        """x [B, *shape] at sigma_from -> the same path's point at sigma_to, exactly."""
        a, b = sigma_level(sigma_from) ** 2, sigma_level(sigma_to) ** 2
        c, rest, mean, v, basis = self._rows(x, text_pooled)
        y = torch.addmm(mean, c * ((v + b) / (v + a)).sqrt(), basis.T)
        y += rest * math.sqrt((self.residual + b) / (self.residual + a))
        return y.reshape(x.shape).to(x.dtype)

    @torch.no_grad()
    def start(self, z: Tensor, sigma: float, history: tuple[float, ...] = (), text_pooled: Tensor | None = None, **_):
        """As in `ImplicitPrior.start`; z is taken to its coordinates once for all levels."""
        top = sigma_level(self.sigma_max) ** 2
        c, rest, mean, v, basis = self._rows(z * self.sigma_max, text_pooled)

        def drawn(level: float, denoised: bool) -> Tensor:
            s2 = sigma_level(level) ** 2
            along, beside = ((v + s2) / (v + top)).sqrt(), math.sqrt((self.residual + s2) / (self.residual + top))
            if denoised:
                along, beside = along * (v / (v + s2)), beside * self.residual / (self.residual + s2)
            y = torch.addmm(mean, c * along, basis.T) + rest * beside
            return y.reshape(z.shape).to(z.dtype)

        return drawn(sigma, False), [(level, drawn(level, True)) for level in sorted(history)]

    def state(self) -> tuple[dict[str, Tensor], dict]:
        config = {"shape": list(self.shape), "residual": self.residual}
        return dict(self.tensors), {**config, "sigma_trunc": self.sigma_trunc, "sigma_max": self.sigma_max}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict) -> TextLowRankPrior:
        return cls(tensors, tuple(config["shape"]), **_numbers(config))


@register_prior("text_mixture")
class TextMixturePrior(ClosedFormPrior):
    """A Gaussian mixture whose weights depend on the prompt.

    Args:
        tensors: those of `ClosedFormPrior` without classes, and text_mean [D], text_axes [D, T], text_weights [T, K].
    """

    conditions = ("text_pooled",)

    def __init__(self, tensors: dict[str, Tensor], shape, residual: float, **options):
        own = {name: tensors[name] for name in (*TEXT_TENSORS, "text_weights") if name in tensors}
        super().__init__({n: v for n, v in tensors.items() if n not in own}, shape, residual, **options)
        text = own["text_axes"].shape if "text_axes" in own else (0, 0)
        want = {"text_mean": text[:1], "text_axes": tuple(text), "text_weights": (text[-1], self.components)}
        self.tensors |= check_tensors(own, want)

    def _allowed(self, t: dict[str, Tensor], pooled: Tensor | None, batch: int) -> Tensor | None:
        """Log weights [B, K] of the components under each prompt; None without one."""
        if pooled is None:
            return None
        return (t["log_weights"] + embed(t, pooled, batch, t["mean"].device) @ t["text_weights"]).log_softmax(1)

    def _mixture_transport(self, t, c, a: float, b: float, allowed, branch: str | None = None) -> Tensor:
        if self.components == 1:
            return self._exact(t, c, a, b, c.new_zeros(len(c), dtype=torch.long))
        return self._flow(t, c, a, b, allowed)

    def denoise(self, x: Tensor, sigma: float, text_pooled: Tensor | None = None, **_) -> Tensor:
        """x [B, *shape] at noise level sigma -> E[x_0 | x, prompt], of x's shape and dtype."""
        return super().denoise(x, sigma, text_pooled)

    def transport(
        self, x: Tensor, sigma_from: float, sigma_to: float, text_pooled: Tensor | None = None, **_
    ) -> Tensor:
        """x [B, *shape] at sigma_from -> the same path's point at sigma_to."""
        return super().transport(x, sigma_from, sigma_to, text_pooled)

    def start(self, z: Tensor, sigma: float, history=(), text_pooled: Tensor | None = None, **_):
        """As in `ImplicitPrior.start`, without leaving the coordinates between the levels."""
        return super().start(z, sigma, history, text_pooled)

    def branch(self, batch: int, text_pooled: Tensor | None = None, **_) -> str:
        """All rows move by the mixture's flow, or all exactly where there is one component."""
        return "exact" if self.components == 1 else "flow"

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict) -> TextMixturePrior:
        return cls(tensors, tuple(config["shape"]), **_numbers(config))


def _numbers(config: dict) -> dict[str, float]:
    missing = [name for name in ("shape", "sigma_trunc", "residual", "sigma_max") if name not in config]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}")
    return {name: float(config[name]) for name in ("sigma_trunc", "sigma_max", "residual")}
