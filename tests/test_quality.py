"""The quality benchmark end to end on a small set, and its arithmetic."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import quality
from tdpm_ext.pictures import load_pictures

DIGITS = "assets/digits"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, request):
    """Two disjoint folders of 160 real digits, and the digits' feature network."""
    root = request.config.rootpath / DIGITS
    base = tmp_path_factory.mktemp("digits")
    for name in ("fit", "eval"):
        pictures = load_pictures(root / f"{name}.zip", limit=160)
        for i, image in enumerate(pictures.images):
            folder = base / name / str(int(pictures.labels[i]))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    return base, root / "features.safetensors"


def arguments(folders, work, *more):
    base, net = folders
    paths = ["--data", base / "fit", "--judge", base / "eval", "--features", net, "--work", work]
    small = ["--budgets", 3, 4, "--samples", 40, "--tune-samples", 4, 8, "--leaders", 2]
    small += ["--calibration-samples", 6, 70, "--out", work / "out.json"]
    return [str(a) for a in ["small", "--ideal", *paths, *small, *more]]


def test_a_small_run_writes_every_arm_and_resumes_without_sampling_again(folders, tmp_path, capsys):
    quality.main(arguments(folders, tmp_path))
    first = json.loads((tmp_path / "out.json").read_text())
    assert first["schema"] == quality.SCHEMA
    assert {(r["arm"], r["budget"]) for r in first["rows"]} == {
        (arm, budget) for arm in ("rival:fd", "rival:rmse", "tdpm:quality", "tdpm:fidelity") for budget in (3, 4)
    }
    assert all(r["nfe"] <= r["budget"] for r in first["rows"])
    assert "took" in capsys.readouterr().out
    quality.main(arguments(folders, tmp_path))
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["rows"] == first["rows"]
    assert "took" not in capsys.readouterr().out


def test_verdict_divides_excesses_over_the_own_run_and_counts_below_zero_as_zero():
    own = {"fd": 1.0, "coverage": 0.8, "recall": 0.5}

    def row(arm, fd, rmse):
        return {"arm": arm, "budget": 4, "fd": fd, "rmse": rmse, "coverage": 0.4, "recall": 0.5}

    rows = [row("rival:fd", 3.0, 0.5), row("rival:rmse", 9.0, 0.4)]
    rows += [row("tdpm:quality", 1.5, 0.3), row("tdpm:fidelity", 2.0, 0.1)]
    out = quality.verdict(rows, own)
    assert out["excess_ratio"][4] == pytest.approx(0.25)
    assert out["rmse_ratio"][4] == pytest.approx(0.25)
    assert out["coverage_over_own"][4] == pytest.approx(0.5)
    better = [row("tdpm:quality", 0.5, 0.3) if r["arm"] == "tdpm:quality" else r for r in rows]
    assert quality.verdict(better, own)["excess_ratio"][4] == 0
    even = [row("rival:fd", 0.9, 0.5) if r["arm"] == "rival:fd" else r for r in rows]
    assert quality.verdict(even, own)["excess_ratio"][4] is None


def test_noise_of_a_seed_does_not_depend_on_how_many_are_drawn(folders, tmp_path):
    bench = quality.build(quality.parse(arguments(folders, tmp_path)))
    assert torch.equal(bench.noise(3), bench.noise(5)[:3])
