"""The kernel benchmark: what is counted, what is refused, and that the committed figures are the current ones."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("k_diffusion", exc_type=ImportError)

from benchmarks import (  # noqa: E402
    gpu,
    gpu_operations,
    gpu_sampling,
    gpu_trajectories,
    inductor_schedule,
    kernel_figure,
    kernels,
    networks,
    records,
    traffic,
)
from tdpm_ext.kernels import facts, group_norm  # noqa: E402

CPU = torch.device("cpu")
COMMITTED = records.RESULTS / "kernels.json"


class Tiny(nn.Module):
    """A denoiser with one of everything that the benchmark looks for."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.back = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x, sigma):
        return self.back(F.silu(self.norm(self.conv(x) + sigma[:, None, None, None])))


@pytest.fixture
def tiny(monkeypatch):
    def inputs(batch):
        return (torch.randn(batch, 4, 8, 8), torch.ones(batch)), {}

    network = networks.Network("tiny", sum(p.numel() for p in Tiny().parameters()) / 1e6, Tiny, inputs)
    monkeypatch.setitem(networks.NETWORKS, "tiny", network)
    return "tiny"


def counted(function, *shapes, dtype=torch.float16):
    """What ``function`` launches, given fake CUDA tensors of these shapes."""
    with FakeTensorMode(), torch.no_grad(), traffic.pretended_gpu(80):
        tensors = [torch.empty(*shape, dtype=dtype, device="cuda") for shape in shapes]
        with traffic.Traffic(processors=108) as mode:
            function(*tensors)
    return mode.launches


# The rules


def test_a_product_reads_its_factors_and_writes_the_result():
    (entry,) = counted(lambda a, b: a @ b, (32, 64), (64, 16))
    assert dataclasses.astuple(entry)[:5] == ("mm", 1, 2 * (32 * 64 + 64 * 16), 0, 2 * 32 * 16)


def test_views_and_allocations_launch_nothing():
    assert counted(lambda x: (x.view(-1)[:8].t(), x.transpose(0, 1), x.new_empty(3), x.detach()), (4, 8)) == []


def test_what_broadcasting_repeats_is_read_once():
    (entry,) = counted(lambda x, row: x + row.expand(4, 8), (4, 8), (8,))
    assert (entry.read, entry.write) == (2 * (32 + 8), 2 * 32)


def test_in_place_and_fills():
    added, filled = counted(lambda x, y: (x.add_(y), y.zero_()), (4, 8), (4, 8))
    assert (added.read, added.write) == (2 * 64, 2 * 32)
    assert (filled.read, filled.write) == (0, 2 * 32)


def test_attention_is_one_launch_whatever_its_strides():
    def packed(x):
        q, k, v = x.view(1, 8, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)

    (entry,) = counted(packed, (1, 8, 96))
    assert (entry.launches, entry.read, entry.write) == (1, 2 * 8 * 96, 2 * 8 * 32)


def test_a_chain_is_the_norm_and_what_surrounds_it_entry_by_entry():
    def block(x, row, other):
        h = F.silu(F.group_norm(x + row[:, :, None, None], 4))
        return torch.addcmul(row[:, :, None, None], h, row[:, :, None, None]) + other

    entries = counted(block, (1, 32, 8, 8), (1, 32), (1, 32, 8, 8))
    assert [(e.op, e.chain) for e in entries] == [
        ("add", True), ("native_group_norm", True), ("silu", True), ("addcmul", True), ("add", False),
    ]  # fmt: skip
    norm = entries[1]
    assert norm.reread == norm.picture == 2 * 32 * 64, "its statistics are taken before it is normalised"
    assert traffic.chain_floor(entries) == 2 * 2 * 32 * 64


def test_a_sum_of_two_pictures_before_a_norm_is_not_in_its_chain():
    entries = counted(lambda x, y: F.group_norm(x + y, 4), (1, 32, 8, 8), (1, 32, 8, 8))
    assert [e.chain for e in entries] == [False, True]


@pytest.mark.parametrize(("side", "launches", "passes"), [(16, 1, 1), (512, 3, 2)])
def test_our_norm_counts_as_its_plan_says(side, launches, passes):
    with facts.building_graph():
        (entry,) = counted(lambda x: group_norm(x, 4, act="silu"), (1, 32, side, side))
    assert (entry.op, entry.launches, entry.chain) == ("group_norm", launches, True)
    assert entry.reread == (passes - 1) * entry.picture


def test_the_pretended_gpu_is_gone_afterwards():
    before = torch.cuda.is_current_stream_capturing, facts.compute_capability(torch.device("cuda"))
    counted(lambda x: x + 1, (2,))
    assert (torch.cuda.is_current_stream_capturing, facts.compute_capability(torch.device("cuda"))) == before


# Networks


