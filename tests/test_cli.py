"""The ``tdpm`` command, run in this process on a tiny k-diffusion checkpoint: files, exit codes, one-line errors."""

import json
import os

os.environ.setdefault("K_DIFFUSION_USE_COMPILE", "0")

import argparse
import re
import signal
import sys
import threading
import traceback

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from tdpm_ext import cli, doctor
from tdpm_ext.checkpoints import open_checkpoint
from tdpm_ext.grid import save_png, to_image

K = pytest.importorskip("k_diffusion")

MODEL = {
    "type": "image_v1",
    "input_channels": 1,
    "input_size": [8, 8],
    "patch_size": 2,
    "mapping_out": 16,
    "depths": [1, 1],
    "channels": [16, 16],
    "self_attn_depths": [False, False],
    "augment_wrapper": False,
    "mapping_cond_dim": 3,
    "sigma_data": 0.5,
    "sigma_min": 0.02,
    "sigma_max": 20,
}


def make_checkpoint(path, seed=0, **changes):
    """A tiny class-conditional U-Net, its zero-initialised weights drawn at random."""
    config = K.config.load_config({"model": {**MODEL, **changes}, "dataset": {"num_classes": 3}})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inner = K.config.make_model(config)
        for p in inner.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.1)
    weights = {name: tensor.contiguous() for name, tensor in inner.state_dict().items()}
    save_file(weights, path, metadata={"config": json.dumps(config)})
    return path


