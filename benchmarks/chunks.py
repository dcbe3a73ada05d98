"""Long drawings in finished pieces: batches of consecutive seeds as files, shared among processes."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@dataclass
class Team:
    """The processes that share the work: this one's rank, how many there are, where it computes."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    state: object | None = None

    @classmethod
    def join(cls, device: str | None) -> Team:
        """What `accelerate launch` started, or this process alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state.device, state)

    def wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()

    def leave(self) -> None:
        if self.state is not None:
            self.state.destroy_process_group()


def chunks_of(seeds: range, batch: int) -> list[range]:
    """Consecutive seeds, ``batch`` at a time."""
    return [seeds[i : i + batch] for i in range(0, len(seeds), batch)]


class Store:
    """Finished batches as files under their first seed's number: pictures float32, features of each network."""

    def __init__(self, folder: Path, identity: dict):
        self.folder = folder / "chunks"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def path(self, seeds: range) -> Path:
        return self.folder / f"{seeds[0]:010d}-{len(seeds)}.safetensors"

    def read(self, seeds: range) -> dict[str, torch.Tensor] | None:
        """The batch, or None if it is not there or was cut short. Raises ValueError for one of other settings."""
        path = self.path(seeds)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("identity") != self.identity:
                    raise ValueError(f"{path} was drawn with other settings: give another --out, or delete it")
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError:
            return None

    def write(self, seeds: range, tensors: dict[str, torch.Tensor]) -> None:
        temporary = self.folder / f".{seeds[0]}.{os.getpid()}"
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"identity": self.identity})
        os.replace(temporary, self.path(seeds))


def gather(store: Store, parts: list[range], name: str) -> torch.Tensor:
    return torch.cat([store.read(part)[name] for part in parts])
