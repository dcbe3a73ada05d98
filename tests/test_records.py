"""Results follow one schema: what is committed does, and nothing else is written or read."""

import copy
import json
import sys
from importlib import metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from benchmarks import records

COMMITTED = sorted(records.RESULTS.glob("*.json"))


def test_the_schema_is_a_json_schema():
    Draft202012Validator.check_schema(records.SCHEMA)
    for kind, content in records.SCHEMA["$defs"]["kinds"].items():
        assert kind.startswith("tdpm-") and kind[-1].isdigit()
        assert content["description"] and "schema" in content["required"]


def test_there_are_committed_results():
    assert len(COMMITTED) >= 5


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_every_committed_result_follows_the_schema_and_comes_back_as_written(path, tmp_path):
    record = records.read(path)
    assert records.read(records.write(record, tmp_path / path.name)) == record


def places(value, path=()):
    """The path of every field, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path + (key,) for key, _ in items] + [p for key, item in items for p in places(item, path + (key,))]


SAMPLE = records.read(records.RESULTS / "quality-digits-ideal.json")
FIELDS = [p for p in places(SAMPLE) if isinstance(p[-1], str) and not p[-1].isdecimal() and p[0] != "prior"]
# what only some rows or some machines have
OPTIONAL = {"sampler", "sigma_max", "rho", "steps", "sigma_trunc", "sigmas", "name", "changed"}
REQUIRED = [p for p in FIELDS if p[-1] not in OPTIONAL or p == ("name",)]


@given(place=st.sampled_from(FIELDS), change=st.sampled_from(["list", "nan", "extra"]))
def test_any_field_mistyped_or_unknown_is_named(place, change):
    record = copy.deepcopy(SAMPLE)
    holder = record
    for key in place[:-1]:
        holder = holder[key]
    name = place[-1] if change != "extra" else "surprise"
    holder[name] = {"list": [[]], "nan": float("nan"), "extra": 1}[change]
    with pytest.raises(ValueError, match=name):
        records.check(record, "it")


@given(place=st.sampled_from(REQUIRED))
def test_any_required_field_that_is_missing_is_named(place):
    record = copy.deepcopy(SAMPLE)
    holder = record
    for key in place[:-1]:
        holder = holder[key]
    del holder[place[-1]]
    with pytest.raises(ValueError, match=place[-1]):
        records.check(record, "it")


def test_a_wrong_record_is_not_written_and_leaves_the_old_one(tmp_path):
    path = records.write(SAMPLE, tmp_path / "a.json")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="tdpm-quality-2"):
        records.write(SAMPLE | {"schema": "tdpm-quality-2"}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_is_wrong_is_named(tmp_path):
    (tmp_path / "cut.json").write_text(json.dumps(SAMPLE)[:100])
    with pytest.raises(ValueError, match="cut.json is not JSON"):
        records.read(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list.json.*schema is None"):
        records.read(tmp_path / "list.json")


def test_no_benchmark_hides_an_installed_package():
    # `python benchmarks/x.py` puts the folder first on the path: a file named like a package would be imported for it
    installed = {name.replace("-", "_").lower() for name in metadata.packages_distributions()} | sys.stdlib_module_names
    own = {path.stem for path in (records.ROOT / "benchmarks").glob("*.py")}
    assert own & installed == set()


def test_commands_are_shown_from_the_repository(monkeypatch):
    words = ["fashion-mnist", "--out", str(records.ROOT / "out" / "a b"), "--seeds", "0-3"]
    assert records.command("fid.py", words) == "python benchmarks/fid.py fashion-mnist --out 'out/a b' --seeds 0-3"
    found = records.environment()
    assert found["device"] == "CPU" and isinstance(found["changed"], bool) and found["torch"]