def make_pictures(folder, classes=3, each=20, seed=0):
    """Class folders of 8x8 grey pictures: a bright bar, at another height for each class, in noise."""
    gen = torch.Generator().manual_seed(seed)
    for c in range(classes):
        for i in range(each):
            picture = torch.randint(0, 60, (1, 8, 8), generator=gen)
            picture[:, 2 * c : 2 * c + 2] += 150
            save_png(to_image(picture.to(torch.uint8)), folder / str(c) / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a checkpoint, pictures, and a prior fitted and calibrated through the command line."""
    folder = tmp_path_factory.mktemp("room")
    make_checkpoint(folder / "model.safetensors")
    make_pictures(folder / "fit")
    make_pictures(folder / "eval", each=48, seed=1)
    return folder


@pytest.fixture(scope="module")
def prior(room):
    path = room / "prior.safetensors"
    argv = [
        "fit",
        room / "model.safetensors",
        "--data",
        room / "fit",
        "--kind",
        "mixture",
        "--components",
        3,
        "-o",
        path,
    ]
    assert run(*argv) == 0
    return path


def run(*argv):
    return cli.main([str(a) for a in argv])


def one_line_error(capsys, *argv, code=1):
    """Run a command that must fail; its whole stderr, which must be one line."""
    capsys.readouterr()
    assert run(*argv) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("tdpm"), captured.err
    return captured.err


# help and arguments


@pytest.mark.parametrize("command", ["doctor", "fit", "calibrate", "sample", "inspect", "install", "uninstall"])
def test_help_ends_in_an_example_of_the_command(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert text.rstrip().splitlines()[-1].strip().startswith(f"tdpm {command}")
    assert run("--help") == 0 and command in capsys.readouterr().out


def test_every_example_in_the_help_parses():
    parser = cli.build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, sub in commands.choices.items():
        words = sub.epilog.split("\n")[-1].split()
        assert parser.parse_args(words[1:]).command == name


def test_version_is_printed(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("tdpm ")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["sample"], "required: CHECKPOINT"),
        (["sample", "x", "--steps", "0"], "'0' is not a whole number above 0"),
        (["sample", "x", "--seeds", "5-2"], "'5-2' is not a range"),
        (["sample", "x", "--seeds", "a"], "such as 0-15"),
        (["sample", "x", "--seeds", "0-99999999999"], "more than 100000"),
        (["sample", "x", "--rho", "nan"], "'nan' is not a number above 0"),
        (["fit", "x"], "required: -o"),
        (["calibrate", "x", "--checkpoint", "y", "--objective", "beauty"], "choose from"),
    ],
)
def test_wrong_command_lines_are_one_line(argv, says, capsys):
    error = one_line_error(capsys, *argv)
    assert says in error and "--help" in error


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), min_size=1, max_size=6))
def test_number_lists_keep_order_and_drop_repeats(spans):
    text = ",".join(f"{low}-{low + more}" if more else str(low) for low, more in spans)
    wanted = list(dict.fromkeys(n for low, more in spans for n in range(low, low + more + 1)))
    assert wanted == cli.numbers(text)


# sample


def test_sample_writes_a_png_a_picture_and_a_grid(room, tmp_path, capsys):
    argv = ["sample", room / "model.safetensors", "--sampler", "euler", "--steps", 3, "--seeds", "4,7-8"]
    assert run(*argv, "--out", tmp_path / "out") == 0
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["grid.png", "seed_00004.png", "seed_00007.png", "seed_00008.png"]
    picture = Image.open(tmp_path / "out" / "seed_00007.png")
    assert picture.size == (8, 8) and picture.mode == "L"
    assert "3 pictures, euler, 3 evaluations" in capsys.readouterr().out


def test_sample_gives_what_k_diffusion_gives_for_that_seed(room, tmp_path):
    path = room / "model.safetensors"
    argv = ["sample", path, "--sampler", "dpmpp_2m", "--steps", 5, "--seeds", 11, "--class", 2, "--cond-scale", 2]
    assert run(*argv, "--sigma-max", 10, "--rho", 3, "--out", tmp_path) == 0
    sigmas = K.sampling.get_sigmas_karras(5, 0.02, 10.0, rho=3.0)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(11)) * sigmas[0]
    extra = {"class_cond": torch.tensor([2]), "cond_scale": 2.0}
    x = K.sampling.sample_dpmpp_2m(open_checkpoint(path).model, x, sigmas, extra, disable=True)
    wanted = ((x[0, 0] + 1) * 127.5).round().clamp(0, 255).numpy()
    assert abs(wanted - np.asarray(Image.open(tmp_path / "class_2_seed_00011.png"))).max() <= 1


@pytest.mark.parametrize(
    "sampler", ["euler", "heun", "lms", "dpmpp_2m", "euler_ancestral", "dpmpp_sde", "dpmpp_3m_sde"]
)
def test_the_batch_size_does_not_change_a_picture(room, tmp_path, sampler):
    argv = ["sample", room / "model.safetensors", "--sampler", sampler, "--steps", 3, "--seeds", "0-3"]
    for batch in (1, 3):
        assert run(*argv, "--batch", batch, "--out", tmp_path / str(batch)) == 0
    for seed in range(4):
        name = f"seed_{seed:05d}.png"
        one, three = (np.asarray(Image.open(tmp_path / b / name)).astype(int) for b in "13")
        assert abs(one - three).max() <= 1 and one.std() > 0
    assert not np.array_equal(one, np.asarray(Image.open(tmp_path / "1" / "seed_00000.png")))


@pytest.mark.parametrize("tier", ["exact", "half"])
def test_acceleration_keeps_the_pictures_and_reports_its_measurement(room, tmp_path, capsys, tier):
    for name in ("off", tier):
        run(
            "sample",
            room / "model.safetensors",
            "--sampler",
            "euler",
            "--seeds",
            "0-2",
            "--accelerate",
            name,
            "--out",
            tmp_path / name,
        )
    plain, fast = (
        np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / n).glob("seed*.png"))]) for n in ("off", tier)
    )
    assert np.abs(plain.astype(int) - fast.astype(int)).max() <= (1 if tier == "exact" else 8)
    assert ("half: " in capsys.readouterr().err) == (tier == "half")


def test_classes_are_rows_and_seeds_columns(room, tmp_path):
    argv = ["sample", room / "model.safetensors", "--sampler", "euler", "--steps", 2, "--seeds", "0-1"]
    assert run(*argv, "--class", "0-2", "--batch", 4, "--out", tmp_path) == 0
    assert len(list(tmp_path.glob("class_*_seed_*.png"))) == 6
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    for row in range(3):
        for column in range(2):
            picture = np.asarray(Image.open(tmp_path / f"class_{row}_seed_{column:05d}.png"))
            enlarged = picture.repeat(7, 0).repeat(7, 1)  # 8 pixels are shown as 56
            y, x = grid.shape[0] - 58 * (3 - row), grid.shape[1] - 58 * (2 - column)
            assert np.array_equal(enlarged, grid[y : y + 56, x : x + 56])


def test_out_may_be_one_png(room, tmp_path):
    argv = ["sample", room / "model.safetensors", "--sampler", "euler", "--steps", 1, "--seeds", "0-11"]
    assert run(*argv, "--out", tmp_path / "new" / "sheet.png") == 0
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sampler", "tdpm"], "give --prior"),
        (["--sampler", "dpm_fast"], "chooses its own noise levels"),
        (["--sampler", "magic"], "unknown sampler 'magic'; known are tdpm, .*dpmpp_2m"),
        (["--sampler", "dpmpp_2m_sde", "--steps", "1"], "needs --steps 2"),
        (["--sampler", "euler", "--class", "0-3"], "--class 3 is not in this checkpoint: its labels are 0 to 2"),
        (["--sampler", "euler", "--cond-scale", "2"], "guides towards a class: give --class 0 to 2"),
        (["--sampler", "euler", "--sigma-max", "0.01"], "must be below"),
        (["--sampler", "euler", "--device", "tpu9"], "--device tpu9 cannot be used here"),
        (["--sampler", "euler", "--config", "nothing.json"], "no config at nothing.json"),
        (["--prior", "nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_what_sample_cannot_do_is_one_line(room, tmp_path, capsys, options, says):
    error = one_line_error(capsys, "sample", room / "model.safetensors", "--out", tmp_path, *options)
    assert re.search(says, error), error
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_checkpoint_are_one_line(room, tmp_path, capsys):
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    argv = ["--sampler", "euler", "--out", tmp_path / "out"]
    assert "not a checkpoint" in one_line_error(capsys, "sample", tmp_path / "text.safetensors", *argv)
    assert "no checkpoint at" in one_line_error(capsys, "sample", tmp_path / "nothing.safetensors", *argv)
    assert "is a file" in one_line_error(
        capsys, "sample", room / "model.safetensors", "--sampler", "euler", "--out", tmp_path / "text.safetensors"
    )
    rgba = make_checkpoint(tmp_path / "rgba.safetensors", input_channels=4)
    assert "4-channel" in one_line_error(capsys, "sample", rgba, *argv)


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert run("sample", tmp_path / "nothing.safetensors", "--sampler", "euler", "--out", tmp_path, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_pictures_that_are_not_finite_are_refused(room, tmp_path, capsys):
    argv = ["sample", room / "model.safetensors", "--sampler", "euler", "--steps", 2, "--seeds", 0, "--class", 1]
    error = one_line_error(capsys, *argv, "--cond-scale", "1e38", "--out", tmp_path)
    assert "not finite" in error and not (tmp_path / "grid.png").exists()


# fit, calibrate, inspect, and sampling with the prior


def test_fit_calibrate_inspect_sample_from_end_to_end(room, prior, tmp_path, capsys):
    model = room / "model.safetensors"
    calibrated = tmp_path / "calibrated.safetensors"
    argv = ["calibrate", prior, "--checkpoint", model, "--budgets", "2-3", "--samples", 8, "-o", calibrated]
    assert run(*argv) == 0
    assert prior.exists() and "calibrated for fidelity" in capsys.readouterr().out
    assert run("inspect", calibrated) == 0
    text = capsys.readouterr().out
    for word in ("mixture", "1x8x8", "60 pictures", open_checkpoint(model).fingerprint, "fidelity", "sigmas"):
        assert word in text, text
    assert "60 pictures" in text
    assert run("inspect", calibrated, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "mixture" and set(facts["plans"]["fidelity"]) == {"2", "3"}
    for batch in (1, 4):
        argv = ["sample", model, "--prior", calibrated, "--steps", 3, "--seeds", "0-3", "--class", 1]
        assert run(*argv, "--batch", batch, "--out", tmp_path / str(batch)) == 0
        assert "4 pictures, tdpm, 3 evaluations" in capsys.readouterr().out
    for seed in range(4):
        name = f"class_1_seed_{seed:05d}.png"
        one, four = (np.asarray(Image.open(tmp_path / b / name)).astype(int) for b in "14")
        assert abs(one - four).max() <= 1 and one.std() > 0


def test_calibrate_for_quality_keeps_the_other_table(room, prior, tmp_path, capsys):
    path = tmp_path / "p.safetensors"
    path.write_bytes(prior.read_bytes())
    argv = ["calibrate", path, "--checkpoint", room / "model.safetensors", "--budgets", 2, "--samples", 8]
    assert run(*argv) == 0
    assert run(*argv, "--objective", "quality", "--data", room / "eval") == 0
    capsys.readouterr()
    assert run("inspect", path, "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["plans"]) == {"fidelity", "quality"}


def test_fit_without_pictures_comes_from_the_checkpoint(room, tmp_path, capsys):
    path = tmp_path / "own.safetensors"
    assert run("fit", room / "model.safetensors", "--no-data", "--kind", "gaussian", "-o", path) == 0
    capsys.readouterr()
    assert run("inspect", path, "--json") == 0
    card = json.loads(capsys.readouterr().out)["card"]
    assert (
        card["source"] == "denoiser" and card["checkpoint"] == open_checkpoint(room / "model.safetensors").fingerprint
    )


def test_fit_from_pictures_alone_goes_with_any_checkpoint(room, tmp_path, capsys):
    path = tmp_path / "free.safetensors"
    assert run("fit", "--data", room / "fit", "--kind", "gaussian", "-o", path) == 0
    other = make_checkpoint(tmp_path / "other.safetensors", seed=5)
    argv = ["--prior", path, "--steps", 2, "--seeds", 0, "--class", 1, "--out", tmp_path / "out"]
    for model in (room / "model.safetensors", other):
        assert run("sample", model, *argv) == 0


def test_the_same_seed_fits_the_same_prior(room, tmp_path):
    for name in "ab":
        argv = ["fit", "--data", room / "fit", "--kind", "mixture", "--components", 2, "--seed", 3]
        assert run(*argv, "-o", tmp_path / name) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_sampling_says_when_the_calibration_is_for_something_else(room, prior, tmp_path, capsys):
    model, path = room / "model.safetensors", tmp_path / "p.safetensors"
    argv = ["sample", model, "--prior", path, "--steps", 2, "--seeds", 0, "--class", 0, "--out", tmp_path / "out"]
    path.write_bytes(prior.read_bytes())
    assert run(*argv) == 0
    assert "not calibrated for fidelity: a plain schedule" in capsys.readouterr().err
    calibrate = ["calibrate", path, "--checkpoint", model, "--budgets", 2, "--samples", 6, "--cond-scale", 1.5]
    assert run(*calibrate, "--objective", "quality", "--data", room / "eval") == 0
    capsys.readouterr()
    assert run(*argv) == 0
    assert "calibrated for guidance 1.5, not 1" in capsys.readouterr().err
    assert run(*argv, "--cond-scale", 1.5) == 0
    assert capsys.readouterr().err == ""
    assert run(*argv, "--objective", "fidelity") == 0
    assert "not calibrated for fidelity" in capsys.readouterr().err


def test_a_start_below_the_cut_is_refused(room, prior, tmp_path, capsys):
    argv = ["sample", room / "model.safetensors", "--prior", prior, "--sigma-max", 0.1, "--out", tmp_path]
    capsys.readouterr()
    assert run(*argv) == 1
    assert "below sigma_trunc" in capsys.readouterr().err


def test_a_prior_for_another_checkpoint_is_refused(room, prior, tmp_path, capsys):
    other = make_checkpoint(tmp_path / "other.safetensors", seed=5)
    fingerprints = [open_checkpoint(p).fingerprint for p in (room / "model.safetensors", other)]
    error = one_line_error(capsys, "sample", other, "--prior", prior, "--out", tmp_path / "out")
    assert all(f in error for f in fingerprints)
    error = one_line_error(capsys, "calibrate", prior, "--checkpoint", other)
    assert all(f in error for f in fingerprints)


def test_mistakes_in_fit_are_one_line_and_write_nothing(room, tmp_path, capsys):
    model, out = room / "model.safetensors", tmp_path / "p.safetensors"
    make_pictures(tmp_path / "two", classes=2, each=2)
    (tmp_path / "empty").mkdir()
    cases = [
        (["fit", "-o", out], "nothing to fit from"),
        (["fit", "--no-data", "-o", out], "give a CHECKPOINT"),
        (["fit", model, "--no-data", "--data", room / "fit", "-o", out], "no --data"),
        (["fit", model, "--data", tmp_path / "nothing", "-o", out], "no pictures at"),
        (["fit", model, "--data", tmp_path / "empty", "-o", out], "no pictures in"),
        (["fit", model, "--data", tmp_path / "two", "-o", out], "2 classes, the checkpoint takes 3 labels"),
        (
            ["fit", model, "--data", room / "fit", "--size", 16, "-o", out],
            "pictures 1x16x16, the checkpoint makes 1x8x8",
        ),
        (["fit", model, "--data", room / "fit", "--kind", "magic", "-o", out], "'magic'.*known are"),
        (["fit", model, "--data", room / "fit", "-o", tmp_path], "is a folder"),
    ]
    for argv, says in cases:
        error = one_line_error(capsys, *argv)
        assert re.search(says, error), error
        assert not out.exists()
    assert run("fit", model, "--data", tmp_path / "two", "--unlabelled", "--kind", "gaussian", "-o", out) == 0


def test_mistakes_in_calibrate_and_inspect_are_one_line(room, prior, tmp_path, capsys):
    model, before = room / "model.safetensors", prior.read_bytes()
    assert "give --data" in one_line_error(capsys, "calibrate", prior, "--checkpoint", model, "--objective", "quality")
    argv = ["calibrate", prior, "--checkpoint", model, "--data", room / "eval"]
    assert "uses no pictures" in one_line_error(capsys, *argv)
    assert "not a prior" in one_line_error(capsys, "calibrate", model, "--checkpoint", model)
    assert "not a prior" in one_line_error(capsys, "inspect", model)
    assert "cannot be read" in one_line_error(capsys, "inspect", tmp_path / "nothing")
    assert prior.read_bytes() == before


# interruption and output that nobody reads


def interrupted(capsys, reached, *argv):
    """Run a command and send this process SIGINT, as Ctrl-C does, once ``reached(main thread's stack)`` holds."""
    over, main = threading.Event(), threading.get_ident()

    def watch():
        while not over.wait(0.005):
            if reached(traceback.extract_stack(sys._current_frames()[main])):
                os.kill(os.getpid(), signal.SIGINT)
                return

    # a shell starts what it puts into the background deaf to SIGINT, and the tests may run there
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=watch, daemon=True).start()
    try:
        error = one_line_error(capsys, *argv, code=130)
    finally:
        over.set()
        signal.signal(signal.SIGINT, before)
    assert error.startswith(f"tdpm {argv[0]}: interrupted")


def test_ctrl_c_while_sampling_leaves_whole_pictures(room, tmp_path, capsys):
    argv = ["--sampler", "euler", "--steps", 20, "--seeds", "0-99999", "--batch", 2, "--out", tmp_path]
    interrupted(capsys, lambda _: any(tmp_path.glob("seed_*.png")), "sample", room / "model.safetensors", *argv)
    assert not (tmp_path / "grid.png").exists() and not list(tmp_path.glob(".*tmp"))
    for file in tmp_path.glob("*.png"):
        Image.open(file).load()


def test_ctrl_c_while_fitting_or_calibrating_changes_no_file(room, prior, tmp_path, capsys):
    model, path = room / "model.safetensors", tmp_path / "p.safetensors"
    path.write_bytes(prior.read_bytes())
    for module, argv in (
        ("fit.py", ["fit", model, "--no-data", "-o", path]),
        ("calibrate.py", ["calibrate", path, "--checkpoint", model, "--budgets", "2-30", "--samples", 256]),
    ):
        interrupted(capsys, lambda stack, m=module: any(f.filename.endswith(f"tdpm_ext/{m}") for f in stack), *argv)
        assert path.read_bytes() == prior.read_bytes() and list(tmp_path.iterdir()) == [path]


def test_a_reader_that_leaves_early_is_no_error(prior, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run("inspect", prior, "--json") == 0
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


# doctor


def packages(**states):
    """What ``probe`` returns where everything works, changed as told."""
    names = (*doctor.REQUIRED, *doctor.OPTIONAL)
    found = {name: doctor.Package(name, "1.0", "works") for name in names}
    found["torch"].facts = {"build": "CPU only", "gpus": [], "mps": False}
    for name, (state, reason) in states.items():
        found[name] = doctor.Package(name, None if state == "missing" else "1.0", state, reason)
    return found


@pytest.mark.slow  # imports every package in a process of its own
def test_doctor_reports_this_machine(capsys):
    code = run("doctor", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (code == 0) == found["usable"]
    assert found["packages"]["torch"] == {
        "version": torch.__version__.split("+")[0],
        "state": "works",
        "reason": "",
    } or (found["packages"]["torch"]["version"] == torch.__version__)
    assert found["packages"]["k_diffusion"]["state"] == found["hosts"]["k_diffusion"] == "works"
    assert found["hosts"]["comfyui"] == "tdpm install comfyui --path FOLDER"
    assert found["problems"] == [] or all(p["fix"] for p in found["problems"])
    assert set(found["kernels"]["backends"]) == {"group_norm", "attention", "sampler_step"}
    assert found["kernels"]["backends"]["attention"]["sdpa"] == "can be used here"


def test_doctor_shows_the_kernels_and_lives_without_them():
    from tdpm_ext.kernels import report

    answer = {"backends": report()["backends"], "lines": str(report()).splitlines()}
    shown = doctor._text(doctor.examine(packages(), doctor.Package(doctor.KERNELS, None, "works", facts=answer)))
    assert any("sdpa" in line and "can be used here" in line for line in shown)
    broken = doctor.Package(doctor.KERNELS, None, "broken", "KernelError: TDPM_KERNELS='fast' in the environment")
    found = doctor.examine(packages(), broken)
    assert found["usable"] and any("TDPM_KERNELS='fast'" in line for line in doctor._text(found))


def test_doctor_tells_what_to_do_and_when_it_is_serious():
    fine = doctor.examine(packages())
    assert fine["usable"] and fine["problems"] == []
    absent = doctor.examine(packages(diffusers=("missing", ""), triton=("missing", "")))
    assert absent["usable"] and absent["problems"] == []
    assert any("pip install 'tdpm-ext[triton]'" in line for line in doctor._text(absent))
    for name, serious in (("numpy", True), ("k_diffusion", True), ("xformers", False)):
        found = doctor.examine(packages(**{name: ("broken", "ImportError: no such symbol")}))
        (problem,) = found["problems"]
        assert problem["serious"] is serious and found["usable"] is not serious and problem["fix"]
    needed = doctor.examine(packages(tqdm=("missing", "")))
    assert not needed["usable"] and needed["problems"][0]["fix"] == "pip install tqdm"


def test_doctor_survives_packages_that_crash_or_raise(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text("import os; os.abort()")
    (tmp_path / "raising.py").write_text("print('hello'); raise OSError('libmissing.so: cannot open')")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)")
    (tmp_path / "k_diffusion.py").write_text("import pkg_resources_gone")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor.probe(("crashing", "raising", "leaving", "k_diffusion", "not_there_at_all"))
    assert {name: p.state for name, p in found.items()} == {
        "crashing": "broken",
        "raising": "broken",
        "leaving": "broken",
        "k_diffusion": "broken",
        "not_there_at_all": "missing",
    }
    assert "ends Python with code -6" in found["crashing"].reason
    assert "libmissing.so" in found["raising"].reason
    assert "setuptools>=77.0.3,<82" in found["k_diffusion"].reason
