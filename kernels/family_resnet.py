"""Residual U-Nets with a time embedding: diffusers' ``UNet2D(Condition)Model``, and the OpenAI / latent-diffusion
``UNetModel`` that ComfyUI and A1111 carry."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tdpm_ext.kernels import ops
from tdpm_ext.kernels.caches import (
    LastPrompt,
    Projections,
    PromptCache,
    capturing,
    cast_by_host,
    hooked,
    last_layer,
    projected,
    remembered,
)
from tdpm_ext.kernels.family import Family, Rule, add_into, may_run, network, ordinary

_ACTS = {nn.SiLU: "silu", nn.GELU: "gelu"}


def _act(module: nn.Module) -> str | None:
    """Name of an activation that can be fused, or None."""
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    return _ACTS.get(type(module))


def _readable(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm's weights can be used as they lie: hosts may keep them elsewhere and cast them in ``forward``."""
    if cast_by_host(norm):
        return False
    return norm.weight is None or (norm.weight.device == x.device and norm.weight.dtype == x.dtype)


def _fused(norm: nn.GroupNorm, x: Tensor, act: str, **extra) -> Tensor:
    return ops.group_norm(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, act=act, **extra)


# ComfyUI's casts weights first, where it is told to; latent diffusion's computes in float32, as everything here does
_NORMS = ("GroupNorm", "GroupNorm32")


def _is_group_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.GroupNorm) and type(module).__name__ in _NORMS


def _drops(module: nn.Module) -> bool:
    return module.training and module.p > 0


# diffusers


def diffusers_block(self, input_tensor, temb, *args, **kwargs):
    """``ResnetBlock2D``: norm and activation in one, the embedding added on the way, no division by one."""
    norm1, norm2, x = self.norm1, self.norm2, input_tensor
    plain = not args and not kwargs and not _drops(self.dropout) and _readable(norm1, x) and _readable(norm2, x)
    if not plain or not may_run(x, norm1, norm2, self.nonlinearity, self.dropout):
        return ordinary(self, input_tensor, temb, *args, **kwargs)
    act = _act(self.nonlinearity)
    h = _fused(norm1, x, act)
    resample = self.upsample if self.upsample is not None else self.downsample
    if resample is not None:
        x, h = resample(x), resample(h)
    h = self.conv1(h)
    extra = {}
    if self.time_emb_proj is not None:
        rows = projected(self, "time_emb_proj", temb, _project)
        if self.time_embedding_norm == "scale_shift":
            extra["scale"], extra["shift"] = rows.chunk(2, dim=1)
        else:
            extra["pre_add"] = rows
    h = self.conv2(_fused(norm2, h, act, **extra))
    h = add_into(h, x if self.conv_shortcut is None else self.conv_shortcut(x))
    return h if self.output_scale_factor == 1 else h / self.output_scale_factor


def _project(block: nn.Module, temb: Tensor) -> Tensor:
    return block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))


def _refuse_diffusers(block: nn.Module) -> str | None:
    if not _is_group_norm(block.norm1) or not _is_group_norm(block.norm2):
        return f"its norms are {type(block.norm1).__name__} and {type(block.norm2).__name__}, not GroupNorm"
    if _act(block.nonlinearity) is None:
        return f"activation {type(block.nonlinearity).__name__} cannot be fused"
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return f"time_embedding_norm is {block.time_embedding_norm!r}"
    if block.upsample is not None and type(block.upsample).__name__ not in ("Upsample2D", "partial"):
        return "resampling by a filter"
    return None


# OpenAI / latent diffusion


def ldm_block(self, x, emb):
    """``ResBlock``: norm and SiLU in one, the embedding added on the way, the sum in place."""
    norm1, norm2, dropout = self.in_layers[0], self.out_layers[0], self.out_layers[2]
    fits = x.ndim == 4 and not _drops(dropout) and _readable(norm1, x) and _readable(norm2, x)
    if not fits or not may_run(x, norm1, self.in_layers[1], norm2, self.out_layers[1], dropout):
        return ordinary(self, x, emb)
    if hooked(self.in_layers, self.out_layers):
        return ordinary(self, x, emb)
    h = _fused(norm1, x, "silu")
    h, x = self.h_upd(h), self.x_upd(x)
    h = self.in_layers[2](h)
    extra = {}
    if self.emb_layers is not None:
        rows = projected(self, "emb_layers", emb, _project_ldm).to(h.dtype)
        if self.use_scale_shift_norm:
            extra["scale"], extra["shift"] = rows.chunk(2, dim=1)
        else:
            extra["pre_add"] = rows
    h = self.out_layers[3](_fused(norm2, h, "silu", **extra))
    return add_into(h, self.skip_connection(x))


