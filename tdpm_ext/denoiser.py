"""A k-diffusion network behind one calling convention: labels, dropped labels and guidance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class CheckpointModel(nn.Module):
    """A k-diffusion denoiser that takes class labels and a guidance scale, whatever network is inside.

    Attributes: ``inner_model`` (k-diffusion's preconditioned ``Denoiser``), ``shape`` (C, H, W), ``sigma_min``,
    ``sigma_max`` (noise std in data units), ``num_classes`` (0 = takes no labels), ``dtype`` of the weights.
    """

    def __init__(self, inner_model: nn.Module, config: dict, dtype: torch.dtype = torch.float32):
        super().__init__()
        model = config["model"]
        self.inner_model = inner_model
        self.shape = (model["input_channels"], *model["input_size"])
        self.sigma_min, self.sigma_max = float(model["sigma_min"]), float(model["sigma_max"])
        self.dtype = dtype
        self.kind = model["type"]
        self.num_classes = class_count(config)
        self._multiple = _size_multiple(model)
        self._mapping_width = model.get("mapping_cond_dim", 0) if self.kind == "image_v1" else 0
        if dtype.itemsize < 4:
            inner_model.inner_model.register_forward_pre_hook(_cast_inputs(dtype), with_kwargs=True)

    def forward(
        self, x: Tensor, sigma: Tensor, class_cond: Tensor | None = None, cond_scale: float = 1.0, **kw
    ) -> Tensor:
        """Denoised pictures, [B, C, H, W] in x's dtype.

        Args:
            x: noisy pictures [B, C, H, W], data + sigma * noise. sigma: noise std in data units, [B] or a number.
            class_cond: int64 [B]; ``num_classes`` = dropped label. None = unconditional.
            cond_scale: guidance, uncond + cond_scale * (cond - uncond), in one doubled batch. 1 = none.
            kw: handed to the network (``aug_cond``, ``mapping_cond``, ``cross_cond`` ...).

        Raises:
            ValueError: shape, labels or guidance that this network cannot take.
        """
        self._check(x, class_cond, cond_scale)
        sigma = torch.as_tensor(sigma, device=x.device).expand(len(x))
        if class_cond is None:  # guidance of nothing towards nothing changes nothing
            return self._denoise(x, sigma, self._dropped(x), kw)
        class_cond = class_cond.to(x.device)
        if cond_scale == 1.0:
            return self._denoise(x, sigma, class_cond, kw)
        twice = {k: torch.cat([v, v]) if _is_batch(v, len(x)) else v for k, v in kw.items()}
        labels = torch.cat([self._dropped(x), class_cond])
        uncond, cond = self._denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), labels, twice).chunk(2)
        return uncond + cond_scale * (cond - uncond)

    def _denoise(self, x: Tensor, sigma: Tensor, labels: Tensor, kw: dict) -> Tensor:
        if self._mapping_width:  # one-hot; the dropped label equals none of the columns, so its row is zero
            columns = torch.arange(self._mapping_width, device=x.device)
            kw = {"mapping_cond": (labels[:, None] == columns).to(x.dtype), **kw}
        elif self.num_classes:
            kw = {"class_cond": labels, **kw}
        wide = torch.promote_types(self.dtype, torch.float32)
        kw = {k: v.to(wide) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kw.items()}
        return self.inner_model(x.to(wide), sigma.to(wide), **kw).to(x.dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        last = self._mapping_width or self.num_classes
        return torch.full((len(x),), last, dtype=torch.int64, device=x.device)

    def _check(self, x: Tensor, class_cond: Tensor | None, cond_scale: float) -> None:
        if x.ndim != 4 or x.shape[1] != self.shape[0]:
            raise ValueError(f"x has shape {tuple(x.shape)}; this checkpoint takes [B, {self.shape[0]}, H, W]")
        if x.shape[2] % self._multiple[0] or x.shape[3] % self._multiple[1]:
            raise ValueError(
                f"x is {x.shape[2]}x{x.shape[3]}; height and width must be multiples of "
                f"{self._multiple[0]} and {self._multiple[1]} (trained at {self.shape[1]}x{self.shape[2]})"
            )
        if not self.num_classes and (class_cond is not None or cond_scale != 1.0):
            given = "class_cond" if class_cond is not None else f"cond_scale={cond_scale}"
            raise ValueError(f"{given} given, but this checkpoint takes no class labels: leave it out")
        if class_cond is None:
            return
        if not isinstance(class_cond, Tensor) or class_cond.shape != x.shape[:1] or class_cond.is_floating_point():
            given = f"{class_cond.dtype} {list(class_cond.shape)}" if isinstance(class_cond, Tensor) else class_cond
            raise ValueError(f"class_cond is {given!r}; it must be an int64 tensor [{len(x)}], one label per picture")
        if class_cond.device.type == "cpu" and len(x):  # on a GPU, reading the labels would stall it
            low, high = class_cond.min().item(), class_cond.max().item()
            if low < 0 or high > self.num_classes:
                raise ValueError(
                    f"class_cond holds {low if low < 0 else high}; labels go from 0 to {self.num_classes - 1}, "
                    f"and {self.num_classes} means unconditional"
                )


def class_count(config: dict) -> int:
    """How many labels a model of this config takes (0 = none); the dropped label is not counted."""
    labels = int(config["dataset"].get("num_classes", 0) or 0)
    if config["model"]["type"] == "image_v1" and config["model"].get("mapping_cond_dim", 0) != labels:
        return 0  # the U-Net has nowhere to take a label, or takes some other vector (pass mapping_cond yourself)
    return labels


def _size_multiple(model: dict) -> tuple[int, int]:
    """Height and width must be multiples of these: patches, halvings and attention windows."""
    if model["type"] == "image_v1":
        side = model["patch_size"] * 2 ** max(0, len(model["depths"]) - 1 - model["skip_stages"])
        return side, side
    if model["type"] == "image_transformer_v1":
        return tuple(model["patch_size"])
    levels = enumerate(model.get("self_attns") or [{}] * len(model["depths"]))
    tokens = math.lcm(*(2**i * level.get("window_size", 1) for i, level in levels))  # a side must hold whole windows
    return tuple(side * tokens for side in model["patch_size"])


def _is_batch(value: object, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == size


def _cast_inputs(dtype: torch.dtype):
    """A forward pre-hook that hands floating point inputs to the network in its own dtype."""

    def cast(value):
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def hook(module, args, kwargs):
        return tuple(map(cast, args)), {k: cast(v) for k, v in kwargs.items()}

    hook.tdpm_capturable = True  # it only casts: CUDA graphs may hold it
    return hook
