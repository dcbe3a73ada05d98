"""The harness: seeds are pictures whatever the batch and the number of processes; it resumes, and says what it did."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import chunks, fid, records
from benchmarks.drawing import Drawer, Request
from benchmarks.rivals import noise_for
from tdpm_ext.pictures import load_pictures

pytest.importorskip("k_diffusion", exc_type=ImportError)
ASSETS = fid.ASSETS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixty real pictures in either half."""
    base = tmp_path_factory.mktemp("data")
    for name in ("fit", "eval"):
        pictures = load_pictures(ASSETS / f"{name}.zip", limit=60)
        for i, image in enumerate(pictures.images):
            folder = base / name / str(int(pictures.labels[i]))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{i:02d}.png")
    return base


def words(data, out, *more):
    base = ["--data", data / "eval", "--fit", data / "fit", "--features", ASSETS / "features.safetensors"]
    base += ["--steps", 2, "--seeds", "5-20", "--blocks", 2, "--device", "cpu", "--cache", out / "cache", "--out", out]
    return [str(w) for w in [*base, *more]]


def pictures(out):
    """Seed -> picture, of everything that was drawn."""
    found = {}
    for path in sorted((out / "chunks").glob("*.safetensors")):
        first = int(path.name.split("-")[0])
        found |= {first + i: x for i, x in enumerate(load_file(path)["x"])}
    return found


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """One process, batches of four."""
    out = tmp_path_factory.mktemp("alone")
    assert fid.main(words(data, out, "--batch", 4)) == 0
    return out


def test_the_record_is_valid_and_complete(alone):
    record = records.read(alone / "record.json")
    assert record["samples"] == 16 and record["seeds"] == [5, 20] and record["nfe"] == 2 and record["processes"] == 1
    row = record["judges"][0]
    assert row["name"] == "FD-CNN128" and row["per_block"] == 8 and row["measures"]["fd"]["sd"] > 0
    assert row["floor"]["mean"] > 0 and record["memorisation"]["ratio"] > 0
    assert record["request"]["sampler"] == "tdpm" and "--seeds 5-20" in record["command"]


def test_another_batch_size_gives_the_same_pictures(alone, data, tmp_path):
    assert fid.main(words(data, tmp_path, "--batch", 7)) == 0
    ours, theirs = pictures(alone), pictures(tmp_path)
    assert sorted(ours) == sorted(theirs) == list(range(5, 21))
    for seed in ours:
        torch.testing.assert_close(ours[seed], theirs[seed], rtol=0, atol=1e-4)


