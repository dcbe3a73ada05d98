"""Noise schedules as pure functions of sigma, the noise std in data units (x_sigma = x_0 + sigma * eps).

A step index means something only together with its table, so every other module speaks sigma; the converters
live here. Everything is computed in float64.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import torch

# Align Your Steps (Sabour, Fidler, Kreis, arXiv 2404.14507): the published 10-step schedules, 11 noise levels.
_ALIGN_YOUR_STEPS = {
    "sd15": (14.6146, 6.4746, 3.8637, 2.6946, 1.8842, 1.3944, 0.9643, 0.6524, 0.3977, 0.1515, 0.0292),
    "sdxl": (14.6146, 6.3184, 3.7682, 2.1812, 1.3405, 0.8621, 0.5551, 0.3799, 0.2332, 0.1114, 0.0292),
}
# A host sigma this close to sigma_trunc counts as equal to it: a step of 0.1 % would waste an evaluation.
CLOSE = 1e-3


def _table(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def vp_linear_sigmas(n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> torch.Tensor:
    """Sigma at each step index of the linear-beta table (Ho et al., arXiv 2006.11239). float64 [n], ascending."""
    _check_count(n)
    betas = torch.linspace(beta_start, beta_end, n, dtype=torch.float64)
    return _table((1 - betas).cumprod(0))


def cosine_sigmas(n: int = 1000, s: float = 0.008) -> torch.Tensor:
    """Sigma at each step index of the cosine table (Nichol and Dhariwal, arXiv 2102.09672), beta clipped at 0.999.

    float64 [n], ascending.
    """
    _check_count(n)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    curve = ((steps + s) / (1 + s) * math.pi / 2).cos() ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return _table((1 - betas).cumprod(0))


def sd_sigmas(n: int = 1000) -> torch.Tensor:
    """Sigma at each step index of Stable Diffusion's scaled-linear table. float64 [n], ascending."""
    _check_count(n)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, n, dtype=torch.float64) ** 2
    return _table((1 - betas).cumprod(0))


def sigma_to_index(sigma: float, table: torch.Tensor) -> float:
    """The (fractional) step index of ``sigma``: linear in log sigma, clamped to the table's ends.

    Args:
        sigma: > 0.
        table: [n] ascending, all > 0.
    """
    values = _check_table(table)
    sigma = float(sigma)
    if not sigma > 0 or math.isinf(sigma):
        raise ValueError(f"sigma is {sigma}: give a finite number above 0")
    if sigma <= values[0]:
        return 0.0
    if sigma >= values[-1]:
        return float(len(values) - 1)
    low = bisect_right(values, sigma) - 1
    span = math.log(values[low + 1] / values[low])
    return low + math.log(sigma / values[low]) / span


def index_to_sigma(index: float, table: torch.Tensor) -> float:
    """Sigma at a (fractional) step index: linear in log sigma, clamped to the table's ends."""
    values = _check_table(table)
    index = float(index)
    if math.isnan(index):
        raise ValueError("step index is NaN: give a number")
    index = min(max(index, 0.0), len(values) - 1.0)
    low = min(int(index), max(len(values) - 2, 0))
    if index == low or len(values) == 1:
        return values[low]
    fraction = index - low
    return values[low] * (values[low + 1] / values[low]) ** fraction


def karras(n: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> torch.Tensor:
    """Karras et al. (arXiv 2206.00364): evenly spaced in sigma**(1/rho). float64 [n+1], decreasing, last 0."""
    _check_range(n, sigma_max, sigma_min)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho is {rho}: give a finite number above 0")
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _finish((high + ramp * (low - high)) ** rho, sigma_max, sigma_min)


def exponential(n: int, sigma_max: float, sigma_min: float) -> torch.Tensor:
    """Evenly spaced in log sigma. float64 [n+1], decreasing, last 0."""
    _check_range(n, sigma_max, sigma_min)
    levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), n, dtype=torch.float64).exp()
    return _finish(levels, sigma_max, sigma_min)