def _refuse_ldm(block: nn.Module) -> str | None:
    for name, known in (("in_layers", (nn.GroupNorm, nn.SiLU, nn.Conv2d)), ("out_layers", _OUT)):
        layers = list(getattr(block, name, ()))
        if len(layers) != len(known) or not all(map(isinstance, layers, known)) or not _is_group_norm(layers[0]):
            return f"{name} are {', '.join(type(m).__name__ for m in layers) or 'missing'}"
    if getattr(block, "exchange_temb_dims", False):
        return "its embedding runs along another axis"
    return None


_OUT = (nn.GroupNorm, nn.SiLU, nn.Dropout, nn.Conv2d)


# both


def group_norm(self, input):
    """A ``GroupNorm`` by itself: on a GPU through the backend that suits its memory format."""
    if input.device.type == "cpu" or not may_run(input) or not _readable(self, input):
        return ordinary(self, input)
    return ops.group_norm(input, self.num_groups, self.weight, self.bias, eps=self.eps)


def prompt_projection(self, input):
    """A linear layer that sees nothing but the prompt: once for each prompt."""
    direct = capturing(input) or cast_by_host(self) or not may_run(input, self)
    cache = None if direct else self._tdpm_prompt
    return remembered(cache, input, lambda: ordinary(self, input))


def _attentions(root: nn.Module) -> list[nn.Module]:
    """Attention modules whose keys and values come from the prompt alone."""
    found = []
    for module in root.modules():
        attention = getattr(module, "attn2", None)  # of a BasicTransformerBlock, in all of these libraries
        linear = attention is not None and all(
            isinstance(getattr(attention, n, None), nn.Linear) for n in ("to_k", "to_v")
        )
        if linear and not getattr(attention, "norm_cross", None):
            found.append(attention)
    return found


def _prepare(root: nn.Module, replace: Callable, projection: str, compute: Callable) -> None:
    """Caches for the prompt and for the embedding, whose projection in each block is the attribute ``projection``."""
    prompt = LastPrompt()
    for attention in _attentions(root):
        for name in ("to_k", "to_v"):
            layer = getattr(attention, name)
            if "forward" not in vars(layer):
                layer._tdpm_prompt = PromptCache(prompt, ((attention, name),))
                replace(layer, prompt_projection, "keys and values once per prompt")
    # layers of another kind (LoRA's wrappers) may compute something else tomorrow with the same weights
    patched = [m for m in root.modules() if "forward" in vars(m)]
    blocks = [m for m in patched if isinstance(last_layer(getattr(m, projection, None)), nn.Linear)]
    shared = Projections(blocks, projection, compute)
    root._tdpm_caches = (prompt, shared)


def _prepare_diffusers(root: nn.Module, replace: Callable) -> None:
    _prepare(root, replace, "time_emb_proj", _project)


def _prepare_ldm(root: nn.Module, replace: Callable) -> None:
    _prepare(root, replace, "emb_layers", _project_ldm)


def _project_ldm(block: nn.Module, emb: Tensor) -> Tensor:
    return block.emb_layers(emb)


_BLOCK = Rule(
    "ResnetBlock2D",
    ("input_tensor", "temb", "args", "kwargs"),
    diffusers_block,
    "norms, activations and embedding in one, sum in place",
    _refuse_diffusers,
)
_NORM = Rule("GroupNorm", ("input",), group_norm, "in its own memory format", variants=_NORMS)
_NETWORK = "channels_last, projections of the noise level remembered"
_REST = {"body": lambda root: root, "narrow": lambda root: [root]}

FAMILIES = (
    Family(
        "diffusers UNet2DConditionModel",
        "UNet2DConditionModel",
        (_BLOCK, _NORM, Rule("UNet2DConditionModel", None, network, _NETWORK)),
        _prepare_diffusers,
        **_REST,
    ),
    Family(
        "diffusers UNet2DModel",
        "UNet2DModel",
        (_BLOCK, _NORM, Rule("UNet2DModel", None, network, _NETWORK)),
        _prepare_diffusers,
        **_REST,
    ),
    Family(
        "OpenAI / latent-diffusion UNetModel",
        "UNetModel",
        (
            Rule("ResBlock", ("x", "emb"), ldm_block, _BLOCK.what, _refuse_ldm),
            _NORM,
            Rule("UNetModel", None, network, _NETWORK),
        ),
        _prepare_ldm,
        **_REST,
    ),
)
