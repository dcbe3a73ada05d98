"""benchmarks/acceleration.py: every arm is timed, compared with eager, and written as a checked record."""

import json

import pytest

from benchmarks import acceleration, records


def test_the_shipped_checkpoint_is_measured_and_written(tmp_path, capsys):
    out = tmp_path / "accelerate.json"
    assert acceleration.main(["--batches", "1", "2", "--rounds", "2", "--quiet", "--json", str(out)]) == 0
    report = records.read(out)
    assert [(r["tier"], r["batch"]) for r in report["rows"]] == [
        ("eager", 1),
        ("exact", 1),
        ("eager", 2),
        ("exact", 2),
    ]
    for row in report["rows"]:
        assert row["error"] <= 1e-5 and row["rmse"] <= 1e-5
        assert (row["tier"] == "eager") == (row["ratio"] == 1.0 and row["error"] == 0.0)
    text = capsys.readouterr().out
    assert "x eager (median over batch sizes)" in text and str(out) in text


def test_a_record_with_an_unknown_tier_is_refused(tmp_path):
    row = {"tier": "magic", "batch": 1}
    report = {"schema": "tdpm-accelerate/1", "environment": {}, "rows": [row], "summary": []}
    with pytest.raises(ValueError, match="does not follow the schema"):
        records.write(report, tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="x.json"):
        records.read(tmp_path / "x.json")


def test_wrong_numbers_are_refused_in_words(capsys):
    with pytest.raises(SystemExit):
        acceleration.main(["--rounds", "0"])
    assert "at least 1" in capsys.readouterr().err