def align_your_steps(n: int, model: str = "sd15", sigma_max: float | None = None) -> torch.Tensor:
    """Align Your Steps for Stable Diffusion, stretched to n steps by interpolation in log sigma.

    Args:
        model: "sd15" or "sdxl".
        sigma_max: start here instead of 14.6146: the rest of the published curve is divided evenly (above the
            table its first segment is continued).

    Returns:
        float64 [n+1], decreasing, last 0.
    """
    _check_count(n)
    if model not in _ALIGN_YOUR_STEPS:
        raise ValueError(f"no Align Your Steps schedule for {model!r}: known are {', '.join(_ALIGN_YOUR_STEPS)}")
    logs = torch.tensor(_ALIGN_YOUR_STEPS[model], dtype=torch.float64).log()
    last = len(logs) - 1
    start = 0.0
    if sigma_max is not None:
        if not math.exp(logs[-1]) < sigma_max < math.inf:
            raise ValueError(f"sigma_max is {sigma_max}: the {model} schedule ends at {math.exp(logs[-1]):.3f}")
        start = _position(math.log(sigma_max), logs)
    positions = torch.linspace(start, last, n + 1, dtype=torch.float64)
    low = positions.floor().long().clamp(0, last - 1)
    sigmas = (logs[low] + (positions - low) * (logs[low + 1] - logs[low])).exp()
    sigmas[0] = math.exp(logs[0]) if sigma_max is None else sigma_max
    sigmas[-1] = 0
    return sigmas


def _position(log_sigma: float, logs: torch.Tensor) -> float:
    """Where on the descending curve ``logs`` the level lies; negative above its start."""
    values = logs.tolist()
    low = next((i for i in range(len(values) - 2) if log_sigma > values[i + 1]), len(values) - 2)
    return low + (log_sigma - values[low]) / (values[low + 1] - values[low])


def respace(sigmas: torch.Tensor | Sequence[float], sigma_trunc: float, steps: int | None = None) -> torch.Tensor:
    """The host's schedule moved to start at ``sigma_trunc``: same count, same shape in log sigma, same end.

    The levels from the first to the last non-zero one are mapped affinely in log sigma onto the range from
    ``sigma_trunc`` to the host's last non-zero sigma. Where that last one is not below ``sigma_trunc`` (a host with
    very few steps) and the host ends in 0, the range ends at ``sigma_trunc / 10``.

    Args:
        sigmas: [n+1] decreasing; a non-zero last sigma is kept.
        sigma_trunc: the new first sigma.
        steps: another number of steps, if wanted.

    Returns:
        float64 [steps+1] on the device of ``sigmas``, first = sigma_trunc, last = the host's last.

    Raises:
        ValueError: fewer than two sigmas, not decreasing, or a last sigma that is not below ``sigma_trunc``.
    """
    levels = _descending(sigmas, sigma_trunc)
    steps = len(levels) - 1 if steps is None else steps
    _check_count(steps, "steps")
    end = levels[-1].item()
    above_zero = levels[levels > 0]
    wanted = steps if end == 0 else steps + 1
    floor = above_zero[-1].item()
    if floor >= sigma_trunc * (1 - CLOSE):
        floor = sigma_trunc / 10
    shape = torch.linspace(0, 1, 2, dtype=torch.float64)
    if above_zero[0] > above_zero[-1]:
        shape = (above_zero[0] / above_zero).log() / (above_zero[0] / above_zero[-1]).log()
    shape = shape if len(shape) == wanted else _resample(shape, wanted)
    out = sigma_trunc * (shape * math.log(floor / sigma_trunc)).exp()
    out[0] = sigma_trunc
    if end > 0:
        out[-1] = end
    else:
        out = torch.cat([out, out.new_zeros(1)])
    return out.to(_device(sigmas))


