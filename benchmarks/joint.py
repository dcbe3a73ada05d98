"""Joint TDPM training against plain training of the same network from scratch, at equal compute.

    python benchmarks/joint.py --json benchmarks/results/joint.json        # both arms, then the verdict
    python benchmarks/joint.py --minutes 60 --out out/joint-60             # longer
    python benchmarks/joint.py --start assets/fashion-mnist/denoiser.safetensors --out out/joint-start --minutes 10

"plain" learns to denoise at all noise levels. "tdpm" learns to denoise up to sigma_trunc alone and, as the same
network, to turn the closed-form prior's draw at sigma_init into a clean picture, against a discriminator (`tdpm train
--denoising 1`). Both see `fit.zip` alone, with the same denoising loss, for the same seconds: on a CPU those of the
process itself, so that a busy machine makes no difference; fitting the closed form is on tdpm's account. The plain
network gets the better schedule of rates (a cosine to zero; tdpm's rate is constant). With ``--start`` both go on from
a trained checkpoint instead of from random weights, at lower rates.

Solvers, sigma_max and cuts are chosen on seeds of their own by the distance to pictures of `fit.zip`; judged are other
seeds against `eval.zip`. Beside the two stand what tells their parts apart: the plain network behind the closed-form
prior, and tdpm's denoiser behind it. Both arms resume where they stopped; drawn pictures are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import tdpm_ext as tdpm  # noqa: E402
from benchmarks import metrics, records  # noqa: E402
from benchmarks.judging import Judge  # noqa: E402
from benchmarks.recipes.timed import Budget, TimedRun  # noqa: E402
from benchmarks.rivals import karras_sigmas, noise_for, run_sampler, steps_for, tune  # noqa: E402
from tdpm_ext.checkpoints import untrained  # noqa: E402
from tdpm_ext.kernels import accelerate  # noqa: E402
from tdpm_ext.optional import import_k_diffusion  # noqa: E402
from tdpm_ext.pictures import class_sequence, load_pictures, to_unit  # noqa: E402
from tdpm_ext.priors.base import default_plan  # noqa: E402
from tdpm_ext.training.losses import noised  # noqa: E402
from tdpm_ext.training.options import Options  # noqa: E402
from tdpm_ext.training.product import save_denoiser  # noqa: E402
from tdpm_ext.training.state import write_atomically  # noqa: E402
from tdpm_ext.training.trainer import Limits, Run  # noqa: E402

ASSETS = ROOT / "assets" / "fashion-mnist"
SEARCHED, JUDGED = 70_000_000, 71_000_000  # first seeds
LONG, SHORT = 50, 5  # evaluations
SOLVERS = ("dpmpp_2m", "lms", "heun")  # at LONG; all five at SHORT
LOSSES = {"adversarial": 1.0, "denoising": 1.0, "gamma": 0.1, "critic": "own", "disc_width": 24}
LEVELS = {"sigma_init": 1.2, "sigma_trunc": 0.7, "sigma_low": 0.2, "sigma_high": 0.8, "noise": "fresh"}
RATES = {"lr": 5e-4, "disc_lr": 1e-3, "ema": 0.99, "warmup": 100, "batch": 32, "label_dropout": 0.0}
# from a trained checkpoint: a lower cut, smaller steps; "plain" is the highest rate of plain training
LATER = {"sigma_init": 1.0, "sigma_trunc": 0.5, "sigma_low": 0.1, "sigma_high": 0.5, "lr": 1e-4, "ema": 0.995}
PLAIN_LATER = 3e-4
CUTS = {
    "closed": (0.5, 0.7, 1.0, 1.5, 2.2, 3.2),
    "learned": (0.25, 0.35, 0.5, 0.7),
    "later": (0.15, 0.25, 0.35, 0.5, 0.7),
}


def beginning(args: argparse.Namespace):
    """What both arms start from: random weights of the config, or the checkpoint of ``--start``."""
    if args.start is None:
        return untrained(args.config, args.seed)
    checkpoint = tdpm.open_checkpoint(args.start)
    checkpoint.model.requires_grad_(True)
    return checkpoint


def settings(args: argparse.Namespace) -> dict:
    """tdpm's levels and rates."""
    return {**LEVELS, **RATES} if args.start is None else {**LEVELS, **RATES, **LATER}


