"""What one captured CUDA graph may stand for: the key of a call, and the state of the weights that it reads.

A graph replays addresses and baked-in numbers. Whatever could make a replay differ from an eager call must be in the
key, be a static input, or be refused; nothing is left out by default.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tdpm_ext.kernels import registry

BY_VALUE = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# Attributes by which adapters (peft, kohya and their kin) change what a module computes without touching a parameter,
# and the one of accelerate's hooks that move weights about.
ADAPTER_STATE = ("scaling", "scale", "multiplier", "strength", "enabled", "merged_adapters", "_active_adapter",
                 "_disable_adapters", "_hf_hook")  # fmt: skip
# Set to True on a hook that does nothing but launch operations on its arguments, so that a graph may hold them.
CAPTURABLE = "tdpm_capturable"


class Refused(Exception):
    """Why a call cannot be a graph; it runs eagerly instead."""


@dataclass(frozen=True)
class Baked:
    """An argument that a graph may bake in: part of its key by value, so it must be hashable.

    For what never changes between calls of one kind, such as a tuple of sigmas. Each new value is a new graph.
    """

    value: Hashable


@dataclass
class Call:
    """Arguments taken apart: a hashable key, the tensors (and floats) to copy in, and how to put them together."""

    key: Hashable = None
    inputs: list[Tensor | float] = field(default_factory=list)
    shape: Any = None

    def rebuild(self, inputs: list[Tensor]) -> tuple[tuple, dict]:
        """(args, kwargs) with ``inputs`` in the places of the originals."""
        return _put_together(self.shape, inputs)


@dataclass(frozen=True)
class _Slot:
    index: int


def take_apart(args: tuple, kwargs: dict, device_type: str, *, floats: bool) -> Call:
    """Describe a call.

    Args:
        device_type: where all tensors must be.
        floats: take a Python float as a static input instead of refusing it.

    Raises:
        Refused: an argument that is neither a tensor, nor a plain value, nor a list, tuple or dict of such.
    """
    call = Call()
    key, call.shape = _visit((args, kwargs), call.inputs, device_type, floats)
    devices = {t.device for t in call.inputs if isinstance(t, Tensor)}
    if len(devices) != 1:
        raise Refused("no tensor among the arguments" if not devices else "arguments on more than one GPU")
    call.key = (key, global_state(device_type))
    return call


def _visit(value: Any, inputs: list, device_type: str, floats: bool) -> tuple[Hashable, Any]:
    kind = type(value)
    if isinstance(value, Tensor):
        key = _tensor_key(value, device_type)
        inputs.append(value)
        return key, _Slot(len(inputs) - 1)
    if kind in (tuple, list):
        parts = [_visit(v, inputs, device_type, floats) for v in value]
        return (kind, *(key for key, _ in parts)), kind(shape for _, shape in parts)
    if kind is dict:
        parts = {name: _visit(v, inputs, device_type, floats) for name, v in value.items()}
        return (dict, *((name, key) for name, (key, _) in parts.items())), {n: shape for n, (_, shape) in parts.items()}
    if kind is Baked:
        return (Baked, type(value.value), value.value), value.value
    if kind is float:
        if not floats:
            raise Refused("a Python float would be baked in: pass a tensor, or Baked(value) if it never changes")
        inputs.append(value)
        return float, _Slot(len(inputs) - 1)
    if isinstance(value, BY_VALUE):
        return (kind, value), value
    raise Refused(f"an argument of type {kind.__name__} has no place in a key")


def _tensor_key(t: Tensor, device_type: str) -> Hashable:
    if type(t) not in (Tensor, nn.Parameter):
        raise Refused(f"a tensor subclass ({type(t).__name__}) among the arguments")
    if t.device.type != device_type:
        raise Refused(f"a tensor on {t.device.type} among the arguments: its value would be baked in")
    if t.layout is not torch.strided:
        raise Refused(f"a tensor of layout {t.layout} among the arguments")
    if not _separate(t):
        raise Refused("a tensor whose elements share memory among the arguments")
    return (Tensor, tuple(t.shape), t.stride(), t.dtype, t.device)


def _separate(t: Tensor) -> bool:
    """Whether distinct elements have distinct addresses, apart from expanded dimensions (stride 0)."""
    reach = 0
    for stride, size in sorted((abs(st), s) for st, s in zip(t.stride(), t.shape, strict=True) if st and s > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _put_together(shape: Any, inputs: list[Tensor]) -> Any:
    if type(shape) is _Slot:
        return inputs[shape.index]
    if type(shape) in (tuple, list):
        return type(shape)(_put_together(s, inputs) for s in shape)
    if type(shape) is dict:
        return {name: _put_together(s, inputs) for name, s in shape.items()}
    return shape


def global_state(device_type: str) -> Hashable:
    """Settings of torch, and requests for backends, that change what is launched."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    matmul = cuda.matmul
    autocast = torch.is_autocast_enabled(device_type)
    # newer torch names precisions by strings, and reading the old flags after the new ones were set is an error
    precision = (
        (matmul.fp32_precision, cudnn.conv.fp32_precision)
        if hasattr(matmul, "fp32_precision")
        else (matmul.allow_tf32, cudnn.allow_tf32)
    )
    return (
        autocast and torch.get_autocast_dtype(device_type),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled() if hasattr(cuda, "cudnn_sdp_enabled") else None,
        registry.requests(),
    )


