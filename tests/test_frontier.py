"""The arithmetic of frontiers, and the whole way from a small search to figures."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("k_diffusion", exc_type=ImportError)
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from benchmarks import contest, figures, frontier, metrics, pareto, records, search  # noqa: E402
from benchmarks.drawing import Drawer, Request  # noqa: E402


def point(family, nfe, fd, sd=0.1, arm=None):
    return {"arm": arm or f"{family} {nfe}", "family": family, "nfe": nfe, "measures": {"fd": {"mean": fd, "sd": sd}}}


def curve(*pairs):
    return [(n, metrics.Estimate(v, 0.1)) for n, v in pairs]


def test_evaluations_are_interpolated_in_the_logarithm_of_the_distance():
    falling = curve((2, 16.0), (4, 4.0), (8, 1.0))
    assert frontier.evaluations_for(falling, 8.0) == pytest.approx(3.0)
    assert frontier.evaluations_for(falling, 2.0) == pytest.approx(6.0)
    assert frontier.evaluations_for(falling, 100.0) == 2
    assert frontier.evaluations_for(falling, 0.9) is None
    assert frontier.evaluations_for([], 1.0) is None


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 100)), min_size=1, max_size=8))
def test_a_frontier_falls_and_reaches_each_of_its_own_distances(pairs):
    found = frontier.frontier([point("tdpm", n, v) for n, v in pairs])
    values = [v.value for _, v in found]
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
    assert values[-1] == min(v for _, v in pairs)
    for n, value in found:
        assert frontier.evaluations_for(found, value.value) == pytest.approx(n, abs=1e-6)


def test_the_verdict_knows_ahead_tie_and_behind_and_what_is_saved():
    ours = [point("tdpm", 2, 4.0), point("tdpm", 4, 2.0), point("tdpm", 6, 2.0)]
    rivals = [point("diffusers", 3, 9.0), point("k-diffusion", 4, 2.1), point("k-diffusion", 6, 1.0)]
    straw = [point("straw man", 5, 0.01), point("reference", 5, 0.01)]
    rows = {r["budget"]: r for r in frontier.verdict(ours + rivals + straw, (1, 3, 4, 6))}
    assert sorted(rows) == [3, 4, 6]  # nobody has a point at one evaluation
    assert [rows[b]["outcome"] for b in (3, 4, 6)] == ["ahead", "tie", "behind"]
    assert [rows[b]["on_frontier"] for b in (3, 4, 6)] == [True, True, False]
    assert rows[3]["saved"] == pytest.approx(3 / 2) and rows[6]["saved"] is None
    assert rows[4]["saved"] == pytest.approx(4 / (2 + 2 * math.log(4 / 2.1) / math.log(2)))


def test_the_envelope_of_the_rivals_never_rises_and_ends_at_the_dearest():
    assert figures.lower_envelope([(4, 2.0, 0), (2, 5.0, 0), (8, 3.0, 0)]) == [(2, 5.0, 0), (4, 2.0, 0), (8, 2.0, 0)]


def denoiser(x, sigma):
    sigma = sigma.reshape(-1, 1, 1, 1)
    return (x * 0.25 + 0.25 * sigma**2) / (0.25 + sigma**2)


def test_a_search_resumes_and_takes_the_best_of_what_it_tried(tmp_path):
    end = Drawer(denoiser, (1, 3, 3)).draw(Request.rival("dpmpp_2m", 60), range(16)).x

    def score(x):
        return {"rmse": metrics.paired_rmse(x, end[: len(x)]), "fd": float((x.std() - 0.5).abs())}

    def made():
        return search.Search(Drawer(denoiser, (1, 3, 3)), score, range(16), 4, 16, tmp_path / "s.jsonl")

    first = made()
    chosen = search.gits_for(first.drawer, range(4), (3, 4))
    rows = first.run(["euler", "lms", "diffusers:unipc"], (3, 4), chosen)
    assert len(rows) == 3 * 2 * 2 and all(r["request"]["budget"] == r["budget"] for r in rows)
    grids = {g for line in (tmp_path / "s.jsonl").read_text().splitlines() for g in [json.loads(line)["key"]]}
    assert len(grids) == first.tried > 60
    best = next(r for r in rows if r["sampler"] == "euler" and r["budget"] == 4 and r["target"] == "rmse")
    plain = first.scores(Request.rival("euler", 4), 16)
    assert best["scores"]["rmse"] < 0.8 * plain["rmse"]  # tuning does something
    with (tmp_path / "s.jsonl").open("a") as file:
        file.write('{"key": "cut sh')
    again = made()
    again.score = None  # nothing is drawn or scored a second time
    assert again.run(["euler", "lms", "diffusers:unipc"], (3, 4), chosen) == rows


def test_a_sampler_out_of_reach_is_not_refined_but_still_listed(tmp_path):
    end = Drawer(denoiser, (1, 3, 3)).draw(Request.rival("dpmpp_2m", 60), range(12)).x

    def score(x):
        error = metrics.paired_rmse(x, end[: len(x)])
        return {"rmse": error, "fd": error}

    looked = search.Search(Drawer(denoiser, (1, 3, 3)), score, range(12), 4, 12, tmp_path / "s.jsonl")
    rows = {r["sampler"]: r for r in looked.run(["dpmpp_2m", "diffusers:lcm"], (8,)) if r["target"] == "fd"}
    assert rows["dpmpp_2m"]["scores"]["seeds"] == 12 and rows["diffusers:lcm"]["scores"]["seeds"] == 4
    assert rows["diffusers:lcm"]["scores"]["fd"] > search.HOPELESS * rows["dpmpp_2m"]["scores"]["fd"]
    tried = [json.loads(json.loads(line)["key"])[0] for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert tried.count("diffusers:lcm") == len(search.samplers.SIGMA_MAXES) < tried.count("dpmpp_2m")


def test_pictures_that_are_not_finite_cannot_win(tmp_path):
    def breaks(x, sigma):
        return denoiser(x, sigma) / (sigma.max() < 30)

    looked = search.Search(Drawer(breaks, (1, 3, 3)), lambda x: {"fd": -1.0, "rmse": -1.0}, range(8), 4, 8,
                           tmp_path / "s.jsonl")  # fmt: skip
    rows = looked.run(["euler"], (3,))
    assert rows and all(r["request"]["sigmas"][0] < 30 for r in rows)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small run on real digits with their ideal denoiser."""
    out = tmp_path_factory.mktemp("pareto")
    words = ["digits", "--ideal", "--budgets", 3, 4, "--priors", "gaussian", "--samples", 24, "--blocks", 3]
    words += ["--samplers", "dpmpp_2m", "diffusers:ddim", "--finalists", 2, "--search-samples", 6, 12]
    words += [
        "--calibration-samples",
        6,
        70,
        "--second",
        pareto.ROOT / "assets/digits/features.safetensors",
        "--rounds",
        1,
        "--work",
        out / "work",
        "--out",
        out / "frontier.json",
    ]
    assert pareto.main([str(w) for w in words]) == 0
    return out, [str(w) for w in words]


