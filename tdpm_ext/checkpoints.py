"""Open what k-diffusion writes, as one kind of denoiser.

``open_checkpoint`` reads inference ``.safetensors`` files (config JSON in the metadata, as k-diffusion's
``convert_for_inference`` writes them), training ``.pth`` files (their EMA weights) and the ``NAME_state.json`` that
names the latest of these, for k-diffusion's model types ``image_v1``, ``image_transformer_v1`` and, where the installed
k-diffusion has it, ``image_transformer_v2``. Nothing is ever unpickled.

Every model is called the same way, ``model(x, sigma, class_cond=labels, cond_scale=3.0) -> denoised``:
k-diffusion's transformers take a label index with one more index for "dropped"; its U-Net knows no labels, so
class-conditional U-Nets take a one-hot ``mapping_cond`` as wide as ``dataset.num_classes``, zeros for "dropped".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tdpm_ext.denoiser import CheckpointModel
from tdpm_ext.optional import import_k_diffusion

MODEL_TYPES = ("image_v1", "image_transformer_v1", "image_transformer_v2")
SUPPORTED = "k-diffusion inference .safetensors and training .pth files, and the _state.json that names the latest .pth"
CONFIG_HELP = (
    "k-diffusion's convert_for_inference.py writes it into the file; or pass the training config JSON yourself "
    "(config=PATH, on the command line --config PATH)"
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    ``shape`` is (C, H, W); ``sigma_min``/``sigma_max`` the noise range it was trained for; ``num_classes`` 0 when it
    takes no labels; ``fingerprint`` 16 hex digits that name the tensors in the file (see ``fingerprint_tensors``).
    """

    model: CheckpointModel
    config: dict
    shape: tuple[int, ...]
    sigma_min: float
    sigma_max: float
    num_classes: int
    fingerprint: str


def open_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    config: str | Path | dict | None = None,
) -> Checkpoint:
    """Open a k-diffusion checkpoint for sampling: eval mode, no gradients, dropout off.

    Args:
        path: inference ``.safetensors``, training ``.pth`` (its EMA weights are used), or ``NAME_state.json``, which
            names the latest ``.pth`` beside it.
        device: where the model goes.
        dtype: of the weights; None = float32, whatever the file holds. With float16/bfloat16 the network runs in it
            and the preconditioning around it stays in float32.
        config: k-diffusion config (JSON file or dict) that replaces the one in the file.

    Raises:
        FileNotFoundError: no such file. ImportError: k-diffusion is missing or broken, or lacks the model type.
        ValueError: not a checkpoint, no config, unknown model type, damaged file, weights that are not finite or do
            not fit the config. Nothing is allocated for a model before its shapes have been compared with the file.
    """
    path = _latest(Path(path))
    tensors, found = _read(path)
    fingerprint = fingerprint_tensors(tensors)[:16]
    config = _given_config(config) if config is not None else _config_in(found, path)
    dtype = dtype or torch.float32
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not a floating point type: use float32, float16 or bfloat16")
    denoiser, config = _build(config, tensors, path, dtype)
    model = CheckpointModel(denoiser, config, dtype).to(device).eval().requires_grad_(False)
    return Checkpoint(model, config, model.shape, model.sigma_min, model.sigma_max, model.num_classes, fingerprint)


