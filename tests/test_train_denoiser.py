"""The training recipe: resumes exactly, and leaves a checkpoint that opens."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import tdpm_ext as tdpm
from benchmarks.recipes import train_denoiser

ROOT = Path(__file__).resolve().parents[1]


def train(monkeypatch, config: Path, out: Path, steps: int) -> None:
    words = ["train", "--data", ROOT / "assets/digits/fit.zip", "--config", config, "--out", out, "--steps", steps]
    monkeypatch.setattr(sys, "argv", [str(w) for w in [*words, "--batch", 8, "--device", "cpu"]])
    train_denoiser.main()


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    config = json.loads((ROOT / "benchmarks/recipes/fashion_mnist.json").read_text())
    config["model"] |= {"channels": [8, 16], "depths": [1, 1], "mapping_out": 16}
    small = tmp_path / "small.json"
    small.write_text(json.dumps(config))
    train(monkeypatch, small, tmp_path / "whole", 6)
    train(monkeypatch, small, tmp_path / "parts", 3)
    train(monkeypatch, small, tmp_path / "parts", 6)
    whole, parts = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=0, atol=0)
    checkpoint = tdpm.open_checkpoint(tmp_path / "parts" / "denoiser.safetensors")
    assert checkpoint.shape == (1, 28, 28) and checkpoint.num_classes == 10
    assert not list((tmp_path / "parts").glob("*.tmp"))
