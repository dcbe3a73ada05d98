"""The ideal denoiser against brute force in float64."""

import pytest
import torch

from tdpm_ext.ideal import IdealDenoiser

SHAPE = (2, 4, 3)
SIGMAS = [1e-3, 0.02, 0.3, 2.0, 80.0, 1e4]


def brute_force(images, x, sigma, allowed=None):
    """sum_i softmax_i(-|x - x_i|^2 / 2 sigma^2) x_i, one row at a time."""
    images, out = images.double(), []
    for b, row in enumerate(x.double()):
        distances = (row - images).flatten(1).square().sum(1)
        if allowed is not None:
            distances = distances.masked_fill(~allowed[b], torch.inf)
        out.append(torch.tensordot((-distances / (2 * sigma[b] ** 2)).softmax(0), images, 1))
    return torch.stack(out)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(150) % 3
    # a mean far from zero against the spread: the expansion of the squares must not cancel
    return 3.0 + 0.5 * torch.randn(150, *SHAPE, generator=generator) + 0.3 * labels.reshape(-1, 1, 1, 1), labels


def noised(images, sigma, seed=1):
    return images[:9] + sigma * torch.randn(9, *images.shape[1:], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_equals_brute_force(data, sigma):
    images, _ = data
    x = noised(images, sigma)
    expected = brute_force(images, x, [sigma] * 9)
    actual = IdealDenoiser(images)(x, torch.full([9], sigma))
    torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=1e-5)


def test_each_row_has_its_own_sigma(data):
    images, _ = data
    sigma = torch.tensor(SIGMAS + [0.5, 1.0, 5.0])
    x = images[:9] + sigma.reshape(-1, 1, 1, 1) * torch.randn(9, *SHAPE, generator=torch.Generator().manual_seed(2))
    expected = brute_force(images, x, sigma.double())
    torch.testing.assert_close(IdealDenoiser(images)(x, sigma).double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.3, 5.0])
def test_class_cond_restricts_to_the_class(data, sigma):
    images, labels = data
    x = noised(images, sigma)
    cond = torch.tensor([0, 1, 2, 2, 1, 0, 3, 3, 1])
    allowed = (labels[None] == cond[:, None]) | (cond == 3)[:, None]
    expected = brute_force(images, x, [sigma] * 9, allowed)
    for chunk in (16384, 7):
        actual = IdealDenoiser(images, labels, chunk)(x, torch.full([9], sigma), class_cond=cond)
        torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("chunk", [1, 7, 149, 150])
def test_chunking_is_irrelevant(data, sigma, chunk):
    images, labels = data
    x, level = noised(images, sigma), torch.full([9], sigma)
    whole = IdealDenoiser(images, labels)
    parts = IdealDenoiser(images, labels, chunk)
    torch.testing.assert_close(parts(x, level), whole(x, level), atol=2e-6, rtol=2e-6)
    cond = torch.arange(9) % 4
    torch.testing.assert_close(parts(x, level, cond), whole(x, level, cond), atol=2e-6, rtol=2e-6)


def test_classes_sorted_into_blocks_that_hold_none_of_a_class(data):
    images, labels = data
    order = labels.argsort()
    x, level = noised(images, 0.5), torch.full([9], 0.5)
    cond = torch.full([9], 2)  # the first blocks hold no picture of class 2 at all
    expected = IdealDenoiser(images, labels)(x, level, cond)
    torch.testing.assert_close(IdealDenoiser(images[order], labels[order], 10)(x, level, cond), expected)


@pytest.mark.parametrize("gone", [1, -1])
def test_a_class_without_pictures_means_unconditional(data, gone):
    images, _ = data
    labels = 2 * (torch.arange(150) % 2)  # classes 0 and 2; 1 is empty
    model, x, level = IdealDenoiser(images, labels), noised(images, 1.0), torch.ones(9)
    torch.testing.assert_close(model(x, level, torch.full([9], gone)), model(x, level))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_one_picture_is_always_the_answer(sigma):
    image = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3))
    x = image + sigma * torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(4))
    actual = IdealDenoiser(image)(x, torch.full([4], sigma))
    torch.testing.assert_close(actual, image.expand(4, *SHAPE), atol=1e-6, rtol=1e-6)


def test_the_same_picture_twice_changes_nothing(data):
    images, _ = data
    x, level = noised(images, 0.4), torch.full([9], 0.4)
    torch.testing.assert_close(IdealDenoiser(torch.cat([images, images]))(x, level), IdealDenoiser(images)(x, level))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (4, 6), (1, 3, 2), (2, 2, 3, 2)])
def test_dtype_and_shape_of_x_are_kept(dtype, shape):
    images = torch.randn(20, *shape, generator=torch.Generator().manual_seed(5))
    x = (images[:3] + torch.randn(3, *shape, generator=torch.Generator().manual_seed(6))).to(dtype)
    out = IdealDenoiser(images)(x, torch.ones(3, dtype=dtype))
    assert out.dtype == dtype and out.shape == x.shape
    torch.testing.assert_close(out.double(), brute_force(images, x, [1.0] * 3), atol=0.01, rtol=0.01)


def test_a_row_does_not_depend_on_its_batch(data):
    images, labels = data
    model, x, level = IdealDenoiser(images, labels), noised(images, 0.6), torch.full([9], 0.6)
    cond = torch.arange(9) % 4
    together = model(x, level, cond)
    for i in range(9):
        torch.testing.assert_close(
            model(x[i : i + 1], level[:1], cond[i : i + 1]), together[i : i + 1], atol=1e-5, rtol=0
        )


def test_wrong_input_is_named(data):
    images, labels = data
    with pytest.raises(ValueError, match=r"N >= 1"):
        IdealDenoiser(images[:0])
    with pytest.raises(ValueError, match=r"3 labels for 150 images"):
        IdealDenoiser(images, labels[:3])
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 4, 3\)"):
        IdealDenoiser(images)(torch.zeros(1, 2, 3, 4), torch.ones(1))
    with pytest.raises(ValueError, match="no labels"):
        IdealDenoiser(images)(images[:1], torch.ones(1), class_cond=torch.zeros(1, dtype=torch.long))
