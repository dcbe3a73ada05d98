"""The training recipe: resumes exactly, does what a plain loop does, and leaves a checkpoint that opens."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import tdpm_ext as tdpm
from benchmarks.recipes import train_denoiser
from benchmarks.recipes.augment import augment
from benchmarks.recipes.train_denoiser import rate_factor
from tdpm_ext.optional import import_k_diffusion
from tdpm_ext.pictures import load_pictures, to_unit

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "assets/digits/fit.zip"


@pytest.fixture
def small(tmp_path) -> Path:
    config = json.loads((ROOT / "benchmarks/recipes/fashion_mnist.json").read_text())
    config["model"] |= {"channels": [8, 16], "depths": [1, 1], "mapping_out": 16}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(config))
    return path


def train(monkeypatch, config: Path, out: Path, steps: int, *more: str, data: Path = DATA) -> None:
    words = ["train", "--data", data, "--config", config, "--out", out, "--steps", steps]
    monkeypatch.setattr(sys, "argv", [str(w) for w in [*words, "--batch", 8, "--device", "cpu", *more]])
    train_denoiser.main()


@pytest.mark.parametrize("options", [(), ("--precision", "bf16")])
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(small, tmp_path, monkeypatch, options):
    train(monkeypatch, small, tmp_path / "whole", 6, *options)
    train(monkeypatch, small, tmp_path / "parts", 3, *options)
    train(monkeypatch, small, tmp_path / "parts", 6, *options)
    whole, parts = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=0, atol=0)
    checkpoint = tdpm.open_checkpoint(tmp_path / "parts" / "denoiser.safetensors")
    assert checkpoint.shape == (1, 28, 28) and checkpoint.num_classes == 10
    assert not list((tmp_path / "parts").glob("*.tmp"))


def plain_loop(config_path: Path, steps: int, batch: int) -> dict[str, torch.Tensor]:
    """The same training, one operation after the other as one would write it first; returns the EMA weights."""
    K = import_k_diffusion()
    config = K.config.load_config(config_path)
    pictures = load_pictures(DATA)
    torch.manual_seed(0)
    denoiser = K.config.make_denoiser_wrapper(config)(K.config.make_model(config))
    inner, optimizer = denoiser.inner_model, config["optimizer"]
    opt = torch.optim.AdamW(inner.parameters(), betas=optimizer["betas"], eps=optimizer["eps"], weight_decay=1e-3)
    ema = {k: v.clone() for k, v in inner.state_dict().items()}
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        torch.manual_seed(step)
        index = order[step * batch : (step + 1) * batch]
        x = to_unit(pictures.images[index])
        sigma = K.config.make_sample_density(config["model"])([batch])
        noise, keep = torch.randn(x.shape), torch.rand(batch) >= config["dataset"]["cond_dropout_rate"]
        label = F.one_hot(pictures.labels[index], 10).float() * keep[:, None]
        opt.param_groups[0]["lr"] = optimizer["lr"] * (step + 1) / config["lr_sched"]["warmup"]
        opt.zero_grad()
        denoiser.loss(x, noise, sigma, mapping_cond=label).mean().backward()
        torch.nn.utils.clip_grad_norm_(inner.parameters(), 1.0)
        opt.step()
        decay = min(config["ema_sched"]["max_value"], 1 - (2 + step) ** -config["ema_sched"]["power"])
        for k, v in inner.state_dict().items():
            ema[k] += (1 - decay) * (v - ema[k])
    return ema


def test_it_takes_the_steps_of_a_plain_loop(small, tmp_path, monkeypatch):
    train(monkeypatch, small, tmp_path / "run", 4)
    state = load_file(tmp_path / "run" / "state.safetensors")
    for name, expected in plain_loop(small, 4, 8).items():
        torch.testing.assert_close(state[f"ema.{name}"], expected, rtol=1e-6, atol=1e-8)


def test_the_rate_warms_up_stays_and_falls_to_zero():
    assert rate_factor(0, 100, 0.0, 0.5) == 0.01
    assert rate_factor(500, 100, 0.5, 0.5) == rate_factor(10**6, 100, 0.99, 0) == 1.0
    assert rate_factor(500, 100, 0.75, 0.5) == pytest.approx(0.5)
    assert rate_factor(500, 100, 1.0, 0.5) == rate_factor(500, 100, 1.3, 0.5) == 0.0


def test_the_emoji_recipe_trains_with_augmentation_and_its_checkpoint_fits_the_clone(tmp_path, monkeypatch):
    recipe = ROOT / "benchmarks/recipes/emoji.json"
    train(monkeypatch, recipe, tmp_path / "run", 2, "--decay", "0.5", data=ROOT / "assets/emoji/fit.zip")
    file = tmp_path / "run" / "denoiser.safetensors"
    assert file.stat().st_size < 8e6
    checkpoint = tdpm.open_checkpoint(file)
    assert checkpoint.shape == (3, 32, 32) and checkpoint.num_classes == 8
    before = load_file(tmp_path / "run" / "state.safetensors")
    assert all(v.isfinite().all() for v in before.values())


def test_augmentation_says_what_it_did_and_leaves_the_rest_alone():
    x = torch.rand(400, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(1)
    y, cond = augment(x, 0.12)
    untouched = (cond == 0).all(1)
    mirrored = (cond[:, 0] == 1) & (cond[:, 1:] == 0).all(1)
    assert 0.15 < untouched.float().mean() < 0.4 and 0.15 < mirrored.float().mean() < 0.4
    assert torch.equal(y[untouched], x[untouched])
    torch.testing.assert_close(y[mirrored], x[mirrored].flip(3), rtol=0, atol=1e-5)
    upside = (cond[:, 1] == 1) & (cond[:, [0, 2, 3, 4, 5, 6, 7, 8]] == 0).all(1)
    assert upside.any()
    torch.testing.assert_close(y[upside], x[upside].flip(2), rtol=0, atol=1e-5)


def test_augmentation_moves_by_what_its_condition_says():
    blob = torch.zeros(2000, 1, 16, 16)
    blob[..., 7:9, 7:9] = 1.0
    torch.manual_seed(2)
    y, cond = augment(blob, 0.12)
    shifted = ((cond[:, 7] != 0) | (cond[:, 8] != 0)) & (cond[:, :7] == 0).all(1) & (cond[:, 7:].abs() < 1.5).all(1)
    assert shifted.sum() > 20
    place = torch.arange(16.0) - 7.5
    mass = y[shifted, 0].clamp_min(0)
    right = (mass.sum(1) * place).sum(1) / mass.sum((1, 2))
    down = (mass.sum(2) * place).sum(1) / mass.sum((1, 2))
    torch.testing.assert_close(torch.stack([right, down], 1), cond[shifted, 7:] * 16 / 8, rtol=0, atol=0.25)