def _resample(curve: torch.Tensor, count: int) -> torch.Tensor:
    """``curve`` [n] read at ``count`` evenly spaced positions, by linear interpolation."""
    positions = torch.linspace(0, len(curve) - 1, count, dtype=torch.float64)
    low = positions.floor().long().clamp(max=len(curve) - 2)
    return curve[low] + (positions - low) * (curve[low + 1] - curve[low])


def cut(sigmas: torch.Tensor | Sequence[float], sigma_trunc: float) -> torch.Tensor:
    """``sigma_trunc`` followed by the host's sigmas below it (one within 0.1 % of it counts as equal).

    Args:
        sigmas: [n+1] decreasing.
        sigma_trunc: the new first sigma.

    Returns:
        float64 on the device of ``sigmas``, first = sigma_trunc, last = the host's last.

    Raises:
        ValueError: fewer than two sigmas, not decreasing, or a last sigma that is not below ``sigma_trunc``.
    """
    levels = _descending(sigmas, sigma_trunc)
    below = levels[levels < sigma_trunc * (1 - CLOSE)]
    return torch.cat([levels.new_tensor([sigma_trunc]), below]).to(_device(sigmas))


def check_sigmas(sigmas: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """The schedule as float64 [n] on the CPU (one transfer).

    Raises:
        ValueError: not 1-D, or an entry is NaN, infinite or negative.
    """
    try:
        levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach()
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"sigmas must be a 1-D tensor or a list of numbers ({error})") from error
    if levels.ndim != 1:
        raise ValueError(f"sigmas have shape {tuple(levels.shape)}: give a 1-D schedule of length steps + 1")
    if not all(0 <= level < math.inf for level in levels.tolist()):
        raise ValueError(f"sigmas {_short(levels)} hold NaN, infinite or negative entries: give finite numbers >= 0")
    return levels


def _descending(sigmas, sigma_trunc: float) -> torch.Tensor:
    levels = check_sigmas(sigmas)
    if not 0 < sigma_trunc < math.inf:
        raise ValueError(f"sigma_trunc is {sigma_trunc}: give a finite number above 0")
    if len(levels) < 2:
        raise ValueError(f"sigmas have {len(levels)} entries: a schedule needs at least two")
    if (levels.diff() > 0).any():
        raise ValueError(f"sigmas {_short(levels)} rise: give a decreasing schedule")
    if levels[0] == 0 or levels[-1] >= sigma_trunc * (1 - CLOSE):
        raise ValueError(f"sigmas {_short(levels)} never go below sigma_trunc={sigma_trunc}: nothing to run")
    return levels


def _device(sigmas) -> torch.device:
    return sigmas.device if isinstance(sigmas, torch.Tensor) else torch.device("cpu")


def _short(levels: torch.Tensor) -> str:
    shown = ", ".join(f"{value:.4g}" for value in levels[:8].tolist())
    return f"[{shown}{', ...' if len(levels) > 8 else ''}]"


def _check_count(n: int, name: str = "n") -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{name} is {n!r}: give a whole number of at least 1")


def _check_range(n: int, sigma_max: float, sigma_min: float) -> None:
    _check_count(n)
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f"sigma_max={sigma_max}, sigma_min={sigma_min}: give 0 < sigma_min <= sigma_max, both finite")


def _finish(levels: torch.Tensor, sigma_max: float, sigma_min: float) -> torch.Tensor:
    """Pin the ends (no rounding through logs and powers) and append 0."""
    levels[-1] = sigma_min
    levels[0] = sigma_max
    return torch.cat([levels, levels.new_zeros(1)])


def _check_table(table: torch.Tensor) -> list[float]:
    levels = check_sigmas(table)
    if len(levels) == 0 or levels[0] <= 0 or (levels.diff() <= 0).any():
        raise ValueError("the sigma table must be non-empty, above 0 and strictly ascending")
    return levels.tolist()
