"""Save and load priors: one ``.safetensors`` file, its header under the metadata key ``tdpm_prior``.

The header is JSON: version, kind, shape, sigma_trunc, coupled, prior_nfe, config (what the kind needs to rebuild
itself; shape and sigma_trunc are added when it is read), card (what the prior was fitted for) and plans (objective ->
budget -> plan). A file may come from anywhere: nothing in it is executed, and everything is checked before use.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from tdpm_ext.plan import Plan
from tdpm_ext.priors.registry import get_prior

KEY = "tdpm_prior"
VERSION = 1
OBJECTIVES = ("fidelity", "quality")
FIELDS = ("version", "kind", "shape", "sigma_trunc", "coupled", "prior_nfe", "config", "card", "plans")
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
MAX_HEADER = 8 * 2**20  # bytes
MAX_BUDGET = 1000
MAX_SIGMA = 1e12
MAX_NUMBERS = 2**31  # entries of one picture


class PriorFileError(ValueError):
    """A prior file that cannot be used. The message names the file, what is wrong, and what was expected."""


def save_prior(prior, path: str | os.PathLike) -> Path:
    """Write ``prior`` to ``path`` (a ``.safetensors`` file) and return the path.

    The file appears complete or not at all: it is written under a temporary name in the same folder and renamed.

    Raises:
        ValueError: the prior could not be loaded again (unregistered kind, NaN in a tensor, a card that is not JSON).
        OSError: the folder is missing, not writable, or full; what was at ``path`` before is untouched.
    """
    path = Path(path)
    tensors, config = prior.state()
    if get_prior(prior.kind) is not type(prior):
        raise ValueError(f"prior kind {prior.kind!r} is registered for another class than {type(prior).__qualname__}")
    tensors = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}; allowed are {', '.join(sorted(DTYPES))}")
        _check_finite(name, tensor)
    header = {
        "version": VERSION,
        "kind": prior.kind,
        "shape": list(prior.shape),
        "sigma_trunc": float(prior.sigma_trunc),
        "coupled": bool(prior.coupled),
        "prior_nfe": int(prior.prior_nfe),
        "config": config,
        "card": prior.card,
        "plans": {
            objective: {str(budget): plan.to_json() for budget, plan in sorted(table.items())}
            for objective, table in prior.plans.items()
        },
    }
    try:
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the prior's config and card must be plain JSON without NaN ({error})") from error
    if len(text) > MAX_HEADER // 2:
        raise ValueError(f"the prior's header takes {len(text)} bytes; at most {MAX_HEADER // 2}: shorten its card")
    _read_header(text)
    _write_atomically(path, to_bytes(tensors, {KEY: text}))
    return path


def load_prior(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    *,
    expect_shape: tuple[int, ...] | None = None,
    expect_checkpoint: str | None = None,
):
    """Read a prior written by ``save_prior``.

    Args:
        device: where its tensors go.
        expect_shape: [C, H, W] (or whatever the host samples); another shape in the file is an error.
        expect_checkpoint: fingerprint of the denoiser at hand; a prior fitted for another one is an error. A prior
            that is tied to no checkpoint (fitted from pictures alone) passes.

    Raises:
        PriorFileError: the file is missing, damaged, not a prior, of a newer version, of an unknown kind, or for
            another shape or checkpoint than expected.
    """
    path = Path(path)
    device = torch.device(device)
    try:
        text, tensors = _read(path)
        header = _read_header(text)
        _expect(header, expect_shape, expect_checkpoint)
        return _build(header, {name: tensor.to(device) for name, tensor in tensors.items()})
    except PriorFileError as error:
        raise PriorFileError(f"{path}: {error}") from error.__cause__


def _write_atomically(path: Path, content: bytes) -> None:
    target = Path(os.path.realpath(path))  # through a link, so that the link stays one
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:  # created with the user's umask
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = f"could not write {len(content)} bytes to {path} ({error.strerror}); nothing there was changed"
            raise type(error)(error.errno, reason) from error
        raise


def _read(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The header text and the tensors (copied to memory, checked for dtype and finiteness)."""
    try:
        with open(path, "rb") as file:
            claimed = int.from_bytes(file.read(8), "little")
        if claimed > MAX_HEADER:
            raise PriorFileError(f"its header claims {claimed} bytes; at most {MAX_HEADER} are read")
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise PriorFileError(f"not a prior: no {KEY!r} in its metadata (a checkpoint, perhaps?)")
            tensors = {name: _read_tensor(file, name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise PriorFileError(f"cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise PriorFileError(f"not a readable .safetensors file ({error})") from error
    return metadata[KEY], tensors


def _read_tensor(file, name: str) -> torch.Tensor:
    dtype = file.get_slice(name).get_dtype()
    if dtype not in DTYPES:
        raise PriorFileError(f"tensor {name[:80]!r} has dtype {dtype}; allowed are {', '.join(sorted(DTYPES))}")
    tensor = file.get_tensor(name).clone()  # the original may be a window on the file
    try:
        _check_finite(name, tensor)
    except ValueError as error:
        raise PriorFileError(str(error)) from error
    return tensor


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"tensor {name[:80]!r} holds NaN or infinite numbers")


def _read_header(text: str) -> dict:
    """Parse and check the header; plans become ``Plan`` objects, the shape a tuple."""
    try:
        header = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PriorFileError(f"its header is not valid JSON ({_first_line(error)})") from error
    if not isinstance(header, dict):
        raise PriorFileError(f"its header is a JSON {type(header).__name__}, not an object")
    _check_version(header.get("version"))
    missing = [name for name in FIELDS if name not in header]
    if missing:
        raise PriorFileError(f"its header lacks {', '.join(missing)}")
    checks = {
        "kind": isinstance(header["kind"], str) and len(header["kind"]) <= 64,
        "shape": _is_shape(header["shape"]),
        "sigma_trunc": _is_number(header["sigma_trunc"]) and 0 < header["sigma_trunc"] < MAX_SIGMA,
        "coupled": isinstance(header["coupled"], bool),
        "prior_nfe": _is_int(header["prior_nfe"]) and 0 <= header["prior_nfe"] <= MAX_BUDGET,
        "config": isinstance(header["config"], dict),
        "card": isinstance(header["card"], dict),
        "plans": isinstance(header["plans"], dict),
    }
    for name, good in checks.items():
        if not good:
            raise PriorFileError(f"its header's {name} is {_short(header[name])}, which is not valid")
    header["shape"] = tuple(header["shape"])
    header["plans"] = _read_plans(header["plans"])
    return header


def _check_version(version) -> None:
    if _is_int(version) and version > VERSION:
        raise PriorFileError(f"written in format {_short(version)}; this tdpm_ext reads {VERSION}: update tdpm_ext")
    if not _is_int(version) or version != VERSION:
        raise PriorFileError(f"its header's version is {_short(version)}; this tdpm_ext reads {VERSION}")


def _read_plans(tables: dict) -> dict[str, dict[int, Plan]]:
    plans: dict[str, dict[int, Plan]] = {}
    for objective, table in tables.items():
        if objective not in OBJECTIVES or not isinstance(table, dict):
            raise PriorFileError(f"plans for {_short(objective)}: objectives are {', '.join(OBJECTIVES)}")
        plans[objective] = {}
        for key, value in table.items():
            budget = int(key) if key.isascii() and key.isdigit() and len(key) < 5 else 0
            if not 1 <= budget <= MAX_BUDGET:
                raise PriorFileError(f"{objective} plan budget {_short(key)}: give 1 to {MAX_BUDGET}")
            try:
                plan = Plan.from_json(value)
            except ValueError as error:
                raise PriorFileError(f"{objective} plan for {budget} evaluations: {error}") from error
            if plan.steps > budget:
                raise PriorFileError(f"{objective} plan for {budget} evaluations spends {plan.steps}")
            plans[objective][budget] = plan
    return plans


def _expect(header: dict, shape, checkpoint: str | None) -> None:
    if shape is not None and tuple(shape) != header["shape"]:
        raise PriorFileError(f"fitted for shape {header['shape']}, but {tuple(shape)} is asked for: fit another prior")
    fitted = header["card"].get("checkpoint")
    if checkpoint is not None and fitted is not None and fitted != checkpoint:
        raise PriorFileError(f"fitted for checkpoint {_short(fitted)}, but {_short(checkpoint)} is in use")


def _build(header: dict, tensors: dict[str, torch.Tensor]):
    try:
        kind = get_prior(header["kind"])
    except ValueError as error:
        raise PriorFileError(str(error)) from error
    try:
        config = {**header["config"], "shape": list(header["shape"]), "sigma_trunc": float(header["sigma_trunc"])}
        prior = kind.from_state(dict(tensors), config)
        used = set(prior.state()[0])
    except Exception as error:  # a kind may be anybody's code, fed with an untrusted file
        raise PriorFileError(
            f"its content does not make a {header['kind']!r} prior ({type(error).__name__}: {_first_line(error)})"
        ) from error
    if extra := sorted(set(tensors) - used):
        raise PriorFileError(f"tensors that a {header['kind']!r} prior does not have: {_short(extra[:5])}")
    for name in ("shape", "coupled", "prior_nfe"):
        if getattr(prior, name) != header[name]:
            raise PriorFileError(f"its header says {name} {header[name]}, its tensors {getattr(prior, name)}")
    prior.sigma_trunc = config["sigma_trunc"]
    prior.card = header["card"]
    prior.plans = header["plans"]
    return prior


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_shape(value) -> bool:
    if not isinstance(value, list) or not 1 <= len(value) <= 4:
        return False
    return all(_is_int(size) and size > 0 for size in value) and math.prod(value) <= MAX_NUMBERS


def _short(value) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer too long to print
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:200]
