"""The evaluation of text to picture: alignment by ridge regression, and the ideal denoiser of captioned pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import tldm
from benchmarks.alignment import Alignment, EffLiteBoth
from benchmarks.features import EffLiteMid
from benchmarks.text_ideal import TextIdealDenoiser
from tdpm_ext.ideal import IdealDenoiser


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
