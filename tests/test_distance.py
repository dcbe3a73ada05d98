"""The distance that calibration judges by."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdpm_ext.distance import KEPT, AsSeenBy, FeatureDistance, RandomFeatures, frechet


def pictures(count=600, shape=(1, 8, 8), seed=0):
    """Smooth pictures, std about 0.5."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator)
    return 1.2 * torch.nn.functional.avg_pool2d(x, 3, 1, 1)


def gaussian(seed, d=5):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), root @ root.T


# -- the formula -------------------------------------------------------------------------------------------------------


@given(a=st.integers(0, 1000), b=st.integers(0, 1000))
def test_frechet_is_symmetric_zero_on_itself_and_never_negative(a, b):
    one, two = gaussian(a), gaussian(b)
    assert frechet(*one, *one) == pytest.approx(0, abs=1e-6)
    assert frechet(*one, *two) == pytest.approx(frechet(*two, *one), rel=1e-6, abs=1e-6)
    assert frechet(*one, *two) > -1e-6


def test_frechet_of_commuting_covariances_is_known_in_closed_form():
    a, b = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([1.0, 9.0, 0.0]).double()
    mean = torch.tensor([1.0, 0.0, 2.0]).double()
    expected = 5.0 + float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet(mean, a.diag(), torch.zeros(3).double(), b.diag()) == pytest.approx(expected)


def test_frechet_agrees_with_the_matrix_square_root():
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(1), gaussian(2)
    values, vectors = np.linalg.eig((cov_a @ cov_b).numpy())
    root = (vectors * np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    expected = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()) - 2 * np.trace(root).real
    assert frechet(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected)


# -- features ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 1, 1), (4, 5, 3), (1, 28, 28)])
def test_random_features_take_any_size_and_are_the_same_from_a_seed(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    first = RandomFeatures(shape[0])(x)
    assert first.shape[0] == 3 and bool(first.isfinite().all())
    assert torch.equal(RandomFeatures(shape[0])(x), first)
    assert not torch.equal(RandomFeatures(shape[0], seed=1)(x), first)


def test_random_features_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    FeatureDistance(pictures())(pictures(200, seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)


# -- the distance ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distance():
    return FeatureDistance(pictures())


def test_the_pictures_themselves_are_at_no_distance_and_others_of_their_kind_near(distance):
    near, far = distance(pictures(600, seed=1)), distance(pictures(600, seed=1).flip(3) + 0.3)
    assert distance(pictures()) == pytest.approx(0, abs=1e-4)
    assert 0 < near < 0.1 * far


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, strength: x + strength * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)),
        lambda x, strength: torch.lerp(x, torch.nn.functional.avg_pool2d(x, 3, 1, 1), strength),
        lambda x, strength: x * (1 + strength),
        lambda x, strength: torch.lerp(x, x.mean(0), strength),
    ],
    ids=["noise", "blur", "contrast", "sameness"],
)
def test_it_grows_with_what_spoils_pictures(distance, spoil):
    others = pictures(600, seed=1)
    values = [distance(spoil(others, strength)) for strength in (0.0, 0.2, 0.4, 0.8)]
    assert values == sorted(values) and values[-1] > 3 * values[0]


@settings(max_examples=10)
@given(st.integers(0, 100))
def test_the_order_of_the_samples_does_not_matter(distance, seed):
    x = pictures(300, seed=1)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
    assert distance(x[order]) == pytest.approx(distance(x), rel=1e-6)


def test_its_std_is_the_pictures_own_per_entry():
    x = pictures() + 5.0 * torch.arange(8.0)  # a mean that differs between pixels is no spread
    expected = float(x.double().var(0, correction=0).mean().sqrt())
    assert FeatureDistance(x).std == pytest.approx(expected, rel=1e-6)


def test_data_come_in_every_form_that_fitting_takes():
    x, probe = pictures(), pictures(200, seed=3)
    raw = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    expected = FeatureDistance(x)(probe)
    assert FeatureDistance(iter(x.split(100)))(probe) == pytest.approx(expected)
    assert FeatureDistance(raw)(probe) == pytest.approx(FeatureDistance(raw.float() / 127.5 - 1)(probe), rel=1e-4)


def test_given_features_are_used_for_pictures_without_channels():
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    distance = FeatureDistance(x, features=lambda x: torch.cat([x, x.square()], 1))
    assert distance(x) == pytest.approx(0, abs=1e-6)
    assert distance(x + 0.5) > 1.0
    with pytest.raises(ValueError, match=r"\(6,\): give features="):
        FeatureDistance(x)


def test_axes_weigh_as_much_as_they_vary_unless_they_are_whitened():
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1.0, 1.0], [-0.2, 0.2]])

    def moved(whitened: bool, way: float) -> float:
        distance = FeatureDistance(x, features=lambda x: x, whitened=whitened)
        return distance(x + torch.tensor([1.0, way]))

    assert moved(True, -1.0) > 10 * moved(True, 1.0)  # along the narrow axis, and along the wide one
    assert moved(False, -1.0) == pytest.approx(moved(False, 1.0), rel=0.1)


class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Conv2d(1, 8, 3)])

    def forward(self, x, sigma):
        self.blocks[0](x)
        return x


def test_a_denoiser_sees_through_random_features_and_through_its_own_blocks(caplog):
    x, probe = pictures(), pictures(200, seed=3)
    plain = FeatureDistance(x)(probe)
    with caplog.at_level("INFO", logger="tdpm_ext"):
        assert AsSeenBy(lambda x, sigma: x, x)(probe) == pytest.approx(plain)  # it shows no blocks
    assert "random features alone" in caplog.text
    both = AsSeenBy(Blocks(), x)
    assert len(both.views) == 2 and both.std == FeatureDistance(x).std
    assert both(probe) == pytest.approx((plain * both.views[1](probe)) ** 0.5)


def test_features_that_never_vary_do_no_harm():
    x = pictures(200)
    distance = FeatureDistance(x, features=lambda x: torch.cat([x.flatten(1)[:, :20], torch.ones(len(x), 5)], 1))
    assert math.isfinite(distance(pictures(200, seed=1)))


@pytest.mark.parametrize("count", [1, 2 * KEPT - 1])
def test_too_few_pictures_are_named(count):
    with pytest.raises(ValueError, match=rf"{count} pictures are too few .* at least {2 * KEPT}"):
        FeatureDistance(pictures(count))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_not_numbers_are_named(distance, bad):
    x = pictures(100)
    x[7, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinity: check the checkpoint"):
        distance(x)


@pytest.mark.parametrize("count", [0, 1])
def test_one_sample_is_no_distribution(distance, count):
    with pytest.raises(ValueError, match=f"{count} pictures to judge: give at least 2"):
        distance(pictures(2)[:count])


@pytest.mark.gpu
def test_samples_on_the_gpu_are_judged_like_those_on_the_cpu(distance):
    x = pictures(200, seed=1)
    assert distance(x.cuda()) == pytest.approx(distance(x))


def test_pictures_are_judged_within_the_range_of_the_data_as_they_will_be_saved():
    paper = pictures().clamp(-0.2, 1.0)
    paper[:, :, :4] = 1.0  # half of each picture is white
    distance = FeatureDistance(paper)
    beyond = paper + 0.5 * (paper == 1.0) * torch.rand(paper.shape, generator=torch.Generator().manual_seed(3))
    assert distance(beyond) == pytest.approx(distance(paper), abs=1e-9)
    assert distance(paper - 0.3 * (paper == 1.0)) > distance(paper) + 1
