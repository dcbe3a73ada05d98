"""The latency benchmark: it checks before it times, refuses when outputs disagree, and writes what its schema says."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

K = pytest.importorskip("k_diffusion", exc_type=ImportError)

from benchmarks import arms, calls, latency, networks, records, timing  # noqa: E402
from benchmarks.rivals import karras_sigmas, noise_for  # noqa: E402
from tdpm_ext import fit_prior, load_prior, open_checkpoint, save_prior  # noqa: E402

CPU = torch.device("cpu")
DEVIATION = 0.6
CONFIG = {
    "model": {
        "type": "image_v1",
        "input_channels": 1,
        "input_size": [8, 8],
        "patch_size": 1,
        "mapping_out": 16,
        "mapping_cond_dim": 3,
        "depths": [1],
        "channels": [8],
        "self_attn_depths": [False],
        "dropout_rate": 0.0,
        "augment_wrapper": False,
        "sigma_data": DEVIATION,
        "sigma_min": 0.01,
        "sigma_max": 80,
    },
    "dataset": {"num_classes": 3},
}


def gaussian_denoiser(x, sigma, **_):
    """The exact denoiser of unrelated pixels of deviation DEVIATION."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return x * DEVIATION**2 / (DEVIATION**2 + sigma**2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A k-diffusion checkpoint (untrained: its network adds nothing to ``gaussian_denoiser``) and a prior for it."""
    folder = tmp_path_factory.mktemp("latency")
    config = K.config.load_config(copy.deepcopy(CONFIG))
    torch.manual_seed(0)
    weights = {k: v.contiguous() for k, v in K.config.make_model(config).state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"config": json.dumps(config)})
    checkpoint = open_checkpoint(folder / "model.safetensors")
    pictures = torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * DEVIATION
    prior = fit_prior("gaussian", pictures, checkpoint=checkpoint.fingerprint, progress=False)
    save_prior(prior, folder / "prior.safetensors")
    return folder


@pytest.fixture
def setup(folder):
    return arms.Setup(gaussian_denoiser, load_prior(folder / "prior.safetensors"), CPU)


@pytest.fixture
def options(folder):
    return ["--checkpoint", str(folder / "model.safetensors"), "--prior", str(folder / "prior.safetensors"), "--quick"]


ARMS = [arms.Arm("tdpm", 3), arms.Arm("dpmpp_2m", 3)]


# --- the gate


def test_the_gate_passes_when_every_route_gives_the_same_pictures(setup):
    checks, rmses = arms.check_outputs([*ARMS, arms.Arm("dpmpp_2m", 50)], setup, 6, seed=0)
    assert all(check["ok"] for check in checks), [c for c in checks if not c["ok"]]
    assert rmses["tdpm@3"] < rmses["dpmpp_2m@3"] and rmses["dpmpp_2m@50"] < 0.01
    assert len({(c["arm"], c["check"]) for c in checks}) == 3 * 4 + 2


def test_the_plain_loop_is_the_sampler_it_checks():
    sigmas, x = karras_sigmas(7, 80.0, 0.02, 7.0), noise_for(range(3), (1, 4, 4)) * 80
    theirs = K.sampling.sample_dpmpp_2m(gaussian_denoiser, x, sigmas.float(), disable=True)
    torch.testing.assert_close(arms.plain_dpmpp_2m(gaussian_denoiser, x, sigmas, {}), theirs, rtol=1e-4, atol=1e-5)


