"""What ships in the clone: complete, small, consistent with its cards, and usable."""

import re
from pathlib import Path

import pytest
import torch

import tdpm_ext as tdpm
from benchmarks import features
from tdpm_ext.pictures import load_pictures, to_unit

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SETS = ("fashion-mnist", "digits", "emoji")


@pytest.mark.parametrize("name", SETS)
def test_each_set_takes_at_most_eight_megabytes_a_kind_and_has_a_licence(name):
    folder = ASSETS / name
    assert sum(f.stat().st_size for f in folder.glob("*.zip")) <= 8e6
    assert all(f.stat().st_size <= 8e6 for f in folder.glob("*.safetensors"))
    assert (folder / "LICENSE").read_text().strip()


@pytest.mark.parametrize("name", SETS)
def test_the_feature_network_still_classifies_as_its_card_says(name):
    net = features.load_features(ASSETS / name / "features.safetensors")
    pictures = load_pictures(ASSETS / name / "eval.zip", limit=1000)
    measured = features.accuracy(net, features.extract(net, to_unit(pictures.images)), pictures.labels)
    stated = [float(v) / 100 for v in re.findall(r"(\d\d\.\d+) ?%", (ASSETS / name / "README.md").read_text())]
    assert any(abs(measured - v) < 0.03 for v in stated), (measured, stated)


@pytest.mark.parametrize("name, kind", [("fashion-mnist", "gaussian"), ("emoji", "lowrank")])
def test_a_shipped_checkpoint_denoises_held_out_pictures_better_than_a_gaussian(name, kind):
    checkpoint = tdpm.open_checkpoint(ASSETS / name / "denoiser.safetensors")
    prior = tdpm.fit_prior(kind, ASSETS / name / "fit.zip", progress=False)
    pictures = load_pictures(ASSETS / name / "eval.zip", limit=64)
    clean = to_unit(pictures.images)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for sigma in (0.1, 0.5, 2.0):
        noisy = clean + sigma * noise
        with torch.no_grad():
            network = checkpoint.model(noisy, torch.full([64], sigma), class_cond=pictures.labels)
        error = (network - clean).square().mean()
        assert error < 0.9 * (prior.denoise(noisy, sigma) - clean).square().mean()


@pytest.mark.parametrize("name", ["fashion-mnist", "emoji"])
def test_a_shipped_prior_belongs_to_its_checkpoint_and_knows_every_budget(name):
    checkpoint = tdpm.open_checkpoint(ASSETS / name / "denoiser.safetensors")
    prior = tdpm.load_prior(
        ASSETS / name / "prior.safetensors", expect_shape=checkpoint.shape, expect_checkpoint=checkpoint.fingerprint
    )
    for objective in ("fidelity", "quality"):
        assert {2, 3, 4, 5, 6, 8} <= prior.plans[objective].keys()
    x = tdpm.sample(checkpoint.model, prior, steps=2, seed=[0, 1], extra_args={"class_cond": torch.tensor([0, 1])})
    assert x.shape == (2, *checkpoint.shape) and bool(x.isfinite().all()) and float(x.std()) > 0.2