def test_a_small_run_gives_a_valid_record_with_all_arms(small):
    record = records.read(small[0] / "frontier.json")
    arms = {(p["family"], p["target"], p["nfe"]) for p in record["points"]}
    assert {("tdpm", o, b) for o in ("quality", "fidelity") for b in (3, 4)} <= arms
    assert {("k-diffusion", "fd", 3), ("k-diffusion", "fd", 4)} & arms
    assert [r["budget"] for r in record["verdict"]] == [3, 4]
    assert record["floor"]["mean"] > 0 and record["reference"]["nfe"] == 60
    assert all(p["ms_per_picture"] > 0 and p["nfe"] <= p["request"]["budget"] for p in record["points"])
    searched = {r["sampler"] for r in record["search"]["best"]}
    assert searched == {"dpmpp_2m", "diffusers:ddim"}
    assert record["memorisation"]["ratio"] > 0
    assert record["second"]["judge"] == record["judge"]  # the same network twice: the same opinion
    for row in record["verdict"]:
        assert row["second"]["ours_fd"] == row["ours_fd"] and row["second"]["outcome"] == row["outcome"]


def test_beyond_far_only_the_samplers_that_lead_before_are_tuned(small, monkeypatch, tmp_path):
    monkeypatch.setattr(pareto, "FAR", 3)
    words = small[1]
    assert pareto.main([*words[:-1], str(tmp_path / "frontier.json"), "--leaders", "1"]) == 0
    searched = {b: set() for b in (3, 4)}
    for row in (rows := records.read(tmp_path / "frontier.json")["search"]["best"]):
        searched[row["budget"]].add(row["sampler"])
    first = min((r for r in rows if r["budget"] == 3 and r["target"] == "fd"), key=lambda r: r["scores"]["fd"])
    assert len(searched[3]) == 2 and searched[4] == {first["sampler"]}


