"""The judge: reference features kept under a key that knows everything, floors, blocks, class proportions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import features, judging, metrics
from tdpm_ext.pictures import Pictures, class_sequence, load_pictures, to_unit


class CountingNet(torch.nn.Module):
    """Eight random projections; counts its calls."""

    dim = 8

    def __init__(self, seed=0, size=None):
        super().__init__()
        weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.size, self.calls = size, 0

    def forward(self, x):
        self.calls += 1
        return x.flatten(1) @ self.weight.T


def pictures(seed, count=60, classes=3):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return Pictures(images, torch.arange(count) % classes, [str(i) for i in range(classes)])


def test_features_are_made_once_per_data_weights_and_resize(tmp_path):
    images, net = pictures(0).images, CountingNet()
    first = features.cached_features(net, images, tmp_path)
    again = features.cached_features(net, images, tmp_path)
    assert net.calls == 1 and np.array_equal(first, again)
    changed = images.clone()
    changed[0, 0, 0, 0] += 1
    for other_net, other_images in ((net, changed), (CountingNet(1), images), (CountingNet(0, size=64), images)):
        before = other_net.calls
        features.cached_features(other_net, other_images, tmp_path)
        assert other_net.calls == before + 1
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_cut_short_is_made_again(tmp_path):
    images, net = pictures(0).images, CountingNet()
    first = features.cached_features(net, images, tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:200])
    assert np.array_equal(features.cached_features(net, images, tmp_path), first)
    assert np.array_equal(np.load(path), first)


def test_floats_are_refused_because_the_key_is_of_the_stored_bytes(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        features.cached_features(CountingNet(), torch.zeros(2, 1, 4, 4), tmp_path)


@given(st.integers(1, 8), st.integers(1, 60))
def test_equal_classes_come_in_turn(classes, count):
    labels = torch.arange(classes * 4) % classes
    expected = torch.arange(count) % classes
    assert torch.equal(class_sequence(labels, classes, count), expected)
    assert torch.equal(class_sequence(None, classes, count), expected)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6).filter(any), st.integers(1, 200))
def test_every_prefix_keeps_the_proportions(sizes, count):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    drawn = class_sequence(labels, len(sizes), count)
    shares = np.array(sizes) / sum(sizes)
    got = np.bincount(drawn.numpy(), minlength=len(sizes))
    assert np.abs(got - shares * count).max() <= len(sizes)
    assert (got[shares == 0] == 0).all()
    assert torch.equal(drawn[: count // 2], class_sequence(labels, len(sizes), count // 2))


@pytest.fixture
def judge():
    return judging.Judge(CountingNet(), "FD-test", pictures(1, 90), pictures(2, 60), cache=None)


def test_blocks_are_measured_apart_and_the_floor_is_of_real_pictures(judge):
    x = to_unit(pictures(3, 60).images)
    rows = judge.over_blocks(judge.features(x))
    by_hand = [judge.measure(judge.features(x[i : i + 20]), 2)["fd"] for i in (0, 20, 40)]
    assert rows["fd"].value == pytest.approx(np.mean(by_hand))
    assert rows["fd"].error == pytest.approx(np.std(by_hand, ddof=1))
    assert set(rows) == set(judging.MEASURES)
    other = metrics.standardise(judge.raw, features.extract(judge.net, to_unit(judge.fit.images)))[1]
    expected = metrics.floor(judge.reference, other, 30, labels=judge.fit.labels.numpy())
    assert judge.floor(30) == expected
    with pytest.raises(ValueError, match="at least 6"):
        judge.over_blocks(judge.features(x[:12]))


def test_pictures_out_of_range_are_judged_as_a_file_would_show_them(judge):
    x = to_unit(pictures(3, 60).images)
    assert judge.fd(3 * x) == judge.fd((3 * x).clamp(-1, 1))


def test_the_shipped_sets_have_their_judges():
    digits = judging.Judge.for_set("digits", cache=None)
    assert digits.name == "FD-CNN128" and len(digits.real) == len(
        load_pictures(judging.ROOT / "assets/digits/eval.zip")
    )
    with pytest.raises(FileNotFoundError, match="one of digits, emoji, fashion-mnist"):
        judging.Judge.for_set("absent")


def test_a_sample_of_indices_is_spread_over_all():
    assert judging.spread(10, 4).tolist() == [0, 3, 6, 9]
    assert judging.spread(3, 9).tolist() == [0, 1, 2]