class Watched:
    """Modules and tensors whose memory a graph reads: tells their state, and what in them no graph can stand for.

    Args:
        watch: modules, with everything inside them, and single tensors.
        forward_of: the module whose ``forward``, not ``__call__``, is captured: its own hooks run outside.
    """

    def __init__(self, watch: Iterable[nn.Module | Tensor], forward_of: nn.Module | None = None):
        items = tuple(watch)
        self.modules = tuple(item for item in items if isinstance(item, nn.Module))
        self.tensors = tuple(item for item in items if isinstance(item, Tensor))
        self.forward_of = forward_of

    def fingerprint(self) -> tuple:
        """Changes whenever a weight is edited, moved or replaced, or a module is switched or replaced.

        In-place edits through ``.data`` are not seen, and need not be: a replay reads the same memory.

        Raises:
            Refused: a hook, which a replay would leave out.
        """
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            raise Refused("a global module hook is registered")
        seen: list = []
        for tensor in self.tensors:
            seen += (tensor.data_ptr(), _version(tensor))
        hooks_outside = None if self.forward_of is None else self.forward_of.__dict__
        waiting = list(self.modules)
        while waiting:  # a U-Net has 700 modules, and this runs before every replay: no calls that can be spared
            own = waiting.pop().__dict__
            if (own["_forward_hooks"] or own["_forward_pre_hooks"]) and own is not hooks_outside and _listens(own):
                raise Refused("a hook inside would run at capture only")
            seen.append(own["training"])
            for held in (own["_parameters"], own["_buffers"]):
                for tensor in held.values():
                    if tensor is not None:
                        seen += (tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)
            if not own.keys().isdisjoint(ADAPTER_STATE):
                if "_hf_hook" in own:
                    raise Refused("its weights are moved about by accelerate")
                seen += [_plain(own.get(name)) for name in ADAPTER_STATE]
            inner = own["_modules"]
            if inner:
                seen += map(id, inner.values())
                waiting += [m for m in inner.values() if m is not None]
        return tuple(seen)

    def check_for_capture(self, device: torch.device) -> None:
        """Raise `Refused` unless all weights are ordinary tensors on ``device``."""
        for tensor in self._all_tensors():
            if type(tensor) not in (Tensor, nn.Parameter):
                raise Refused(f"a weight is a {type(tensor).__name__}")
            if tensor.device != device and tensor.numel():
                raise Refused(f"a weight is on {tensor.device}, the arguments are on {device}")

    def needs_grad(self) -> bool:
        """Whether autograd would record the call on account of the weights."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in self._all_tensors())

    def _all_tensors(self) -> Iterable[Tensor]:
        yield from self.tensors
        for module in self.modules:
            yield from module.parameters()
            yield from module.buffers()


def _listens(own: dict) -> bool:
    """Whether a hook of the module with this ``__dict__`` must run at every call."""
    hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
    return not all(getattr(hook, CAPTURABLE, False) for hook in hooks)


def _plain(value: Any) -> Hashable:
    """A value that compares like ``value``, without waiting for a GPU."""
    if isinstance(value, BY_VALUE) or type(value) is float:
        return value
    if isinstance(value, dict):
        return tuple((str(name), _plain(v)) for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    return (value.data_ptr(), _version(value)) if isinstance(value, Tensor) else id(value)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
