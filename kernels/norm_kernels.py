"""Triton kernels of group normalisation; `norm_plan` says how they are cut, `triton_norm` launches them.

Notation: ``c`` channels, ``s`` pixels, ``g`` groups, ``k`` partial results; a tile is [c, s]. Every kernel takes x as a
pointer and three strides, so contiguous and channels_last differ in nothing but which stride is 1.

Statistics never leave float32 and never meet a large mean: each channel is measured from its own first pixel (its
``pivot``), channels and parts are merged by the formula of Chan, Golub & LeVeque (1983), and the mean is kept as a sum
of two floats. A ``pre_add`` moves a channel's mean and nothing else, so it enters only where channels are merged.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Tiles under way at once. A loop without a matrix product is pipelined only where it says so itself.
STAGES = tl.constexpr(4)
# counts whose value says nothing about alignment: no new compilation for each
COUNTS = ["blocks", "splits", "tiles"]


@triton.jit
def _place(blocks, channels, PER_BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr):
    """This program's sample, its first channel, and which of BLOCK_C channels are its own."""
    pid = tl.program_id(0)
    n = pid // blocks
    c0 = (pid % blocks) * PER_BLOCK
    c = tl.arange(0, BLOCK_C)
    c_in = c < PER_BLOCK
    if not EVEN:  # else not even asked: a comparison with a number of run time may cost the wide loads
        c_in = c_in & (c0 + c < channels)
    return n, c0.to(tl.int64), c_in


@triton.jit
def _offsets(stride_c, stride_s, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr):
    c = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    if WIDE:
        c = c.to(tl.int64)
        s = s.to(tl.int64)
    return c[:, None] * stride_c + s[None, :] * stride_s


@triton.jit
def _pivot(x, c_in, stride_c, BLOCK_C: tl.constexpr):
    """The first pixel of each channel, from which the channel is measured."""
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    return tl.load(x + c * stride_c, mask=c_in, other=0.0).to(tl.float32)