def test_a_network_of_another_size_is_refused(monkeypatch, tiny):
    network = dataclasses.replace(networks.NETWORKS[tiny], parameters=3.0)
    monkeypatch.setitem(networks.NETWORKS, tiny, network)
    with pytest.raises(ValueError, match=r"tiny has 0.00 M parameters here, and 3.0 M in public"):
        networks.build(tiny, "cpu", torch.float32)


def test_random_weights_let_the_output_depend_on_every_layer():
    model = networks.build("fashion-mnist", "cpu", torch.float32)
    assert all(p.any() for p in model.parameters())
    with networks.defaults("cpu", torch.float32):
        args, kwargs = networks.NETWORKS["fashion-mnist"].inputs(2)
    with torch.no_grad():
        assert model(*args, **kwargs).shape == (2, 1, 28, 28)


@pytest.mark.slow
def test_inductor_fuses_a_chain(tiny):
    eager, compiled = traffic.count(tiny, "eager"), inductor_schedule.count(tiny)
    assert len(eager) == 5
    assert sum(e.op == "convolution" for e in compiled) == 2
    assert 2 <= sum(e.op == "fused" for e in compiled) <= 4, "statistics and the rest, besides what conv leaves"
    assert traffic.totals(compiled)["once"] > traffic.chain_floor(eager)


# The report


@pytest.fixture(scope="module")
def report():
    names = ["cifar10", "fashion-mnist"]
    rows, notes = kernels.count_all(names, 1, torch.float16, inductor=False)
    return rows, notes


def test_the_committed_counts_are_the_current_ones(report):
    committed = {(row["network"], row["arm"]): row for row in records.read(COMMITTED)["counts"]}
    for row in report[0]:
        assert committed[row["network"], row["arm"]] == row, "run: python benchmarks/kernels.py"


@pytest.mark.slow
def test_the_committed_counts_of_stable_diffusion_are_the_current_ones():
    pytest.importorskip("diffusers")
    committed = {row["arm"]: row for row in records.read(COMMITTED)["counts"] if row["network"] == "sd15"}
    rows, _ = kernels.count_all(["sd15"], 1, torch.float16, inductor=False)
    assert [committed[row["arm"]] for row in rows] == rows, "run: python benchmarks/kernels.py"


def test_the_committed_promises_hold():
    record = records.read(COMMITTED)
    assert {bar["bar"].split(":")[0] for bar in record["bars"]} == {"sd15", "cifar10"}
    assert all(bar["holds"] for bar in record["bars"]), record["bars"]
    assert kernels.bars(record["counts"]) == record["bars"]


def test_modelled_times_are_bytes_over_bandwidth(report):
    found = kernels.modelled(report[0], bandwidth=1000.0)
    rows = {(row["network"], row["arm"]): row for row in report[0]}
    for entry in found:
        assert entry["modelled_ms"] == pytest.approx(rows[entry["network"], entry["arm"]][entry["what"]] / 1e9)


def test_the_command_writes_what_it_prints(tiny, tmp_path, capsys):
    path = tmp_path / "counts.json"
    assert kernels.main(["--networks", "fashion-mnist", "--no-inductor", "--json", str(path)]) == 0
    record, printed = records.read(path), capsys.readouterr().out
    for row in record["counts"]:
        assert any(row["arm"] in line and f" {row['launches']} " in line for line in printed.splitlines())
    assert "not a measurement" in printed and "without a GPU" in record["label"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_promise_that_fails_fails_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "BARS", {"chain": 0.0, "launches": 0.0})
    path = tmp_path / "counts.json"
    assert kernels.main(["--networks", "cifar10", "--no-inductor", "--json", str(path)]) == 1


# On a GPU: the same code runs here, on the CPU and on small shapes


def test_operations_are_compared_then_timed():
    found = gpu_operations.measure(CPU, torch.float32, runs=3, small=True)
    by_backend = {(row["op"], row["backend"]): row for row in found["rows"]}
    assert {op for op, _ in by_backend} == set(gpu_operations.ARMS)
    for (op, backend), row in by_backend.items():
        if backend == gpu_operations.ARMS[op][0]:
            assert row["error"] < 1e-5 and row["cold_us"] > 0 and row["share"] > 0 and row["why_not"] is None
        else:
            assert row["cold_us"] is None and "needs CUDA tensors" in row["why_not"]


def test_a_wrong_operation_gets_no_times(monkeypatch):
    right = gpu_operations.OPERATIONS["group_norm"]
    backends = iter([right, lambda *args, **options: right(*args, **options) + 0.01])
    monkeypatch.setitem(gpu_operations.ARMS, "group_norm", ("native", "reference"))
    monkeypatch.setattr(gpu_operations, "_error", lambda case, backend, truth: (
        next(backends)(*case.args, **case.options).double() - truth).abs().max().item())  # fmt: skip
    case = next(gpu_operations.cases(CPU, torch.float32, small=True))
    timer = gpu_operations.Timer(CPU, 3)
    first, second = gpu_operations._rows(case, timer, {"copy_gb_s": 1.0}, torch.float32)
    assert first["cold_us"] is not None
    assert second["cold_us"] is None and second["why_not"].startswith("wrong: error 0.01")