def train_plain(args: argparse.Namespace, pictures) -> dict:
    """Karras et al.'s denoising loss at the config's noise levels; returns steps and seconds."""
    checkpoint, device = beginning(args), torch.device(args.device)
    about = checkpoint.config["model"]
    density, sigma_data = import_k_diffusion().config.make_sample_density(about), float(about["sigma_data"])
    budget = Budget(args.minutes, 1_000_000, PLAIN_LATER if args.start else checkpoint.config["optimizer"]["lr"])
    run = TimedRun(checkpoint.model, args.out / "plain", device, budget, seed=args.seed, decay=0.0)
    images, labels = pictures.images.to(device), pictures.labels.to(device)

    def loss() -> torch.Tensor:
        index = torch.randint(len(images), (args.batch,), device=device)
        x, sigma = to_unit(images[index]), density([args.batch], device=device)
        denoised = checkpoint.model(noised(x, sigma, torch.randn_like(x)), sigma, class_cond=labels[index])
        weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
        return (weight * (denoised - x).flatten(1).square().mean(1)).mean()

    run.train(loss)
    if budget.used(run.step, run.seconds) < 1:
        raise SystemExit("interrupted: the same command goes on from there")
    run.load_ema()
    save_denoiser(checkpoint, args.out / "plain" / "denoiser.safetensors")
    return {"steps": run.step, "batch": args.batch, "seconds": round(run.seconds, 1)}


def train_tdpm(args: argparse.Namespace, pictures) -> dict:
    """Joint training; returns steps and seconds, those of fitting the closed form among them."""
    from accelerate import Accelerator

    kept, clock = args.out / "base.safetensors", time.monotonic if args.device == "cuda" else time.process_time
    checkpoint = beginning(args)
    began = clock()
    if not kept.exists():
        tdpm.save_prior(tdpm.fit_prior("mixture", pictures, progress=False), kept)
        write_atomically(kept.with_suffix(".seconds"), f"{clock() - began:.1f}".encode())
    fitting = float(kept.with_suffix(".seconds").read_text())
    options = Options(kind="shared", seed=args.seed, **LOSSES, **settings(args))
    accelerator = Accelerator(cpu=args.device == "cpu")
    data = {"images": pictures.images, "labels": pictures.labels, "base": tdpm.load_prior(kept)}
    run = Run(options, checkpoint, args.out / "tdpm", accelerator, **data)
    if (left := 60 * args.minutes - fitting - run.seconds) > 0:
        run.train(Limits(minutes=left / 60, check_every=0, clock=clock))
    return {"steps": run.step, "batch": options.batch, "seconds": round(run.seconds + fitting, 1)}


