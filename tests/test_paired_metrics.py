"""Paired fidelity, memorisation, ties and blocks of seeds; the distances against torchmetrics as a third party."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import metrics
from benchmarks.metrics import Estimate


def gaussian(seed, count=300, dim=10, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) * scale + shift


class Identity(torch.nn.Module):
    """A feature extractor for torchmetrics: its input is the features."""

    num_features = 10

    def forward(self, x):
        return x


def torchmetrics_module(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"torchmetrics.image.{name}", exc_type=ImportError)


@pytest.mark.parametrize("count", [300, 8], ids=["full rank", "fewer pictures than features"])
def test_frechet_distance_agrees_with_torchmetrics(count):
    module = torchmetrics_module("fid")
    a, b = gaussian(1, count), gaussian(2, count, scale=1.3, shift=0.4)
    other = module.FrechetInceptionDistance(feature=Identity(), input_img_size=(10,)).set_dtype(torch.float64)
    other.update(torch.from_numpy(a), real=True)
    other.update(torch.from_numpy(b), real=False)
    assert metrics.frechet_distance(a, b) == pytest.approx(other.compute().item(), rel=1e-6)


def test_kernel_distance_agrees_with_torchmetrics():
    module = torchmetrics_module("kid")
    a, b = torch.from_numpy(gaussian(3)), torch.from_numpy(gaussian(4, shift=0.4))
    # one subset of everything: torchmetrics divides both within-sums by m (m - 1) and the cross sum by m m, as we do
    value = module.poly_mmd(a, b, degree=3, gamma=None, coef=1.0).item()
    assert metrics.kernel_distance(a, b, replicates=2).value == pytest.approx(value, rel=1e-6)


@given(st.floats(0.001, 1.0), st.integers(1, 4))
def test_psnr_of_a_constant_difference_is_its_definition(difference, count):
    a = np.zeros((count, 1, 3, 3))
    expected = 20 * math.log10(2 / difference)
    np.testing.assert_allclose(metrics.psnr(a, a + difference), [min(expected, metrics.PSNR_CAP)] * count, rtol=1e-9)
    np.testing.assert_allclose(metrics.psnr(a, a + 255 * difference / 2, peak=255), metrics.psnr(a, a + difference))


def test_equal_pictures_get_the_cap_and_stay_finite():
    x = np.random.default_rng(0).standard_normal((3, 1, 4, 4))
    got = metrics.paired(x, x, x.reshape(3, -1), x.reshape(3, -1))
    assert got == (0.0, metrics.PSNR_CAP, 0.0)


def test_features_of_unrelated_pictures_differ_by_the_square_root_of_two():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 4000, 5))
    assert metrics.paired(x, y, x, y).features == pytest.approx(math.sqrt(2), rel=0.03)


def test_memorisation_of_fresh_pictures_is_one_and_of_copies_zero():
    rng = np.random.default_rng(2)
    fitted, held, fresh = rng.standard_normal((3, 400, 6))
    honest = metrics.memorisation(fresh, held, fitted)
    assert honest.ratio == pytest.approx(1, abs=0.1) and honest.copies < 0.04
    copied = metrics.memorisation(fitted[:100] + 1e-4, held, fitted)
    assert copied.ratio < 0.01 and copied.copies == 1.0
    half = np.concatenate([fresh[:50], fitted[:50]])
    assert metrics.memorisation(half, held, fitted).copies == pytest.approx(0.5, abs=0.05)


def test_held_out_pictures_that_were_fitted_are_refused():
    x = np.random.default_rng(3).standard_normal((20, 4))
    with pytest.raises(ValueError, match="not fitted"):
        metrics.memorisation(x, x, x)


def test_blocks_give_their_mean_and_deviation():
    got = metrics.over_blocks([1.0, 2.0, 3.0])
    assert got == (2.0, 1.0)
    assert math.isnan(metrics.over_blocks([5.0]).error)
    with pytest.raises(ValueError, match="finite"):
        metrics.over_blocks([1.0, float("inf")])


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0.01, 2), st.floats(0.01, 2))
def test_a_difference_under_the_noise_is_a_tie_and_the_order_of_arguments_only_changes_the_sign(a, b, sd_a, sd_b):
    x, y = Estimate(a, sd_a), Estimate(b, sd_b)
    verdict = metrics.compare(x, y)
    assert verdict == -metrics.compare(y, x)
    assert (verdict == 0) == (abs(a - b) <= 2 * math.hypot(sd_a, sd_b))
    if verdict:
        assert (verdict < 0) == (a < b)


def test_one_block_cannot_be_compared():
    with pytest.raises(ValueError, match="two or more"):
        metrics.compare(Estimate(1.0, float("nan")), Estimate(2.0, 0.1))
