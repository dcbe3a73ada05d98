"""Which prior a ComfyUI job uses: the one a node names, or the only one in ``models/tdpm`` that fits the model."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tdpm_ext.hosts.comfyui_model import Facts
from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.priors.io import KEY, PriorFileError, load_prior

log = logging.getLogger("tdpm_ext")
FOLDER = "tdpm"  # below ComfyUI's models, and the key under which ComfyUI knows it
OPTION = "tdpm_prior"  # in a MODEL's options
AUTOMATIC = "automatic"


@dataclass(frozen=True)
class Pick:
    """A prior as nodes hand it on: its file's name, and the prior or the reason why there is none.

    ``Pick(AUTOMATIC)`` leaves the choice to `find`.
    """

    name: str
    prior: ImplicitPrior | None = None
    reason: str = ""

    def __deepcopy__(self, memo) -> Pick:
        return self  # ComfyUI copies a MODEL's options deeply whenever it is patched; the prior's tensors are shared


def find(facts: Facts, shape: tuple[int, ...] | None, *picks: Pick | ImplicitPrior | None) -> Pick:
    """The first of ``picks`` that is set, else the only prior in the folder made for this model.

    Args:
        facts: of the model.
        shape: of one latent; None accepts every size.

    Returns:
        A pick whose prior can be used with the model, or one without a prior and with the reason.
    """
    pick = next((pick for pick in picks if pick is not None), Pick(AUTOMATIC))
    if isinstance(pick, ImplicitPrior):
        pick = Pick("the given prior", pick)
    if pick.prior is None and pick.name == AUTOMATIC:
        pick = only_one(facts, shape)
    if pick.prior is not None and (reason := _misfit(pick.prior, facts, shape)):
        return Pick(pick.name, None, f"{pick.name} {reason}")
    return pick


def only_one(facts: Facts, shape: tuple[int, ...] | None) -> Pick:
    """The one prior in the folder fitted for this very checkpoint and size."""
    if facts.flow:
        return Pick(AUTOMATIC, None, "the model is a rectified-flow model, whose x is not data + sigma * noise")
    names = list_files()
    looks = {name: glance(_path_of(name)) for name in names}
    fits = [
        name
        for name, look in looks.items()
        if look is not None and look[1] == facts.checkpoint is not None and shape in (None, look[0])
    ]
    size = "" if shape is None else f" at {_size(shape)}"
    if len(fits) > 1:
        reason = f"{len(fits)} priors fit this model{size} ({', '.join(fits)}): choose one with Load TDPM Prior"
        return Pick(AUTOMATIC, None, reason)
    if not fits:
        damaged = [name for name, look in looks.items() if look is None]
        reason = f"models/{FOLDER} holds no prior for this model{size}: Fit TDPM Prior makes one"
        return Pick(AUTOMATIC, None, reason + (f" (not readable: {', '.join(damaged)})" if damaged else ""))
    pick = read(fits[0])
    if pick.prior is not None:
        log.info("tdpm: %s is the only prior for this model%s", fits[0], size)
    return pick


def read(name: str) -> Pick:
    """The prior file of that name in the folder; a pick without a prior when it cannot be used."""
    path = _path_of(name)
    if path is None:
        return Pick(name, None, f"models/{FOLDER} has no file {name}")
    try:
        status = path.stat()
        return _read(name, path, status.st_mtime_ns, status.st_size)
    except (PriorFileError, OSError) as error:
        return Pick(name, None, " ".join(str(error).split()))


def versions(name: str | None) -> str:
    """Changes when the file of that name changes; for None, when any file in the folder does."""
    stamps = []
    for each in list_files() if name is None else [name]:
        path = _path_of(each)
        stamps.append(f"{each} {'' if path is None else path.stat().st_mtime_ns}")
    return "\n".join(stamps)


def list_files() -> list[str]:
    """The names of all prior files."""
    import folder_paths

    return folder_paths.get_filename_list(FOLDER)


def glance(path: Path | None) -> tuple[tuple[int, ...], str | None] | None:
    """(shape, checkpoint) from a prior file's header, without reading its tensors; None for anything else."""
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
        return tuple(int(size) for size in header["shape"]), header["card"].get("checkpoint")
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


@lru_cache(maxsize=8)
def _read(name: str, path: Path, changed: int, size: int) -> Pick:
    """Read once for every version of the file."""
    return Pick(name, load_prior(path))


def _path_of(name: str) -> Path | None:
    import folder_paths

    found = folder_paths.get_full_path(FOLDER, name)
    return None if found is None else Path(found)


def _misfit(prior: ImplicitPrior, facts: Facts, shape: tuple[int, ...] | None) -> str | None:
    """Why the prior is not for this model or size; both sides are named."""
    card, made = prior.card, prior.card.get("comfyui")
    made = made if isinstance(made, dict) else {}
    if facts.flow:
        return "does not apply: the model is a rectified-flow model, whose x is not data + sigma * noise"
    for name, what in (("family", "a model of type"), ("latent", "latents of type"), ("prediction", "prediction type")):
        here = getattr(facts, name)
        if name in made and here is not None and made[name] != here:
            return f"was fitted for {what} {made[name]}, and this one is {here}"
    if None not in (card.get("checkpoint"), facts.checkpoint) and card["checkpoint"] != facts.checkpoint:
        return f"was fitted for checkpoint {card['checkpoint']}, and this one is {facts.checkpoint}"
    if shape is not None and tuple(prior.shape) != shape:
        return f"was fitted for latents of {_size(prior.shape)}, and these are {_size(shape)}"
    return None


def _size(shape) -> str:
    return "x".join(map(str, shape))