def untrained(config: str | Path, seed: int = 0) -> Checkpoint:
    """A new network of a k-diffusion config JSON, its weights drawn from ``seed``: training from scratch."""
    k_diffusion = import_k_diffusion()
    found = k_diffusion.config.load_config(config)
    torch.manual_seed(seed)
    inner = k_diffusion.config.make_denoiser_wrapper(found)(k_diffusion.config.make_model(found))
    model = CheckpointModel(inner, found)
    limits = (model.sigma_min, model.sigma_max)
    return Checkpoint(model, found, model.shape, *limits, model.num_classes, "untrained")


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (64 hex digits) over names, dtypes, shapes and bytes, in the order of the names.

    The same weights stored at another precision have another fingerprint.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        digest.update(head.encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _latest(path: Path) -> Path:
    """What a training run's ``NAME_state.json`` points at; any other path as it is."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return path
    found = _parse(path.read_text(encoding="utf-8", errors="replace"), path)
    latest = found.get("latest_checkpoint") if isinstance(found, dict) else None
    if not isinstance(latest, str):
        kind = "a config" if isinstance(found, dict) and "model" in found else "a JSON file without latest_checkpoint"
        raise ValueError(f"{path} is {kind}, not a checkpoint; supported are {SUPPORTED}")
    return path.with_name(Path(latest).name)  # written relative to where the training ran


def _read(path: Path) -> tuple[dict[str, Tensor], str | dict | None]:
    """The tensors of a checkpoint and its config as found (JSON text, dict or None)."""
    if path.is_dir():
        kind = "a diffusers folder" if (path / "model_index.json").exists() else "a folder"
        raise ValueError(f"{path} is {kind}; supported checkpoints are {SUPPORTED}: give one file")
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: supported are {SUPPORTED}")
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise ValueError(f"{path} is empty: the copy or download did not finish")
    tensors, config = _read_training(path) if head[:2] in (b"PK", b"\x80\x02") else _read_safetensors(path)
    if not tensors:
        raise ValueError(f"{path} holds no tensors, so it is not a checkpoint; supported are {SUPPORTED}")
    return tensors, config


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata.get("config")  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a checkpoint, or it is truncated or corrupt ({error}): copy or download it again; "
            f"supported are {SUPPORTED}"
        ) from error


def _read_training(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many kinds: pickle, zip, runtime, value and key errors
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a k-diffusion training checkpoint ({reason}): it is truncated or corrupt, or "
            "holds Python objects, which are never loaded; convert_for_inference.py turns your own into .safetensors"
        ) from error
    weights = content.get("model_ema") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        held = sorted(map(str, content))[:6] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} has no 'model_ema' weights (it holds {held}): not a k-diffusion training checkpoint")
    config = content.get("config")
    return weights, config if isinstance(config, dict) else None


def _given_config(source: str | Path | dict) -> dict:
    if isinstance(source, dict):
        return _checked_config(source, "the given config")
    where = Path(source)
    if not where.exists():
        raise FileNotFoundError(f"no config at {where}: give a k-diffusion config JSON file")
    return _checked_config(_parse(where.read_text(encoding="utf-8", errors="replace"), where), where)


def _config_in(found: str | dict | None, path: Path) -> dict:
    if found is None:
        raise ValueError(f"{path} has no 'config' in its metadata: {CONFIG_HELP}")
    return _checked_config(_parse(found, path) if isinstance(found, str) else found, path)


def _parse(text: str, where: Path) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the config is not valid JSON ({error})") from error


def _checked_config(config: object, where: str | Path) -> dict:
    """The config, checked as far as this package reads it; the rest is k-diffusion's to judge."""
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not isinstance(config.get("dataset", {}), dict):
        raise ValueError(f"{where}: the config has no 'model' section, so it is not a k-diffusion config")
    if model.get("type") not in MODEL_TYPES:
        kind = model.get("type")
        raise ValueError(f"{where}: model type {kind!r} is unknown; supported are {', '.join(MODEL_TYPES)}")
    _check_sections(model, config.get("dataset", {}), where)
    return config


def _check_sections(model: dict, dataset: dict, where: str | Path) -> None:
    missing = [k for k in ("input_channels", "input_size", "sigma_min", "sigma_max") if k not in model]
    if missing:
        raise ValueError(f"{where}: the config's model section lacks {', '.join(missing)}")
    channels, size, classes = model["input_channels"], model["input_size"], dataset.get("num_classes", 0)
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(v, int) and v > 0 for v in [channels, *size]):
        raise ValueError(
            f"{where}: input_channels is {channels!r} and input_size {size!r}; they must be a number above 0 and "
            "[height, width]"
        )
    if not isinstance(classes, int) or classes < 0:
        raise ValueError(f"{where}: dataset.num_classes is {classes!r}; it must be a whole number, 0 for no labels")
    low, high, data = model["sigma_min"], model["sigma_max"], model.get("sigma_data", 1.0)
    numbers = all(isinstance(v, int | float) and math.isfinite(v) for v in (low, high, data))
    if not numbers or not (0 < low < high and data > 0):
        raise ValueError(
            f"{where}: sigma_min is {low!r}, sigma_max {high!r}, sigma_data {data!r}; they must be numbers, "
            "0 < sigma_min < sigma_max and 0 < sigma_data"
        )


def _build(config: dict, tensors: dict[str, Tensor], path: Path, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """k-diffusion's denoiser with the file's weights, and the config with k-diffusion's defaults filled in."""
    k_diffusion = import_k_diffusion()
    _check_available(config["model"], k_diffusion, path)
    try:
        config = k_diffusion.config.load_config(config)
        if (blocks := _block_count(config["model"])) > len(tensors):  # every block holds several tensors
            raise ValueError(f"it asks for {blocks} blocks, and the file holds {len(tensors)} tensors")
        with torch.device("meta"):  # shapes only: nothing is allocated, no random number is drawn
            inner = k_diffusion.config.make_model(config)
        denoiser = k_diffusion.config.make_denoiser_wrapper(config)(inner)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: k-diffusion cannot build a model from the config ({type(error).__name__}: {error}): {CONFIG_HELP}"
        ) from error
    _compare({name: tuple(t.shape) for name, t in inner.state_dict().items()}, tensors, path)
    weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(
            f"{path}: weights in {_some(bad)} are NaN or infinite (as {dtype}): the file is damaged, get it again"
        )
    inner.load_state_dict(weights, assign=True)
    for module in inner.modules():  # k-diffusion's U-Net attention drops out in eval mode too
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    return denoiser, config


def _check_available(model: dict, k_diffusion, path: Path) -> None:
    """The hourglass transformer came after k-diffusion's last release, and its local attention is another package."""
    if model["type"] != "image_transformer_v2":
        return
    if not hasattr(k_diffusion.models, "ImageTransformerDenoiserModelV2"):
        raise ImportError(
            f"{path} is an image_transformer_v2, which the installed k-diffusion does not have: install it from its "
            "repository (pip install --no-deps git+https://github.com/crowsonkb/k-diffusion)"
        )
    levels = model.get("self_attns") or [{"type": "neighborhood"}] * (len(model.get("widths") or ()) - 1)
    local = any(isinstance(level, dict) and level.get("type") == "neighborhood" for level in levels)
    if local and find_spec("natten") is None:
        raise ImportError(f"{path} uses neighborhood attention: install natten, which k-diffusion runs it with")


def _compare(wanted: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], path: Path) -> None:
    lacking = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    other = [
        f"{name} is {tuple(tensors[name].shape)}, the config wants {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    parts = []
    parts += [f"missing from the file: {_some(lacking)}"] if lacking else []
    parts += [f"not in the model: {_some(extra)}"] if extra else []
    parts += [f"other shapes: {_some(other)}"] if other else []
    if parts:
        raise ValueError(f"{path}: the weights do not fit the config; {'; '.join(parts)}: is it the right config?")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _block_count(model: dict) -> int:
    return model["depth"] if model["type"] == "image_transformer_v1" else sum(model["depths"])