def test_two_processes_give_the_same_pictures_to_the_bit(alone, data, tmp_path):
    # the launcher starts several local processes under no other name; --device cpu keeps them off any GPU
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launch += ["--main_process_port", str(free.getsockname()[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(fid.ROOT / "benchmarks" / "fid.py"), *words(data, tmp_path, "--batch", 4)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = pictures(alone), pictures(tmp_path)
    assert all(torch.equal(ours[seed], theirs[seed]) for seed in range(5, 21))
    one, two = (records.read(out / "record.json") for out in (alone, tmp_path))
    assert two["processes"] == 2 and two["pictures_sha256"] == one["pictures_sha256"]
    assert two["judges"] == one["judges"]


def test_each_seed_gets_its_own_noise_and_class_in_any_company():
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, x, sigma, class_cond):
            seen.update({(float(p.sum()), int(c)): p.clone() for p, c in zip(x, class_cond, strict=True)})
            return torch.zeros_like(x)

    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    drawer = Drawer(Spy(), (1, 4, 4), 3, labels)
    request = Request.rival("euler", 1)
    drawer.draw(request, range(100, 110), batch=3)
    first = dict(seen)
    seen.clear()
    drawer.draw(request, [109, 104, 100])
    assert set(seen) < set(first)
    assert all(torch.equal(seen[k], first[k]) for k in seen)
    noise = noise_for([104], (1, 4, 4)) * 80
    assert any(torch.equal(v[None], noise) for v in first.values())


def test_an_interrupted_run_goes_on_and_damaged_pieces_are_made_again(alone, data, tmp_path):
    assert fid.main(words(data, tmp_path, "--batch", 4)) == 0
    kept = sorted((tmp_path / "chunks").iterdir())
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in kept}
    kept[1].unlink()
    kept[2].write_bytes(kept[2].read_bytes()[:1000])
    assert fid.main(words(data, tmp_path, "--batch", 4)) == 0
    for i, path in enumerate(kept):
        assert path.read_bytes() == before[path.name][1]
        assert (path.stat().st_mtime_ns == before[path.name][0]) == (i not in (1, 2))


def test_pieces_of_other_settings_are_refused(alone, data, capsys):
    assert fid.main(words(data, alone, "--batch", 4, "--steps", 3)) == 2
    assert "drawn with other settings" in capsys.readouterr().err


def test_a_rival_and_the_paired_reference(data, tmp_path, capsys):
    setting = tmp_path / "setting.json"
    setting.write_text(json.dumps(Request.rival("dpmpp_2m", 3, "exponential", 20.0, 0.1).to_json()))
    few = ["--seeds", "0-11", "--batch", 12, "--setting", setting, "--sampler", "dpmpp_2m", "--paired"]
    assert fid.main(words(data, tmp_path / "out", *few)) == 0
    record = records.read(tmp_path / "out" / "record.json")
    assert record["request"]["grid"] == "exponential" and record["nfe"] == 3
    assert 0 < record["paired"]["rmse"] < 0.5 and record["paired"]["psnr"] > 10
    assert "to the 60-evaluation run" in capsys.readouterr().out


class Layers(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, (32, 64)).mean(1).flatten(1)


class StandIn(torch.nn.Module):
    """Called like the TorchScript Inception."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_inception_features_of_other_weights_are_judged_but_not_called_fid(data, tmp_path):
    pytest.importorskip("cleanfid", exc_type=ImportError)
    torch.jit.script(StandIn()).save(tmp_path / "mine.pt")
    net = ["--features", ASSETS / "features.safetensors", "inception", "--inception", tmp_path / "mine.pt"]
    few = ["--seeds", "0-11", "--batch", 12, *net]
    assert fid.main(words(data, tmp_path, *few)) == 2  # not the published weights
    assert fid.main(words(data, tmp_path, *few, "--any-weights")) == 0
    rows = records.read(tmp_path / "record.json")["judges"]
    assert [r["name"].split("-")[0] for r in rows] == ["FD", "FD"] and rows[1]["name"].endswith("clean")
    assert rows[1]["whole"]["fd"] > 0 and len(list((tmp_path / "pictures").glob("*.png"))) == 12


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--sampler", "ddim"], "choose from tdpm, euler"),
        (["--sampler", "heun", "--options", "{'a': 1}"], "Expecting property name"),
        (["--features", "inception", "--inception", "absent.pt"], "no Inception weights at absent.pt"),
        (["--features", "absent.safetensors"], "no feature network at absent.safetensors"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(data, tmp_path, capsys, wrong, message):
    assert fid.main(words(data, tmp_path, "--seeds", "0-11", "--batch", 12, *wrong)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fid: ") and message in error


def test_the_quick_run_judges_what_ships(tmp_path, capsys):
    assert fid.main(["--quick", "--device", "cpu", "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "o")]) == 0
    record = records.read(tmp_path / "o" / "record.json")
    assert record["samples"] == fid.QUICK and record["nfe"] == 4
    row = record["judges"][0]
    assert row["whole"]["coverage"] > 0.9 and row["measures"]["fd"]["mean"] < 2 * row["floor"]["mean"]
    assert "floor at 32" in capsys.readouterr().out


def test_seeds_are_divided_into_consecutive_pieces():
    assert [list(c) for c in chunks.chunks_of(range(3, 10), 3)] == [[3, 4, 5], [6, 7, 8], [9]]
    for text in ("", "5-3", "a-b", "-1-4"):
        with pytest.raises(Exception, match="seeds"):
            fid.seeds_of(text)
