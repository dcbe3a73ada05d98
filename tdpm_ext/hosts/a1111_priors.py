"""Which prior a picture of the web UI uses: the one its setting names, or the one made for the loaded checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.priors.io import KEY, PriorFileError, load_prior

AUTOMATIC, NONE = "automatic", "none"
CARD = "a1111"  # in a prior's card: what the web UI knew when it was fitted


@dataclass(frozen=True)
class Pick:
    """A prior, its file's name and the start of its SHA-256; or the reason why there is none."""

    name: str
    prior: ImplicitPrior | None = None
    reason: str = ""
    digest: str = ""


def find(setting: str, shape: tuple[int, ...]) -> Pick:
    """The prior of the setting: a file's name, "none", or "automatic": the one fitted for this checkpoint and size.

    Args:
        shape: of one latent.
    """
    if setting == NONE:
        return Pick(NONE, None, "none is chosen in the settings")
    if setting != AUTOMATIC:
        return read(setting)
    own = checkpoint()
    looks = {name: glance(folder() / name) for name in list_files()}
    fits = [name for name, look in looks.items() if look is not None and own is not None and look == (shape, own)]
    size = "x".join(map(str, shape))
    if len(fits) == 1:
        return read(fits[0])
    if fits:
        reason = f"{len(fits)} priors fit this checkpoint at {size} ({', '.join(fits)}): choose one in the settings"
        return Pick(AUTOMATIC, None, reason)
    damaged = [name for name, look in looks.items() if look is None]
    reason = (
        f"models/tdpm holds no prior made here for this checkpoint at {size}: choose one in the settings, or fit one"
    )
    return Pick(AUTOMATIC, None, reason + (f" (not readable: {', '.join(damaged)})" if damaged else ""))


def read(name: str) -> Pick:
    """The prior file of that name; a pick without a prior when it cannot be used with the loaded checkpoint."""
    path = folder() / name
    try:
        if Path(name).name != name:  # a setting may come with somebody's picture
            raise FileNotFoundError(f"{name!r} is not a file name in models/tdpm")
        status = path.stat()
        pick = _read(name, path, status.st_mtime_ns, status.st_size)
    except FileNotFoundError:
        return Pick(name, None, f"models/tdpm has no file {name}")
    except (PriorFileError, OSError) as error:
        return Pick(name, None, " ".join(str(error).split()))
    fitted, own = _made_for(pick.prior.card), checkpoint()
    if None not in (fitted, own) and fitted != own:
        return Pick(name, None, f"{name} was fitted for checkpoint {fitted}, and {own} is loaded")
    return pick


def list_files() -> list[str]:
    """The names of all prior files."""
    return sorted(path.name for path in folder().glob("*.safetensors"))


def folder() -> Path:
    """``models/tdpm`` of the web UI."""
    from modules import paths

    return Path(paths.models_path) / "tdpm"


def checkpoint() -> str | None:
    """The web UI's short hash, or name, of the loaded checkpoint."""
    from modules import shared

    info = getattr(shared.sd_model, "sd_checkpoint_info", None)
    return getattr(info, "shorthash", None) or getattr(info, "name", None)


def glance(path: Path) -> tuple[tuple[int, ...], str | None] | None:
    """(shape, checkpoint) from a prior file's header, without its tensors; None for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
        return tuple(int(size) for size in header["shape"]), _made_for(header["card"])
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


@lru_cache(maxsize=8)
def _read(name: str, path: Path, changed: int, size: int) -> Pick:
    """Read once for every version of the file."""
    return Pick(name, load_prior(path), digest=hashlib.sha256(path.read_bytes()).hexdigest()[:10])


def _made_for(card: dict) -> str | None:
    made = card.get(CARD)
    return made.get("checkpoint") if isinstance(made, dict) else None