class Jitter:
    """A model that is not the same twice."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma, **_):
        self.calls += 1
        return gaussian_denoiser(x, sigma) + 0.01 * (self.calls % 7)


def depends_on_the_batch(x, sigma, **_):
    return gaussian_denoiser(x, sigma) + 0.01 * len(x)


def not_finite(x, sigma, **_):
    return gaussian_denoiser(x, sigma) / 0.0


@pytest.mark.parametrize(
    "model, broken",
    [(Jitter(), "repeated run"), (depends_on_the_batch, "alone and in a batch"), (not_finite, "another route")],
)
def test_the_gate_names_what_disagrees(setup, model, broken):
    setup.model = model
    checks, _ = arms.check_outputs(ARMS, setup, 6, seed=0)
    assert {"tdpm@3", "dpmpp_2m@3"} <= {c["arm"] for c in checks if not c["ok"] and c["check"] == broken}
    assert records.problems(VALID | {"checks": checks}) == []


def test_the_gate_refuses_a_prior_that_loses_the_picture_of_the_seed(setup):
    honest = setup.prior.start
    setup.prior.start = lambda z, *levels, **cond: honest(z.roll(1, -1), *levels, **cond)
    failed = [c["check"] for c in arms.check_outputs(ARMS, setup, 6, seed=0)[0] if not c["ok"]]
    assert "rmse to the reference against dpmpp_2m@3" in failed


def test_disagreement_means_exit_1_and_nothing_timed(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arms, "plain_dpmpp_2m", lambda model, x, sigmas, args: x * 0)
    monkeypatch.setattr(latency, "time_arms", lambda *_: pytest.fail("timed although the outputs disagree"))
    report = tmp_path / "report.json"
    assert latency.main([*options, "--json", str(report)]) == 1
    printed = capsys.readouterr()
    assert "DISAGREES  dpmpp_2m@4: another route" in printed.out and "of the time of" not in printed.out
    assert "nothing was timed" in printed.err
    written = json.loads(report.read_text())
    assert written["agreed"] is False and written["arms"] == [] and written["speedups"] == []


# --- the whole run


def test_a_run_reports_every_arm_and_batch_in_a_valid_file(options, tmp_path, capsys):
    path = tmp_path / "deep" / "report.json"
    batches = ["--batch", "1", "3", "--budgets", "2", "4", "--against", "6"]
    assert latency.main([*options, *batches, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    timing.validate(report)
    names = ["tdpm@2", "tdpm@4", "dpmpp_2m@2", "dpmpp_2m@4", "dpmpp_2m@6"]
    assert [(r["arm"], r["batch"]) for r in report["arms"]] == [(n, b) for b in (1, 3) for n in names]
    assert all(r["nfe"] == r["budget"] and 0 < r["min_ms"] <= r["p50_ms"] <= r["p90_ms"] for r in report["arms"])
    assert all((r["prior_ms"] > 0) == r["arm"].startswith("tdpm") for r in report["arms"])
    assert len(report["speedups"]) == 2 * 2 * 3 and len(report["checks"]) == 5 * 4 + 2 * 2
    printed = capsys.readouterr().out
    assert "CPU figures" in printed and "tdpm@4 takes 1/" in printed and "against" in printed
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_the_first_picture_is_timed_in_a_process_of_its_own(options):
    command = [sys.executable, ROOT / "benchmarks" / "latency.py", *options, "--first", "tdpm@2"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True, cwd="/")
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"load_ms", "first_ms"} and all(value > 0 for value in found.values())


def test_overhead_needs_no_checkpoint(options, tmp_path, capsys):
    path = tmp_path / "overhead.json"
    assert latency.main(["--overhead", *options[2:4], "--rounds", "3", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    timing.validate(report)
    samplers = ("euler", "dpmpp_2m", "tdpm", "tdpm, prior not used")
    assert {(r["arm"], r["steps"]) for r in report["overhead"]} == {(s, n) for s in samplers for n in (4, 8, 20)}
    assert "a further step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (["--checkpoint", "absent.safetensors"], "no checkpoint at absent.safetensors"),
        (["--prior", "absent.safetensors"], "absent.safetensors"),
        (["--sigma-min", "90"], "sigma_min < sigma_max"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(options, capsys, change, message):
    assert latency.main([*options, *change]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("latency: ") and message in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_without_cuda_is_refused(options, capsys):
    assert latency.main([*options, "--device", "cuda"]) == 2
    assert "use --device cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_run_on_cuda_reports_gpu_figures(options, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert latency.main([*options, "--device", "cuda", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    timing.validate(report)
    assert report["environment"]["device"] == "cuda" and capsys.readouterr().out.lstrip().startswith("GPU")


# --- clocks


def test_arms_take_turns_and_warm_up_rounds_do_not_count():
    order = []
    times = timing.interleave({n: lambda n=n: order.append(n) for n in "abc"}, timing.Clock(CPU), rounds=4, warmup=2)
    assert {name: len(ms) for name, ms in times.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = ["".join(order[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and set(rounds) == {"abc", "bca", "cab"}


def test_stopwatch_counts_the_outermost_call_once_and_leaves_the_object_as_it_was():
    class Thing:
        def outer(self, n):
            return self.inner(n) + self.inner(n)

        def inner(self, n):
            if n < 0:
                raise RuntimeError("negative")
            return n

    thing, watch = Thing(), timing.Stopwatch(timing.Clock(CPU))
    with watch.methods_of(thing, ("outer", "inner")):
        assert thing.outer(2) == 4 and watch.calls == 1 and watch.ms > 0
        with pytest.raises(RuntimeError):
            thing.outer(-1)
        assert thing.inner(3) == 3 and watch.calls == 3 and watch.depth == 0
    assert vars(thing) == {}


def test_time_inside_the_excluded_watch_is_taken_off():
    watch = timing.Stopwatch(timing.Clock(CPU))
    busy = watch.wrap(lambda: torch.randn(400, 400) @ torch.randn(400, 400))
    whole = timing.interleave({"x": busy}, timing.Clock(CPU), 5, 1)["x"]
    rest = timing.interleave({"x": busy}, timing.Clock(CPU), 5, 1, excluded=watch)["x"]
    assert 0 <= min(rest) < 0.5 * min(whole)


def test_summary_is_minimum_median_and_ninetieth_percentile():
    found = timing.summary([float(i) for i in range(11)])
    assert found == {"runs": 11, "min_ms": 0.0, "p50_ms": 5.0, "p90_ms": 9.0}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_peak_memory_sees_what_one_call_allocates():
    small = timing.peak_memory(lambda: None, CPU)
    large = timing.peak_memory(lambda: torch.ones(32 * 2**20), CPU)  # 128 MiB
    assert large is None or large - small > 100


# --- the file format

ROW = records.SCHEMA["$defs"]["kinds"][timing.SCHEMA_NAME]["properties"]["arms"]["items"]["required"]
VALID = {
    "schema": timing.SCHEMA_NAME,
    "mode": "latency",
    "label": "CPU figures",
    "environment": timing.environment(CPU),
    "settings": {"rounds": 3},
    "agreed": True,
    "checks": [{"arm": "tdpm@4", "check": "repeated run", "value": 0.0, "limit": 1e-3, "ok": True}],
    "arms": [
        dict.fromkeys(ROW, 1.0) | {"arm": "tdpm@4", "batch": 1, "budget": 4, "nfe": 4, "runs": 3, "peak_mib": None}
    ],
    "first_picture": [{"arm": "tdpm@4", "load_ms": 5.0, "first_ms": 2.0}],
    "speedups": [{"arm": "tdpm@4", "against": "dpmpp_2m@8", "batch": 1, "ratio": 1.9}],
    "overhead": [],
}


def places(value, path=()):
    """The path of every field, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path + (key,) for key, _ in items] + [p for key, item in items for p in places(item, path + (key,))]


