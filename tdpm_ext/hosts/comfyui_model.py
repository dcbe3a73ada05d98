"""What a ComfyUI model says about itself: which checkpoint it is, under which prompt it runs, where its ranges end.

Everything is read from the objects that ComfyUI hands to a sampler; what a wrapper hides counts as unknown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

_CHAIN = 6  # wrappers followed inwards through ``.inner_model``
_FINGERPRINTS: WeakKeyDictionary = WeakKeyDictionary()


@dataclass(frozen=True)
class Facts:
    """What a prior is compared with. None: a wrapper hides it.

    Attributes:
        checkpoint: fingerprint of the weights, the same with and without LoRAs; None also for merged checkpoints.
        family: ComfyUI's name for the architecture, such as SD15 or SDXL.
        latent: its name for the units of the latents.
        prediction: its name for what the network predicts; CONST is a rectified flow.
    """

    checkpoint: str | None = None
    family: str | None = None
    latent: str | None = None
    prediction: str | None = None

    @property
    def flow(self) -> bool:
        """x is an interpolation of data and noise, not data + sigma * noise."""
        return self.prediction == "CONST"


def facts_of(patcher) -> Facts:
    """The facts of a MODEL, as nodes pass it around: a ``ModelPatcher``."""
    return _facts(patcher.model, patcher, patcher.get_model_object("model_sampling"))


def facts_behind(model) -> Facts:
    """The facts of what a sampler was given: ``KSamplerX0Inpaint`` or a wrapper around it."""
    patcher = getattr(guider_behind(model), "model_patcher", None)
    base = next((link for link in _links(model) if hasattr(link, "latent_format")), None)
    return Facts() if base is None else _facts(base, patcher, base.model_sampling)


def guider_behind(model):
    """The ``CFGGuider`` inside of what a sampler was given, or None."""
    return next((link for link in _links(model) if hasattr(link, "conds") and hasattr(link, "cfg")), None)


def prompt_hash(conditioning: Iterable) -> str:
    """A short hash of a prompt: CONDITIONING as nodes pass it, or the guider's own form of it."""
    digest = hashlib.sha256()
    for item in conditioning:
        tensor = item.get("cross_attn") if isinstance(item, dict) else item[0]
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def range_ends(model) -> list[tuple[str, float]]:
    """What stops acting before the end of the chain: ("ControlNet" or "conditioning", the sigma where it stops)."""
    guider = guider_behind(model)
    found = set()
    for conds in (getattr(guider, "conds", None) or {}).values():
        for cond in conds:
            if isinstance(cond.get("timestep_end"), (int, float)):
                found.add(("conditioning", float(cond["timestep_end"])))
            control = cond.get("control")
            while control is not None:
                if (span := getattr(control, "timestep_range", None)) is not None:
                    found.add(("ControlNet", float(span[1])))
                control = getattr(control, "previous_controlnet", None)
    return sorted(found)


def _facts(base, patcher, sampling) -> Facts:
    return Facts(
        checkpoint=None if _merged(base, patcher) else _fingerprint(base, getattr(patcher, "backup", {})),
        family=type(getattr(base, "model_config", base)).__name__,
        latent=type(base.latent_format).__name__,
        prediction=type(sampling).__bases__[-1].__name__,
    )


def _links(model) -> list:
    links = [model]
    while len(links) < _CHAIN and (inner := getattr(links[-1], "inner_model", None)) is not None:
        links.append(inner)
    return links


def _merged(base, patcher) -> bool:
    """Whether a node changes weights that no LoRA changes: the checkpoint is then another one, without a name."""
    patches = getattr(patcher, "patches", None)
    return bool(patches) and any(name in patches for name, weight in base.named_parameters() if weight.ndim == 1)


def _fingerprint(base, backup: dict) -> str:
    """Names and shapes of all weights, values of the one-dimensional ones (biases, norms), which LoRAs leave alone.

    Values are compared as bfloat16, so that a half-precision checkpoint is itself in whatever precision it is loaded.
    """
    if base not in _FINGERPRINTS:
        digest = hashlib.sha256()
        for name, weight in sorted(base.named_parameters()):
            saved = backup.get(name)
            weight = weight if saved is None else saved.weight
            digest.update(f"{name.replace('_orig_mod.', '')}{tuple(weight.shape)}".encode())
            if weight.ndim == 1:
                values = weight.detach().to("cpu", torch.bfloat16).float()
                digest.update(values.numpy().tobytes())
        _FINGERPRINTS[base] = f"comfyui-{digest.hexdigest()[:32]}"
    return _FINGERPRINTS[base]
