"""The state of a run in one safetensors file, written whole or not at all; the previous one stands until then."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tdpm_ext.training.watch import Health


def save_state(path: Path, tensors: dict[str, Tensor], step: int, seconds: float, health: Health) -> None:
    """``tensors`` and what the next step needs beside them. Random numbers need no state: they follow from the step."""
    about = {"step": str(step), "seconds": f"{seconds:.1f}", "health": json.dumps(asdict(health))}
    write_atomically(path, save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, about))


def load_state(path: Path, tensors: dict[str, Tensor]) -> tuple[int, float, Health]:
    """Copy the file's values into ``tensors``; returns (step, seconds, health).

    Raises:
        ValueError: the file is damaged, or it belongs to a run of other shapes; nothing was changed then.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        step, seconds, health = int(about["step"]), float(about["seconds"]), Health(**json.loads(about["health"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the state of a training run, or damaged ({error}): move it away") from error
    odd = [name for name in {*tensors, *found} if name not in found or name not in tensors]
    odd += [name for name in tensors if name in found and found[name].shape != tensors[name].shape]
    if odd:
        raise ValueError(f"{path} belongs to another run: {', '.join(sorted(odd)[:4])} do not fit; use another folder")
    with torch.no_grad():
        for name, value in tensors.items():
            value.copy_(found[name])
    return step, seconds, health


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one go."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
