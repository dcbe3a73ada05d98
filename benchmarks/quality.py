"""Quality and fidelity at equal evaluations: tdpm against k-diffusion's best tuned sampler, on one denoiser.

    python benchmarks/quality.py fashion-mnist            # the shipped checkpoint, class-conditional
    python benchmarks/quality.py fashion-mnist --ideal    # the exact denoiser of the fit half, no network
    python benchmarks/quality.py digits --ideal           # a set that nothing was tuned on
    python benchmarks/quality.py my --data FIT --judge EVAL --features FILE|efflite --checkpoint FILE|--ideal

The prior is fitted and calibrated on the fit half alone and judged against the evaluation half, with a feature
network that calibration never saw. Rivals are tuned for every count, separately for FD and for rmse, on the very
scores that judge them. FD: Frechet distance in standardised features; excess: FD above the same model's own
60-evaluation run. Results go to OUT (JSON); finished arms are kept in the work folder, so that the same command
resumes after an interruption.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import tdpm_ext as tdpm  # noqa: E402
from benchmarks import features as judges  # noqa: E402
from benchmarks import metrics, records, rivals  # noqa: E402
from benchmarks.judging import spread  # noqa: E402
from tdpm_ext.kernels import accelerate  # noqa: E402
from tdpm_ext.pictures import class_sequence, load_pictures, to_unit  # noqa: E402

BUDGETS = (2, 3, 4, 5, 6, 8)
SCHEMA = "tdpm-quality-1"


@dataclass
class Bench:
    """Everything that one run compares: the denoiser, the pictures, the judge, and where arms are kept."""

    name: str
    model: object
    ideal: bool
    num_classes: int
    fit: object
    judge: torch.Tensor
    net: object
    work: Path
    args: argparse.Namespace
    checkpoint: str | None
    labels: torch.Tensor | None = None  # of the judging pictures

    def __post_init__(self):
        self.real = np.asarray(self.extract(self.judge), dtype=np.float64)
        self.shape = tuple(self.judge.shape[1:])

    def extract(self, x: torch.Tensor) -> np.ndarray:
        return judges.extract(self.net, x.float().clamp(-1, 1), batch=256)

    def fd(self, x: torch.Tensor) -> float:
        reference, other = metrics.standardise(self.real, self.extract(x))
        return metrics.frechet_distance(other, reference)

    def extra(self, count: int) -> dict:
        """Classes in the proportions of the judging pictures: in turn where those are equal."""
        if not self.num_classes:
            return {}
        return {"class_cond": class_sequence(self.labels, self.num_classes, count).to(self.args.device)}

    def noise(self, count: int, first: int = 1_000_000) -> torch.Tensor:
        return rivals.noise_for(range(first, first + count), self.shape).to(self.args.device)

    def kept(self, name: str, make) -> torch.Tensor:
        """The pictures of arm ``name``, made once and kept."""
        path = self.work / f"{name}.safetensors"
        if path.exists():
            return load_file(path)["x"]
        start = time.time()
        x = make().cpu()
        temporary = path.with_suffix(".tmp")
        save_file({"x": x.contiguous()}, temporary)
        temporary.replace(path)
        print(f"{self.name}: {name} took {time.time() - start:.0f} s", flush=True)
        return x


def tune_rivals(bench: Bench, reference: torch.Tensor) -> dict:
    """Best settings per score and budget: every setting on a few seeds, the leaders again on more."""
    path = bench.work / "tuning.json"
    if path.exists():
        return json.loads(path.read_text())
    few, more = bench.args.tune_samples
    z = bench.noise(more)

    def score(x):
        scores = {"rmse": metrics.paired_rmse(x.cpu(), reference[: len(x)])}
        return {**scores, "fd": bench.fd(x)}

    first = rivals.tune(
        bench.model, bench.args.budgets, z[:few], score, extra_args=bench.extra(few), batch=bench.args.batch
    )
    best: dict[str, dict] = {"rmse": {}, "fd": {}}
    for budget in bench.args.budgets:
        rows = [r for r in first.rows if r["budget"] == budget and r["scores"]]
        best["rmse"][budget] = min(rows, key=lambda r: r["scores"]["rmse"])
        leaders = sorted(rows, key=lambda r: r["scores"]["fd"])[: bench.args.leaders]
        scored = []
        for row in leaders:
            x = rivals.run_rival(
                bench.model, row["sampler"], budget, row["sigma_max"], row["rho"], z, extra_args=bench.extra(more),
                batch=bench.args.batch,
            ).x  # fmt: skip
            scored.append((bench.fd(x), row))
        best["fd"][budget] = min(scored, key=lambda pair: pair[0])[1]
    out = {"tried": len(first.rows), "samples": [few, more], "best": best}
    path.write_text(json.dumps(out))
    return json.loads(path.read_text())


def fitted_prior(bench: Bench):
    """Fit on the fit half, calibrate for both objectives; the file is kept and read again."""
    path = bench.work / "prior.safetensors"
    if path.exists():
        return tdpm.load_prior(path)
    rank = {"rank": bench.args.rank} if bench.args.rank else {}
    prior = tdpm.fit_prior(bench.args.kind, bench.fit, checkpoint=bench.checkpoint, **rank)
    settings = {"num_classes": bench.num_classes, "budgets": bench.args.budgets, "batch": bench.args.batch}
    for objective in ("fidelity", "quality"):
        start = time.time()
        samples = bench.args.calibration_samples and bench.args.calibration_samples[objective == "quality"]
        tdpm.calibrate(prior, bench.model, objective=objective, data=bench.fit, samples=samples, **settings)
        prior.card[f"{objective}_seconds"] = round(time.time() - start, 1)
    tdpm.save_prior(prior, path)
    return tdpm.load_prior(path)


def judged(bench: Bench, x: torch.Tensor, reference: torch.Tensor) -> dict:
    reals, fakes = metrics.standardise(bench.real, bench.extract(x))
    kept = metrics.manifold(reals[spread(len(reals), len(fakes))], fakes)
    return {
        "fd": metrics.frechet_distance(fakes, reals),
        "rmse": metrics.paired_rmse(x, reference),
        "coverage": kept.coverage,
        "recall": kept.recall,
        "precision": kept.precision,
    }


def arms(bench: Bench, tuning: dict, prior, reference: torch.Tensor) -> list[dict]:
    """One row per budget and arm: the rival tuned for FD, the one tuned for rmse, tdpm for either objective."""
    count = bench.args.samples
    z, extra, rows = bench.noise(count), bench.extra(count), []
    for budget in bench.args.budgets:
        for target in ("fd", "rmse"):
            s = tuning["best"][target][str(budget)]
            name = f"{s['sampler']}-{budget}-{s['sigma_max']:g}-{s['rho']:g}"

            def rival(s=s, budget=budget):
                return rivals.run_rival(
                    bench.model, s["sampler"], budget, s["sigma_max"], s["rho"], z, extra_args=extra,
                    batch=bench.args.batch,
                ).x  # fmt: skip

            x = bench.kept(name, rival)
            setting = {k: s[k] for k in ("sampler", "sigma_max", "rho", "steps", "nfe")}
            rows.append({"arm": f"rival:{target}", "budget": budget, **setting, **judged(bench, x, reference)})
        for objective in ("quality", "fidelity"):
            plan = prior.plan_for(budget, objective)

            def ours(objective=objective, budget=budget):
                seeds = list(range(1_000_000, 1_000_000 + count))
                return tdpm.sample(
                    bench.model, prior, steps=budget, seed=seeds, extra_args=extra, objective=objective,
                    batch=bench.args.batch, device=bench.args.device, disable=True,
                )  # fmt: skip

            x = bench.kept(f"tdpm-{objective}-{budget}", ours)
            about = {"nfe": plan.steps, "sigma_trunc": plan.sigma_trunc, "sigmas": list(plan.sigmas)}
            rows.append({"arm": f"tdpm:{objective}", "budget": budget, **about, **judged(bench, x, reference)})
    return rows


def verdict(rows: list[dict], own: dict) -> dict:
    """The ratios that matter: FD excess and rmse, tdpm over the tuned rival."""
    at = {(r["arm"], r["budget"]): r for r in rows}
    out: dict = {
        "excess_ratio": {},
        "rmse_ratio": {},
        "fd_over_own": {},
        "coverage_over_own": {},
        "recall_over_own": {},
    }
    for budget in sorted({r["budget"] for r in rows}):
        ours, rival = at["tdpm:quality", budget], at["rival:fd", budget]
        excess = max(0.0, ours["fd"] - own["fd"])
        theirs = max(0.0, rival["fd"] - own["fd"])
        out["excess_ratio"][budget] = excess / theirs if theirs > 0 else (0.0 if excess == 0 else None)
        out["fd_over_own"][budget] = ours["fd"] / own["fd"]
        out["coverage_over_own"][budget] = ours["coverage"] / own["coverage"]
        out["recall_over_own"][budget] = ours["recall"] / own["recall"]
        out["rmse_ratio"][budget] = at["tdpm:fidelity", budget]["rmse"] / at["rival:rmse", budget]["rmse"]
    ratios = [v for b, v in out["rmse_ratio"].items() if b in (3, 4, 5, 6, 8)]
    out["rmse_ratio_mean"] = float(np.mean(ratios)) if ratios else None
    return out


def copying(bench: Bench, prior) -> dict:
    """Distance to the nearest picture the prior was fitted on: samples (quality plan, 4) against held-out pictures."""
    fit = to_unit(bench.fit.images).numpy()
    x = load_file(bench.work / "tdpm-quality-4.safetensors")["x"].clamp(-1, 1).numpy()
    ours = float(np.mean(metrics.nearest_distance(x, fit)))
    held = float(np.mean(metrics.nearest_distance(bench.judge[spread(len(bench.judge), len(x))].numpy(), fit)))
    return {"samples": ours, "held_out": held, "ratio": ours / held}


def run(bench: Bench) -> dict:
    count, start = bench.args.samples, time.time()
    z, extra = bench.noise(count), bench.extra(count)
    reference = bench.kept(
        "own-60", lambda: rivals.reference_run(bench.model, z, extra_args=extra, batch=bench.args.batch)
    )
    own = judged(bench, reference, reference)
    some = bench.fit.take(spread(len(bench.fit), len(bench.judge)))
    fit_features = bench.extract(to_unit(some.images))
    reals, fits = metrics.standardise(bench.real, fit_features)
    floor = metrics.floor(reals, fits, min(count, len(fits)), labels=some.labels if bench.num_classes else None)
    print(f"{bench.name}: own 60-evaluation run FD {own['fd']:.3f}, floor {floor.value:.3f} (N={count})", flush=True)
    prior = fitted_prior(bench)
    tuning = tune_rivals(bench, reference)
    rows = arms(bench, tuning, prior, reference)
    result = {
        "schema": SCHEMA,
        "name": bench.name,
        "denoiser": "ideal" if bench.ideal else bench.checkpoint,
        "judge": bench.args.features_name,
        "samples": count,
        "class_conditional": bool(bench.num_classes),
        "floor": floor.value,
        "own60": own,
        "rows": rows,
        "verdict": verdict(rows, own),
        "tuning": {"settings_tried": tuning["tried"], "samples": tuning["samples"]},
        "prior": {"kind": prior.kind, **prior.card},
        "command": f"python benchmarks/quality.py {shlex.join(bench.args.given)}",
        "environment": records.environment(bench.args.device),
        "seconds": round(time.time() - start),
    }
    if not bench.ideal and 4 in bench.args.budgets:
        result["copying"] = copying(bench, prior)
    return result


def show(result: dict) -> str:
    """The result as text: one line per budget."""
    at = {(r["arm"], r["budget"]): r for r in result["rows"]}
    own = result["own60"]
    lines = [
        f"{result['name']} ({'ideal denoiser' if result['denoiser'] == 'ideal' else 'checkpoint'}), "
        f"{result['judge']}, N={result['samples']}: own 60-evaluation FD {own['fd']:.3f}, floor {result['floor']:.3f}",
        "evals | FD rival   tdpm | excess ratio | coverage, recall / own | rmse rival  tdpm  ratio",
    ]
    v = result["verdict"]
    for budget in sorted({r["budget"] for r in result["rows"]}):
        key = budget if budget in v["excess_ratio"] else str(budget)
        fds = at["rival:fd", budget]["fd"], at["tdpm:quality", budget]["fd"]
        errors = at["rival:rmse", budget]["rmse"], at["tdpm:fidelity", budget]["rmse"]
        excess = "n/a" if v["excess_ratio"][key] is None else f"{v['excess_ratio'][key]:.3f}"
        kept = v["coverage_over_own"][key], v["recall_over_own"][key]
        lines.append(
            f"{budget:5d} | {fds[0]:8.3f} {fds[1]:6.3f} | {excess:>12s} | {kept[0]:10.3f} {kept[1]:11.3f} | "
            f"{errors[0]:10.4f} {errors[1]:.4f} {v['rmse_ratio'][key]:.3f}"
        )
    if v["rmse_ratio_mean"] is not None:
        lines.append(f"mean rmse ratio over 3, 4, 5, 6, 8: {v['rmse_ratio_mean']:.3f}")
    if "copying" in result:
        lines.append(f"nearest fitted picture, samples / held-out pictures: {result['copying']['ratio']:.3f}")
    return "\n".join(lines)


def parse(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", help="a folder of assets/ (fashion-mnist, digits), or any name with --data and --judge")
    p.add_argument("--ideal", action="store_true", help="use the ideal denoiser of the fit pictures, no network")
    p.add_argument(
        "--checkpoint", type=Path, help="k-diffusion .safetensors (default: assets/NAME/denoiser.safetensors)"
    )
    p.add_argument("--data", type=Path, help="pictures to fit and calibrate on")
    p.add_argument("--judge", type=Path, help="pictures to judge by")
    p.add_argument("--judge-count", type=int, default=5000, help="pictures to judge by, at most (default 5000)")
    p.add_argument("--features", help="feature network file, or 'efflite' (extra [bench])")
    p.add_argument("--kind", default="mixture", help="prior kind (default mixture)")
    p.add_argument("--rank", type=int, help="principal axes of the prior (default: its own)")
    p.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    p.add_argument("--samples", type=int, default=2000)
    p.add_argument("--tune-samples", type=int, nargs=2, default=[96, 400], metavar=("FEW", "MORE"))
    p.add_argument("--calibration-samples", type=int, nargs=2, metavar=("FIDELITY", "QUALITY"))
    p.add_argument("--leaders", type=int, default=4, help="settings that go on to the second tuning round")
    p.add_argument("--batch", type=int, default=100)
    p.add_argument(
        "--accelerate", choices=("off", "exact", "compile"), default="exact", help="compile: faster on a CPU"
    )
    p.add_argument("--device", default="cpu")
    p.add_argument("--work", type=Path, help="folder for finished arms (default out/quality/NAME)")
    p.add_argument("--out", type=Path, help="JSON (default benchmarks/results/quality-NAME.json)")
    args = p.parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    return args


def build(args: argparse.Namespace) -> Bench:
    assets = ROOT / "assets" / args.name
    fit = load_pictures(args.data or assets / "fit.zip")
    real = load_pictures(args.judge or assets / "eval.zip", limit=args.judge_count)
    judge, own = to_unit(real.images), assets / "features.safetensors"
    args.features = args.features or (str(own) if own.exists() else "efflite")
    if args.features == "efflite":
        net, args.features_name = judges.EffLiteMid(), "FD-EffLite0-mid112"
    else:
        net, args.features_name = judges.load_features(args.features), "FD-CNN128"
    kind = "ideal" if args.ideal else "checkpoint"
    work = args.work or ROOT / "out" / "quality" / f"{args.name}-{kind}"
    work.mkdir(parents=True, exist_ok=True)
    args.out = args.out or ROOT / "benchmarks" / "results" / f"quality-{args.name}-{kind}.json"
    if args.ideal:
        model, classes, fingerprint = tdpm.IdealDenoiser(to_unit(fit.images)).to(args.device), 0, None
    else:
        checkpoint = tdpm.open_checkpoint(args.checkpoint or assets / "denoiser.safetensors", args.device)
        if args.accelerate != "off":
            accelerate(checkpoint.model, precision=args.accelerate)  # equal to rounding, and the same for all
        model, classes, fingerprint = checkpoint.model, checkpoint.num_classes, checkpoint.fingerprint
    net.to(args.device)
    return Bench(args.name, model, args.ideal, classes, fit, judge, net, work, args, fingerprint, real.labels)


def main(argv=None) -> None:
    args = parse(argv)
    with torch.no_grad():
        result = run(build(args))
    records.write(result, args.out)
    print(show(result))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
