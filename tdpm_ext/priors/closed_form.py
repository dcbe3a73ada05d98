"""The arithmetic shared by every closed-form prior: a Gaussian mixture resolved in the leading principal axes.

The model of the data, in an orthonormal basis U of principal axes around the mean:
    * the first q coordinates follow a mixture of K full-covariance Gaussians (q = 0: none);
    * the remaining R - q coordinates are Gaussian with their pooled variances;
    * everything outside the R axes is isotropic with variance `residual` (never dropped: the noise lives there too).
`gaussian` is q = 0 with all axes, `lowrank` q = 0 with a few, `mixture` q > 0.

A Gaussian coordinate of variance v moves along the probability-flow ODE from sigma_a to sigma_b by the factor
sqrt((v + sigma_b^2) / (v + sigma_a^2)) (Wang & Vastola, arXiv 2412.09726). The mixture part has a closed-form
denoiser but no closed-form flow: it is integrated in variables in which the moment-matched Gaussian stands still,
so that only the mixture's departure from it costs steps, and no network call. Where one component is the only
candidate (a labelled mixture with `class_cond`), its own factor is exact and is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tdpm_ext.priors.base import ImplicitPrior

FLOW_STEP = 0.45  # step of the mixture flow in the variable of `flow_grid`
LIMITS = {"mean": 1, "basis": 2, "variances": 1, "log_weights": 1, "means": 2, "rotations": 3, "spreads": 2}


def flow_grid(sigma_from: float, sigma_to: float, scale: float) -> list[float]:
    """Noise levels for the mixture flow: geometric below ``scale``, sparse above, where it is all but Gaussian."""

    def progress(sigma: float) -> float:
        return math.log(sigma) - math.log1p(sigma / scale)

    a, b = progress(sigma_from), progress(sigma_to)
    steps = max(2, math.ceil(abs(b - a) / FLOW_STEP))
    levels = []
    for i in range(steps + 1):
        e = math.exp(a + (b - a) * i / steps)
        levels.append(e / (1 - e / scale))
    return [sigma_from, *levels[1:-1], sigma_to]


class ClosedFormPrior(ImplicitPrior):
    """A prior with a closed-form denoiser. Tensors are float32 on the CPU until used; see the module's docstring.

    Args:
        mean [d], basis [d, R] (orthonormal columns), variances [R] (total, along the basis), residual: float.
        log_weights [K], means [K, q], rotations [K, q, q] (columns: eigenvectors), spreads [K, q] (eigenvalues),
        classes int64 [K] (the class of each component, -1: none): empty for a plain Gaussian.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], shape, residual: float, **options):
        super().__init__(shape, **options)
        self.residual = float(residual)
        self.tensors = _validated(tensors, math.prod(self.shape))
        if not self.residual >= 0 or not math.isfinite(self.residual):
            raise ValueError(f"residual variance {residual} must be finite and not negative")
        # looked at once, here: on a GPU every look would wait for it, and none is allowed inside a CUDA graph
        self._labelled = bool((self.tensors["classes"] >= 0).all())
        q = self.tensors["means"].shape[1]
        self._scale = 2 * math.sqrt((float(self.tensors["variances"][:q].max()) if q else 0.0) + 1e-12)
        self._moved: dict[torch.device, dict[str, torch.Tensor]] = {}

    @property
    def components(self) -> int:
        return len(self.tensors["log_weights"])

    @property
    def num_classes(self) -> int:
        return int(self.tensors["classes"].max()) + 1 if self.components else 0

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors on ``device``, copied once."""
        if device.type == "cpu":
            return self.tensors
        if device not in self._moved:
            self._moved[device] = {k: v.to(device) for k, v in self.tensors.items()}
        return self._moved[device]

    # -- coordinates ---------------------------------------------------------------------------------------------

    def _split(self, x: torch.Tensor):
        """x -> float32 coordinates along the basis [B, R], and what lies outside it [B, d] (None: nothing does)."""
        self.check(x)
        t = self.on(x.device)
        y = x.reshape(len(x), -1).float() - t["mean"]
        c = y @ t["basis"]
        outside = None if t["basis"].shape[0] == t["basis"].shape[1] else torch.addmm(y, c, t["basis"].T, alpha=-1)
        return c, outside

    def _join(self, c: torch.Tensor, outside: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        t = self.on(like.device)
        y = torch.addmm(t["mean"], c, t["basis"].T)
        if outside is not None:
            y += outside
        return y.reshape(like.shape).to(like.dtype)

    def _shrink(self, t, c, outside, sigma: float, allowed):
        """Coordinates of x at noise level sigma -> coordinates of E[x_0 | x]."""
        v = t["variances"]
        out = c * (v / (v + sigma**2))
        if self.components:
            q = t["means"].shape[1]
            out[:, :q] = self._mixture_denoise(t, c[:, :q], sigma, allowed)
        return out, None if outside is None else outside * (self.residual / (self.residual + sigma**2))

    def _move(self, t, c, outside, a: float, b: float, allowed, branch: str | None = None):
        """Coordinates of x at noise level a -> those of the same path's point at b."""
        v = t["variances"]
        out = c * ((v + b * b) / (v + a * a)).sqrt()
        if self.components:
            q = t["means"].shape[1]
            out[:, :q] = self._mixture_transport(t, c[:, :q], a, b, allowed, branch)
        ratio = math.sqrt((self.residual + b * b) / (self.residual + a * a))
        return out, None if outside is None else outside * ratio

    # -- the prior's interface -----------------------------------------------------------------------------------

    @torch.no_grad()
    def denoise(self, x: torch.Tensor, sigma: float, class_cond: torch.Tensor | None = None, **_) -> torch.Tensor:
        """x [B, *shape] at noise level sigma -> E[x_0 | x], of x's shape and dtype."""
        sigma, t = sigma_level(sigma), self.on(x.device)
        c, outside = self._split(x)
        return self._join(*self._shrink(t, c, outside, sigma, self._allowed(t, class_cond, len(x))), x)

    @torch.no_grad()
    def transport(
        self, x: torch.Tensor, sigma_from: float, sigma_to: float, class_cond: torch.Tensor | None = None, **_
    ) -> torch.Tensor:
        """x [B, *shape] at sigma_from -> the same path's point at sigma_to. Exact for one component."""
        a, b, t = sigma_level(sigma_from), sigma_level(sigma_to), self.on(x.device)
        c, outside = self._split(x)
        return self._join(*self._move(t, c, outside, a, b, self._allowed(t, class_cond, len(x))), x)

    @torch.no_grad()
    def start(
        self,
        z: torch.Tensor,
        sigma: float,
        history: Sequence[float] = (),
        class_cond: torch.Tensor | None = None,
        branch: str | None = None,
        **_,
    ) -> tuple[torch.Tensor, list[tuple[float, torch.Tensor]]]:
        """As in `ImplicitPrior.start`, without leaving the coordinates between the levels.

        Args:
            branch: what `branch` says of these conditions; given, nothing waits for the device.
        """
        t, at, seen = self.on(z.device), self.sigma_max, []
        place = self._split(z * self.sigma_max)
        allowed = self._allowed(t, class_cond, len(z))
        for level in sorted(map(sigma_level, history), reverse=True):
            place, at = self._move(t, *place, at, level, allowed, branch), level
            seen.insert(0, (level, self._join(*self._shrink(t, *place, level, allowed), z)))
        return self._join(*self._move(t, *place, at, sigma_level(sigma), allowed, branch), z), seen

    def branch(self, batch: int, class_cond: torch.Tensor | None = None, **_) -> str:
        """How the rows of a draw move: by their only component's "exact" flow, by the mixture's "flow", or "mixed".

        Reads the labels, which waits for a GPU.
        """
        label = None if class_cond is None else torch.as_tensor(class_cond).cpu()
        allowed = self._allowed(self.tensors, label, batch)
        if allowed is None:
            return "exact" if self.components == 1 else "flow"
        alone = allowed.sum(1) == 1
        return "exact" if bool(alone.all()) else "mixed" if bool(alone.any()) else "flow"

    # -- the mixture ---------------------------------------------------------------------------------------------

    def _allowed(self, t: dict, class_cond: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        """bool [B, K]: components each row may use; None when all may (no condition, or no class in this prior).

        A kind may return log weights [B, K] instead: how much each row uses each component.
        """
        if class_cond is None or not self._labelled:
            return None
        label = torch.as_tensor(class_cond, device=t["classes"].device).reshape(-1)
        if len(label) not in (1, batch):
            raise ValueError(f"class_cond holds {len(label)} labels for {batch} pictures: give one per picture")
        own = t["classes"][None] == label.expand(batch)[:, None]
        return own | ~own.any(1, keepdim=True)

    def _mixture_denoise(self, t, c, sigma, allowed) -> torch.Tensor:
        """c [B, q] -> E[c_0 | c] [B, q] under the mixture."""
        spread = t["spreads"]  # [K, q]
        y = torch.bmm(c[None] - t["means"][:, None], t["rotations"])  # [K, B, q], along each component's own axes
        scale = (spread + sigma**2).reciprocal()
        quad = torch.bmm(y.square(), scale[:, :, None])[..., 0].T.double()
        weighed = allowed is not None and allowed.is_floating_point()
        logits = (allowed if weighed else t["log_weights"]).double() - 0.5 * (quad - scale.double().log().sum(1))
        if allowed is not None and not weighed:
            logits = logits.masked_fill(~allowed, -torch.inf)  # [B, K]
        share = logits.softmax(1).float()  # [B, K]
        kept = y * (spread * scale)[:, None] * share.T[:, :, None]
        turned = kept.transpose(0, 1).reshape(len(c), -1) @ t["rotations"].mT.reshape(-1, c.shape[1])
        return torch.addmm(turned, share, t["means"])

    def _mixture_transport(self, t, c, a: float, b: float, allowed, branch: str | None = None) -> torch.Tensor:
        """Rows with one candidate component move exactly, the others by `_flow`: each row alone decides which."""
        if allowed is None and branch is None:
            branch = "exact" if self.components == 1 else "flow"
        if branch == "flow":
            return self._flow(t, c, a, b, allowed)
        k = c.new_zeros(len(c), dtype=torch.long) if allowed is None else allowed.int().argmax(1)
        if branch == "exact":
            return self._exact(t, c, a, b, k)
        alone = allowed.sum(1) == 1
        exact, rest = alone.nonzero()[:, 0], (~alone).nonzero()[:, 0]
        out = torch.empty_like(c)
        if len(exact):
            out[exact] = self._exact(t, c[exact], a, b, k[exact])
        if len(rest):
            out[rest] = self._flow(t, c[rest], a, b, allowed[rest])
        return out

    @staticmethod
    def _exact(t, c, a: float, b: float, k: torch.Tensor) -> torch.Tensor:
        """Each row by the flow of one component, that of index k [B]."""
        mean, turn, spread = t["means"][k], t["rotations"][k], t["spreads"][k]
        y = torch.einsum("bq,bqr->br", c - mean, turn) * ((spread + b * b) / (spread + a * a)).sqrt()
        return torch.einsum("br,bqr->bq", y, turn) + mean

    def _flow(self, t, c, a: float, b: float, allowed) -> torch.Tensor:
        """Heun's method on w = (c - m) / sqrt(v + sigma^2), constant under the Gaussian of the same moments.

        dw/dlog(sigma) = -(D_mixture - D_gaussian) / sqrt(v + sigma^2). Moments are those of the candidates.
        """
        m, v = self._candidate_moments(t, allowed)

        def slope(w: torch.Tensor, sigma: float) -> torch.Tensor:
            root = (v + sigma**2).sqrt()
            y = w * root
            return (m + y * (v / (v + sigma**2)) - self._mixture_denoise(t, m + y, sigma, allowed)) / root

        levels = flow_grid(a, b, self._scale)
        w = (c - m) / (v + a * a).sqrt()
        for here, there in zip(levels, levels[1:], strict=False):
            h = math.log(there / here)
            first = slope(w, here)
            w = w + (0.5 * h) * (first + slope(w + h * first, there))
        return m + w * (v + b * b).sqrt()

    @staticmethod
    def _candidate_moments(t, allowed) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance along each axis of the components each row may use: [B, q] both, or [1, q] for all."""
        weights = t["log_weights"].softmax(0)[None]
        if allowed is not None:
            weights = allowed.exp() if allowed.is_floating_point() else weights * allowed
            weights = weights / weights.sum(1, keepdim=True)
        mean = weights @ t["means"]
        within = torch.einsum("kqr,kr->kq", t["rotations"].square(), t["spreads"])
        return mean, (weights @ (within + t["means"].square()) - mean.square()).clamp_min(0)

    # -- files ---------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        config = {"shape": list(self.shape), "residual": self.residual}
        return dict(self.tensors), {**config, "sigma_trunc": self.sigma_trunc, "sigma_max": self.sigma_max}

    @classmethod
    def from_state(cls, tensors: dict[str, torch.Tensor], config: dict) -> ClosedFormPrior:
        missing = [k for k in ("shape", "sigma_trunc", "residual", "sigma_max") if k not in config]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        keys = {k: float(config[k]) for k in ("sigma_trunc", "sigma_max", "residual")}
        return cls(tensors, tuple(config["shape"]), **keys)


def gaussian_tensors(mean: torch.Tensor, basis: torch.Tensor, variances: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of a prior without mixture components."""
    return {
        "mean": mean.float(),
        "basis": basis.float(),
        "variances": variances.float().clamp_min(0),
        "log_weights": torch.zeros(0),
        "means": torch.zeros(0, 0),
        "rotations": torch.zeros(0, 0, 0),
        "spreads": torch.zeros(0, 0),
        "classes": torch.zeros(0, dtype=torch.long),
    }


def sigma_level(sigma: float | torch.Tensor) -> float:
    """One noise level as a float; a [B] tensor of equal entries is accepted, as samplers pass it."""
    if isinstance(sigma, torch.Tensor):
        values = sigma.reshape(-1)
        if values.numel() > 1 and bool((values != values[0]).any()):
            raise ValueError("a closed-form prior takes one sigma for the whole batch; the values given differ")
        sigma = float(values[0])
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma {sigma} must be positive and finite")
    return float(sigma)


def _validated(tensors: dict[str, torch.Tensor], d: int) -> dict[str, torch.Tensor]:
    """Check names, shapes and values of untrusted tensors; return them as contiguous float32 / int64."""
    names = {*LIMITS, "classes"}
    if set(tensors) != names:
        raise ValueError(f"tensors are {sorted(tensors)}; a closed-form prior has {sorted(names)}")
    for name, dims in LIMITS.items():
        if tensors[name].ndim != dims or not tensors[name].is_floating_point():
            shape = tuple(tensors[name].shape)
            raise ValueError(f"{name} has shape {shape}, {tensors[name].dtype}: want {dims}-d floats")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    t = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    r, k, q = t["basis"].shape[1], t["log_weights"].shape[0], t["means"].shape[1]
    want = {"mean": (d,), "basis": (d, r), "variances": (r,)}
    want |= {"means": (k, q), "rotations": (k, q, q), "spreads": (k, q)}
    for name, shape in want.items():
        if tuple(t[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(t[name].shape)}; {shape} fits the other tensors and the picture")
    if t["classes"].shape != (k,) or t["classes"].dtype != torch.long or q > r or (k > 0) != (q > 0):
        raise ValueError("classes, components and rank do not fit together")
    if bool((t["variances"] < 0).any()) or bool((t["spreads"] < 0).any()):
        raise ValueError("a variance is negative")
    return {name: v if name == "classes" else v.float() for name, v in t.items()}
