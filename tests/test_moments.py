"""Moments of data: exact, from one pass in bounded memory, and every kind of input that pictures come in."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from tdpm_ext.pictures import Pictures
from tdpm_ext.priors.moments import BATCH, Batches, full_moments, one_thread, sketch_moments


def quiet(data, labels=None):
    return Batches(data, labels, progress=False)


def low_rank(count, d, rank, noise=0.05, seed=0, mean=0.0):
    """Pictures [count, 1, d / 4, 4] with ``rank`` strong directions of falling strength, and noise."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank, d, generator=generator) * torch.linspace(1, 0.3, rank)[:, None]
    data = torch.randn(count, rank, generator=generator) @ mix / math.sqrt(rank)
    return (mean + data + noise * torch.randn(count, d, generator=generator)).reshape(count, 1, -1, 4)


def exact(data):
    """mean, eigenvalues (falling), eigenvectors, float64."""
    flat = data.flatten(1).double()
    covariance = torch.cov(flat.T, correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    return flat.mean(0), values.flip(0), vectors.flip(1)


# -- full --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 500, 2 * BATCH + 1])  # fewer than directions; one batch; three batches
@pytest.mark.parametrize("mean", [0.0, 1000.0])  # mean >> std: no cancellation
def test_full_moments_are_mean_and_covariance(count, mean):
    data = low_rank(count, 24, 6, mean=mean)
    moments = full_moments(quiet(data))
    centre, values, _ = exact(data)
    torch.testing.assert_close(moments.mean, centre, atol=1e-9, rtol=1e-12)
    torch.testing.assert_close(moments.variances, values.clamp_min(0), atol=1e-9, rtol=1e-6)
    rebuilt = moments.basis * moments.variances @ moments.basis.T
    torch.testing.assert_close(rebuilt, torch.cov(data.flatten(1).double().T, correction=0), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(moments.basis.T @ moments.basis, torch.eye(24, dtype=torch.float64))
    assert moments.residual == 0 and moments.count == count and moments.shape == (1, 6, 4)
    assert bool((moments.variances.diff() <= 0).all()) and bool((moments.variances >= 0).all())


def test_std_is_the_root_mean_variance_per_entry():
    data = low_rank(400, 24, 6)
    expected = float(data.double().var(0, correction=0).mean().sqrt())
    assert math.isclose(full_moments(quiet(data)).std, expected, rel_tol=1e-9)
    assert math.isclose(sketch_moments(quiet(data), 4).std, expected, rel_tol=1e-6)


def test_the_fingerprint_is_that_of_the_pictures_in_order():
    data = low_rank(BATCH + 5, 8, 2)
    whole = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    assert full_moments(quiet(data)).sha256 == whole
    assert sketch_moments(quiet(data.split(100)), 2).sha256 == whole
    assert full_moments(quiet(data.flip(0))).sha256 != whole


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8))
@settings(max_examples=25)
def test_how_data_are_cut_into_batches_does_not_matter(sizes):
    data = low_rank(sum(sizes), 12, 3, mean=5.0)
    parts = full_moments(quiet(list(data.split(sizes))))
    whole = full_moments(quiet(data))
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.variances, whole.variances, atol=1e-10, rtol=1e-8)
    assert (parts.count, parts.sha256) == (whole.count, whole.sha256)


def test_a_stream_too_wide_for_a_full_covariance_is_refused_before_memory_is_taken():
    with pytest.raises(ValueError, match="'lowrank'"):
        full_moments(quiet(torch.zeros(2, 1, 1, 4097) for _ in range(3)))


# -- sketch ------------------------------------------------------------------------------------------------------------


