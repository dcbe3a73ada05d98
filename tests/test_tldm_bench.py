"""The evaluation of text to picture: alignment by ridge regression, and the ideal denoiser of captioned pictures."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tdpm_ext
from benchmarks import records, tldm
from benchmarks.alignment import Alignment, EffLiteBoth
from benchmarks.features import EffLiteMid
from benchmarks.recipes.embed_captions import caption_phrases
from benchmarks.text_ideal import TextIdealDenoiser
from benchmarks.tldm_bench import _settle
from benchmarks.tldm_data import load_captions
from benchmarks.tldm_verdict import headline, verdicts
from tdpm_ext.checkpoints import open_checkpoint
from tdpm_ext.ideal import IdealDenoiser
from tdpm_ext.priors.io import save_prior
from tdpm_ext.priors.shared import SharedPrior
from tdpm_ext.text import save_phrases
from tdpm_ext.text_denoiser import TextDenoiser
from tests.tiny_text import MODEL, written

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "tldm"


def world(names: int = 80, each: int = 4, noise: float = 0.3):
    """Features that follow the embedding of the name they show: (features, embeddings by name, names)."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(names, 8))
    groups = np.repeat(np.arange(names), each)
    features = embeddings[groups] @ rng.normal(size=(8, 20)) + noise * rng.normal(size=(len(groups), 20))
    return 5 * features + 3, embeddings, groups


def test_pictures_find_names_that_were_never_seen():
    features, embeddings, groups = world()
    seen, candidates = groups < 50, embeddings[50:]
    alignment = Alignment.fit(features[seen], embeddings[groups[seen]], groups[seen])
    found = alignment.measure(features[~seen], groups[~seen] - 50, candidates)
    assert found["r1"] > 0.8 and found["r10"] > 0.98 and found["median_rank"] == 1
    shuffled = np.random.default_rng(1).permutation(groups[~seen] - 50)
    blind = alignment.measure(features[~seen], shuffled, candidates)
    assert blind["r1"] < 0.15 and abs(blind["r10"] - 10 / 30) < 0.15 and found["cosine"] > blind["cosine"] + 0.5


def test_noise_lowers_the_score_step_by_step():
    scores = []
    for noise in (0.1, 2.0, 8.0):
        features, embeddings, groups = world(noise=noise)
        seen = groups < 50
        alignment = Alignment.fit(features[seen], embeddings[groups[seen]], groups[seen])
        scores.append(alignment.measure(features[~seen], groups[~seen] - 50, embeddings[50:])["r10"])
    assert scores[0] > scores[1] > scores[2]


def test_one_name_is_too_few_to_choose_a_ridge_by():
    features, embeddings, groups = world(names=1)
    with pytest.raises(ValueError, match="1 names are too few"):
        Alignment.fit(features, embeddings[groups], groups)


def test_both_feature_layers_come_from_one_pass():
    pytest.importorskip("efficientnet_lite_pytorch")
    net = EffLiteBoth()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    both, middle = net(x), EffLiteMid()(x)
    assert both.shape == (2, 1392) and torch.equal(both[:, :112], middle)
    x224 = (x * 127.5 + 0.5) / 128
    last = net.net.extract_features(x224).mean((2, 3))
    assert torch.allclose(both[:, 112:], last, atol=1e-5)


def captioned():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(50, 2, 4, 4, generator=generator)
    pooled = torch.randn(50, 6, generator=generator)
    noisy = pictures[:7] + torch.randn(7, 2, 4, 4, generator=generator)
    return pictures, pooled, noisy


def test_without_a_prompt_it_is_the_ideal_denoiser():
    pictures, pooled, noisy = captioned()
    ours, known = TextIdealDenoiser(pictures, pooled), IdealDenoiser(pictures)
    for sigma in (0.3, 1.0, 20.0):
        assert torch.allclose(ours(noisy, torch.tensor(sigma)), known(noisy, torch.tensor(sigma)), atol=1e-5)


def test_a_prompt_weighs_pictures_by_how_near_their_captions_are():
    pictures, pooled, noisy = captioned()
    sure = TextIdealDenoiser(pictures, pooled, sharpness=200.0)
    blind = torch.randn(7, 2, 4, 4, generator=torch.Generator().manual_seed(1)) * 80
    told = sure(blind, torch.tensor(80.0), text_pooled=pooled[:7])
    assert torch.allclose(told, pictures[:7], atol=0.02)
    away, towards = sure(noisy, torch.tensor(1.0)), sure(noisy, torch.tensor(1.0), text_pooled=pooled[:7])
    guided = sure(noisy, torch.tensor(1.0), text_pooled=pooled[:7], cond_scale=3.0)
    assert torch.allclose(guided, away + 3 * (towards - away), atol=1e-5)
    with pytest.raises(ValueError, match="49 pictures"):
        TextIdealDenoiser(pictures[:49], pooled)


