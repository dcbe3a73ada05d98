"""The studies of cuts and of codes: levels are the named ones, every evaluation counts, a second run draws nothing."""

import math

import pytest
import torch

import tdpm_ext as tdpm
from benchmarks import autoencoder, judging, records, truncation
from benchmarks.autoencoder import farthest
from tdpm_ext.schedule import karras

CUTS = ["0.33883", "1.0"]


def test_a_budget_is_spent_whole_and_the_prior_pays_from_it():
    for prior_nfe in (0, 1):
        level = truncation.levels(0.5, "budget", 3, prior_nfe)
        assert len(level.sigmas) - 1 == 3 - prior_nfe
        assert level.sigmas[0] == pytest.approx(0.5) and level.sigmas[-1] == 0


def test_a_cut_leaves_the_lower_part_of_one_schedule():
    whole = karras(truncation.LONG, truncation.SIGMA_MAX, truncation.SIGMA_MIN).tolist()
    counts = []
    for sigma in (20.0, 2.5, 0.33883, 0.02645):
        level = truncation.levels(sigma, "cut", 3, 1).sigmas
        assert level[0] == sigma
        assert list(level[1:]) == pytest.approx([s for s in whole if s < sigma])
        counts.append(len(level) - 1)
    assert counts == sorted(counts, reverse=True) and counts[-1] <= 2


def test_the_papers_cuts_are_marked_at_their_noise_levels():
    args = truncation.parse([])
    assert args.sigmas[:3] == pytest.approx([0.02645, 0.17277, 0.33883], rel=1e-3)


def test_priors_are_kinds_or_files_and_a_budget_leaves_room_for_a_learned_one(capsys):
    assert truncation.parse([]).priors[:2] == ["gaussian", "mixture"]
    with pytest.raises(SystemExit):
        truncation.parse(["--budget", "1"])
    assert "give 2 or more" in capsys.readouterr().err


@pytest.fixture(scope="module")
def few():
    """The shipped judge with a few of its pictures: what it would say of all is its own test's business."""
    judge = judging.Judge.for_set("fashion-mnist", cache=None)
    some = judging.spread(5000, 200)
    return judging.Judge(judge.net, judge.name, judge.real.take(some), judge.fit.take(some), None)


@pytest.fixture(scope="module")
def small(tmp_path_factory, few):
    folder = tmp_path_factory.mktemp("truncation")
    words = ["--priors", "gaussian", "mixture", "--sigmas", *CUTS, "--samples", "6", "--blocks", "1", "--batch", "6"]
    words += ["--device", "cpu", "--work", str(folder / "work"), "--out", str(folder / "truncation.json")]
    # the untruncated run is the dear part, and nothing here depends on its 60 evaluations
    with pytest.MonkeyPatch.context() as patch:
        rival = truncation.Request.rival
        patch.setattr(truncation.Request, "rival", lambda name, budget: rival(name, 4))
        patch.setattr(judging.Judge, "for_set", lambda name: few)
        assert truncation.main(words) == 0
        yield folder, words


def test_a_small_study_has_every_point_and_a_figure(small):
    folder, _ = small
    record = records.read(folder / "truncation.json")
    points = {(p["prior"], p["schedule"], round(p["sigma_trunc"], 5)): p for p in record["points"]}
    assert set(points) == {(k, s, float(c)) for k in ("gaussian", "mixture") for s in ("budget", "cut") for c in CUTS}
    for (_, schedule, sigma), point in points.items():
        expected = truncation.levels(sigma, schedule, 3, 0)
        assert point["nfe"] == len(expected.sigmas) - 1 and math.isfinite(point["measures"]["fd"]["mean"])
    assert [mark["step"] for mark in record["marks"]] == [4, 49, 99]
    assert (folder / "truncation.png").stat().st_size > 10_000
    assert (folder / "truncation.svg").read_text().startswith("<?xml")


def test_a_second_run_draws_nothing_again(small, monkeypatch):
    folder, words = small
    before = records.read(folder / "truncation.json")
    monkeypatch.setattr(truncation, "solve", None)
    assert truncation.main(words) == 0
    assert records.read(folder / "truncation.json")["points"] == before["points"]


def test_a_learned_prior_pays_its_call_from_the_budget(small):
    folder, words = small
    opened = tdpm.open_checkpoint(truncation.ROOT / "assets/fashion-mnist/denoiser.safetensors")
    source = tdpm.get_prior("source")(opened.shape, 0.3, 0.7)
    study = truncation.build(truncation.parse(words))
    study.priors, study.digests = {"source": source.bind(study.drawer.model)}, {"source": "none"}
    points = study.points("source")
    assert {p["prior_nfe"] for p in points} == {1}
    assert [p["nfe"] for p in points if p["schedule"] == "budget"] == [3]  # the other cut is above its reach


def test_codes_lose_more_the_noisier_they_are(tmp_path, monkeypatch):
    out = tmp_path / "autoencoder.json"
    monkeypatch.setattr(autoencoder, "PAIRS", (8,))
    words = ["--samples", "10", "--blocks", "2", "--batch", "20", "--sigmas", "0.1", "2", "--device", "cpu"]
    assert autoencoder.main([*words, "--work", str(tmp_path), "--out", str(out)]) == 0
    record = records.read(out)
    errors = {(p["sigma_trunc"], p["steps"]): p["rmse"]["mean"] for p in record["points"]}
    assert len(errors) == 2 * len(autoencoder.STEPS)
    for steps in autoencoder.STEPS:
        assert errors[0.1, steps] < 0.1 < errors[2, steps] < record["apart"]["mean"]
    for name in ("autoencoder", "autoencoder-interpolation"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_the_farthest_pair_is_found():
    points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
    assert {tuple(x.tolist()) for x in farthest(points)} == {(3.0, 0.0), (-2.0, 0.0)}