def test_trajectories_agree_and_are_timed(tiny):
    rows = gpu_trajectories.measure(
        tiny, 2, CPU, torch.float32, rounds=2, arms=("eager", "channels_last", "accelerate", "one graph")
    )
    assert [row["arm"] for row in rows] == ["eager", "channels_last", "accelerate", "one graph"]
    assert all(row["agrees"] and row["speedup"] > 0 and row["p50_ms"] >= row["min_ms"] > 0 for row in rows)


def test_an_arm_that_disagrees_gets_no_speedup(tiny, monkeypatch):
    def spoiled(arm, model):
        return model if arm == "eager" else lambda x, sigma: model(x, sigma) * 1.01

    monkeypatch.setattr(gpu_trajectories, "prepare", spoiled)
    rows = gpu_trajectories.measure(tiny, 1, CPU, torch.float32, rounds=2, arms=("eager", "accelerate"))
    assert (rows[0]["agrees"], rows[1]["agrees"], rows[1]["speedup"]) == (True, False, None)


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "make gpu: torch sees no CUDA GPU here, so nothing was run\n")


@pytest.fixture(scope="module")
def sampled():
    return gpu_sampling.measure(CPU, rounds=1, batches=(1,))


def test_samplers_and_ways_of_running_them_agree_and_are_timed(sampled):
    assert len(sampled) == 9 and all(row["drift"] < 1e-4 and row["p50_ms"] > 0 for row in sampled)
    rmse = {(row["sampler"], row["steps"]): row["rmse"] for row in sampled}
    assert rmse["dpmpp_2m", 50] < rmse["tdpm", 4] < rmse["dpmpp_2m", 4]


def test_a_way_that_gives_other_pictures_is_not_timed(monkeypatch):
    calls = {("tdpm", 4, "eager"): lambda: torch.zeros(1, 2), ("tdpm", 4, "accelerate"): lambda: torch.ones(1, 2)}
    right, wrong = gpu_sampling._rows(calls, torch.zeros(1, 2), CPU, 1, 1)
    assert right["runs"] == 1 and wrong["runs"] is None
    assert "not timed: rmse 1 " in gpu_sampling.lines([wrong])[1]


@pytest.fixture
def record(tiny, sampled):
    """A record of the kind that a GPU run writes, with rows of this CPU; nothing keeps it."""
    return {
        "schema": gpu.SCHEMA,
        "command": "test",
        "environment": records.environment(),
        "device": {
            "name": "none", "capability": "0.0", "processors": 1, "memory_gib": 1.0, "cuda": None, "cudnn": None,
            "packages": {"triton": None}, "environment": {}, "nvidia_smi": {},
        },
        "tests": {"passed": 3, "failed": 0, "skipped": 0, "optional": {"xformers is not installed": 1}, "seconds": 1.0},
        "sanitizer": [{"tool": "memcheck", "clean": True, "says": "ERROR SUMMARY: 0 errors"}],
        "operations": gpu_operations.measure(CPU, torch.float32, runs=3, small=True),
        "trajectories": gpu_trajectories.measure(tiny, 1, CPU, torch.float32, rounds=2, arms=("eager", "accelerate")),
        "sampling": sampled,
        "backends": {},
        "seconds": 1.0,
    }  # fmt: skip


def test_a_gpu_record_follows_the_schema_and_is_drawn_and_printed(record, tmp_path, capsys):
    records.write(record, tmp_path / "gpu.json")
    kernel_figure.draw_times(record, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    gpu.print_report(record)
    printed = capsys.readouterr().out
    assert "accelerate" in printed and "needs CUDA tensors" in printed and "memcheck: clean" in printed


@pytest.mark.parametrize(
    "change",
    [
        ("tests", "failed", 1),
        ("tests", "skipped", 1),
        ("tests", "passed", 0),
        ("sanitizer", 0, "clean", False),
        ("operations", "rows", 0, "why_not", "wrong: error 1, allowed 0.1"),
        ("trajectories", 0, "agrees", False),
        ("sampling", 1, "runs", None),
    ],
    ids=lambda change: ".".join(map(str, change[:-1])),
)
def test_whatever_is_wrong_fails_the_gpu_run(record, change):
    assert gpu.passed(record)
    broken = json.loads(json.dumps(record))
    *path, last, value = change
    holder = broken
    for key in path:
        holder = holder[key]
    holder[last] = value
    assert not gpu.passed(broken)
