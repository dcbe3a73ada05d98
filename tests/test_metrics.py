"""The metrics do what their names say: closed forms, another implementation, and real damage to real pictures."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import metrics  # noqa: E402
from benchmarks.features import FeatureNet, accuracy, extract, load_features, save_features  # noqa: E402
from benchmarks.recipes import train_features  # noqa: E402
from tdpm_ext.pictures import load_pictures, to_unit  # noqa: E402

ASSETS = ROOT / "assets" / "fashion-mnist"
COUNT = 600


def gaussian(seed, count=400, dim=12, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) * scale + shift


@pytest.fixture(scope="module")
def net():
    return load_features(ASSETS / "features.safetensors")


@pytest.fixture(scope="module")
def reference(net):
    return extract(net, to_unit(load_pictures(ASSETS / "fit.zip", limit=2000).images))


@pytest.fixture(scope="module")
def pictures():
    return load_pictures(ASSETS / "eval.zip", limit=COUNT)


@pytest.fixture(scope="module")
def judge(net, reference):
    """Pictures in [-1, 1] -> features standardised by the reference set."""
    return lambda images: metrics.standardise(reference, extract(net, images))[1]


@pytest.fixture(scope="module")
def standard_reference(reference):
    return metrics.standardise(reference)[0]


def blurred(images, sigma):
    taps = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
    kernel = (taps / taps.sum()).outer(taps / taps.sum())[None, None]
    return F.conv2d(F.pad(images, (3,) * 4, mode="replicate"), kernel)


# --- against closed forms and another implementation


def test_frechet_distance_of_known_gaussian_moments():
    a = gaussian(0)
    assert metrics.frechet_distance(a, a + 3.0) == pytest.approx(9.0 * a.shape[1], rel=1e-10)
    # (1 - s)^2 tr(C) for a scaled copy around its own mean
    scaled = (a - a.mean(0)) * 2.5 + a.mean(0)
    assert metrics.frechet_distance(a, scaled) == pytest.approx(1.5**2 * np.trace(np.cov(a.T)), rel=1e-10)


@pytest.mark.parametrize("count", [400, 8], ids=["full rank", "fewer pictures than features"])
def test_frechet_distance_agrees_with_k_diffusion_in_double_precision(count):
    evaluation = pytest.importorskip("k_diffusion.evaluation", exc_type=ImportError)
    a, b = gaussian(1, count), gaussian(2, count, scale=1.3, shift=0.4)
    other = evaluation.fid(torch.from_numpy(a), torch.from_numpy(b), eps=0.0).item()
    assert metrics.frechet_distance(a, b) == pytest.approx(other, rel=1e-6)


def test_distances_of_cnn_features_agree_with_k_diffusion(judge, standard_reference, pictures):
    evaluation = pytest.importorskip("k_diffusion.evaluation", exc_type=ImportError)
    features = judge(to_unit(pictures.images))
    pair = torch.from_numpy(standard_reference), torch.from_numpy(features)
    assert all(x.dtype == torch.float64 for x in pair)
    expected = evaluation.fid(*pair, eps=0.0).item()
    assert metrics.frechet_distance(standard_reference, features) == pytest.approx(expected, rel=1e-6)
    own = metrics.kernel_distance(standard_reference, features, replicates=2).value
    assert own == pytest.approx(evaluation.squared_mmd(*pair).item(), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), dim=st.integers(1, 6), count=st.integers(2, 40), other=st.integers(2, 40))
def test_frechet_distance_is_symmetric_not_negative_and_zero_to_itself(seed, dim, count, other):
    a, b = gaussian(seed, count, dim), gaussian(seed + 1, other, dim, shift=0.5)
    distance = metrics.frechet_distance(a, b)
    scale = 1 + np.abs(a).max() ** 2 + np.abs(b).max() ** 2
    assert distance >= 0
    assert distance == pytest.approx(metrics.frechet_distance(b, a), abs=1e-5 * scale)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-5 * scale)


def test_float32_features_are_judged_in_double_precision():
    a, b = gaussian(3, shift=300.0).astype(np.float32), gaussian(4, shift=300.0).astype(np.float32)
    exact = metrics.frechet_distance(a.astype(np.float64), b.astype(np.float64))
    assert metrics.frechet_distance(a, b) == exact
    assert all(x.dtype == np.float64 for x in metrics.standardise(a, b))


def test_kernel_distance_error_bar_covers_the_spread_between_samples():
    draw = np.split(gaussian(5, 1600), 8)
    draws = [metrics.kernel_distance(a, b) for a, b in zip(draw[:4], draw[4:], strict=True)]
    shifted = metrics.kernel_distance(draw[0], draw[1] + 1.5)
    assert all(abs(d.value) < 4 * d.error for d in draws)
    assert shifted.value > 3 * shifted.error > 0
    assert metrics.kernel_distance(gaussian(6), gaussian(7), seed=1) == metrics.kernel_distance(
        gaussian(6), gaussian(7), seed=1
    )


def test_blocks_do_not_change_a_result(monkeypatch):
    a, b = gaussian(8, 150), gaussian(9, 170)
    whole = metrics.kernel_distance(a, b, 5), metrics.manifold(a, b), metrics.nearest_distance(a, b)
    monkeypatch.setattr(metrics, "BLOCK", 16)
    parts = metrics.kernel_distance(a, b, 5), metrics.manifold(a, b), metrics.nearest_distance(a, b)
    assert parts[0] == pytest.approx(whole[0], rel=1e-9)
    assert parts[1] == whole[1]
    np.testing.assert_allclose(parts[2], whole[2], rtol=1e-12)


def test_manifold_matches_its_definition_on_a_line():
    real, fake = np.arange(10.0)[:, None], np.array([[0.0], [0.1], [4.4], [30.0], [31.0], [32.0]])
    got = metrics.manifold(real, fake, k=1)  # every real ball has radius 1
    assert got.precision == 3 / 6  # 0, 0.1 and 4.4
    assert got.density == (2 + 2 + 2) / (1 * 6)  # each lies in two balls: 0 and 1; 0 and 1; 4 and 5
    assert got.coverage == 4 / 10  # 0, 1, 4, 5
    assert got.recall == 9 / 10  # the ball of 4.4 reaches 0.1; those of 0 and 0.1 hold 0; all but 9
    itself = metrics.manifold(real, real, k=3)
    assert (itself.precision, itself.recall, itself.coverage) == (1.0, 1.0, 1.0)


def test_a_missing_mode_costs_recall_and_coverage_but_not_precision():
    rng = np.random.default_rng(0)
    modes = rng.standard_normal((2, 200, 4)) + np.array([0.0, 30.0])[:, None, None]
    got = metrics.manifold(modes.reshape(400, 4), rng.standard_normal((400, 4)))
    assert got.precision > 0.9 and got.coverage < 0.55 and got.recall < 0.55


def test_paired_rmse_and_nearest_distance_by_hand():
    assert metrics.paired_rmse(np.zeros((2, 1, 2, 2)), np.full((2, 1, 2, 2), 3.0)) == 3.0
    found = metrics.nearest_distance([[[0.0, 0.0]], [[5.0, 5.0]]], [[[3.0, 4.0]], [[5.0, 5.0]]])
    assert found.tolist() == [5.0, 0.0]
    near = 1e6 + np.arange(3.0)[:, None] * 1e-3  # far from zero: the expanded square alone would lose this
    np.testing.assert_allclose(metrics.nearest_distance(near, near[:1]), [0, 1e-3, 2e-3], rtol=1e-6)


def test_standardise_uses_the_reference_alone_and_survives_a_constant_feature():
    reference = np.column_stack([gaussian(10, dim=3), np.full(400, 7.0)])
    ours, other = metrics.standardise(reference, reference[:5] + 1.0)
    np.testing.assert_allclose(ours.std(0), [1, 1, 1, 0], atol=1e-12)
    np.testing.assert_allclose(other - ours[:5], np.tile(1 / np.append(reference[:, :3].std(0), 1.0), (5, 1)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: metrics.frechet_distance(np.zeros((5, 3)), np.zeros((5, 4))), "3 and 4 features"),
        (lambda: metrics.frechet_distance(np.zeros((1, 3)), np.zeros((5, 3))), "N >= 2"),
        (lambda: metrics.frechet_distance(np.full((5, 3), np.nan), np.zeros((5, 3))), "5 of 5 rows are not finite"),
        (lambda: metrics.manifold(np.zeros((5, 3)), np.zeros((9, 3))), "N >= 6"),
        (lambda: metrics.paired_rmse(np.zeros(3), np.zeros(4)), "one shape"),
        (lambda: metrics.floor(np.zeros((9, 2)), np.zeros((9, 2)), 5, 2), "do not fit into 9"),
    ],
)
def test_input_that_has_no_answer_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- against damage done to real pictures


def test_the_shipped_network_classifies_as_well_as_its_card_says(net, pictures):
    assert net.dim == 128
    right = accuracy(net, extract(net, to_unit(pictures.images)), pictures.labels)
    assert right == pytest.approx(net.notes["test_accuracy"], abs=0.03)
    assert net.notes["test_accuracy"] > 0.9


def test_clean_pictures_lie_at_the_floor(judge, standard_reference, pictures):
    features = judge(to_unit(pictures.images))
    levels = [metrics.floor(standard_reference, features, n).value for n in (COUNT // 6, COUNT // 3, COUNT // 2)]
    assert levels == sorted(levels, reverse=True)  # the floor falls with the count
    assert metrics.frechet_distance(standard_reference, features) < levels[-1]
    kernel = metrics.kernel_distance(standard_reference, features)
    assert abs(kernel.value) < 3 * kernel.error


def test_floor_of_equal_classes_is_that_of_equal_classes(standard_reference, judge, pictures):
    features, labels = judge(to_unit(pictures.images)), pictures.labels.numpy()
    even = metrics.floor(standard_reference, features, COUNT // 3, labels=labels)
    assert even.value < metrics.floor(standard_reference, features, COUNT // 3).value
    by_hand = metrics.frechet_distance(standard_reference, features)
    assert metrics.floor(standard_reference, features, COUNT, labels=labels).value == pytest.approx(by_hand)


@pytest.mark.parametrize("damage, levels", [("noise", (0.04, 0.1, 0.2, 0.4)), ("blur", (0.4, 0.7, 1.0))])
def test_frechet_distance_rises_with_damage(judge, standard_reference, pictures, damage, levels):
    clean = to_unit(pictures.images)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    distances = [metrics.frechet_distance(standard_reference, judge(clean))]
    for level in levels:
        harmed = (clean + level * noise).clamp(-1, 1) if damage == "noise" else blurred(clean, level)
        distances.append(metrics.frechet_distance(standard_reference, judge(harmed)))
    assert distances == sorted(distances) and distances[-1] > 10 * distances[0]


def test_a_dropped_class_and_duplicates_show(judge, standard_reference, pictures):
    features = judge(to_unit(pictures.images))
    clean, truth = metrics.frechet_distance(standard_reference, features), standard_reference[::4]
    dropped = features[pictures.labels.numpy() != 1]
    assert metrics.frechet_distance(standard_reference, dropped) > 1.5 * clean
    repeated = np.tile(features[::10], (10, 1))
    assert metrics.manifold(truth, repeated).coverage < 0.6 * metrics.manifold(truth, features).coverage


# --- the feature networks themselves


def test_features_do_not_depend_on_the_batch(net, pictures):
    images = to_unit(pictures.images[:50])
    np.testing.assert_allclose(extract(net, images, batch=7), extract(net, images), rtol=1e-4, atol=1e-4)
    assert extract(net, images[:0]).shape == (0, 128)


def test_saved_network_comes_back_and_other_files_are_refused(tmp_path):
    torch.manual_seed(0)
    net = FeatureNet(size=8, widths=(4, 6), dim=5)
    save_features(net, tmp_path / "net.safetensors", {"seed": 0})
    again = load_features(tmp_path / "net.safetensors")
    assert again.config == net.config and again.notes == {"seed": 0}
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    with pytest.raises(ValueError, match=r"takes pictures of shape \(1, 8, 8\)"):
        again(torch.zeros(1, 1, 9, 9))
    raw = (tmp_path / "net.safetensors").read_bytes()
    for content in (raw[:-3], b"", b"\xff" * 100):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="bad.safetensors is not a feature network"):
            load_features(tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError, match="train_features.py"):
        load_features(tmp_path / "absent.safetensors")


def test_the_training_recipe_learns_and_gives_the_same_file_twice(tmp_path, capsys):
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(48):  # two classes: bright above, bright below
        picture = rng.integers(0, 90, (8, 8)).astype(np.uint8)
        picture[: 4 if i % 2 else 8, :][-4:] += 120
        (tmp_path / "set" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "set" / str(i % 2) / f"{i}.png")
    options = ["--data", str(tmp_path / "set"), "--test", str(tmp_path / "set"), "--batch", "16", "--epochs", "4"]
    for name in ("a", "b"):
        assert train_features.main([*options, "--shift", "1", "--out", str(tmp_path / f"{name}.safetensors")]) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    notes = load_features(tmp_path / "a.safetensors").notes
    assert notes["test_accuracy"] > 0.9 and notes["pictures"] == 48 and notes["shift"] == 1
    capsys.readouterr()
    assert train_features.main([*options, "--batch", "99", "--out", str(tmp_path / "c.safetensors")]) == 2
    assert "smaller --batch" in capsys.readouterr().err and not (tmp_path / "c.safetensors").exists()


def test_extract_refuses_bytes_and_values_that_are_not_finite(net):
    with pytest.raises(ValueError, match="to_unit"):
        extract(net, torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match="NaN"):
        extract(net, torch.full((1, 1, 28, 28), float("nan")))


def test_efficientnet_features_are_those_of_block_ten(pictures):
    pytest.importorskip("efficientnet_lite_pytorch")
    from benchmarks.features import EffLiteMid

    net = EffLiteMid()
    images = to_unit(pictures.images[:6])
    caught = {}
    hook = net.net._blocks[10].register_forward_hook(lambda _m, _i, output: caught.update(block=output))
    features = extract(net, images)
    resized = F.interpolate(images.repeat(1, 3, 1, 1), size=(64, 64), mode="bilinear", antialias=True)
    net.net.extract_features(((resized + 1) * 127.5 - 127) / 128)  # the package's own path through the network
    hook.remove()
    assert features.shape == (6, 112) and features.dtype == np.float32
    np.testing.assert_allclose(features, caught["block"].mean((2, 3)).numpy(), atol=1e-3, rtol=1e-3)


def test_efficientnet_without_its_packages_says_what_to_install(monkeypatch):
    from benchmarks.features import EffLiteMid

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"efficientnet-lite-pytorch==0\.1\.0.*\[bench\]"):
        EffLiteMid()


def test_a_fit_made_once_gives_the_distance_that_the_features_give():
    rng = np.random.default_rng(5)
    reference = rng.normal(size=(60, 12)) * np.arange(1, 13)
    fit = metrics.normal(reference)
    for count in (8, 40):
        other = rng.normal(size=(count, 12)) * 3 + 1
        expected = metrics.frechet_distance(other, reference)
        # looser than rounding: with fewer pictures than features, square roots of eigenvalues that are zero
        assert metrics.frechet_distance(other, fit) == pytest.approx(expected, rel=1e-7)
    assert metrics.frechet_distance(reference, fit) < 1e-6
    with pytest.raises(ValueError, match="11 and 12 features"):
        metrics.frechet_distance(other[:, :11], fit)