def test_a_second_run_draws_nothing_again_and_figures_come_from_the_record_alone(small, monkeypatch):
    out, words = small
    first = records.read(out / "frontier.json")
    monkeypatch.setattr(Drawer, "draw", None)
    monkeypatch.setattr(pareto.judging.Judge, "over_blocks", None)  # nor is anything judged again, by either judge
    assert (
        pareto.main(
            [
                *words[: words.index("--rounds")],
                "--rounds",
                "0",
                "--work",
                str(out / "work"),
                "--out",
                str(out / "b.json"),
            ]
        )
        == 0
    )
    second = records.read(out / "b.json")
    for one, two in zip(first["points"], second["points"], strict=True):
        assert one["measures"] == two["measures"] and one["paired"] == two["paired"]
    before = (out / "frontier-evaluations.svg").read_bytes()
    assert pareto.main(["digits", "--ideal", "--figures", "--out", str(out / "frontier.json")]) == 0
    assert (out / "frontier-evaluations.svg").read_bytes() == before


def test_every_line_of_a_figure_is_labelled_and_told_apart_without_colour(small):
    import matplotlib

    matplotlib.use("Agg")
    record = records.read(small[0] / "frontier.json")
    lines = figures.series(record, "nfe")
    looks = [(s.get("linestyle", "-"), s.get("marker"), s["linewidth"]) for s in map(figures._style, lines, range(9))]
    assert len(set(looks)) == len(looks) >= 4
    for name in ("evaluations", "milliseconds"):
        assert (small[0] / f"frontier-{name}.png").stat().st_size > 10_000
        assert (small[0] / f"frontier-{name}.svg").read_text().startswith("<?xml")
    assert torch.tensor([len(line["points"]) for line in lines]).min() >= 1


def test_a_verdict_says_plainly_where_a_rival_is_better():
    rows = [{"budget": b, "on_frontier": b != 5} for b in (2, 3, 5, 8, 20)]
    assert frontier.standing(rows).startswith("tdpm is NOT on the frontier at 5 evaluations (of 3, 5, 8)")
    assert "within one standard deviation, at 3, 8" in frontier.standing([r for r in rows if r["budget"] != 5])
    assert "No budget" in frontier.standing(rows[:1])


def test_a_process_waits_for_a_prior_that_another_one_makes(tmp_path, monkeypatch):
    words = ["digits", "--ideal", "--priors", "gaussian", "--wait", "--work", str(tmp_path)]
    waiting = pareto.build(pareto.parse(words))
    monkeypatch.setattr(contest.time, "sleep", lambda _: (tmp_path / "prior-gaussian.safetensors").write_bytes(b"x"))
    assert waiting.prior_files == {"gaussian": tmp_path / "prior-gaussian.safetensors"}
    (tmp_path / "prior-gaussian.safetensors").unlink()
    monkeypatch.setattr(contest, "WAIT", -1)
    with pytest.raises(FileNotFoundError, match="--until priors"):
        del waiting.prior_files
        waiting.prior_files  # noqa: B018


def test_processes_with_a_budget_each_leave_nothing_to_draw_for_the_last_one(small, tmp_path, monkeypatch):
    words = [*small[1][: small[1].index("--rounds")], "--rounds", "0", "--work", str(tmp_path / "work")]
    at = words.index("--budgets") + 1
    del words[at : at + 2]
    assert pareto.main([*words[:at], "4", *words[at:], "--until", "priors"]) == 0
    for budget in "34":
        assert pareto.main([*words[:at], budget, *words[at:], "--until", "points"]) == 0
    with (tmp_path / "work" / "points.jsonl").open("a") as file:
        file.write('["cut sh')
    monkeypatch.setattr(Drawer, "draw", None)
    assert pareto.main([*words[:at], "3", "4", *words[at:], "--out", str(tmp_path / "all.json")]) == 0
    record = records.read(tmp_path / "all.json")
    assert [r["budget"] for r in record["verdict"]] == [3, 4]
