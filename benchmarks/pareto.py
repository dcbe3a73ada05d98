"""Quality against evaluations and against milliseconds: every sampler at its best settings, tdpm at every prior.

    python benchmarks/pareto.py fashion-mnist                   # the shipped checkpoint
    python benchmarks/pareto.py emoji
    python benchmarks/pareto.py digits --ideal                  # the exact denoiser of the fit half, no network
    python benchmarks/pareto.py fashion-mnist --figures         # draw the figures of the committed record again

Rivals get their best settings at each count by a search on seeds that are not judged (``search.py``); the leaders are
then drawn from the same seeds as tdpm and judged over disjoint blocks of seeds. tdpm's priors are fitted and
calibrated on the fit half, judged on the evaluation half with features that calibration never saw. Everything
finished is kept in WORK, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# not this script's own folder, whose modules would hide installed packages of their names
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE] + [str(ROOT)]

import tdpm_ext as tdpm  # noqa: E402
from benchmarks import diffusers_rivals, figures, frontier, judging, metrics, records, timing  # noqa: E402
from benchmarks.contest import JUDGED_SEED, SEARCH_SEED, Contest, Lines, kept_as  # noqa: E402
from benchmarks.drawing import TDPM, Drawer, Request  # noqa: E402
from benchmarks.samplers import SAMPLERS  # noqa: E402
from benchmarks.search import Search  # noqa: E402
from tdpm_ext.grid import picture_grid, save_png  # noqa: E402
from tdpm_ext.kernels import accelerate  # noqa: E402
from tdpm_ext.pictures import load_pictures, to_uint8, to_unit  # noqa: E402

SCHEMA = "tdpm-frontier/1"
BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20)
PRIORS = ("mixture", "gaussian", "lowrank")
FAR = 10  # evaluations beyond which --leaders applies
TIMED = 16  # pictures per timed call
COLUMNS = 12  # seeds in the grid of pictures


def search_rivals(bench: Contest) -> tuple[list[dict], Search]:
    """Rows of the best settings per sampler, budget and target."""
    few, more = bench.args.search_samples
    seeds = range(SEARCH_SEED, SEARCH_SEED + more)
    reference = bench.pictures(Request.rival("dpmpp_2m", 60), f"search-reference-{more}", seeds)[0]

    def score(x: torch.Tensor) -> dict[str, float]:
        return {"fd": bench.judge.fd(x), "rmse": metrics.paired_rmse(x, reference[: len(x)])}

    names = bench.args.samplers or list(SAMPLERS)
    path = bench.work / f"search-{bench.judge.name}.jsonl"
    search = Search(bench.drawer, score, seeds, few, more, path, bench.args.batch)
    steps = {SAMPLERS[n].steps_within(b) for n in names for b in bench.args.budgets} - {0}
    levels = bench.levels(seeds[:24], steps)
    near = [b for b in bench.args.budgets if b <= FAR or not bench.args.leaders]
    rows = search.run(names, near, levels)
    if far := sorted(set(bench.args.budgets) - set(near)):
        rows += search.run(leading(rows, bench.args.leaders) if near else names, far, levels)
    return rows, search


def leading(rows: list[dict], count: int) -> list[str]:
    """The ``count`` samplers with the lowest distance at the largest budget of ``rows``."""
    last = max(row["budget"] for row in rows)
    return [r["sampler"] for r in finalists([r for r in rows if r["budget"] == last], count) if r["target"] == "fd"]


def finalists(rows: list[dict], count: int) -> list[dict]:
    """Of each budget the ``count`` samplers with the lowest distance in the search and the one with the lowest rmse."""
    out = []
    for budget in sorted({r["budget"] for r in rows}):
        for target, most in (("fd", count), ("rmse", 1)):
            own = [r for r in rows if r["budget"] == budget and r["target"] == target]
            out += sorted(own, key=lambda r: r["scores"][target])[: most or len(own)]
    return out


def measure_points(bench: Contest, rows: list[dict]) -> list[dict]:
    """The finalists among the rivals, then tdpm with every prior and both objectives, then straw men if wanted."""
    points = []
    for row in finalists(rows, bench.args.finalists):
        request, family = Request.from_json(row["request"]), SAMPLERS[row["sampler"]].library
        arm = f"{row['sampler']} {row['budget']} for {row['target']}"
        points.append(bench.point(arm, family, row["target"], request))
    for kind in bench.args.priors:
        for budget in bench.args.budgets:
            for objective in ("quality", "fidelity") if kind == bench.args.priors[0] else ("quality",):
                request = Request(TDPM, budget, objective, kind)
                arm = f"tdpm {kind} {objective} {budget}"
                points.append(bench.point(arm, "tdpm", objective, request))
    for name in diffusers_rivals.STRAW_MEN if bench.args.straw_men else ():
        points.append(bench.point(name, "straw man", None, Request.rival(name, 1)))
    return points


def same_seed_grid(bench: Contest, points: list[dict]):
    """A sheet of the first judged seeds: data of the same classes, the long run, the best arms of either side."""
    seeds, real = bench.seeds[:COLUMNS], bench.judge.real
    classes = bench.drawer.classes(seeds)
    shown = judging.spread(len(real), COLUMNS)
    if classes is not None:  # of each seed's class a picture of its own
        own = {int(c): iter(torch.nonzero(real.labels == c).flatten().tolist()) for c in classes.unique()}
        shown = [next(own[int(c)]) for c in classes]
    rows = [("data", real.images[shown])]
    rows.append(("60 evaluations", to_uint8(bench.own[:COLUMNS])))
    for budget in (b for b in (3, 4, 6, 8) if b in bench.args.budgets):
        for side in ((frontier.OURS,), frontier.RIVALS):
            point = frontier.best_within([p for p in points if p["family"] in side and p["nfe"] == budget], budget)
            if point is not None:
                x = bench.pictures(Request.from_json(point["request"]), kept_as(point["arm"]))[0][:COLUMNS]
                name = "tdpm" if side == (frontier.OURS,) else point["request"]["sampler"]
                rows.append((f"{name}, {budget}", to_uint8(x)))
    return picture_grid([list(pictures) for _, pictures in rows], [label for label, _ in rows])


def second_opinion(bench: Contest, rows: list[dict], points: list[dict], features: str) -> dict:
    """The points of the verdict under another feature network; adds ``second`` to each row, returns name and floor."""
    net, name = judging.load_net(features)
    judge, kept = replace(bench.judge, net=net.to(bench.drawer.device), name=name), Lines(bench.work / "second.jsonl")

    def fd(arm: str) -> metrics.Estimate:
        request = Request.from_json(next(p for p in points if p["arm"] == arm)["request"])
        key = json.dumps([name, arm, bench.args.blocks, bench.args.samples, bench.identity(request)], sort_keys=True)

        def measure() -> dict:
            features = judge.features(bench.pictures(request, kept_as(arm))[0])
            return records.estimate(judge.over_blocks(features, bench.args.blocks)["fd"])

        return frontier.estimate({"measures": {"fd": kept.get(key, measure)}})

    for row in rows:
        ours, rival = fd(row["ours"]), fd(row["rival"])
        outcome = frontier.OUTCOMES[metrics.compare(ours, rival)]
        row["second"] = {"ours_fd": records.estimate(ours), "rival_fd": records.estimate(rival), "outcome": outcome}
    return {"judge": name, "floor": records.estimate(judge.floor(bench.args.samples))}


def time_points(bench: Contest, points: Iterable[dict], rounds: int) -> None:
    """Milliseconds per picture of every point, taking turns; medians."""
    seeds, calls = range(TIMED), {}
    for point in points:
        request = Request.from_json(point["request"])
        drawer = bench.drawer_for(request)
        calls[point["arm"]] = lambda d=drawer, r=request: d.draw(r, seeds)
    times = timing.interleave(calls, timing.Clock(bench.drawer.device), rounds, 1, "milliseconds")
    for point in points:
        point["ms_per_picture"] = timing.summary(times[point["arm"]])["p50_ms"] / TIMED


def prepare(bench: Contest, until: str) -> None:
    """The part of ``run`` that is kept in the work folder: for one of several processes, or for later."""
    if until == "priors":
        print(f"{bench.name}: priors in {', '.join(map(records.shown, bench.prior_files.values()))}")
        return
    points = measure_points(bench, search_rivals(bench)[0])
    print(f"{bench.name}: {len(points)} points at {bench.args.budgets} in {records.shown(bench.work)}")


def run(bench: Contest) -> dict:
    """Search, draw, judge, time, decide."""
    start = time.time()
    rows, search = search_rivals(bench)
    reference = bench.point("own-60", "reference", None, Request.rival("dpmpp_2m", 60))
    points = measure_points(bench, rows)
    if bench.args.rounds:
        time_points(bench, [p for p in points if p["family"] != "straw man"], bench.args.rounds)
    verdict = frontier.verdict(points, bench.args.budgets)
    second = second_opinion(bench, verdict, points, bench.args.second) if bench.args.second else None
    middle = next(p for p in points if p["target"] == "quality" and p["nfe"] == min(4, max(bench.args.budgets)))
    x = bench.pictures(Request.from_json(middle["request"]), kept_as(middle["arm"]))[0]
    save_png(same_seed_grid(bench, points), bench.args.out.with_name(f"{bench.args.out.stem}-grid.png"))
    return {
        "schema": SCHEMA, "name": bench.name, "checkpoint": bench.fingerprint, "judge": bench.judge.name,
        "blocks": bench.args.blocks, "per_block": bench.args.samples, "first_seed": JUDGED_SEED,
        "floor": records.estimate(bench.judge.floor(bench.args.samples)), "reference": reference, "points": points,
        "search": {"tried": search.tried, "samples": list(bench.args.search_samples),
                   "budgets": list(bench.args.budgets), "best": rows},
        "verdict": verdict, "second": second,
        "priors": {kind: {"kind": prior.kind, **prior.card} for kind, prior in bench.priors.items()},
        "memorisation": bench.judge.memorisation(x[:2000])._asdict(),
        "command": records.command("pareto.py", bench.args.given),
        "environment": records.environment(bench.drawer.device), "seconds": round(time.time() - start, 1),
    }  # fmt: skip


def build(args: argparse.Namespace) -> Contest:
    assets, device = ROOT / "assets" / args.name, torch.device(args.device)
    if args.data:
        net, name = judging.load_net(args.features or "efflite")
        judge = judging.Judge(net, name, load_pictures(args.judge), load_pictures(args.data))
    else:
        judge = judging.Judge.for_set(args.name, args.features)
    if args.ideal:
        model, classes, fingerprint = tdpm.IdealDenoiser(to_unit(judge.fit.images)).to(device), 0, "ideal"
    else:
        opened = tdpm.open_checkpoint(args.checkpoint or assets / "denoiser.safetensors", args.device)
        model, classes, fingerprint = opened.model, opened.num_classes, opened.fingerprint
        if args.accelerate != "off":
            accelerate(model, precision=args.accelerate)  # equal to rounding, and the same for every sampler
    labels = judge.real.labels if classes else None
    judge.net.to(device)
    drawer = Drawer(model, tuple(judge.real.images.shape[1:]), classes, labels, None, device)
    work = args.work or ROOT / "out" / "pareto" / args.slug
    work.mkdir(parents=True, exist_ok=True)
    return Contest(args.name, judge, drawer, fingerprint, args, work)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("name", help="a folder of assets/ (fashion-mnist, emoji, digits), or any name with --data and --judge")
    add("--checkpoint", type=Path, help="default: the set's own")
    add("--ideal", action="store_true", help="use the ideal denoiser of the fit half, no network")
    add("--data", type=Path, help="pictures to fit on, of a set that is not in assets/")
    add("--judge", type=Path, help="pictures to judge against, for --data")
    add("--features", help="feature network, or efflite (default: the set's own, else efflite)")
    add("--second", help="another feature network, for the verdict's points (a file, or efflite)")
    add("--budgets", type=int, nargs="+", default=list(BUDGETS))
    add("--priors", nargs="+", default=list(PRIORS), help="closed-form kinds; the first also for fidelity")
    add("--rank", type=int, help="principal axes of the mixture and lowrank priors (default: theirs)")
    add("--samples", type=int, default=2000, help="pictures per block of seeds (default 2000)")
    add("--blocks", type=int, default=3)
    add("--samplers", nargs="+", choices=sorted(SAMPLERS), help="rivals (default: all)")
    add("--finalists", type=int, default=4, help="rivals judged in full at each budget (default 4; 0: all)")
    add("--leaders", type=int, default=0, help=f"beyond {FAR} evaluations tune only so many, the best up to there")
    add("--search-samples", type=int, nargs=2, default=(64, 256), metavar=("FEW", "MORE"))
    add("--calibration-samples", type=int, nargs=2, metavar=("FIDELITY", "QUALITY"))
    add("--straw-men", action="store_true", help="also the 250-step DDIM and the 1000-step DDPM: hours")
    add("--rounds", type=int, default=5, help="timed rounds (default 5; 0: no milliseconds)")
    add("--batch", type=int, default=64)
    add("--device", default="cpu")
    add("--accelerate", choices=("off", "exact", "compile"), default="exact", help="compile: faster on a CPU")
    add("--work", type=Path, help="where finished pieces are kept (default out/pareto/NAME)")
    add("--out", type=Path, help="the record (default benchmarks/results/frontier-NAME.json)")
    add(
        "--until",
        choices=("priors", "points"),
        help="stop when these are in WORK (points: of --budgets); several "
        "processes with a budget each can share WORK, and the run without --until finds all that they did",
    )
    add("--wait", action="store_true", help="wait for priors that another process makes, instead of making them")
    add("--figures", action="store_true", help="only draw the figures of the record again")
    args = p.parse_args(argv)
    args.given = argv
    args.slug = f"{args.name}-{'ideal' if args.ideal else 'checkpoint'}"
    args.out = args.out or records.RESULTS / f"frontier-{args.slug}.json"
    if bool(args.data) != bool(args.judge):
        p.error("--data and --judge belong together")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.until:
            prepare(build(args), args.until)
            return 0
        record = records.read(args.out) if args.figures else run(build(args))
        if not args.figures:
            records.write(record, args.out)
        print(frontier.show(record))
        for path in figures.draw(record, args.out.with_suffix("")):
            print(f"wrote {records.shown(path)}")
    except (OSError, ValueError, ImportError) as error:
        print(f"pareto: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
