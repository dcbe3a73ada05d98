"""k-diffusion's ``image_v1`` U-Net: what is fused, cached or computed in another way, and stays equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpm_ext.kernels import cpu_blocks, native, ops
from tdpm_ext.kernels.caches import LastPrompt, PromptCache, RowCache, capturing, hooked, remembered
from tdpm_ext.kernels.family import Family, Rule, add_into, channels_last, may_run, ordinary

# In k-diffusion's dict of conditions, under these names: what every AdaGN would compute from the mapping network's
# output, (scale, shift) [B, C] each at its own `_tdpm_slot`; the same made ready for torch's CPU kernels; and whether
# any of it is new, so that the norms look at their inputs once.
TABLE, READY, NEW = "_tdpm_table", "_tdpm_ready", "_tdpm_new"
CHUNK = 16  # pictures at a time on a CPU: what one stage hands to the next stays in its cache
STEEP = 4.0  # mean over standard deviation from which torch's channels_last norm on a CPU needs help


def _ada_gn(module: nn.Module, x: Tensor, cond: dict, act: str | None) -> Tensor:
    slot = getattr(module, "_tdpm_slot", None)
    ready = None if slot is None else cond.get(READY)
    if ready is not None and ready[slot][0].dtype == x.dtype:
        return _ready_norm(module, x, *ready[slot], act, cond[NEW])
    if slot is not None and TABLE in cond:
        scale, shift = cond[TABLE][slot]
    else:
        scale, shift = module.mapper(cond[module.cond_key]).chunk(2, dim=-1)
    if scale.dtype != x.dtype:  # the network is in half precision, its conditioning is not
        scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    return ops.group_norm(x, module.num_groups, eps=module.eps, scale=scale, shift=shift, act=act)


def _ready_norm(module: nn.Module, x: Tensor, gain: Tensor, shift: Tensor, act: str | None, new: bool) -> Tensor:
    """The norm on a CPU in as few operations as can be: on a small picture each costs more than its arithmetic."""
    if new and not module._tdpm_steep:
        module._tdpm_steep = _is_steep(x, module.num_groups)
    if module._tdpm_steep:
        x = native.near_zero(x, module.num_groups)
    if gain.ndim == 1:  # the same for all pictures
        h = torch.group_norm(x, module.num_groups, gain, shift, module.eps)
    else:
        h = torch.group_norm(x, module.num_groups, None, None, module.eps)
        torch.addcmul(shift, h, gain, out=h)
    return native.gelu(h) if act else h


def _is_steep(x: Tensor, groups: int) -> bool:
    variance, mean = torch.var_mean(x.unflatten(1, (groups, -1)), dim=(2, 3, 4))
    return bool((mean.square() > STEEP**2 * variance).any())


def ada_gn(self, input, cond):
    """``AdaGN``: norm, scale and shift in one."""
    if not may_run(input):
        return ordinary(self, input, cond)
    return _ada_gn(self, input, cond, None)


def residual_block(self, input, cond):
    """``ResConvBlock``: AdaGN and GELU in one, dropout of inference left out, the sum in place."""
    stages = _stages(self.main)
    if stages is None or not may_run(input, *(m for norm, act, _, drop in stages for m in (norm, act, drop))):
        return ordinary(self, input, cond)
    if cpu_blocks.switched_on(self, input) and (y := _residual_in_blocks(self, stages, input, cond)) is not None:
        return y
    h = input
    for norm, _, conv, _ in stages:
        h = conv(_ada_gn(norm, h, cond, "gelu"))
    return add_into(h, self.skip(input))


def _residual_in_blocks(module: nn.Module, stages: list[tuple], x: Tensor, cond: dict) -> Tensor | None:
    """The whole block in C++, or None where it is built otherwise."""
    norms, skip = tuple(_block_norm(stage[0], cond) for stage in stages), module.skip
    same = type(skip) is nn.Identity and not hooked(skip)
    convolutions = tuple(stage[2] for stage in stages)
    if len(stages) != 2 or not all(norms) or not cpu_blocks.usable(*convolutions, *(() if same else (skip,))):
        return None
    return cpu_blocks.residual(x, norms, "gelu", convolutions, None if same else skip)


def _block_norm(module: nn.Module, cond: dict) -> cpu_blocks.Norm | None:
    """An AdaGN as the C++ blocks take it, or None where its scale and shift are not at hand."""
    slot, ready = getattr(module, "_tdpm_slot", None), cond.get(READY)
    return None if slot is None or ready is None else cpu_blocks.Norm(module.num_groups, module.eps, *ready[slot])


def _stages(main: nn.Sequential) -> list[tuple[nn.Module, ...]] | None:
    """[(AdaGN, GELU, convolution, dropout), ...], or None where the block is built otherwise."""
    parts = list(main)
    stages = [tuple(parts[i : i + 4]) for i in range(0, len(parts), 4)]
    for stage in stages:
        if len(stage) != 4 or not hasattr(stage[0], "_tdpm_slot") or not isinstance(stage[1], nn.GELU):
            return None  # only norms that are patched themselves: a subclass may do something else
        idle = isinstance(stage[3], nn.modules.dropout._DropoutNd) and (not stage[3].training or stage[3].p == 0)
        if not idle or stage[1].approximate != "none":
            return None
    return stages


def self_attention(self, input, cond):
    """``SelfAttention2d``: q, k and v as views of one channels_last tensor, which every fused kernel can read."""
    if not may_run(input):
        return ordinary(self, input, cond)
    n, c, h, w = input.shape
    if cpu_blocks.switched_on(self, input) and not self.dropout.p and not hooked(self.norm_in):
        norm = _block_norm(self.norm_in, cond)
        whole = c // self.n_head % cpu_blocks.LANES == 0
        if norm and whole and cpu_blocks.usable(self.qkv_proj, self.out_proj):
            return cpu_blocks.attention(input, norm, self.n_head, self.qkv_proj, self.out_proj)
    qkv = channels_last(self.qkv_proj(self.norm_in(input, cond))).permute(0, 2, 3, 1)
    q, k, v = qkv.reshape(n, h * w, 3, self.n_head, c // self.n_head).permute(2, 0, 3, 1, 4)
    y = _attention(q, k, v, None, self.dropout.p)
    return add_into(self.out_proj(_picture(y, h, w)), input)


def cross_attention(self, input, cond):
    """``CrossAttention2d``: keys, values and mask once for each prompt; no mask where nothing is padded."""
    if not may_run(input):
        return ordinary(self, input, cond)
    n, c, h, w = input.shape
    q = channels_last(self.q_proj(self.norm_dec(input, cond))).permute(0, 2, 3, 1)
    q = q.reshape(n, h * w, self.n_head, c // self.n_head).transpose(1, 2)
    cross, padding = cond[self.cond_key], cond[self.cond_key_padding]
    bypass = capturing(input) or not _plain(self.norm_enc, self.kv_proj)
    kv, mask = (None, None) if bypass else self._tdpm_prompt
    kv = remembered(kv, cross, lambda: self.kv_proj(self.norm_enc(cross)))
    k, v = kv.view(n, -1, self.n_head * 2, c // self.n_head).transpose(1, 2).chunk(2, dim=1)
    if mask is None:
        bias = padding[:, None, None, :] * -10000
    else:  # empty where nothing is padded: without a mask the fused kernels take part
        bias = mask.get(padding, lambda: padding[:, None, None, :] * -10000 if padding.any() else padding.new_empty(0))
    y = _attention(q, k, v, bias if bias.numel() else None, self.dropout.p)
    return add_into(self.out_proj(_picture(y, h, w)), input)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """[B, heads, L, D]. k-diffusion hands its dropout to attention in evaluation mode too, and so does this."""
    if dropout or q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
    return ops.attention(q, k, v, mask=mask)


def _picture(y: Tensor, h: int, w: int) -> Tensor:
    """[B, heads, H * W, D] -> [B, heads * D, H, W] in channels_last."""
    n, heads, _, d = y.shape
    return y.transpose(1, 2).reshape(n, h, w, heads * d).permute(0, 3, 1, 2)


LINEAR = [0.125, 0.375, 0.375, 0.125]  # taps of k-diffusion's default resampling kernel
DOUBLED = [2 * tap for tap in LINEAR]


def downsample(self, x):
    """``Downsample2d``: each channel by itself; the library convolves all channels with all others, times zero."""
    if not may_run(x):
        return ordinary(self, x)
    if _in_blocks(self, x, LINEAR):
        return cpu_blocks.downsample(x)
    x = F.pad(x, (self.pad,) * 4, self.pad_mode)
    if x.device.type == "cpu" and _is_linear(self, LINEAR):
        rows = _four_taps(x[:, :, :-3:2], x[:, :, 1:-2:2], x[:, :, 2:-1:2], x[:, :, 3::2])
        return _four_taps(rows[..., :-3:2], rows[..., 1:-2:2], rows[..., 2:-1:2], rows[..., 3::2])
    return F.conv2d(x, _per_channel(self, x), stride=2, groups=x.shape[1])


def _four_taps(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return (b + c).mul_(LINEAR[1]).add_(a, alpha=LINEAR[0]).add_(d, alpha=LINEAR[0])


def upsample(self, x):
    """``Upsample2d``: each channel by itself."""
    if not may_run(x):
        return ordinary(self, x)
    if _in_blocks(self, x, DOUBLED):
        return cpu_blocks.upsample(x)
    x = F.pad(x, ((self.pad + 1) // 2,) * 4, self.pad_mode)
    if x.device.type == "cpu" and _is_linear(self, DOUBLED):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[:, :, 2:-2, 2:-2]
    weight = _per_channel(self, x)
    return F.conv_transpose2d(x, weight, stride=2, padding=self.pad * 2 + 1, groups=x.shape[1])


def _is_linear(module: nn.Module, taps: list[float]) -> bool:
    """Whether the kernel is k-diffusion's default one, which torch's own kernels do several times faster on a CPU."""
    return not torch.compiler.is_compiling() and module.kernel.tolist() == [[a * b for b in taps] for a in taps]


def _in_blocks(module: nn.Module, x: Tensor, taps: list[float]) -> bool:
    """Whether a C++ block does this resampling: the default kernel with reflected borders."""
    fits = cpu_blocks.switched_on(module, x) and x.shape[1] % cpu_blocks.LANES == 0 and min(x.shape[2:]) > 1
    return fits and module.pad_mode == "reflect" and _is_linear(module, taps)


def _per_channel(module: nn.Module, x: Tensor) -> Tensor:
    """The resampling kernel for each channel, [C, 1, k, k]."""
    return module.kernel.to(x).expand(x.shape[1], 1, -1, -1)


def image_v1(
    self,
    input,
    sigma,
    mapping_cond=None,
    unet_cond=None,
    cross_cond=None,
    cross_cond_padding=None,
    return_variance=False,
):
    """``ImageDenoiserModelV1``: channels_last throughout, all projections of sigma and class looked up at once."""
    if not may_run(input):
        return ordinary(self, input, sigma, mapping_cond, unet_cond, cross_cond, cross_cond_padding, return_variance)
    if input.device.type == "cpu" and len(input) > CHUNK:
        given = (input, sigma, mapping_cond, unet_cond, cross_cond, cross_cond_padding)
        parts = zip(*(len(input) * [None] if t is None else t.split(CHUNK) for t in given), strict=False)
        done = [image_v1(self, *part, return_variance) for part in parts]
        return tuple(map(torch.cat, zip(*done, strict=True))) if isinstance(done[0], tuple) else torch.cat(done)
    for prompt in self._tdpm_prompts:
        prompt.new_call()
    cond = _conditions(self, sigma, mapping_cond)
    if cross_cond is not None:
        cond["cross"], cond["cross_padding"] = cross_cond, cross_cond_padding
    x = input if unet_cond is None else torch.cat([input, unet_cond], dim=1)
    if self.patch_size > 1:
        x = F.pixel_unshuffle(x, self.patch_size)
    x = self.proj_out(self.u_net(channels_last(self.proj_in(channels_last(x))), cond))
    logvar = None
    if self.has_variance:
        x, logvar = x[:, :-1], x[:, -1].flatten(1).mean(1)
    if self.patch_size > 1:
        x = F.pixel_shuffle(x, self.patch_size)
    x = x.contiguous()  # as the library returns it; callers may view it
    return (x, logvar) if self.has_variance and return_variance else x


image_v1.__name__ = "forward"  # its bound method takes that one's place, and graphs look at the name


def _conditions(module: nn.Module, sigma: Tensor, mapping_cond: Tensor | None) -> dict:
    """k-diffusion's dict of conditions, with the table where it can be used."""
    cache, mappers = module._tdpm_rows, [norm.mapper for norm in module._tdpm_norms]
    embedding = module.mapping if mapping_cond is None else (*module.mapping, module.mapping_cond)
    if capturing(sigma) or not _plain(*embedding, *mappers):
        return {"cond": _mapping(module, sigma, mapping_cond)}

    def compute(sigma, mapping_cond=None):
        out = _mapping(module, sigma, mapping_cond)
        return torch.cat([out, *(mapper(out) for mapper in mappers)], dim=1)

    def arrange(rows: Tensor) -> dict:
        widths = [mapper.out_features for mapper in mappers]
        out, *parts = rows.split([rows.shape[1] - sum(widths), *widths], dim=1)
        table = tuple(part.chunk(2, dim=1) for part in parts)
        return {"cond": out, TABLE: table} | ({} if module._tdpm_compiled else _ready(rows, table))

    cond = cache.arranged([t for t in (sigma, mapping_cond) if t is not None], compute, arrange)
    return {**cond, NEW: cache.added} if READY in cond else dict(cond)


