"""Joint against plain training: the arms start alike, stop by one clock, resume, and are judged at what they cost."""

import re
from functools import partial

import pytest
import torch

from benchmarks import joint, judging, records
from tdpm_ext.pictures import load_pictures


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A comparison of seconds, judged by a few pictures."""
    folder = tmp_path_factory.mktemp("joint")
    judge = judging.Judge.for_set("fashion-mnist", cache=None)
    some = judging.spread(5000, 200)
    few = judging.Judge(judge.net, judge.name, judge.real.take(some), judge.fit.take(some), None)
    words = ["--minutes", "0.03", "--samples", "6", "--blocks", "1", "--searched", "2", "--batch", "8"]
    words += ["--device", "cpu", "--out", str(folder / "work"), "--json", str(folder / "joint.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "load_pictures", lambda path: load_pictures(path, limit=200))
        patch.setattr(joint, "RATES", {**joint.RATES, "batch": 8})
        patch.setattr(joint, "LONG", 6)  # nothing here depends on its 50 evaluations
        patch.setattr(judging.Judge, "for_set", lambda name: few)
        patch.setattr(joint, "tune", partial(joint.tune, rivals=("lms",), rhos=(7.0,)))
        assert joint.main(words) == 0
        yield folder, words


def test_both_arms_spend_the_same_seconds_and_every_chain_its_budget(small):
    record = records.read(small[0] / "joint.json")
    plain, ours = (record["trained"][arm] for arm in ("plain", "tdpm"))
    assert plain["steps"] > 0 and ours["steps"] > 0
    for arm in (plain, ours):  # a step is finished, not cut
        assert 1.7 <= arm["seconds"] < 5.0
    rows = {(row["name"], row["evaluations"]) for row in record["rows"]}
    assert {("plain", 6), ("plain", 5), ("tdpm", 5), ("plain, closed-form prior", 5)} <= rows
    assert all(re.search(r"sigma_max|cut at", row["chosen"]) for row in record["rows"])


def test_the_same_command_again_trains_and_draws_nothing(small, monkeypatch):
    folder, words = small
    before = records.read(folder / "joint.json")
    monkeypatch.setattr(joint, "tune", None)
    monkeypatch.setattr(joint.tdpm, "sample", None)
    assert joint.main(words) == 0
    after = records.read(folder / "joint.json")
    assert after["trained"] == before["trained"] and after["rows"] == before["rows"]


@pytest.mark.parametrize("words", [[], ["--start", str(joint.ASSETS / "denoiser.safetensors")]])
def test_both_arms_start_from_the_same_weights_which_can_be_trained(words):
    args = joint.parse(words)
    one, two = (joint.beginning(args).model for _ in range(2))
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(p.requires_grad for p in one.parameters())


def test_a_comparison_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        joint.parse(["--minutes", "0"])
    assert "give more" in capsys.readouterr().err
