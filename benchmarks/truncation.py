"""Where to cut the chain: quality and cost against sigma_trunc, for every kind of prior there is.

    python benchmarks/truncation.py                                      # shipped checkpoint, all its priors
    python benchmarks/truncation.py --priors gaussian out/mine.safetensors --device cuda
    python benchmarks/truncation.py --figures                            # draw the record again

Two schedules behind each prior and level. "budget": a fixed number of evaluations in all (the prior's own counted),
whatever the level: what a user who pays for so many should choose. "cut": one long Karras schedule, of which only the
levels below sigma_trunc are run, as in the paper: cost falls with the level. Neither is calibrated, so that priors
differ by themselves alone; a closed-form prior seeds the solver's history. The paper's T = 4, 49 and 99 (steps of the
linear table) are marked by their sigmas. Finished batches are kept in the work folder: the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import tdpm_ext as tdpm  # noqa: E402
from benchmarks import judging, records  # noqa: E402
from benchmarks.chunks import Store, chunks_of, gather  # noqa: E402
from benchmarks.contest import JUDGED_SEED, kept_as  # noqa: E402
from benchmarks.drawing import Drawer, Request  # noqa: E402
from benchmarks.rivals import CountCalls  # noqa: E402
from tdpm_ext.kernels import accelerate  # noqa: E402
from tdpm_ext.priors.base import HISTORY_RATIO, default_plan  # noqa: E402
from tdpm_ext.schedule import cut, karras, vp_linear_sigmas  # noqa: E402
from tdpm_ext.solver import solve  # noqa: E402

SCHEMA = "tdpm-truncation/1"
MARKS = (4, 49, 99)  # where the paper cuts, steps of the linear table
FURTHER = (0.6, 1.0, 1.6, 2.5, 4.0, 6.5, 10.0, 20.0)
CLOSED = ("gaussian", "mixture", "lowrank")
LONG, SIGMA_MAX, SIGMA_MIN = 18, 80.0, 0.02  # the long schedule


@dataclass(frozen=True)
class Level:
    """One way below one cut: ``schedule`` "budget" or "cut", noise levels decreasing to 0."""

    schedule: str
    sigmas: tuple[float, ...]


def levels(sigma_trunc: float, schedule: str, budget: int, prior_nfe: int) -> Level:
    """The noise levels from ``sigma_trunc`` down."""
    if schedule == "budget":
        return Level(schedule, default_plan(sigma_trunc, budget - prior_nfe).sigmas)
    return Level(schedule, tuple(cut(karras(LONG, SIGMA_MAX, SIGMA_MIN), sigma_trunc).tolist()))


@dataclass
class Study:
    """The denoiser, the priors by name, the judge, and where pictures are kept."""

    drawer: Drawer
    fingerprint: str
    priors: dict
    digests: dict[str, str]
    judge: judging.Judge
    args: argparse.Namespace

    @property
    def parts(self) -> list[range]:
        seeds = range(JUDGED_SEED, JUDGED_SEED + self.args.blocks * self.args.samples)
        return chunks_of(seeds, self.args.batch)

    def kept(self, name: str, identity: dict, make) -> tuple[torch.Tensor, int]:
        """Pictures of all seeds and the denoiser calls behind one; ``make(seeds) -> (x, calls)`` what is missing."""
        store = Store(self.args.work / kept_as(name), {"checkpoint": self.fingerprint, **identity})
        for part in self.parts:
            if store.read(part) is None:
                x, calls = make(part)
                store.write(part, {"x": x, "nfe": torch.tensor(calls)})
        return gather(store, self.parts, "x"), max(int(store.read(part)["nfe"]) for part in self.parts)

    def measures(self, x: torch.Tensor) -> dict:
        rows = self.judge.over_blocks(self.judge.features(x), self.args.blocks)
        return {key: records.estimate(value) for key, value in rows.items()}

    def reference(self) -> dict:
        """The denoiser's own 60 evaluations."""
        own = Request.rival("dpmpp_2m", 60)
        return self.measures(self.kept("own-60", {"request": own.to_json()}, lambda s: self.drawer.draw(own, s))[0])

    @torch.no_grad()
    def below(self, prior, level: Level, seeds: range) -> tuple[torch.Tensor, int]:
        """Pictures drawn from ``prior`` at the first of the levels and denoised along the rest."""
        seeds, counted = list(seeds), CountCalls(self.drawer.model)
        request = Request("tdpm", len(level.sigmas))
        arguments, z = self.drawer.arguments(request, seeds), self.drawer.noise(seeds)
        top = level.sigmas[0]
        x, history = prior.start(z, top, (HISTORY_RATIO * top,), **arguments)
        x = solve(counted, x, level.sigmas, arguments, None, True, orders=2, history=history)
        return x.float().cpu(), counted.calls

    def points(self, name: str) -> list[dict]:
        """All measured points of one prior."""
        prior, out = self.priors[name], []
        usable = [sigma for sigma in self.args.sigmas if prior.starts_at(sigma)]
        for schedule, sigma in tqdm([(s, at) for s in ("budget", "cut") for at in usable], desc=name, unit="point"):
            level = levels(sigma, schedule, self.args.budget, prior.prior_nfe)
            identity = {"prior": self.digests[name], "sigmas": level.sigmas}
            x, calls = self.kept(f"{name}-{schedule}-{sigma:.4g}", identity, partial(self.below, prior, level))
            out.append({
                "prior": name, "kind": prior.kind, "schedule": schedule, "sigma_trunc": sigma,
                "nfe": calls + prior.prior_nfe, "prior_nfe": prior.prior_nfe, "measures": self.measures(x),
            })  # fmt: skip
        return out


