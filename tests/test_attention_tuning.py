"""Which backend the measurement of attentions promotes; that it measures anything is for a GPU to show."""

import json

import pytest
import torch

from benchmarks import attention_tuning as tuning
from tdpm_ext.kernels import attention_table

WHERE = {"name": "a card", "nvidia_smi": {"driver_version": "1.2"}}


def timing(us):
    return {"p50": us, "p90": us * 1.1, "n": 60}


def one(shape=(1, 8, 256, 77, 40), **us):
    return {"shape": list(shape), "dtype": "float16", "us": {name: timing(value) for name, value in us.items()}}


def row(*probes, backend="triton"):
    return {"head_dim": 40, "queries": "medium", "keys": "short", "masked": False, "backend": backend, "probes": probes}


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(tuning, "device_facts", lambda: WHERE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def test_a_backend_must_gain_on_every_probe():
    assert tuning.winner([one(sdpa=10, triton=8), one(sdpa=10, triton=9.5)]) == "triton"
    assert tuning.winner([one(sdpa=10, triton=5), one(sdpa=10, triton=9.8)]) is None


def test_one_that_cannot_do_a_call_does_not_win():
    assert tuning.winner([one(sdpa=10, triton=5), one(sdpa=10)]) is None


def test_the_better_of_two_wins_by_its_least_gain():
    probes = [one(sdpa=10, triton=5, xformers=8), one(sdpa=10, triton=9.6, xformers=8)]
    assert tuning.winner(probes) == "xformers"


def test_a_promoted_row_keeps_its_weakest_measurement_and_passes_the_packages_own_check(card, tmp_path):
    rows = [row(one(sdpa=10, triton=5), one((1, 8, 1024, 77, 40), sdpa=20, triton=18)), row(backend=None)]
    tuning._write(tuning.table(rows, "python x.py"), tmp_path / "table.json")
    (kept,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert kept["measured"]["shape"] == [1, 8, 1024, 77, 40] and kept["cc"] == 90
    assert attention_table.load(tmp_path / "table.json") == {(90, 40, "medium", "short", False): "triton"}


def test_rows_of_other_generations_stay(card, tmp_path):
    tuning._write(tuning.table([row(one(sdpa=10, triton=5))], "python x.py"), tmp_path / "table.json")
    older = json.loads((tmp_path / "table.json").read_text())
    older["rows"][0]["cc"] = 80
    (tmp_path / "table.json").write_text(json.dumps(older))
    both = tuning.merged(tuning.table([row(one(sdpa=10, triton=5))], "python x.py"), tmp_path / "table.json")
    assert [kept["cc"] for kept in both["rows"]] == [80, 90]


def test_every_class_of_the_table_is_probed():
    assert set(tuning.LENGTHS) == set(attention_table.LENGTHS)
    for name, lengths in tuning.LENGTHS.items():
        assert {attention_table.length_class(n) for n in lengths} == {name}


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.main([]) == 2
    assert "nothing was measured" in capsys.readouterr().err
