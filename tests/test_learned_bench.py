"""The benchmark of learned priors: its arms are commands that can be run, its record and table follow the schema."""

from __future__ import annotations

from dataclasses import fields

import pytest

from benchmarks import learned, records
from benchmarks.metrics import Estimate
from tdpm_ext.cli import build_parser
from tdpm_ext.training.options import Options

MEASURES = ("fd", "kd", "precision", "recall", "density", "coverage")


@pytest.mark.parametrize("name", learned.ARMS)
def test_every_arm_is_a_command_of_options_that_fit(name):
    args = learned.parse(["train", "--only", name])
    phases = [build_parser().parse_args(words) for words in learned.train_commands(name, args)]
    for parsed in phases:
        options = Options(**{field.name: getattr(parsed, field.name) for field in fields(Options)})
        assert options.kind in name or options.kind == "shared"
    assert [parsed.start for parsed in phases] == [None, *(parsed.out for parsed in phases[:-1])]
    assert phases[-1].out == learned.phase_folder(args, name) and phases[-1].checkpoint.exists()


def arm(fd: float) -> dict:
    found = {key: records.estimate(Estimate(fd if key == "fd" else 0.8, 0.1)) for key in MEASURES}
    row = {"objective": "quality", "budget": 2, "nfe": 1, "prior_nfe": 1, "sigmas": [0.2, 0.0], "rmse": 0.1}
    facts = {"kind": "shared", "bytes": 1, "steps": 1, "minutes": 1.0, "pictures": 5000, "added_parameters": 0}
    return {
        "arm": "shared",
        "flags": "",
        **facts,
        "added_share": 0.0,
        "call_share": 1.0,
        "rows": [{**row, "measures": found}],
    }


def test_the_table_sets_an_arm_beside_what_it_has_to_beat():
    own, others = learned.known()
    assert {(row["arm"], row["budget"]) for row in others} >= {("tdpm:quality", 3), ("rival:fd", 8)}
    text = learned.table([arm(1.25)], own, others)
    closed = next(row["fd"] for row in others if (row["arm"], row["budget"]) == ("tdpm:quality", 3))
    assert f"| closed form |  | quality | 3 | {closed:.2f} |" in text
    assert "| shared | 0.0% | quality | 2 | 1.25 ± 0.10 |" in text


def test_a_record_follows_the_schema():
    own, others = learned.known()
    record = {"schema": "tdpm-learned/1", "command": "", "environment": records.environment("cpu"), "checkpoint": "x"}
    record |= {"judge": "FD", "blocks": 3, "per_block": 2000, "reference": 256, "own60": own, "compared": others}
    assert records.problems({**record, "arms": [arm(1.0)]}) == []
    assert records.problems({**record, "arms": [{**arm(1.0), "rows": [{}]}]})
