"""Training: losses by their laws, runs that resume exactly, and failures that are seen and said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tdpm_ext as tdpm
from tdpm_ext.cli import main
from tdpm_ext.pictures import to_uint8
from tdpm_ext.training.conditions import Classes
from tdpm_ext.training.discriminator import Discriminator, FeatureDiscriminator
from tdpm_ext.training.losses import ConditionalTransport, NonSaturating, Regression, Relativistic, noised
from tdpm_ext.training.options import Options
from tdpm_ext.training.teacher import FIRST_SEED, draw_teacher
from tdpm_ext.training.trainer import Limits, Run, TrainingFailed
from tdpm_ext.training.watch import Health, coverage
from tests.tiny_denoiser import CLASSES, CONFIG, SHAPE, tiny_base, tiny_checkpoint, tiny_pictures

BASE = tiny_base()
SMALL = Options(batch=8, warmup=2, disc_width=8, width=16, depth=1, sigma_trunc=0.3, finish=(0.3,), noise="kept")


def run(out, options=SMALL, *, data=True, base=BASE, accelerator=None, kind=Run, **more) -> Run:
    images, labels = tiny_pictures() if data else (None, None)
    accelerator = accelerator or Accelerator(cpu=True)
    parts = {"images": images, "labels": labels, "base": base, "check_samples": 64, **more}
    return kind(options, tiny_checkpoint(), out, accelerator, **parts)


def limits(steps: int, **more) -> Limits:
    return Limits(steps=steps, log_every=1, **{"check_every": 0, **more})


def rows_of_log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# -- losses --------------------------------------------------------------------------------------------------------


class Slope(torch.nn.Module):
    """D(x) = slope * sum(x): |grad D|^2 = slope^2 * entries everywhere."""

    def __init__(self, slope: float):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(slope))

    def forward(self, x, sigma, cond=None):
        return self.slope * x.flatten(1).sum(1)


@given(st.floats(0.01, 2), st.floats(-2, 2), st.integers(1, 6))
def test_a_lazy_penalty_is_as_strong_as_one_at_every_step(gamma, slope, every):
    disc, x, sigma = Slope(slope), torch.randn(4, 5), torch.ones(4)
    lazy, never = NonSaturating(gamma, every), NonSaturating(0.0)
    penalties = [lazy.discriminator(disc, x, -x, sigma, None, k).total - never.discriminator(disc, x, -x, sigma).total
                 for k in range(every)]  # fmt: skip
    assert sum(penalties).item() / every == pytest.approx(0.5 * gamma * 5 * slope**2, rel=1e-3, abs=1e-4)


@given(st.floats(0, 2), st.floats(-2, 2))
def test_the_relativistic_loss_holds_both_slopes(gamma, slope):
    disc, x, sigma = Slope(slope), torch.randn(4, 5), torch.ones(4)
    found = Relativistic(gamma).discriminator(disc, x, x, sigma)
    assert float(found.penalty) == pytest.approx(5 * slope**2, rel=1e-4, abs=1e-6)
    expected = torch.tensor(2.0).log() + gamma * 5 * slope**2  # real and fake alike: softplus(0)
    assert float(found.total) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("loss", [Relativistic(0.1), NonSaturating(0.1)], ids=lambda loss: loss.name)
def test_a_batchs_gradient_is_the_mean_of_its_halves(loss):
    torch.manual_seed(0)
    disc = Discriminator(SHAPE, conditions=Classes(CLASSES), width=8)
    real, fake, sigma = torch.randn(8, *SHAPE), torch.randn(8, *SHAPE), torch.rand(8) + 0.1
    cond = torch.arange(8) % CLASSES

    def gradient(rows):
        disc.zero_grad()
        loss.discriminator(disc, real[rows], fake[rows], sigma[rows], cond[rows]).total.backward()
        return torch.cat([p.grad.flatten() for p in disc.parameters() if p.grad is not None])

    halves = (gradient(slice(0, 4)) + gradient(slice(4, 8))) / 2
    torch.testing.assert_close(gradient(slice(0, 8)), halves, rtol=1e-3, atol=1e-5)


def test_transport_is_cheap_between_equal_sets_and_dear_where_a_mode_is_missing():
    torch.manual_seed(0)
    loss, modes = ConditionalTransport(6), torch.eye(6)[:2].repeat_interleave(8, 0)
    noise = 0.01 * torch.randn(16, 6)
    same, dropped = loss.cost(modes, modes + noise), loss.cost(modes, modes[:1].expand(16, -1) + noise)
    assert float(same) < float(dropped)
    labels = (torch.arange(16) >= 8).long()
    assert float(loss.cost(modes, modes + noise, labels)) < 1e-3  # inside a class all is alike


@given(st.floats(0.0, 1.0), st.floats(0.0, 3.0))
def test_regression_is_a_distance(huber, size):
    a = torch.zeros(3, *SHAPE)
    value = float(Regression(huber)(a + size, a))
    assert value == pytest.approx((size**2 + huber**2) ** 0.5 - huber if huber else size**2, rel=1e-3, abs=1e-5)


def test_discriminators_judge_each_row_alone_and_know_level_and_class():
    torch.manual_seed(0)
    checkpoint = tiny_checkpoint()
    own = Discriminator(SHAPE, conditions=Classes(CLASSES), width=8)
    with torch.no_grad():
        for layer in own.modulate:
            layer.weight.normal_()
    for disc in (own, FeatureDiscriminator(checkpoint.model, SHAPE, conditions=Classes(CLASSES), width=8)):
        x, sigma, cond = torch.randn(4, *SHAPE), torch.full((4,), 0.3), torch.arange(4) % CLASSES
        scores = disc(x, sigma, cond)
        alone = torch.cat([disc(x[i : i + 1], sigma[:1], cond[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(scores, disc(x, 2 * sigma, cond))
        assert not torch.allclose(scores, disc(x, sigma, (cond + 1) % CLASSES))
    names = [name for name, _ in disc.named_parameters()]
    assert not any("twin" in name for name in names) and not any(p.requires_grad for p in checkpoint.model.parameters())


def test_noise_is_added_row_by_row():
    x = noised(torch.zeros(2, *SHAPE), torch.tensor([1.0, 3.0]), torch.ones(2, *SHAPE))
    assert x[0].unique().tolist() == [1.0] and x[1].unique().tolist() == [3.0]


# -- runs ----------------------------------------------------------------------------------------------------------

RUNS = {
    "shared": SMALL,
    "lora, non_saturating": replace(SMALL, rank=2, loss="non_saturating", every=2),
    "generator, fresh, transport": replace(SMALL, kind="generator", noise="fresh", finish=(), loss="transport"),
    "hybrid": replace(SMALL, regression=1.0, teacher=16, teacher_steps=6),
    "joint raw": replace(SMALL, kind="raw-shared", denoising=1.0, critic="own", finish=()),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(name, tmp_path):
    for steps, folder in ((4, "whole"), (2, "parts"), (4, "parts")):
        run(tmp_path / folder, RUNS[name]).train(limits(steps))
    whole, parts = (load_file(tmp_path / folder / "state.safetensors") for folder in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=0)
    start = run(tmp_path / "untrained", RUNS[name]).tensors()
    assert any(not torch.equal(start[key], whole[key]) for key in start if key.startswith("prior."))
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_finished_prior_is_the_running_mean_and_samples(tmp_path):
    path = run(tmp_path, replace(SMALL, rank=2)).train(limits(3))
    prior = tdpm.load_prior(path, expect_checkpoint="tiny-0").bind(tiny_checkpoint().model)
    assert prior.card["steps"] == 3 and prior.card["added_parameters"] == sum(v.numel() for v in prior.changes.values())
    assert prior.plans["quality"][1].sigmas == (0.3, 0.0)
    means = load_file(tmp_path / "state.safetensors")
    first = next(value for key, value in prior.changes.items() if key.endswith("down"))
    assert any(torch.equal(value.half(), first) for key, value in means.items() if key.startswith("mean."))
    pictures = tdpm.sample(tiny_checkpoint().model, prior, steps=2, seed=[1, 2], objective="quality")
    assert pictures.isfinite().all()


@pytest.mark.parametrize(("kind", "levels"), [("generator", [(0.1, 0.0), (0.3, 0.1, 0.0)]), ("raw-generator", [])])
def test_fresh_noise_is_planned_at_levels_that_were_compared(kind, levels, tmp_path):
    prior = tdpm.load_prior(run(tmp_path, replace(SMALL, kind=kind, noise="fresh", finish=())).train(limits(1)))
    assert [plan.sigmas for plan in prior.plans.get("quality", {}).values()] == levels


def test_another_runs_folder_is_refused(tmp_path):
    run(tmp_path).train(limits(1))
    with pytest.raises(ValueError, match="gamma: 0.1 there, 0.2 here"):
        run(tmp_path, replace(SMALL, gamma=0.2))
    (tmp_path / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not the state of a training run"):
        run(tmp_path)


def test_a_second_phase_goes_on_with_other_options(tmp_path):
    run(tmp_path / "first").train(limits(2))
    second = run(tmp_path / "second", replace(SMALL, lr=1e-5), start=tmp_path / "first")
    assert second.step == 2
    assert all(torch.equal(value, load_file(tmp_path / "first" / "state.safetensors")[key])
               for key, value in second.tensors().items())  # fmt: skip
    second.train(limits(3))
    assert run(tmp_path / "second", replace(SMALL, lr=1e-5), start=tmp_path / "first").step == 3  # its own state now


# autograd's threads forbid a fork of this process, so a fresh one makes the two
TWO_PROCESSES = """
import sys
from pathlib import Path

