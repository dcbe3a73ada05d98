"""3x3 convolutions by Winograd's F(4x4, 3x3): the same numbers but for rounding, and weights that stay up to date."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tdpm_ext.kernels import winograd


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 13), st.integers(1, 13), st.booleans())
def test_it_is_a_convolution_with_padding_one(n, c, o, h, w, bias):
    g = torch.Generator().manual_seed(n * 1000 + c * 100 + h * 10 + w)
    x = torch.randn(n, c, h, w, generator=g, dtype=torch.float64)
    weight = torch.randn(o, c, 3, 3, generator=g, dtype=torch.float64)
    b = torch.randn(o, generator=g, dtype=torch.float64) if bias else None
    y = winograd.conv3x3(x, winograd.transform_weight(weight), b)
    torch.testing.assert_close(y, F.conv2d(x, weight, b, padding=1), rtol=1e-10, atol=1e-10)


def test_rounding_in_float32_is_small_against_the_result():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 64, 14, 14, generator=g), torch.randn(64, 64, 3, 3, generator=g) / 24
    wanted = F.conv2d(x.double(), weight.double(), padding=1)
    error = winograd.conv3x3(x, winograd.transform_weight(weight), None) - wanted
    assert error.abs().max() <= 1e-4 * wanted.std() and error.std() <= 1e-5 * wanted.std()


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "dtype": torch.float64},
    ],
)
def test_only_plain_convolutions_fit(changes):
    assert winograd.fits(nn.Conv2d(32, 32, 3, padding=1))
    assert not winograd.fits(nn.Conv2d(32, 32, **changes))
    assert not winograd.fits(nn.Conv2d(16, 32, 3, padding=1))


def test_transformed_weights_follow_edits_where_they_lie():
    conv = nn.Conv2d(32, 32, 3, padding=1)
    kept = winograd.TransformedWeights([(nn.Sequential(conv), "0")])
    u = conv._tdpm_winograd
    with torch.no_grad():
        conv.weight.mul_(2)
    kept.update()
    assert conv._tdpm_winograd is u and u.equal(winograd.transform_weight(conv.weight))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: Inductor cannot build CPU code here")
def test_compiled_code_uses_it_and_sees_edits():
    from types import MethodType

    conv = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    kept = winograd.TransformedWeights([(nn.Sequential(conv), "0")])
    vars(conv)["forward"] = MethodType(winograd.forward, conv)
    compiled = torch.compile(lambda x: conv(x), fullgraph=True, dynamic=False)
    x = torch.randn(8, 32, 12, 12, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 3.0):
        conv.weight.mul_(factor)
        kept.update()
        wanted = F.conv2d(x, conv.weight, conv.bias, padding=1)
        y = compiled(x)
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-4)
        assert not y.equal(wanted)  # it was really computed in another way