def _plain(*modules: nn.Module) -> bool:
    """Whether all are torch's own layers, which nobody listens to: a wrapper may compute something else at any time."""
    return all(type(m) in (nn.Linear, nn.GELU, nn.LayerNorm) for m in modules) and not hooked(*modules)


def _ready(rows: Tensor, table: tuple) -> dict:
    """Scales plus one and shifts, of the shapes that torch's CPU kernels take without a further operation."""
    if rows.device.type != "cpu":
        return {}
    if rows.stride(0) == 0 or len(rows) == 1:
        return {READY: tuple((scale[0] + 1, shift[0]) for scale, shift in table)}
    return {READY: tuple(((scale + 1)[:, :, None, None], shift[:, :, None, None]) for scale, shift in table)}


def _mapping(module: nn.Module, sigma: Tensor, mapping_cond: Tensor | None) -> Tensor:
    embed = module.timestep_embed((sigma.log() / 4)[:, None])
    return module.mapping(embed if mapping_cond is None else embed + module.mapping_cond(mapping_cond))


def prepare(root: nn.Module, replace: Callable) -> None:
    """Give the patched modules of an ``ImageDenoiserModelV1`` their caches."""
    prompt, padding = LastPrompt(), LastPrompt()
    norms = []
    for module in root.modules():
        patched = "forward" in vars(module)
        if patched and hasattr(module, "mapper"):
            own = module.cond_key == "cond"
            module._tdpm_slot, module._tdpm_steep = len(norms) if own else None, False
            norms += [module] if own else []
        elif patched and hasattr(module, "kv_proj"):
            kv = PromptCache(prompt, ((module, "norm_enc"), (module, "kv_proj")))
            module._tdpm_prompt = (kv, PromptCache(padding, ()))
    embedding = [(root, name) for name in ("timestep_embed", "mapping_cond", "mapping")]
    root._tdpm_prompts, root._tdpm_compiled, root._tdpm_norms = (prompt, padding), False, tuple(norms)
    root._tdpm_rows = RowCache((*embedding, *((norm, "mapper") for norm in norms)))


_RULES = (
    Rule("AdaGN", ("input", "cond"), ada_gn, "norm, scale and shift in one"),
    Rule("ResConvBlock", ("input", "cond"), residual_block, "norm and GELU in one, sum in place"),
    Rule("SelfAttention2d", ("input", "cond"), self_attention, "attention without copies"),
    Rule("CrossAttention2d", ("input", "cond"), cross_attention, "keys and values once per prompt"),
    Rule("Downsample2d", ("x",), downsample, "one channel at a time"),
    Rule("Upsample2d", ("x",), upsample, "one channel at a time"),
    Rule(
        "ImageDenoiserModelV1",
        (
            "input",
            "sigma",
            "mapping_cond",
            "unet_cond",
            "cross_cond",
            "cross_cond_padding",
            "return_variance",
        ),
        image_v1,
        "channels_last, projections of sigma and class remembered",
    ),
)
FAMILY = Family(
    "k-diffusion image_v1",
    "ImageDenoiserModelV1",
    _RULES,
    prepare,
    body=lambda root: root.u_net,
    narrow=lambda root: [m for m in root.modules() if isinstance(m, nn.Conv2d)],
    blocks=True,
)
