"""The definitions of the operations: against torch's own, formulas written out, and k-diffusion's layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from tdpm_ext.kernels.reference import attention, group_norm, sampler_step

ACTS = {None: lambda y: y, "silu": functional.silu, "gelu": functional.gelu}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Group normalisation


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", [(2, 12), (2, 12, 7), (3, 12, 5, 3), (2, 12, 2, 3, 5)], ids=str)
def test_group_norm_is_torchs_with_what_stands_around_it(shape, act):
    x, weight, bias = randn(*shape), randn(12, seed=1), randn(12, seed=2)
    pre_add, scale, shift = (randn(shape[0], 12, seed=seed) for seed in (3, 4, 5))
    wide = (shape[0], 12) + (1,) * (len(shape) - 2)
    expected = functional.group_norm(x + pre_add.reshape(wide), 4, weight, bias, eps=1e-3)
    expected = ACTS[act](expected * (1 + scale.reshape(wide)) + shift.reshape(wide))
    given = {"pre_add": pre_add, "scale": scale, "shift": shift.reshape(wide)}
    torch.testing.assert_close(group_norm(x, 4, weight, bias, eps=1e-3, act=act, **given), expected)


def test_group_norm_is_k_diffusions_adaptive_one():
    layers = pytest.importorskip("k_diffusion.layers")
    layer = layers.AdaGN(6, 12, 3).double()
    torch.nn.init.normal_(layer.mapper.weight, generator=torch.Generator().manual_seed(0))
    x, cond = randn(2, 12, 4, 5), randn(2, 6, seed=1)
    scale, shift = layer.mapper(cond).chunk(2, dim=-1)
    ours = group_norm(x, 3, eps=layer.eps, scale=scale, shift=shift)
    torch.testing.assert_close(ours, layer(x, {"cond": cond}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_group_norm_rounds_once(dtype):
    x, weight, bias = randn(2, 8, 6, 5, dtype=dtype) * 300, randn(8, seed=1, dtype=dtype), randn(8, seed=2, dtype=dtype)
    exact = group_norm(x.double(), 2, weight.double(), bias.double(), act="silu")
    ours = group_norm(x, 2, weight, bias, act="silu")
    assert ours.dtype == dtype
    # at most one unit in the last place: half of one from the rounding, the rest where float32 falls on the other side
    spacing = torch.finfo(dtype).eps * torch.exp2(exact.abs().clamp_min(1e-4).log2().floor())
    assert bool(((ours.double() - exact).abs() <= 0.51 * spacing).all())


def test_group_norm_keeps_its_digits_far_from_zero():
    x = randn(2, 8, 16, 16, dtype=torch.float32) + 1000
    exact = group_norm(x.double(), 2)
    ours, torchs = ((y.double() - exact).abs().max() for y in (group_norm(x, 2), functional.group_norm(x, 2)))
    assert ours < 1e-6
    assert ours < 0.1 * torchs


def test_group_norm_of_a_constant_is_the_bias():
    x, bias = torch.full((2, 4, 3, 3), 7.3), randn(4, dtype=torch.float32)
    torch.testing.assert_close(
        group_norm(x, 2, None, bias), bias.reshape(1, 4, 1, 1).expand(2, 4, 3, 3), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, 2:6],
        lambda x: x.to(memory_format=torch.channels_last)[:, 2:6],
    ],
    ids=["contiguous", "channels_last", "transposed", "slice", "channels_last slice"],
)
def test_results_come_as_empty_like_would_allocate_them(make):
    x = make(randn(2, 8, 5, 3, dtype=torch.float32))
    strides = torch.empty_like(x).stride()
    assert group_norm(x, 2).stride() == strides
    assert attention(x, x.clone(), x.clone()).stride() == strides
    assert [t.stride() for t in sampler_step(x, x.contiguous(), a=1.0, b=1.0)] == [strides, strides]


def test_empty_pictures_are_returned():
    assert group_norm(torch.empty(0, 4, 3, 3), 2).shape == (0, 4, 3, 3)
    assert group_norm(torch.empty(2, 4, 0, 3), 2).shape == (2, 4, 0, 3)


def test_one_row_serves_all_samples():
    x, row = randn(3, 6, 4), randn(1, 6, seed=1)
    expected = group_norm(x, 2, pre_add=row.expand(3, 6), scale=row.expand(3, 6), shift=row.expand(3, 6))
    torch.testing.assert_close(group_norm(x, 2, pre_add=row, scale=row, shift=row), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"groups": 5}, "12 channels do not divide into 5 groups"),
        ({"act": "relu"}, "act is 'relu'; it must be one of"),
        ({"weight": torch.ones(3)}, r"weight has shape \(3,\).*\[12\]"),
        ({"scale": torch.ones(2, 3)}, r"scale has shape \(2, 3\).*\[2, 12\] or \[1, 12\]"),
        ({"shift": torch.ones(12)}, r"shift has shape \(12,\)"),
        ({"pre_add": torch.ones(2, 12, 4, 3)}, r"pre_add has shape \(2, 12, 4, 3\)"),
        ({"x": torch.ones(3)}, r"x has shape \(3,\); it must be \[N, C, \*spatial\]"),
    ],
)
def test_group_norm_says_what_does_not_fit(change, complaint):
    arguments = {"x": torch.ones(2, 12, 4, 3), "groups": 3} | change
    with pytest.raises(ValueError, match=complaint):
        group_norm(**arguments)


def test_gradients_are_right():
    leaves = [randn(2, 4, 3, seed=0), randn(4, seed=1), randn(4, seed=2), *(randn(2, 4, seed=s) for s in (3, 4, 5))]
    for leaf in leaves:
        leaf.requires_grad_()

    def normalise(x, weight, bias, pre_add, scale, shift):
        return group_norm(x, 2, weight, bias, pre_add=pre_add, scale=scale, shift=shift, act="silu")

    assert torch.autograd.gradcheck(normalise, leaves)
    qkv = [randn(1, 2, 3, 4, seed=s).requires_grad_() for s in (6, 7, 8)]
    mask = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask=mask), qkv)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiles_to_one_graph(memory_format):
    x = randn(2, 8, 4, 4, dtype=torch.float32).to(memory_format=memory_format)

    def all_three(x):
        y = group_norm(x, 2, act="gelu", shift=x.mean((2, 3)))
        y = attention(y, y, y, mask=y.mean((1, 3))[:, None, None, :] > -9)
        return sampler_step(x, y, (x,), a=0.5, b=0.25, c=(0.125,), uncond=x, cond_scale=2.0)

    compiled = torch.compile(all_three, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, all_three(x), rtol=1e-6, atol=1e-6)
    assert [t.stride() for t in compiled] == [t.stride() for t in all_three(x)]


# Attention


@pytest.mark.parametrize("keys", [1, 7, 77])
@pytest.mark.parametrize("mask", [None, "bool", "added"])
def test_attention_is_torchs(keys, mask):
    q, k, v = randn(2, 3, 5, 8), randn(2, 3, keys, 8, seed=1), randn(2, 3, keys, 8, seed=2)
    if mask is not None:
        mask = randn(2, 1, 5, keys, seed=3) if mask == "added" else randn(2, 1, 5, keys, seed=3) > 0.5
        if mask.dtype == torch.bool:
            mask[..., 0] = True  # torch gives nothing of use for a row that attends to nothing
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(attention(q, k, v, scale=0.3, mask=mask), expected)


def test_attention_scales_by_the_root_of_the_head_dimension():
    q, k, v = randn(1, 1, 3, 16), randn(1, 1, 4, 16, seed=1), randn(1, 1, 4, 16, seed=2)
    torch.testing.assert_close(attention(q, k, v), attention(q, k, v, scale=0.25))


@pytest.mark.parametrize("mask", [torch.tensor([[True, True], [False, False]]), torch.tensor([[0.0], [-math.inf]])])
def test_a_row_that_attends_to_nothing_is_zero(mask):
    v = randn(1, 1, 2, 4, seed=2)
    y = attention(randn(1, 1, 2, 4), randn(1, 1, 2, 4, seed=1), v, mask=mask)
    assert bool((y[0, 0, 1] == 0).all())
    assert bool((y[0, 0, 0] != 0).all())


def test_attention_does_not_overflow_in_half_precision():
    q = torch.full((1, 1, 2, 64), 300.0, dtype=torch.float16)
    v = randn(1, 1, 2, 64, dtype=torch.float16)
    torch.testing.assert_close(attention(q, q, v), v.mean(2, keepdim=True).expand(1, 1, 2, 64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shapes", [((1, 2, 3, 4), (1, 2, 3, 5)), ((1, 2, 3, 4), (1, 3, 3, 4)), ((2, 3, 4), (2, 3, 4))])
def test_attention_says_what_does_not_fit(shapes):
    q, k = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"must be q \[B, H, Lq, D\]"):
        attention(q, k, k)


# One step of the sampler

numbers = st.floats(-3, 3, allow_nan=False)


@given(a=numbers, b=numbers, c=st.lists(numbers, max_size=2), d=numbers, cond_scale=numbers)
def test_a_step_is_the_weighted_sum(a, b, c, d, cond_scale):
    x, denoised, uncond, noise = (randn(2, 3, seed=seed) for seed in range(4))
    previous = [randn(2, 3, seed=10 + i) for i in range(len(c))]
    y, used = sampler_step(x, denoised, previous, a=a, b=b, c=c, noise=noise, d=d, uncond=uncond, cond_scale=cond_scale)
    guided = uncond + cond_scale * (denoised - uncond)
    expected = a * x + b * guided + sum(f * p for f, p in zip(c, previous, strict=True)) + d * noise
    torch.testing.assert_close(used, guided)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("with_input", [False, True])
def test_raw_outputs_are_preconditioned_before_guidance(with_input):
    x, raw, raw_uncond, other = (randn(2, 3, seed=seed) for seed in range(4))
    model_input = other if with_input else x
    cond, uncond = (0.4 * model_input + 0.7 * f for f in (raw, raw_uncond))
    expected = sampler_step(x, cond, a=0.9, b=0.1, uncond=uncond, cond_scale=5.0)
    given = {"c_skip": 0.4, "c_out": 0.7, "model_input": other if with_input else None}
    torch.testing.assert_close(sampler_step(x, raw, a=0.9, b=0.1, uncond=raw_uncond, cond_scale=5.0, **given), expected)


def test_a_step_in_half_precision_rounds_once():
    x, denoised = randn(64, dtype=torch.float16) * 100, randn(64, seed=1, dtype=torch.float16)
    y, used = sampler_step(x, denoised, (denoised,), a=1 / 3, b=2 / 3, c=(0.1,))
    exact = x.double() / 3 + denoised.double() * (2 / 3 + 0.1)
    assert bool(((y.double() - exact).abs() <= 0.51 * torch.finfo(torch.float16).eps * exact.abs() * 2).all())
    assert torch.equal(used, denoised)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"denoised": torch.ones(3)}, r"denoised has shape \(3,\)"),
        ({"previous": (torch.ones(3),), "c": (1.0,)}, r"previous\[0\] has shape \(3,\)"),
        ({"c": (1.0,)}, "1 factors c for 0 previous"),
        ({"d": 0.5}, "d is 0.5, but there is no noise"),
        ({"c_skip": 0.5}, "give both or neither"),
        ({"model_input": torch.ones(2)}, "used with c_skip and c_out only"),
    ],
)
def test_a_step_says_what_does_not_fit(change, complaint):
    arguments = {"x": torch.ones(2), "denoised": torch.ones(2), "a": 1.0, "b": 0.0} | change
    with pytest.raises(ValueError, match=complaint):
        sampler_step(**arguments)
