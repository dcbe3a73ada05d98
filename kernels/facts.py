"""What a choice of backend depends on, as plain values: the call's own facts, the machine's, the user's switches.

Gathering facts asks the device and the installation; choosing (`registry.select`) only reads them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec

import torch

TRITON_LEAST = (3, 3)  # older ones have another tensor-core floor, and nothing here was ever tried on them
SWITCHES = {  # environment variable: its allowed values, the first one being the default
    "TDPM_KERNELS": ("auto", "off", "reference", "triton"),
    "TDPM_ATTENTION": ("auto", "sdpa", "triton", "xformers"),
    "TDPM_GRAPHS": ("auto", "0", "1"),
    "TDPM_KERNELS_STRICT": ("0", "1"),
}


class KernelError(RuntimeError):
    """A request that cannot be met: an unknown backend or switch, or a backend that cannot do the call at hand."""


@dataclass(frozen=True)
class Facts:
    """Everything that a choice may depend on; hashable, so that a choice is made once per set of facts.

    Args:
        device: device type of the tensors.
        cc: compute capability of the GPU times ten (90 is Hopper); 0 where there is none.
        layout: "contiguous", "channels_last", or "strided" for anything else.
        nbytes: size of the main input.
        head_dim, q_len, kv_len: of an attention; 0 elsewhere.
        mask: "" without one, "bool", or "added".
        mixed: a parameter has another dtype than the main input.
        needs_grad: gradients are enabled and an input wants one.
        capturing: a CUDA graph is being captured, or warmed up for capture.
        request: the backend that was asked for.
        unavailable: (backend, why it cannot be used at all here), sorted.
        refused: why the Triton kernel itself cannot take these shapes, strides and types.
        native_nhwc: torch's own GroupNorm keeps channels_last on CUDA.
        table: the backend that the committed measurements put first for this attention, "" where nobody looked.
    """

    op: str
    device: str = "cuda"
    cc: int = 0
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    nbytes: int = 0
    head_dim: int = 0
    q_len: int = 0
    kv_len: int = 0
    mask: str = ""
    mixed: bool = False
    needs_grad: bool = False
    compiling: bool = False
    capturing: bool = False
    request: str = "auto"
    unavailable: tuple[tuple[str, str], ...] = ()
    refused: tuple[str, ...] = ()
    native_nhwc: bool = False
    table: str = ""

    @property
    def capability(self) -> str:
        return f"{self.cc // 10}.{self.cc % 10}"

    @property
    def type_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Switches:
    """The environment as read once, at the first question."""

    TDPM_KERNELS: str
    TDPM_ATTENTION: str
    TDPM_GRAPHS: str
    TDPM_KERNELS_STRICT: str

    @property
    def strict(self) -> bool:
        return self.TDPM_KERNELS_STRICT == "1"


@lru_cache(maxsize=1)
def switches() -> Switches:
    """The environment's switches.

    Raises:
        KernelError: a value that the switch does not have.
    """
    found = {}
    for field in fields(Switches):
        allowed = SWITCHES[field.name]
        value = os.environ.get(field.name, "").strip().lower() or allowed[0]
        if value not in allowed:
            raise KernelError(f"{field.name}={value!r} in the environment: give one of {', '.join(allowed)}")
        found[field.name] = value
    return Switches(**found)


# The machine


@lru_cache(maxsize=1)
def unavailable() -> tuple[tuple[str, str], ...]:
    """(backend, reason) for every backend that this installation cannot run at all.

    Raises:
        KernelError: a broken installation, where TDPM_KERNELS_STRICT=1.
    """
    found = {"triton": _without_triton(), "xformers": _without_xformers()}
    return tuple(sorted((name, reason) for name, reason in found.items() if reason))


def _without_triton() -> str:
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'tdpm-ext[triton]'"
    if torch.version.hip:
        return "torch is built for ROCm; the kernels are checked for NVIDIA only"
    if broken := _import_error("triton"):
        return _broken("triton", broken)
    version = _version_of("triton")
    if version_tuple(version) < TRITON_LEAST:
        return f"triton {version} is older than {'.'.join(map(str, TRITON_LEAST))}"
    return ""


def _without_xformers() -> str:
    # Installed is not enough, nor is importable: without its C++ extension xformers imports with a warning.
    if find_spec("xformers") is None:
        return "xformers is not installed: pip install 'tdpm-ext[xformers]'"
    from tdpm_ext.kernels.xformers_probe import why_not

    reason = why_not()
    return _broken("xformers", reason) if reason else ""


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # put on the path by hand
        return getattr(importlib.import_module(name), "__version__", "0")


def _import_error(name: str) -> str:
    # A broken installation raises anything from ImportError to OSError; whatever it is, it becomes the reason.
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return ""


def _broken(name: str, reason: str) -> str:
    message = f"{name} is installed but broken ({reason})"
    if switches().strict:
        raise KernelError(f"{message}; TDPM_KERNELS_STRICT=1 forbids doing without it")
    return message


def version_tuple(version: str) -> tuple[int, ...]:
    """(3, 8) of "3.8.0+cu130.dev1"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


_assumed_cc: list[int] = []


@contextlib.contextmanager
def assume_gpu(cc: int) -> Iterator[None]:
    """Answer questions about the GPU as if one of compute capability ``cc`` / 10 were here.

    For planning with fake CUDA tensors (`FakeTensorMode`) on a machine without a GPU: counting launches and bytes.
    """
    _assumed_cc.append(cc)
    try:
        yield
    finally:
        _assumed_cc.pop()


def compute_capability(device: torch.device) -> int:
    """Compute capability times ten of a CUDA device; 0 for others, and where no driver answers."""
    if device.type != "cuda":
        return 0
    return _assumed_cc[-1] if _assumed_cc else _capability(device.index)


@lru_cache
def _capability(index: int | None) -> int:
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@lru_cache(maxsize=1)
def native_nhwc_group_norm() -> bool:
    """Whether torch's own CUDA GroupNorm keeps channels_last: asked of torch with fake tensors, nothing is launched.

    Up to 2.14 it makes the input contiguous first, so that every GroupNorm undoes the layout.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), FakeTensorMode():  # whoever counts operations must not count these
        x = torch.empty(1, 4, 2, 2, device="cuda").to(memory_format=torch.channels_last)
        y = torch.nn.functional.group_norm(x, 2)
    return y.is_contiguous(memory_format=torch.channels_last)


class _Building(threading.local):
    depth = 0


_building = _Building()


@contextlib.contextmanager
def building_graph() -> Iterator[None]:
    """Around warm-up and capture: both make the same choices, so that all is compiled before the capture."""
    _building.depth += 1
    try:
        yield
    finally:
        _building.depth -= 1


def is_building_graph() -> bool:
    """Whether this thread is warming up or capturing one of our graphs."""
    return _building.depth > 0


def is_capturing() -> bool:
    """Whether work of this thread goes into a CUDA graph, ours or somebody else's."""
    return is_building_graph() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


# The call


def machine(x: torch.Tensor) -> dict:
    """The facts about where a tensor is, as arguments of `Facts`."""
    cuda = x.is_cuda
    return {
        "device": x.device.type,
        "cc": compute_capability(x.device),
        "dtype": x.dtype,
        "capturing": cuda and is_capturing(),
        "unavailable": unavailable() if cuda else (),
    }


def layout_of(x: torch.Tensor) -> str:
    """ "contiguous", "channels_last" (also of three spatial dimensions) or "strided"."""
    if x.is_contiguous():
        return "contiguous"
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]):
        return "channels_last"
    return "strided"


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record a call with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