FIELDS = [p for p in places(VALID) if isinstance(p[-1], str) and p[0] != "settings"]


def test_a_report_of_this_machine_is_valid(tmp_path):
    timing.write_report(VALID, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == VALID


@given(place=st.sampled_from(FIELDS), change=st.sampled_from(["drop", "list", "nan", "extra"]))
def test_any_field_missing_mistyped_or_unknown_is_named(place, change):
    report = copy.deepcopy(VALID)
    holder = report
    for key in place[:-1]:
        holder = holder[key]
    name = place[-1] if change != "extra" else "surprise"
    if change == "drop":
        del holder[name]
    else:
        holder[name] = {"list": [[]], "nan": float("nan"), "extra": 1}[change]
    with pytest.raises(ValueError, match=name):
        timing.validate(report)


def test_speedups_of_disagreeing_outputs_and_other_versions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="although the outputs disagree"):
        timing.write_report(VALID | {"agreed": False}, tmp_path / "report.json")
    with pytest.raises(ValueError, match="tdpm-latency/2"):
        timing.write_report(VALID | {"schema": "tdpm-latency/2"}, tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


# --- networks with random weights


def test_a_network_is_timed_by_every_baseline_and_labelled(tmp_path, monkeypatch, capsys):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(x) * 2

    tiny = networks.Network("a tiny network", 0.0, Twice, lambda n: ((torch.randn(n, 3, 8, 8),), {}))
    monkeypatch.setitem(networks.NETWORKS, "cifar10", tiny)
    means = ["--baselines", "channels_last", "accelerate", "--batch", "1", "2", "--rounds", "3"]
    path = tmp_path / "calls.json"
    assert latency.main(["--network", "cifar10", *means, "--json", str(path)]) == 0
    record = records.read(path)
    assert [(r["batch"], r["baseline"]) for r in record["calls"]] == [
        (b, n) for b in (1, 2) for n in ("eager", "channels_last", "accelerate")
    ]
    assert "random weights: latency only" in record["label"] and "CPU figures" in capsys.readouterr().out
    assert all(r["error"] < 1e-4 and r["first_s"] > 0 and r["runs"] == 3 for r in record["calls"])


def test_a_baseline_that_gives_something_else_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(calls, "ready", lambda name, model: model if name == "eager" else lambda *a, **k: model(*a) + 1)
    tiny = networks.Network("tiny", 0.0, torch.nn.Flatten, lambda n: ((torch.randn(n, 3),), {}))
    monkeypatch.setitem(networks.NETWORKS, "cifar10", tiny)
    monkeypatch.setattr(networks, "build", lambda *_: torch.nn.Flatten())
    assert latency.main(["--network", "cifar10", "--baselines", "channels_last", "--batch", "2"]) == 2
    assert "nothing was timed" in capsys.readouterr().err


def test_what_is_paid_once_is_paid_back_after_so_many_pictures():
    assert calls.break_even(31.0, 1.0, 50.0, 20.0, 2) == 2000  # 30 s at 15 ms a picture
    assert calls.break_even(31.0, 1.0, 20.0, 20.0, 2) is None
    assert calls.break_even(0.5, 1.0, 50.0, 20.0, 2) == 0
    rows = [{"arm": a, "batch": 1, "p50_ms_per_picture": ms} for a, ms in (("tdpm@4", 20.0), ("dpmpp_2m@8", 50.0))]
    found = latency.break_even(rows, 300.0)
    assert found == [{"arm": "tdpm@4", "against": "dpmpp_2m@8", "batch": 1, "pictures": 10_000}]
    assert latency.break_even(rows, None) == []