def open_priors(args: argparse.Namespace, judge: judging.Judge, fingerprint: str, model) -> tuple[dict, dict]:
    """Priors by name, and what says which they are: kinds to fit, or files."""
    priors, digests = {}, {}
    for word in args.priors:
        path = args.work / f"prior-{word}.safetensors" if word in CLOSED else Path(word)
        shipped = ROOT / "assets" / args.name / "prior.safetensors"
        if word == "mixture" and shipped.exists() and not path.exists():
            path = shipped
        if word in CLOSED and not path.exists():
            tdpm.save_prior(tdpm.fit_prior(word, judge.fit, checkpoint=fingerprint), path)
        prior = tdpm.load_prior(path, expect_checkpoint=fingerprint)
        if hasattr(prior, "bind"):
            prior.bind(model, fingerprint)
        name = word if word in CLOSED else path.stem.removeprefix("prior-")
        priors[name], digests[name] = prior, hashlib.sha256(path.read_bytes()).hexdigest()
    return priors, digests


def build(args: argparse.Namespace) -> Study:
    folder, device = ROOT / "assets" / args.name, torch.device(args.device)
    judge = judging.Judge.for_set(args.name)
    opened = tdpm.open_checkpoint(folder / "denoiser.safetensors", args.device)
    priors, digests = open_priors(args, judge, opened.fingerprint, opened.model)
    accelerate(opened.model, precision="compile")  # the same to rounding
    judge.net.to(device)
    labels = judge.real.labels if opened.num_classes else None
    drawer = Drawer(opened.model, opened.shape, opened.num_classes, labels, None, device)
    return Study(drawer, opened.fingerprint, priors, digests, judge, args)


def run(study: Study, argv: list[str] | None) -> dict:
    args, start, table = study.args, time.time(), vp_linear_sigmas()
    reference = study.reference()
    return {
        "schema": SCHEMA, "name": args.name, "checkpoint": study.fingerprint, "judge": study.judge.name,
        "blocks": args.blocks, "per_block": args.samples,
        "floor": records.estimate(study.judge.floor(args.samples)), "reference": reference,
        "marks": [{"step": step, "sigma": table[step].item()} for step in MARKS],
        "priors": {name: {"kind": prior.kind, **prior.card} for name, prior in study.priors.items()},
        "points": [point for name in study.priors for point in study.points(name)],
        "command": records.command("truncation.py", argv),
        "environment": records.environment(study.drawer.device), "seconds": time.time() - start,
    }  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", default="fashion-mnist", help="a folder of assets/ with a checkpoint")
    p.add_argument("--priors", nargs="+", help="kinds or files (default: gaussian, mixture, the set's learned)")
    p.add_argument("--sigmas", type=float, nargs="+", help="levels to cut at (default: the paper's and eight above)")
    p.add_argument("--budget", type=int, default=3, help='evaluations in all on the schedule "budget" (default 3)')
    p.add_argument("--samples", type=int, default=667, help="pictures per block of seeds (default 667)")
    p.add_argument("--blocks", type=int, default=3)
    p.add_argument("--batch", type=int, default=100)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--work", type=Path, help="kept pictures (default out/truncation/NAME)")
    p.add_argument("--out", type=Path, help="the record (default benchmarks/results/truncation.json)")
    p.add_argument("--figures", action="store_true", help="only draw the record again")
    args = p.parse_args(argv)
    if args.budget < 2:
        p.error(f"--budget {args.budget}: give 2 or more, a learned prior takes one of them")
    table = vp_linear_sigmas()
    args.sigmas = args.sigmas or [*(table[step].item() for step in MARKS), *FURTHER]
    learned = sorted((ROOT / "assets" / args.name).glob("prior-*.safetensors"))
    args.priors = args.priors or ["gaussian", "mixture", *map(str, learned)]
    args.work = args.work or ROOT / "out" / "truncation" / args.name
    args.out = args.out or records.RESULTS / "truncation.json"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.figures:
        records.write(run(build(args), argv), args.out)
    from benchmarks import truncation_figure

    for path in truncation_figure.draw(records.read(args.out), args.out.with_suffix("")):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
