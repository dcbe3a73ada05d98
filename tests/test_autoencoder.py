"""The auto-encoder view: a fixed encoder, a decoder with known errors on Gaussian data, codes that interpolate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tdpm_ext as tdpm
from tdpm_ext.autoencoder import AutoEncoder, great_circle

SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def pictures():
    """Gaussian pictures of different variances along the axes, so that everything has a closed form."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.1, 1.0, 16)
    return (torch.randn(4000, 16, generator=generator) * scales).reshape(-1, *SHAPE)


@pytest.fixture(scope="module")
def prior(pictures):
    return tdpm.fit_prior("gaussian", pictures, progress=False)


@pytest.fixture(scope="module")
def auto(prior):
    return AutoEncoder(lambda x, sigma, **_: prior.denoise(x, sigma), prior, sigma_trunc=0.5)


def test_a_code_is_the_picture_with_seeded_noise_whatever_the_batch(auto, pictures):
    x = pictures[:6]
    codes = auto.encode(x, seed=10)
    assert torch.equal(auto.encode(x[2:4], seed=12), codes[2:4])
    assert torch.equal(auto.encode(x[2:4], seed=[12, 13]), codes[2:4])
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(10))
    assert torch.allclose(codes[0], x[0] + 0.5 * noise)
    assert torch.allclose(auto.encode(x, 2.0, seed=10) - x, 4 * (codes - x), atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(sigma=st.floats(0.05, 5.0))
def test_one_step_errs_as_a_posterior_mean_does(auto, prior, pictures, sigma):
    again = auto.reconstruct(pictures, 1, sigma)
    variances = prior.tensors["variances"]
    expected = (variances * sigma**2 / (variances + sigma**2)).mean()
    assert (again - pictures).square().mean().item() == pytest.approx(expected.item(), rel=0.03)


def test_many_steps_give_the_data_their_spread_back(auto, pictures):
    # the flow carries the law of the codes to that of the data; a posterior mean is too smooth
    for sigma in (0.5, 2.0):
        again = auto.reconstruct(pictures, 60, sigma)
        assert again.std() == pytest.approx(pictures.std().item(), rel=0.02)
        assert auto.reconstruct(pictures, 1, sigma).std() < 0.97 * pictures.std()
        errors = [(x - pictures).square().mean().sqrt() for x in (again, auto.reconstruct(pictures, 1, sigma))]
        assert errors[1] < errors[0] < math.sqrt(2) * errors[1]


def test_errors_rise_with_the_noise_of_the_code(auto, pictures):
    errors = [(auto.reconstruct(pictures, 4, s) - pictures).square().mean() for s in (0.02, 0.1, 0.5, 2.0, 10.0)]
    assert errors == sorted(errors) and errors[0] < 0.02**2


def test_samples_are_those_of_the_sampler(auto, prior):
    ours = auto.sample(5, steps=3, seed=7)
    assert torch.equal(ours, tdpm.sample(auto.model, prior, (5, *SHAPE), 3, 7, sigma_trunc=0.5))


def test_decode_spends_the_steps_it_is_given_and_hands_on_the_condition(prior, pictures):
    seen = []

    def model(x, sigma, **cond):
        seen.append((float(sigma[0]), cond))
        return prior.denoise(x, sigma)

    labels = torch.arange(3)
    AutoEncoder(model, prior).reconstruct(pictures[:3], 5, 0.7, class_cond=labels)
    levels = [level for level, _ in seen]
    assert len(levels) == 5 and levels[0] == pytest.approx(0.7) and levels == sorted(levels, reverse=True)
    assert all(cond["class_cond"] is labels for _, cond in seen)


def test_a_latent_gives_its_code_back(auto, prior, pictures):
    codes = auto.encode(pictures[:20])
    assert torch.allclose(prior.sample(auto.latent(codes), 0.5), codes, atol=1e-4)


@pytest.mark.parametrize("through", ["code", "prior"])
def test_an_interpolation_begins_and_ends_with_the_reconstructions(auto, pictures, through):
    row = auto.interpolate(pictures[0], pictures[1], 5, through=through, seed=3)
    ends = auto.reconstruct(pictures[:2], 8, seed=[3, 3])
    assert row.shape == (5, *SHAPE)
    assert torch.allclose(row[[0, -1]], ends, atol=1e-4)
    steps = row.diff(dim=0).flatten(1).norm(dim=1)
    assert steps.max() < 2 * steps.min()


def test_a_row_through_a_prior_of_classes_stays_in_its_class(pictures):
    labels = torch.arange(len(pictures)) % 2
    apart = pictures + torch.where(labels == 1, 4.0, -4.0).reshape(-1, 1, 1, 1)
    prior = tdpm.fit_prior("mixture", apart, labels=labels, components=1, progress=False)
    auto = AutoEncoder(lambda x, sigma, **cond: prior.denoise(x, sigma, **cond), prior, 6.0)
    a, b = apart[labels == 1][:2]
    row = auto.interpolate(a, b, 5, through="prior", class_cond=torch.ones(5, dtype=torch.long))
    ends = auto.reconstruct(torch.stack([a, b]), 8, seed=[0, 0], class_cond=torch.ones(2, dtype=torch.long))
    assert torch.allclose(row[[0, -1]], ends, atol=1e-3)
    assert bool((row.flatten(1).mean(1) > 2).all())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 50))
def test_a_great_circle_keeps_the_length_of_unit_vectors_and_its_ends(seed, size):
    a, b = torch.nn.functional.normalize(
        torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )
    share = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None]
    row = great_circle(a, b, share)
    assert torch.allclose(row.norm(dim=1), torch.ones(7, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(row[0], a) and torch.allclose(row[-1], b)
    assert torch.allclose(great_circle(a, a, share), a.expand(7, -1))


def test_what_cannot_be_done_is_said(auto, pictures):
    with pytest.raises(ValueError, match="2 seeds for 3 pictures"):
        auto.encode(pictures[:3], seed=[1, 2])
    with pytest.raises(ValueError, match="sigma_trunc is -1"):
        auto.encode(pictures[:3], -1.0)
    with pytest.raises(ValueError, match="fitted for"):
        auto.encode(torch.zeros(1, 1, 5, 5))
    with pytest.raises(ValueError, match="one of code, prior"):
        auto.interpolate(pictures[0], pictures[1], through="pixels")
    with pytest.raises(ValueError, match="steps=0"):
        auto.decode(pictures[:1], 0)