@dataclass
class Verdict:
    """The trained arms, the judge, and where pictures are kept."""

    args: argparse.Namespace

    def __post_init__(self):
        self.judge, self.device = Judge.for_set("fashion-mnist"), torch.device(self.args.device)
        fit = to_unit(self.judge.fit.images)
        self.near = metrics.normal(self.judge.features(fit))
        self.base = tdpm.load_prior(self.args.out / "base.safetensors", self.device)
        self.models = {}
        for arm, name in (("plain", "denoiser"), ("tdpm", "prior-denoiser")):
            opened = tdpm.open_checkpoint(self.args.out / arm / f"{name}.safetensors", self.device)
            accelerate(opened.model)  # equal to rounding
            self.models[arm] = opened.model
            if arm == "tdpm":
                learned = tdpm.load_prior(self.args.out / arm / "prior.safetensors", self.device)
                self.learned = learned.bind(opened.model, opened.fingerprint)

    def labels(self, count: int) -> torch.Tensor:
        return class_sequence(self.judge.real.labels, 10, count).to(self.device)

    def fd(self, x: torch.Tensor) -> float:
        """Distance to pictures that were trained on: what choices are made by."""
        return metrics.frechet_distance(self.judge.features(x.cpu()), self.near)

    def solver(self, arm: str, budget: int) -> tuple[str, Callable]:
        """(what was chosen, a draw) of the best solver for an arm's denoiser."""
        z = noise_for(range(SEARCHED, SEARCHED + self.args.searched), self.models[arm].shape).to(self.device)
        few = {"rivals": SOLVERS, "sigma_maxes": (80.0, 20.0), "rhos": (7.0,)} if budget == LONG else {}
        extra = {"class_cond": self.labels(len(z))}
        tuned = tune(self.models[arm], [budget], z, lambda x: {"fd": self.fd(x)}, extra_args=extra, batch=100, **few)
        row = tuned.best["fd"][budget]
        name, top, rho = row["sampler"], row["sigma_max"], row["rho"]
        sigmas = karras_sigmas(steps_for(name, budget), top, 0.02, rho).to(self.device, torch.float32)

        def draw(seeds: range) -> torch.Tensor:
            z = noise_for(seeds, self.models[arm].shape).to(self.device)
            extra = {"class_cond": self.labels(len(z))}
            return run_sampler(self.models[arm], name, sigmas, z, extra, 100, budget).x.cpu()

        return f"{name}, sigma_max {top:g}, rho {rho:g}", draw

    def behind(self, arm: str, prior, cuts: tuple[float, ...], budget: int) -> tuple[str, Callable]:
        """(the cut that was chosen, a draw) of a chain behind a prior; the prior's call is one of the budget."""

        def draw(seeds: range, cut: float) -> torch.Tensor:
            steps = budget - prior.prior_nfe
            prior.plans = {"quality": {steps: default_plan(cut, steps)}}
            extra = {"class_cond": self.labels(len(seeds))}
            settings = {"objective": "quality", "batch": 100, "device": self.device, "disable": True}
            return tdpm.sample(self.models[arm], prior, steps=budget, seed=list(seeds), extra_args=extra, **settings)

        seeds = range(SEARCHED, SEARCHED + self.args.searched)
        cut = min(cuts, key=lambda cut: self.fd(draw(seeds, cut)))
        return f"cut at {cut:g}", partial(draw, cut=cut)

    def runs(self) -> list[tuple]:
        """(name of the row, arm, budget, how to find its draw)."""
        cuts = CUTS["later" if self.args.start else "learned"]
        learned = [("tdpm", "tdpm", b, partial(self.behind, "tdpm", self.learned, cuts, b)) for b in (2, 5)]
        return [
            ("plain", "plain", LONG, partial(self.solver, "plain", LONG)),
            ("plain", "plain", SHORT, partial(self.solver, "plain", SHORT)),
            *learned,
            ("plain, closed-form prior", "plain", SHORT, partial(self.behind, "plain", self.base, CUTS["closed"], 5)),
            ("tdpm, closed-form prior", "tdpm", SHORT, partial(self.behind, "tdpm", self.base, CUTS["closed"], 5)),
        ]

    def rows(self) -> list[dict]:
        out, folder = [], self.args.out / "drawn"
        folder.mkdir(exist_ok=True)
        seeds = range(JUDGED, JUDGED + self.args.blocks * self.args.samples)
        ours = [self.args.out / "tdpm" / f"{name}.safetensors" for name in ("prior", "prior-denoiser")]
        digest = {"plain": _digest(self.args.out / "plain" / "denoiser.safetensors"), "tdpm": _digest(*ours)}
        for name, arm, budget, find in self.runs():
            key = hashlib.sha256(f"{name} {digest[arm]} {seeds} {self.args.searched}".encode()).hexdigest()[:12]
            kept = folder / f"{budget}-{key}.safetensors"
            words = kept.with_suffix(".txt")
            if not kept.exists():
                chosen, draw = find()
                write_atomically(words, chosen.encode())
                write_atomically(kept, save({"x": draw(seeds).cpu().contiguous()}))
            found = self.judge.over_blocks(self.judge.features(load_file(kept)["x"]), self.args.blocks)
            measures = {key: records.estimate(value) for key, value in found.items()}
            out.append({"name": name, "evaluations": budget, "chosen": words.read_text(), "measures": measures})
            print(line(out[-1]), flush=True)
        return out


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def line(row: dict) -> str:
    """One row of the table, Markdown."""
    m = row["measures"]
    cells = [f"{m[key]['mean']:.2f} ± {m[key]['sd'] or 0:.2f}" for key in ("fd", "coverage", "recall")]
    return f"| {row['name']} | {row['evaluations']} | {' | '.join(cells)} | {row['chosen']} |"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = load_pictures(args.data)
    trained = {"plain": train_plain(args, pictures), "tdpm": train_tdpm(args, pictures)}
    print("| network and chain | evaluations | FD | coverage | recall | chosen |\n|---|---|---|---|---|---|")
    verdict = Verdict(args)
    rows = verdict.rows()
    if args.json:
        model = verdict.models["plain"]
        record = {
            "schema": "tdpm-joint/1", "command": records.command("joint.py", argv), "judge": verdict.judge.name,
            "blocks": args.blocks, "per_block": args.samples, "pictures": len(pictures), "minutes": args.minutes,
            "floor": records.estimate(verdict.judge.floor(args.samples)),
            "parameters": sum(p.numel() for p in model.parameters()), "trained": trained,
            "options": {**LOSSES, **settings(args)}, "rows": rows, "environment": records.environment(args.device),
        }  # fmt: skip
        records.write(record, args.json)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=5, help="of compute per arm (default 5)")
    p.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "recipes" / "fashion_mnist_small.json")
    p.add_argument(
        "--start", type=Path, metavar="CHECKPOINT", help="go on from trained weights (default: from scratch)"
    )
    p.add_argument("--data", type=Path, default=ASSETS / "fit.zip", help="pictures to train on (default fit.zip)")
    p.add_argument("--batch", type=int, default=64, help="of plain training (default 64)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--samples", type=int, default=334, help="judged pictures per block of seeds (default 334)")
    p.add_argument("--blocks", type=int, default=3)
    p.add_argument("--searched", type=int, default=100, help="seeds by which solvers and cuts are chosen")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "joint")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    if not args.minutes > 0 or args.samples < 6 or args.searched < 2:
        p.error(f"--minutes {args.minutes:g} --samples {args.samples} --searched {args.searched}: give more")
    return args


if __name__ == "__main__":
    sys.exit(main())