from accelerate import Accelerator, debug_launcher

sys.path.append(sys.argv[1])
from tests.test_training import limits, run


def train(folder):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    run(Path(folder), accelerator=accelerator).train(limits(3))


debug_launcher(train, (sys.argv[2],), num_processes=2)
"""


def test_two_processes_train_what_one_does(tmp_path):
    run(tmp_path / "one").train(limits(3))
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", TWO_PROCESSES, str(root), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-5)


class Interrupted(Run):
    """Presses Ctrl-C in the middle of step 2."""

    def _advance(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super()._advance()


def test_ctrl_c_saves_and_the_run_goes_on_from_there(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", kind=Interrupted).train(limits(4))
    run(tmp_path / "parts").train(limits(4))
    run(tmp_path / "whole").train(limits(4))
    whole, parts = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_nan_ends_the_run_and_the_last_good_state_stands(tmp_path):
    run(tmp_path).train(limits(2))
    kept = {name: (tmp_path / name).read_bytes() for name in ("state.safetensors", "prior.safetensors")}
    again = run(tmp_path)
    with torch.no_grad():
        again.trained[0].fill_(float("nan"))
    with pytest.raises(TrainingFailed, match=r"step 3: .* NaN or infinite; the last good state is .*state.safetensors"):
        again.train(limits(9))
    assert all((tmp_path / name).read_bytes() == content for name, content in kept.items())


class Dropping(Run):
    """A prior that gives one picture from step 3 on."""

    def _advance(self):
        covered = 0.8 if self.step < 2 else 0.01
        self.watch.look = lambda model, prior: (1 / covered, covered, torch.zeros(64, *SHAPE))
        return super()._advance()


def test_a_collapse_is_warned_of_and_ends_the_run(tmp_path):
    with pytest.raises(TrainingFailed, match="the prior collapsed: coverage 0.01"):
        run(tmp_path, kind=Dropping).train(limits(20, check_every=1, save_minutes=0))
    checks = [row for row in rows_of_log(tmp_path) if "coverage" in row]
    assert [row["step"] for row in checks] == [1, 2, 3, 4]
    assert "modes are being dropped" in checks[2]["warning"] and "collapsed" in checks[3]["warning"]
    assert tdpm.load_prior(tmp_path / "best.safetensors").card["steps"] <= 2


def test_verdicts_in_words():
    health = Health()
    assert [health.see_scores(apart) is not None for apart in (20, 20, 20, 20, 0, 20)] == [
        False,
        False,
        True,
        *[False] * 3,
    ]
    assert health.see_check(2.0, 0.8) == (True, None, False)
    best, text, lost = health.see_check(3.0, 0.6)
    assert not best and "coverage fell to 0.60 from 0.80" in text and not lost


def test_coverage_sees_a_missing_mode():
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(200, 4, generator=generator) + 20 * (torch.arange(200) % 2)[:, None]
    fresh = torch.randn(200, 4, generator=generator) + 20 * (torch.arange(200) % 2)[:, None]
    assert coverage(modes, fresh) > 0.9
    assert coverage(modes, fresh[fresh[:, 0] < 10]) == pytest.approx(0.5, abs=0.05)


def test_log_grid_and_plot_are_left(tmp_path):
    run(tmp_path).train(limits(4, check_every=2))
    rows = rows_of_log(tmp_path)
    assert [row["step"] for row in rows if "distance" in row] == [2, 4]
    losses = [row for row in rows if "discriminator" in row]
    assert len(losses) == 4 and all({"prior", "real", "fake", "penalty", "seconds"} <= row.keys() for row in losses)
    for name in ("grid.png", "log.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_data_the_checkpoints_own_pictures_take_their_place(tmp_path):
    options = replace(SMALL, teacher=128, teacher_steps=4)
    free = run(tmp_path, options, data=False)
    free.train(limits(2))
    torch.testing.assert_close(free.data.images, free.teacher.final)
    assert tdpm.load_prior(tmp_path / "prior.safetensors").card["source"] == "checkpoint"
    with pytest.raises(ValueError, match="no pictures to learn from"):
        run(tmp_path / "none", SMALL, data=False)


def test_trajectories_are_drawn_once_and_belong_to_their_settings(tmp_path):
    checkpoint, device = tiny_checkpoint(), torch.device("cpu")
    settings = {"shape": SHAPE, "sigma_trunc": 0.3, "sigma_max": 20.0, "sigma_min": 0.02, "steps": 6, "device": device}
    settings |= {"conditions": Classes(CLASSES), "cond_scale": 1.0, "checkpoint": "tiny-0", "progress": False}
    teacher = draw_teacher(checkpoint.model, tmp_path, count=9, **settings)
    again = draw_teacher(None, tmp_path, count=9, **settings)  # no model: everything comes from the disk
    assert torch.equal(teacher.final, again.final) and torch.equal(teacher.state, again.state)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(FIRST_SEED + 4))
    assert torch.equal(teacher.z[4], z) and teacher.labels.tolist() == [i % CLASSES for i in range(9)]
    below = checkpoint.model(teacher.state, torch.full((9,), 0.3), class_cond=teacher.labels)
    torch.testing.assert_close(teacher.denoised, below, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="another checkpoint or other settings"):
        draw_teacher(None, tmp_path, count=9, **{**settings, "cond_scale": 2.0})


def test_trajectories_are_the_same_from_an_accelerated_network_which_is_handed_back_as_it_was(tmp_path):
    checkpoint, device = tiny_checkpoint(), torch.device("cpu")
    settings = {"shape": SHAPE, "sigma_trunc": 0.3, "sigma_max": 20.0, "sigma_min": 0.02, "steps": 6, "device": device}
    settings |= {"conditions": Classes(CLASSES), "cond_scale": 1.0, "checkpoint": "tiny-0", "progress": False}
    plain = draw_teacher(checkpoint.model, tmp_path / "plain", count=9, **settings)
    patched = {name: dict(vars(module)) for name, module in checkpoint.model.named_modules()}
    fast = draw_teacher(checkpoint.model, tmp_path / "fast", count=9, **settings, accelerate="exact")
    for name in ("state", "denoised", "final"):
        torch.testing.assert_close(getattr(fast, name), getattr(plain, name), rtol=1e-3, atol=1e-3)
    assert all(vars(module).keys() == patched[name].keys() for name, module in checkpoint.model.named_modules())
    with pytest.raises(ValueError, match="precision='quick'"):  # it reaches what accelerates, and is asked there
        draw_teacher(checkpoint.model, tmp_path / "none", count=9, **settings, accelerate="quick")


def test_regression_comes_nearer_to_the_checkpoints_own_pictures(tmp_path):
    options = replace(SMALL, adversarial=0.0, regression=1.0, teacher=64, teacher_steps=12, lr=2e-3, ema=0.9)
    training = run(tmp_path, options)
    training.train(limits(60))
    rows = [row["regression"] for row in rows_of_log(tmp_path)]
    assert sum(rows[-10:]) < 0.7 * sum(rows[:10])
    assert tdpm.load_prior(tmp_path / "prior.safetensors").coupled


def test_joint_training_leaves_a_denoiser_and_a_prior_that_is_one_with_it(tmp_path):
    options = replace(SMALL, denoising=1.0, critic="own")
    run(tmp_path, options).train(limits(3))
    checkpoint = tdpm.open_checkpoint(tmp_path / "prior-denoiser.safetensors")
    prior = tdpm.load_prior(tmp_path / "prior.safetensors", expect_checkpoint=checkpoint.fingerprint)
    prior.bind(checkpoint.model, checkpoint.fingerprint)
    assert prior.network is checkpoint.model and prior.card["added_parameters"] == 0 and not prior.weights()
    assert any(row.get("denoising", 0) > 0 for row in rows_of_log(tmp_path))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "gan"}, "kind is 'gan': choose one of shared"),
        ({"loss": "wasserstein"}, "choose one of relativistic"),
        ({"batch": 0}, "batch is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"adversarial": 0.0}, "nothing trains the prior"),
        ({"regression": 1.0}, "set teacher"),
        ({"finish": (0.3, 0.4)}, "noise levels of denoiser steps, falling"),
        ({"finish": (0.2,)}, "let it begin at sigma_trunc 0.3"),
        ({"sigma_trunc": 3.0, "finish": ()}, "above sigma_init"),
        ({"kind": "generator", "rank": 2}, "rank 2 is for a LoRA"),
        ({"denoising": 1.0}, "set critic to 'own'"),
        ({"label_dropout": 1.0}, "label_dropout is 1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(SMALL, **change)


# -- the command line ----------------------------------------------------------------------------------------------


def write_inputs(folder):
    """A checkpoint file and a folder of pictures, as a user has them."""
    from tdpm_ext.grid import save_png, to_image

    images, labels = tiny_pictures(150)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        save_png(to_image(image), folder / "pictures" / str(label) / f"{i:03d}.png")
    weights = tiny_checkpoint().model.inner_model.inner_model.state_dict()
    save_file(weights, folder / "denoiser.safetensors", {"config": json.dumps(CONFIG)})


def test_the_command_trains_resumes_and_its_prior_samples(tmp_path, capsys):
    write_inputs(tmp_path)
    words = ["train", tmp_path / "denoiser.safetensors", "--data", tmp_path / "pictures", "--out", tmp_path / "run"]
    words += ["--kind", "generator", "--width", 16, "--depth", 1, "--batch", 8, "--disc-width", 8, "--device", "cpu"]
    words += ["--sigma-trunc", 0.3, "--finish", 0.3, "--check-every", 0, "--check-samples", 64]
    for steps in (1, 2):
        assert main([str(word) for word in [*words, "--steps", steps]]) == 0
    assert "step 2: " in capsys.readouterr().out
    prior = tmp_path / "run" / "prior.safetensors"
    words = ["sample", tmp_path / "denoiser.safetensors", "--prior", prior, "--steps", 2, "--seeds", "0-1"]
    assert main([str(word) for word in [*words, "--class", 1, "--out", tmp_path / "grid.png", "--device", "cpu"]]) == 0
    assert "2 evaluations" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "denoiser.safetensors"), "--out", str(tmp_path / "x"), "--lr", "-1"]) == 1
    assert "lr is -1.0" in capsys.readouterr().err


def test_without_pictures_the_trajectories_fit_the_base_too(tmp_path, capsys):
    write_inputs(tmp_path)
    words = ["train", tmp_path / "denoiser.safetensors", "--out", tmp_path / "run", "--batch", 8, "--device", "cpu"]
    words += ["--adversarial", 0, "--regression", 1, "--teacher", 128, "--teacher-steps", 4, "--noise", "kept"]
    words += ["--sigma-trunc", 0.3, "--check-every", 0, "--check-samples", 64, "--steps", 1, "--base", "gaussian"]
    assert main([str(word) for word in [*words, "--clock", "process"]]) == 0
    drawn = load_file(tmp_path / "run" / "teacher" / "part-0000.safetensors")["final"]
    base = tdpm.load_prior(tmp_path / "run" / "base.safetensors")
    assert base.card["source"] == "denoiser" and base.card["pictures"] == 128
    assert base.card["data_mean"] == pytest.approx(float(drawn.mean()), abs=1e-4)


def test_the_command_trains_from_scratch_jointly_alone(tmp_path, capsys):
    write_inputs(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = [
        "train",
        tmp_path / "config.json",
        "--data",
        tmp_path / "pictures",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
    ]
    words += ["--batch", 8, "--disc-width", 8, "--check-every", 0, "--device", "cpu", "--check-samples", 64]
    assert main([str(word) for word in words]) == 1
    assert "--denoising 1" in capsys.readouterr().err
    assert main([str(word) for word in [*words, "--denoising", 1, "--critic", "own"]]) == 0
    assert tdpm.open_checkpoint(tmp_path / "run" / "prior-denoiser.safetensors").num_classes == CLASSES


def test_pictures_of_the_watch_do_not_depend_on_training(tmp_path):
    training = run(tmp_path)
    first = training.watch.look(training.checkpoint.model, training.prior)[2]
    again = training.watch.look(training.checkpoint.model, training.prior)[2]
    assert torch.equal(to_uint8(first), to_uint8(again))
