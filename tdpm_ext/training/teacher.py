"""The checkpoint's own trajectories, drawn once and kept on disk: what regression aims at, and data where none are.

A folder of ``part-0000.safetensors`` files, each written whole; an interrupted drawing goes on with the next part. Row
i belongs to seed FIRST_SEED + i, the seed that ``tdpm_ext.sample`` would give the same noise to.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from tdpm_ext.decide import seeded_noise
from tdpm_ext.schedule import karras
from tdpm_ext.solver import solve
from tdpm_ext.training.conditions import Classes
from tdpm_ext.training.options import Options
from tdpm_ext.training.state import write_atomically

FIRST_SEED = 70_000_000  # away from the seeds that people and benchmarks use
ROWS = 512  # trajectories in one part
SIGMA_MIN = 0.02  # where they end before the last step to 0


class Teacher:
    """Trajectories of one frozen denoiser.

    Attributes:
        z [N, *shape] unit noise, labels int64 [N] or None, ``state`` x at ``sigma_trunc``, ``denoised`` D(state) there,
        ``final`` finished pictures; float32 on the device. ``target``: whichever of them the run's loss aims at.
    """

    def __init__(self, z: Tensor, labels: Tensor | None, state: Tensor, denoised: Tensor, final: Tensor):
        self.z, self.labels, self.state, self.denoised, self.final = z, labels, state, denoised, final
        self.target = state

    def aim(self, what: str) -> None:
        """Let ``target`` be "state", "denoised" or "final"."""
        self.target = {"state": self.state, "denoised": self.denoised, "final": self.final}[what]


def trajectories(
    options: Options, checkpoint, folder: Path, conditions: Classes, device: torch.device, *, progress: bool = True,
    accelerate: str = "off",
) -> Teacher | None:  # fmt: skip
    """Those that a run with these options needs of its checkpoint, drawn or read (see `draw_teacher`); None: none."""
    if not options.teacher:
        return None
    settings = {"shape": checkpoint.shape, "sigma_trunc": options.sigma_trunc, "steps": options.teacher_steps}
    settings |= {"sigma_max": checkpoint.sigma_max, "sigma_min": SIGMA_MIN, "cond_scale": options.cond_scale}
    settings |= {"count": options.teacher, "checkpoint": checkpoint.fingerprint, "conditions": conditions}
    model = checkpoint.model.to(device)
    return draw_teacher(model, folder, device=device, progress=progress, accelerate=accelerate, **settings)


def levels_through(sigma_max: float, sigma_trunc: float, sigma_min: float, steps: int) -> list[float]:
    """A Karras schedule of about ``steps`` levels that passes through ``sigma_trunc`` exactly; ends in 0."""
    levels = karras(steps, sigma_max, sigma_min, 7.0)[:-1].tolist()
    near = min(range(1, len(levels)), key=lambda i: abs(levels[i] / sigma_trunc - 1))
    levels[near] = sigma_trunc
    return [*sorted(set(levels), reverse=True), 0.0]


def draw_teacher(
    model,
    folder: Path,
    *,
    count: int,
    shape: tuple[int, ...],
    sigma_trunc: float,
    sigma_max: float,
    sigma_min: float,
    steps: int,
    conditions: Classes,
    cond_scale: float,
    checkpoint: str | None,
    device: torch.device,
    progress: bool = True,
    accelerate: str = "off",
) -> Teacher:
    """Draw what is missing in ``folder`` and return all ``count`` trajectories, on ``device``.

    Args:
        accelerate: precision of `tdpm_ext.kernels.accelerate` while the denoiser draws, or "off".

    Raises:
        ValueError: the folder holds trajectories of another checkpoint or with other settings.
    """
    facts = {"shape": list(shape), "sigma_trunc": sigma_trunc, "sigma_max": sigma_max, "sigma_min": sigma_min}
    facts |= {"steps": steps, **conditions.facts(), "cond_scale": cond_scale, "checkpoint": checkpoint}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    levels = levels_through(sigma_max, sigma_trunc, sigma_min, steps)
    parts = []
    with _accelerated(model, accelerate):
        for first in tqdm(range(0, count, ROWS), desc="trajectories", disable=not progress or count <= ROWS):
            path = folder / f"part-{first // ROWS:04d}.safetensors"
            rows = min(ROWS, count - first)
            part = _read(path, name, rows)
            if part is None:
                part = _draw(model, first, rows, shape, levels, sigma_trunc, conditions, cond_scale, device)
                _write(path, part, {"settings": name, **{key: json.dumps(value) for key, value in facts.items()}})
            parts.append(part)
    joined = {key: torch.cat([part[key][: count - k * ROWS] for k, part in enumerate(parts)]) for key in parts[0]}
    z = seeded_noise(shape, range(FIRST_SEED, FIRST_SEED + count)).to(device)
    labels = conditions.numbers(0, count, device)
    return Teacher(z, labels, *(joined[key].to(device) for key in ("state", "denoised", "final")))


def _accelerated(model, precision: str):
    """A context in which the denoiser is faster; training, which needs its gradients, finds it as it was."""
    if precision == "off":
        return nullcontext()
    from tdpm_ext.kernels import accelerate

    return accelerate(model, precision=precision)


@torch.no_grad()
def _draw(model, first, rows, shape, levels, sigma_trunc, conditions, cond_scale, device) -> dict[str, Tensor]:
    kept: dict[str, list[Tensor]] = {"state": [], "denoised": [], "final": []}
    size = rows if device.type == "cuda" else 64
    for at in range(first, first + rows, size):
        here = min(size, first + rows - at)
        seeds = range(FIRST_SEED + at, FIRST_SEED + at + here)
        extra = conditions.args(conditions.numbers(at, here, device))
        if cond_scale != 1.0:
            extra["cond_scale"] = cond_scale

        def keep(info):
            if abs(float(info["sigma"]) / sigma_trunc - 1) < 1e-5:
                kept["state"].append(info["x"].clone())
                kept["denoised"].append(info["denoised"])

        x = seeded_noise(shape, seeds).to(device) * levels[0]
        kept["final"].append(solve(model, x, levels, extra, keep, True))
    part = {key: torch.cat(values).cpu() for key, values in kept.items()}
    if not all(bool(value.isfinite().all()) for value in part.values()):
        raise ValueError("the checkpoint's own run gave NaN or infinity: check the checkpoint, its units and sigma_max")
    return part


def _read(path: Path, name: str, rows: int) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("settings") != name:
            raise ValueError(f"{path} holds trajectories of another checkpoint or other settings: use another folder")
        part = {key: file.get_tensor(key) for key in ("state", "denoised", "final")}
    return part if len(part["final"]) >= rows else None


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    write_atomically(path, save({key: value.contiguous() for key, value in tensors.items()}, metadata))