def explained(moments, covariance):
    """Share of the variance that the kept axes hold, measured by the true covariance."""
    return float((moments.basis.T @ covariance @ moments.basis).trace() / covariance.trace())


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_sketch_explains_nearly_what_exact_principal_axes_explain(rank):
    data = low_rank(700, 96, 20)
    centre, values, _ = exact(data)
    covariance = torch.cov(data.flatten(1).double().T, correction=0)
    moments = sketch_moments(quiet(data), rank)
    best = float(values[:rank].sum() / values.sum())
    assert moments.basis.shape == (96, rank)
    assert 0.97 * best < explained(moments, covariance) <= best + 1e-9
    torch.testing.assert_close(moments.mean, centre, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(moments.basis.T @ moments.basis, torch.eye(rank, dtype=torch.float64), atol=1e-9, rtol=0)


def test_sketch_residual_follows_the_trace():
    """What the axes leave over is spread over the remaining directions: the total variance is exact."""
    data = low_rank(700, 96, 20)
    _, values, _ = exact(data)
    for rank in (1, 8, 40):
        moments = sketch_moments(quiet(data), rank)
        total = float(moments.variances.sum()) + moments.residual * (96 - rank)
        assert math.isclose(total, float(values.sum()), rel_tol=1e-9)
        assert math.isclose(moments.residual, float(values[rank:].sum()) / (96 - rank), rel_tol=0.15)


def test_sketch_is_exact_where_the_rank_covers_the_data():
    data = low_rank(300, 64, 6, noise=0.0)
    _, values, _ = exact(data)
    moments = sketch_moments(quiet(data), 10)
    torch.testing.assert_close(moments.variances[:6], values[:6], atol=1e-8, rtol=1e-6)
    assert float(moments.variances[6:].max()) < 1e-7 and moments.residual < 1e-8


def test_sketch_is_the_same_from_a_seed_and_hardly_depends_on_it():
    data = low_rank(300, 64, 6)
    first, again, other = (sketch_moments(quiet(data), 6, seed) for seed in (0, 0, 1))
    assert torch.equal(first.basis, again.basis) and torch.equal(first.variances, again.variances)
    torch.testing.assert_close(first.variances, other.variances, atol=0, rtol=0.03)


@pytest.mark.parametrize("rank", [3, 64, 500])  # 500: more than there are directions
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sketch_of_few_pictures(rank, count):
    data = low_rank(count, 64, 6)
    moments = sketch_moments(quiet(data), rank)
    assert moments.basis.shape[1] == max(1, min(rank, 64, count - 1))
    for tensor in (moments.mean, moments.basis, moments.variances):
        assert bool(tensor.isfinite().all())
    flat = data.flatten(1).double()
    assert math.isclose(moments.std**2 * 64, float((flat - flat.mean(0)).square().sum()) / count, abs_tol=1e-9)


def test_sketch_reads_a_generator_once_and_keeps_little():
    live, most = [0], [0]

    class Counted(torch.Tensor):
        def __del__(self):
            live[0] -= 1

    def stream():
        for part in low_rank(640, 64, 6).split(32):
            live[0] += 1
            most[0] = max(most[0], live[0])
            yield part.as_subclass(Counted)

    moments = sketch_moments(quiet(stream()), 4)
    assert moments.count == 640
    assert most[0] <= 3  # one batch at work, one on its way; not the data set


def test_sketch_memory_does_not_grow_with_the_data():
    """The largest tensor made during the pass is a batch or the sketch, never count x d."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.size = max(Largest.size, out.untyped_storage().nbytes())
            return out

    parts = (low_rank(32, 256, 6, seed=k) for k in range(40))
    with Largest():
        sketch_moments(quiet(parts), 4)
    width = 2 * 4 + 16
    assert Largest.size <= max(32 * 256 * 8, 256 * width * 8)


# -- input -------------------------------------------------------------------------------------------------------------


def test_every_form_of_input_gives_the_same_batches():
    data, labels = low_rank(70, 8, 2), torch.arange(70) % 3
    pairs = TensorDataset(data, labels)
    for source in (
        quiet(data, labels),
        quiet(DataLoader(pairs, 16)),
        quiet((data[k : k + 7], labels[k : k + 7]) for k in range(0, 70, 7)),
        quiet([[data[:50], labels[:50]], [data[50:], labels[50:]]]),
    ):
        seen = list(source)
        assert torch.equal(torch.cat([x for x, _ in seen]), data)
        assert torch.equal(torch.cat([y for _, y in seen]), labels)


def test_bytes_are_taken_to_the_unit_range_and_floats_left_alone():
    raw = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1, 1)
    (x, labels), *_ = quiet(Pictures(raw, torch.tensor([0, 1, 0]), ["a", "b"]))
    torch.testing.assert_close(x.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
    assert labels.tolist() == [0, 1, 0]
    (x, _), *_ = quiet(torch.full([2, 1, 1, 1], 7.5, dtype=torch.float16))
    assert x.dtype == torch.float32 and x.flatten().tolist() == [7.5, 7.5]


def test_data_that_ask_for_gradients_are_read_all_the_same():
    data = low_rank(5, 8, 2)
    assert full_moments(quiet(data.clone().requires_grad_())).sha256 == full_moments(quiet(data)).sha256


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, BATCH - 1, BATCH + 3])
def test_not_a_number_names_the_picture(bad, where):
    data = low_rank(BATCH + 10, 8, 2)
    data[where, 0, 1, 2] = bad
    for read in (full_moments, lambda b: sketch_moments(b, 2)):
        with pytest.raises(ValueError, match=rf"picture {where} of the data holds NaN or infinity"):
            read(quiet(data))
    with pytest.raises(ValueError, match=rf"picture {where} of"):
        full_moments(quiet(iter(data.split(50))))


@pytest.mark.parametrize("empty", [[], iter([]), (x for x in ())])
def test_a_loader_without_pictures_is_named(empty):
    with pytest.raises(ValueError, match="no pictures"):
        full_moments(quiet(empty))


def test_a_loader_of_empty_batches_is_named():
    with pytest.raises(ValueError, match="no pictures"):
        sketch_moments(quiet([torch.zeros(0, 1, 2, 2)]), 2)


def test_an_empty_batch_among_others_changes_nothing():
    data = low_rank(20, 8, 2)
    mixed = full_moments(quiet([data[:0], data[:7], data[:0], data[7:]]))
    torch.testing.assert_close(mixed.variances, full_moments(quiet(data)).variances)


def test_a_generator_cannot_be_read_twice():
    batches = quiet(iter(low_rank(10, 8, 2).split(5)))
    assert not batches.repeatable
    full_moments(batches)
    with pytest.raises(ValueError, match="only once"):
        full_moments(batches)


def test_pictures_of_two_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) after pictures of shape \(1, 3, 2\)"):
        list(quiet([torch.zeros(2, 1, 3, 2), torch.zeros(2, 1, 2, 2)]))


@pytest.mark.parametrize(
    "data, labels, says",
    [
        (torch.zeros(0, 1, 2, 2), None, r"\(0, 1, 2, 2\).*at least one picture"),
        (torch.zeros(4), None, r"\(4,\)"),
        (torch.zeros(4, 1, 2, 2), torch.zeros(3), "3 labels for 4 pictures"),
        (7, None, "data is int"),
        (None, None, "data is NoneType"),
        ([torch.zeros(4, 1, 2, 2)], torch.zeros(4), "yield .*labels"),
    ],
)
def test_data_that_cannot_be_pictures_are_refused_at_once(data, labels, says):
    with pytest.raises(ValueError, match=says):
        quiet(data, labels)


@pytest.mark.parametrize("item", [np.zeros((2, 1, 2, 2)), "picture.png", {"image": torch.zeros(2, 1, 2, 2)}, [], None])
def test_a_loader_that_gives_something_else_is_told_what_to_give(item):
    with pytest.raises(ValueError, match="loader gave .*tensor"):
        list(quiet([item]))


def test_an_array_is_told_to_become_a_tensor():
    with pytest.raises(ValueError, match="tensor"):
        list(quiet(np.zeros((4, 1, 2, 2), dtype=np.float32)))


def test_one_thread_holds_inside_and_is_undone_even_by_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