@pytest.mark.parametrize("words", [[], ["--ideal", "--checkpoint", "x"]])
def test_one_denoiser_is_asked_for(words, capsys):
    with pytest.raises(SystemExit):
        tldm.parse(words)
    assert "either --ideal or --checkpoint" in capsys.readouterr().err


# -- verdicts ------------------------------------------------------------------------------------------------------


def row(arm: str, nfe: int, fd: float, r10: float, **more) -> dict:
    return {"arm": arm, "budget": nfe, "nfe": nfe, "fd": fd, "r10": r10, "coverage": 0.8, "recall": 0.8, **more}


def ours(nfe: int, fd: float, r10: float, objective: str = "fidelity") -> dict:
    return row("tdpm", nfe, fd, r10, prior="text_lowrank", objective=objective)


OWN, DDIM_ROW = row("own", 60, 10.0, 0.40), row("ddim", 250, 10.0, 0.40)
RIVALS = [row("rival", n, fd, r10, sampler="lms") for n, fd, r10 in ((4, 20, 0.3), (8, 10.3, 0.4), (10, 10.0, 0.4))]
CHANCE = {"r1": 0.002, "r10": 0.02}
TIMES = {"batch": 10, "ms_per_picture": {"text": 10.0, "ddim_250": 500.0, "tdpm_4": 10.0, "tdpm_6": 12.0}}


def test_a_verdict_counts_what_is_saved_against_the_rival_at_its_best_count():
    rows = [OWN, DDIM_ROW, *RIVALS, ours(2, 30, 0.4), ours(4, 10.4, 0.39), ours(6, 10.2, 0.4)]
    (found,) = verdicts(rows, CHANCE, TIMES)
    assert found["nfe"] == 4 and found["fd_over_own"] == pytest.approx(1.04)
    assert found["r10_over_chance"] == pytest.approx(19.5)
    assert found["saved"] == {"sampler": "lms", "rival_nfe": 8, "nfe": 4, "ratio": 2.0}  # 8 is as good as 10
    assert found["ddim"]["nfe"] == 4 and found["ddim"]["pictures"] == pytest.approx(510 / 20)
    assert found["ddim"]["pictures_of_one_prompt"] == pytest.approx(501 / 11)


def test_pictures_that_lost_their_prompt_save_nothing():
    rows = [OWN, DDIM_ROW, *RIVALS, ours(2, 9.0, 0.2), ours(4, 9.0, 0.3)]
    (found,) = verdicts(rows, CHANCE, TIMES)
    assert found["saved"]["nfe"] is None and found["saved"]["ratio"] is None
    assert found["ddim"] == {"nfe": None, "pictures": None, "pictures_of_one_prompt": None}
    (found,) = verdicts([OWN, ours(4, 9.0, 0.4)], CHANCE, None)
    assert found["saved"] is None and found["ddim"] is None


def test_what_is_shown_keeps_its_alignment():
    good, wrong = ours(4, 11.0, 0.39), ours(4, 8.0, 0.2, objective="quality")
    assert headline([OWN, wrong, good]) is good
    assert headline([OWN, wrong]) is wrong


# -- the command ---------------------------------------------------------------------------------------------------


def test_a_work_folder_belongs_to_one_denoiser_and_one_guidance(tmp_path):
    args = tldm.parse(["--ideal", "--work", str(tmp_path)])
    _settle(args, "ideal")
    _settle(args, "ideal")
    with pytest.raises(ValueError, match=r"denoiser: 'ideal' there, 'abc' here.*--work"):
        _settle(args, "abc")
    other = tldm.parse(["--ideal", "--work", str(tmp_path), "--cond-scale", "4"])
    with pytest.raises(ValueError, match=r"cond_scale: 2.0 there, 4.0 here"):
        _settle(other, "ideal")


@pytest.mark.parametrize("words", [["--ideal", "--kinds"]])
def test_something_to_judge_is_asked_for(words, capsys):
    with pytest.raises(SystemExit):
        tldm.parse(words)
    assert "nothing to judge" in capsys.readouterr().err


