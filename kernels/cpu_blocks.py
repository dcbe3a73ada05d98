"""Blocks of k-diffusion's U-Net in one call each, by C++ that was compiled for this processor.

Everything here takes float32 tensors in channels_last on the CPU and gives such; convolutions have channels in
multiples of ``LANES``. Rounding is a little larger than torch's own (some 1e-5 of a layer's size: Winograd's
convolutions), so none of it is part of the exact tier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdpm_ext.kernels.caches import Fingerprint, hooked
from tdpm_ext.kernels.cpu_library import library

LANES = 16  # of the widest vectors
ACTS = {None: 0, "silu": 1, "gelu": 2}
SWITCH, PACKED = "_tdpm_switch", "_tdpm_packed"


@dataclass
class Switch:
    """Whether the blocks of a network are to be used at the moment; one object, known to all its modules."""

    on: bool = False


def switched_on(module: nn.Module, x: Tensor) -> bool:
    """Whether this module is to use its block for this input."""
    switch = vars(module).get(SWITCH)
    return switch is not None and switch.on and x.dtype == torch.float32 and _ready(x)


def _ready(x: Tensor) -> bool:
    return x.is_cpu and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def fits(module: nn.Module) -> bool:
    """Whether a module is a plain 3x3 or 1x1 convolution in float32 on the CPU, of such channels."""
    if type(module) is not nn.Conv2d or "forward" in vars(module) or module.padding_mode != "zeros":
        return False
    same = module.padding in ((0, 0), "valid") if module.kernel_size == (1, 1) else module.padding in ((1, 1), "same")
    plain = (module.stride, module.dilation, module.groups) == ((1, 1), (1, 1), 1)
    plain = plain and (module.bias is None or (module.bias.dtype == torch.float32 and module.bias.is_contiguous()))
    shape = module.kernel_size in ((1, 1), (3, 3)) and module.in_channels % LANES == module.out_channels % LANES == 0
    return plain and same and shape and module.weight.is_cpu and module.weight.dtype == torch.float32


def usable(*convolutions: nn.Module) -> bool:
    """Whether these modules are still what was packed, and nobody listens to them."""
    return all(type(m) is nn.Conv2d and PACKED in vars(m) for m in convolutions) and not hooked(*convolutions)


class PackedWeights:
    """The weights of some convolutions as the blocks read them, kept up to date.

    ``places``: where they stand, as (module, name).
    """

    def __init__(self, places: list[tuple[nn.Module, str]]):
        self._modules = [getattr(module, name) for module, name in places]
        self.weights = Fingerprint(places)

    def update(self) -> None:
        """Pack anew if any weight has changed; those that do not fit any more are not used."""
        if not self.weights.changed():
            return
        for module in self._modules:
            if fits(module):
                vars(module)[PACKED] = pack(module.weight.detach())
            else:
                vars(module).pop(PACKED, None)


def pack(weight: Tensor) -> Tensor:
    """[out, in, 3, 3] or [out, in, 1, 1], float32 -> what the blocks read, transformed for Winograd's convolutions."""
    lib = library()
    out, channels, size, _ = weight.shape
    strips = -(-out // lib.tdpm_strip())
    packed = weight.new_empty(strips * (36 if size == 3 else 1) * channels * lib.tdpm_strip())
    if size == 3:
        lib.tdpm_pack3x3(weight.data_ptr(), out, channels, *weight.stride(), packed.data_ptr())
    else:
        lib.tdpm_pack1x1(weight.data_ptr(), out, channels, *weight.stride()[:2], packed.data_ptr())
    return packed


@dataclass
class Norm:
    """Group normalisation before a block: gain and shift are [C], or [N, C, 1, 1] with adjacent channels."""

    groups: int
    eps: float
    gain: Tensor
    shift: Tensor

    def pointers(self) -> tuple:
        """As the library takes it."""
        each = self.gain.ndim > 1
        steps = (self.gain.stride(0), self.shift.stride(0)) if each else (0, 0)
        return self.gain.data_ptr(), self.shift.data_ptr(), *steps, self.groups, self.eps


NO_NORM = (None, None, 0, 0, 0, 0.0)


def convolution(x: Tensor, module: nn.Conv2d, norm: Norm | None = None, act: str | None = None) -> Tensor:
    """``module(act(norm(x)))``, a 3x3 convolution."""
    n, channels, height, width = x.shape
    y = _empty(n, module.out_channels, height, width)
    before = NO_NORM if norm is None else norm.pointers()
    library().tdpm_conv3x3(
        x.data_ptr(), *before, ACTS[act], *_pointers(module), y.data_ptr(),
        n, height, width, channels, module.out_channels, torch.get_num_threads(),
    )  # fmt: skip
    return y


def residual(
    x: Tensor, norms: tuple[Norm, Norm], act: str, convolutions: tuple[nn.Conv2d, nn.Conv2d], skip: nn.Conv2d | None
) -> Tensor:
    """Two 3x3 convolutions, each of ``act(norm(...))``, plus x or a 1x1 convolution of it."""
    n, channels, height, width = x.shape
    first, second = convolutions
    y = _empty(n, second.out_channels, height, width)
    library().tdpm_residual(
        x.data_ptr(), *norms[0].pointers(), *norms[1].pointers(), ACTS[act], *_pointers(first), *_pointers(second),
        *((None, None) if skip is None else _pointers(skip)), y.data_ptr(), n, height, width, channels,
        second.out_channels, first.out_channels, torch.get_num_threads(),
    )  # fmt: skip
    return y


def pointwise(x: Tensor, module: nn.Conv2d) -> Tensor:
    """``module(x)``, a 1x1 convolution."""
    n, channels, height, width = x.shape
    y = _empty(n, module.out_channels, height, width)
    library().tdpm_conv1x1(
        x.data_ptr(), *_pointers(module), y.data_ptr(), n, height, width, channels,
        module.out_channels, torch.get_num_threads(),
    )  # fmt: skip
    return y


def attention(x: Tensor, norm: Norm, heads: int, qkv: nn.Conv2d, project: nn.Conv2d) -> Tensor:
    """``x + project(self-attention of qkv(norm(x)))``; qkv's channels are [3, heads, C / heads]."""
    n, channels, height, width = x.shape
    y = torch.empty_like(x)
    library().tdpm_attention(
        x.data_ptr(), *norm.pointers(), *_pointers(qkv), *_pointers(project), y.data_ptr(),
        n, height, width, channels, heads, torch.get_num_threads(),
    )  # fmt: skip
    return y


def downsample(x: Tensor) -> Tensor:
    """Half the size, as k-diffusion's ``Downsample2d`` with its default filter; at least 2 pixels high and wide."""
    n, channels, height, width = x.shape
    y = _empty(n, channels, height // 2, width // 2)
    library().tdpm_downsample(x.data_ptr(), y.data_ptr(), n, height, width, channels, torch.get_num_threads())
    return y


def upsample(x: Tensor) -> Tensor:
    """Twice the size, as k-diffusion's ``Upsample2d`` with its default filter; at least 2 pixels high and wide."""
    n, channels, height, width = x.shape
    y = _empty(n, channels, 2 * height, 2 * width)
    library().tdpm_upsample(x.data_ptr(), y.data_ptr(), n, height, width, channels, torch.get_num_threads())
    return y


def _empty(n: int, channels: int, height: int, width: int) -> Tensor:
    return torch.empty((n, height, width, channels), dtype=torch.float32).permute(0, 3, 1, 2)


def _pointers(module: nn.Conv2d) -> tuple[int, int | None]:
    return vars(module)[PACKED].data_ptr(), _pointer(module.bias)


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