@triton.jit
def _stream(
    x, pivot, c_in, first, last, pixels, stride_c, stride_s,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean (from ``pivot``) and sum of squared deviations of each channel, over the pixels from first up to last.

    ``x`` points at pixel ``first``; ``last`` is ``pixels``, or whole blocks away from ``first``. Every lane of the tile
    runs Welford's recurrence over its own pixels; the lanes are merged once, at the end.
    """
    s = tl.arange(0, BLOCK_S)
    offsets = _offsets(stride_c, stride_s, BLOCK_C, BLOCK_S, WIDE)
    step = tl.cast(stride_s, tl.int64) * BLOCK_S
    mean = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    m2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    count = 0.0
    for start in tl.range(first, last, BLOCK_S, num_stages=STAGES):
        inside = c_in[:, None] & (start + s < pixels)[None, :]  # not `last`, whose divisibility nobody knows
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - pivot[:, None]
        count += 1.0
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / count)
        m2 += delta * (value - mean)
        x += step
    seen = ((last - first - s + (BLOCK_S - 1)) // BLOCK_S).to(tl.float32)[None, :]  # pixels of each lane
    channel_mean = tl.sum(mean * seen, axis=1) / (last - first)
    apart = mean - channel_mean[:, None]
    return channel_mean, tl.sum(m2 + seen * apart * apart, axis=1)


@triton.jit
def _sum_of_group(values, chosen, member):
    """For each channel the sum of the ``chosen`` values in its group. [c], [c, g], [c, g] -> [c]"""
    per_group = tl.sum(tl.where(chosen, values[:, None], 0.0), axis=0)
    return tl.sum(tl.where(member, per_group[None, :], 0.0), axis=1)


@triton.jit
def _affine(
    pivot, mean, m2, n, c0, c_in, weight, bias, pre_add, scale, shift, pre_add_sample, scale_sample, shift_sample,
    pixels, eps, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """(centre, factor, term) of each channel: before the activation, the result is (x - centre) * factor + term."""
    c = tl.arange(0, BLOCK_C)
    g = tl.arange(0, BLOCK_G)
    member = (c // PER_GROUP)[:, None] == g[None, :]
    leader = c[:, None] == (g * PER_GROUP)[None, :]  # of each group: its first channel
    offset = pivot - _sum_of_group(pivot, leader, member)
    if pre_add is not None:
        added = tl.load(pre_add + n * pre_add_sample + c0 + c, mask=c_in, other=0.0).to(tl.float32)
        offset += added - _sum_of_group(added, leader, member)
    from_leader = offset + mean
    group_mean = _sum_of_group(from_leader, member, member) / PER_GROUP
    apart = from_leader - group_mean
    total = _sum_of_group(m2 + pixels * apart * apart, member, member)
    factor = tl.rsqrt(total / PER_GROUP / pixels + eps)
    term = tl.zeros([BLOCK_C], tl.float32)
    if weight is not None:
        factor *= tl.load(weight + c0 + c, mask=c_in, other=0.0).to(tl.float32)
    if bias is not None:
        term += tl.load(bias + c0 + c, mask=c_in, other=0.0).to(tl.float32)
    if scale is not None:
        scaled = 1.0 + tl.load(scale + n * scale_sample + c0 + c, mask=c_in, other=0.0).to(tl.float32)
        factor *= scaled
        term *= scaled
    if shift is not None:
        term += tl.load(shift + n * shift_sample + c0 + c, mask=c_in, other=0.0).to(tl.float32)
    # The group's mean as this channel sees it, pivot + back, does not fit one float when it is far from zero: what is
    # lost in rounding it (Knuth's two-sum) goes into the term.
    back = group_mean - offset
    centre = pivot + back
    part = centre - pivot
    lost = (pivot - (centre - part)) + (back - part)
    return centre, factor, term - lost * factor


@triton.jit
def _finish(value, centre, factor, term, ACT: tl.constexpr):
    """The tile's result: normalised, affine, activated."""
    value = (value - centre[:, None]) * factor[:, None] + term[:, None]
    if ACT == "silu":
        value = value / (1.0 + tl.exp(-value))
    elif ACT == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    return value


@triton.jit(do_not_specialize=COUNTS)
def tile_kernel(
    x, y, weight, bias, pre_add, scale, shift, x_sample, x_channel, x_pixel, y_sample, y_channel, y_pixel,
    pre_add_sample, scale_sample, shift_sample, channels, pixels, blocks, eps, PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """BLOCK_G whole groups, held in registers. Grid: (samples * blocks,)."""
    n, c0, c_in = _place(blocks, channels, PER_GROUP * BLOCK_G, BLOCK_C, EVEN)
    n = n.to(tl.int64)
    x += n * x_sample + c0 * x_channel
    y += n * y_sample + c0 * y_channel
    inside = c_in[:, None] & (tl.arange(0, BLOCK_S) < pixels)[None, :]
    raw = tl.load(x + _offsets(x_channel, x_pixel, BLOCK_C, BLOCK_S, WIDE), mask=inside, other=0.0)
    value = raw.to(tl.float32)
    pivot = _pivot(x, c_in, x_channel, BLOCK_C)
    from_pivot = tl.where(inside, value - pivot[:, None], 0.0)
    mean = tl.sum(from_pivot, axis=1) / pixels
    apart = tl.where(inside, from_pivot - mean[:, None], 0.0)
    m2 = tl.sum(apart * apart, axis=1)
    centre, factor, term = _affine(
        pivot, mean, m2, n, c0, c_in, weight, bias, pre_add, scale, shift, pre_add_sample, scale_sample, shift_sample,
        pixels, eps, PER_GROUP, BLOCK_C, BLOCK_G,
    )  # fmt: skip
    value = _finish(value, centre, factor, term, ACT)
    tl.store(y + _offsets(y_channel, y_pixel, BLOCK_C, BLOCK_S, WIDE), value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def loop_kernel(
    x, y, weight, bias, pre_add, scale, shift, x_sample, x_channel, x_pixel, y_sample, y_channel, y_pixel,
    pre_add_sample, scale_sample, shift_sample, channels, pixels, blocks, eps, PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """BLOCK_G whole groups, read twice. Grid: (samples * blocks,)."""
    n, c0, c_in = _place(blocks, channels, PER_GROUP * BLOCK_G, BLOCK_C, EVEN)
    n = n.to(tl.int64)
    x += n * x_sample + c0 * x_channel
    y += n * y_sample + c0 * y_channel
    pivot = _pivot(x, c_in, x_channel, BLOCK_C)
    mean, m2 = _stream(x, pivot, c_in, 0, pixels, pixels, x_channel, x_pixel, BLOCK_C, BLOCK_S, WIDE)
    centre, factor, term = _affine(
        pivot, mean, m2, n, c0, c_in, weight, bias, pre_add, scale, shift, pre_add_sample, scale_sample, shift_sample,
        pixels, eps, PER_GROUP, BLOCK_C, BLOCK_G,
    )  # fmt: skip
    s = tl.arange(0, BLOCK_S)
    x_offsets = _offsets(x_channel, x_pixel, BLOCK_C, BLOCK_S, WIDE)
    y_offsets = _offsets(y_channel, y_pixel, BLOCK_C, BLOCK_S, WIDE)
    x_step = tl.cast(x_pixel, tl.int64) * BLOCK_S
    y_step = tl.cast(y_pixel, tl.int64) * BLOCK_S
    for start in tl.range(0, pixels, BLOCK_S, num_stages=STAGES):
        inside = c_in[:, None] & (start + s < pixels)[None, :]
        value = tl.load(x + x_offsets, mask=inside, other=0.0).to(tl.float32)
        value = _finish(value, centre, factor, term, ACT)
        tl.store(y + y_offsets, value.to(y.dtype.element_ty), mask=inside)
        x += x_step
        y += y_step


@triton.jit(do_not_specialize=COUNTS)
def part_kernel(
    x, parts, x_sample, x_channel, x_pixel, plane, channels, pixels, blocks, splits, chunk,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Statistics of BLOCK_C channels, ``chunk`` pixels -> parts [2, n, k, c]. Grid: (samples * splits * blocks,)."""
    row, c0, c_in = _place(blocks, channels, BLOCK_C, BLOCK_C, EVEN)  # row: sample and split
    n = (row // splits).to(tl.int64)
    first = (row % splits) * chunk
    x += n * x_sample + c0 * x_channel
    pivot = _pivot(x, c_in, x_channel, BLOCK_C)
    last = tl.minimum(first + chunk, pixels)
    x += first.to(tl.int64) * x_pixel
    mean, m2 = _stream(x, pivot, c_in, first, last, pixels, x_channel, x_pixel, BLOCK_C, BLOCK_S, WIDE)
    parts += row.to(tl.int64) * channels + c0 + tl.arange(0, BLOCK_C)
    tl.store(parts, mean, mask=c_in)
    tl.store(parts + plane, m2, mask=c_in)


@triton.jit(do_not_specialize=COUNTS)
def merge_kernel(
    x, parts, affine, weight, bias, pre_add, scale, shift, x_sample, x_channel, pre_add_sample, scale_sample,
    shift_sample, part_plane, affine_plane, channels, pixels, blocks, splits, chunk, eps, PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """All parts of BLOCK_G groups -> affine [3, n, c]: centre, factor, term. Grid: (samples * blocks,)."""
    n, c0, c_in = _place(blocks, channels, PER_GROUP * BLOCK_G, BLOCK_C, EVEN)
    n = n.to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    pivot = _pivot(x + n * x_sample + c0 * x_channel, c_in, x_channel, BLOCK_C)
    parts += n * splits * channels + c0 + c[:, None]
    mean = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, splits, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = c_in[:, None] & (k < splits)[None, :]
        seen = tl.minimum(pixels - k * chunk, chunk).to(tl.float32)[None, :]
        mean += tl.sum(tl.load(parts + k[None, :] * channels, mask=inside, other=0.0) * seen, axis=1)
    mean = mean / pixels
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, splits, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = c_in[:, None] & (k < splits)[None, :]
        seen = tl.minimum(pixels - k * chunk, chunk).to(tl.float32)[None, :]
        apart = tl.load(parts + k[None, :] * channels, mask=inside, other=0.0) - mean[:, None]
        within = tl.load(parts + part_plane + k[None, :] * channels, mask=inside, other=0.0)
        m2 += tl.sum(tl.where(inside, within + seen * apart * apart, 0.0), axis=1)
    centre, factor, term = _affine(
        pivot, mean, m2, n, c0, c_in, weight, bias, pre_add, scale, shift, pre_add_sample, scale_sample, shift_sample,
        pixels, eps, PER_GROUP, BLOCK_C, BLOCK_G,
    )  # fmt: skip
    affine += n * channels + c0 + c
    tl.store(affine, centre, mask=c_in)
    tl.store(affine + affine_plane, factor, mask=c_in)
    tl.store(affine + 2 * affine_plane, term, mask=c_in)


@triton.jit(do_not_specialize=COUNTS)
def apply_kernel(
    x, y, affine, x_sample, x_channel, x_pixel, y_sample, y_channel, y_pixel, plane, channels, pixels, blocks, tiles,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """One tile with its channels' (centre, factor, term). Grid: (samples * tiles * blocks,)."""
    row, c0, c_in = _place(blocks, channels, BLOCK_C, BLOCK_C, EVEN)  # row: sample and tile of pixels
    n = (row // tiles).to(tl.int64)
    first = (row % tiles) * BLOCK_S
    inside = c_in[:, None] & (first + tl.arange(0, BLOCK_S) < pixels)[None, :]
    affine += n * channels + c0 + tl.arange(0, BLOCK_C)
    centre = tl.load(affine, mask=c_in, other=0.0)
    factor = tl.load(affine + plane, mask=c_in, other=0.0)
    term = tl.load(affine + 2 * plane, mask=c_in, other=0.0)
    x += n * x_sample + c0 * x_channel + first.to(tl.int64) * x_pixel
    y += n * y_sample + c0 * y_channel + first.to(tl.int64) * y_pixel
    value = tl.load(x + _offsets(x_channel, x_pixel, BLOCK_C, BLOCK_S, WIDE), mask=inside, other=0.0).to(tl.float32)
    value = _finish(value, centre, factor, term, ACT)
    tl.store(y + _offsets(y_channel, y_pixel, BLOCK_C, BLOCK_S, WIDE), value.to(y.dtype.element_ty), mask=inside)