def test_missing_data_are_named_with_the_recipe_that_makes_them(tmp_path, capsys):
    assert tldm.main(["--ideal", "--data", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "train.zip: python benchmarks/recipes/build_tldm.py makes it" in said and said.count("\n") == 1


def some_data(folder: Path) -> Path:
    """A few held-out pictures twice, as both halves; all phrases with embeddings by chance."""
    with zipfile.ZipFile(ASSETS / "eval.zip") as archive:
        names = archive.namelist()
        for name, some in (("train.zip", names[::10]), ("eval.zip", names[::40])):
            with zipfile.ZipFile(folder / name, "w") as out:
                for member in some:
                    out.writestr(member, archive.read(member))
    captions = load_captions(ASSETS / "captions.json")
    (folder / "captions.json").write_text(json.dumps(captions))
    generator = torch.Generator().manual_seed(0)
    phrases = {p: torch.randn(2, 384, generator=generator) for p in caption_phrases(captions, 1)}
    save_phrases(phrases, folder / "phrases.safetensors")
    return folder


def test_one_command_judges_every_arm_and_goes_on_where_it_stopped(tmp_path, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("k_diffusion")
    words = ["--ideal", "--data", str(some_data(tmp_path)), "--budgets", "2", "--rival-budgets", "2", "--no-ddim"]
    words += ["--kinds", "text_lowrank", "text_lowrank@data", "--samples", "12", "--rounds", "0"]
    words += ["--tune-samples", "4", "6", "--calibration-samples", "4", "6", "--work", str(tmp_path / "work")]
    words += ["--prompts", "red heart, flat style", "dog, simple style", "--out", str(tmp_path / "r.json")]
    assert tldm.main(words) == 0
    first = records.read(tmp_path / "r.json")
    assert [(r["arm"], r.get("prior")) for r in first["rows"]][::2] == [
        ("own", None), ("rival", None), ("tdpm", "text_lowrank"), ("tdpm", "text_lowrank@data")
    ]  # fmt: skip
    assert len(first["rows"]) == 7 and len(first["verdicts"]) == 4 and first["rows"][0]["rmse"] == 0
    assert (tmp_path / "r.png").exists()
    capsys.readouterr()
    assert tldm.main(["--table", str(tmp_path / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = (
        "| own run (dpmpp_2m) | 60 |",
        "| best tuned: ",
        "| tdpm, `text_lowrank`, ",
        "| tdpm, `text_lowrank@data`, ",
    )
    assert len(lines) == 6 and all(line.startswith(start) for line, start in zip(lines[2:], starts, strict=True))
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "work").iterdir()}
    (tmp_path / "work" / "own-60.safetensors").unlink()
    path = tmp_path / "work" / "prior-text_lowrank.safetensors"
    prior = tdpm_ext.load_prior(path)
    whole, prior.plans = prior.plans, {"fidelity": prior.plans["fidelity"]}  # as after an interruption
    save_prior(prior, path)
    capsys.readouterr()
    assert tldm.main(words) == 0
    assert capsys.readouterr().out.count(": done") == 1  # only what was missing
    again = records.read(tmp_path / "r.json")
    assert again["rows"] == first["rows"] and tdpm_ext.load_prior(path).plans == whole
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "work").iterdir()}.keys() == made.keys()
    some = load_file(tmp_path / "work" / "own-60.safetensors")["x"]
    assert tldm.main([*words, "--samples", "14"]) == 0  # two pictures more of every arm
    more = load_file(tmp_path / "work" / "own-60.safetensors")["x"]
    assert len(more) == 14 and torch.equal(more[:12], some)
    assert records.read(tmp_path / "r.json")["samples"] == 14
    assert tldm.main([*words, "--tune-samples", "5", "6"]) == 1
    assert "tune_samples: [4, 6] there, [5, 6] here" in capsys.readouterr().err


def test_a_checkpoint_is_judged_with_a_prior_that_was_trained_for_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tldm, "DDIM", 9)  # steps
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("k_diffusion")
    checkpoint = written(
        tmp_path, MODEL | {"input_channels": 4, "input_size": [16, 16], "mapping_cond_dim": 384, "cross_cond_dim": 384}
    )
    opened = open_checkpoint(checkpoint)
    model = TextDenoiser(opened)
    prior = SharedPrior.create(model, (4, 16, 16), 0.5, 2.0, rank=1, sigma_max=opened.sigma_max)
    prior.card["checkpoint"] = opened.fingerprint
    save_prior(prior, tmp_path / "learned.safetensors")
    words = ["--checkpoint", str(checkpoint), "--data", str(some_data(tmp_path)), "--accelerate", "off", "--kinds"]
    words += ["--prior", str(tmp_path / "learned.safetensors"), "--budgets", "2", "3", "--rival-budgets", "2"]
    words += ["--samples", "8", "--rounds", "1", "--timed", "2", "--no-ddim", "--prompts", "dog, flat style"]
    words += ["--tune-samples", "2", "3", "--calibration-samples", "4", "6", "--work", str(tmp_path / "work")]
    assert tldm.main([*words, "--out", str(tmp_path / "r.json")]) == 0, capsys.readouterr().err
    record = records.read(tmp_path / "r.json")
    ours = [(r["prior"], r["objective"], r["nfe"]) for r in record["rows"] if r["arm"] == "tdpm"]
    assert ours == [("shared", "quality", 2), ("shared", "quality", 3)]  # the prior's own call among them
    assert {"prior", "evaluation", "decode", "tdpm_2", "ddim_9"} <= record["latency"]["ms_per_picture"].keys()
