"""The paper's claims on six distributions in the plane: DDPM, truncated chains behind five priors, a one-shot GAN.

    python benchmarks/toy.py                      # one seed: nine minutes of one core in all
    python benchmarks/toy.py --seeds 3            # and the spread between trainings
    python benchmarks/toy.py --sets ring --seeds 1
    python benchmarks/toy.py --quick              # seconds; the same steps at a toy's toy size, into out/toy-quick
    python benchmarks/toy.py --figures            # draw again from the record and the kept samples

Per set and seed a denoiser is trained, and four adversarial networks: a GAN on clean points, a generator and a raw
generator behind which the denoiser runs, and one shared network that is denoiser and prior at once (the paper's joint
training, going on from the denoiser). Distances are sliced 2-Wasserstein over the data's std, beside their floor (real
points); the coverage says what share of the set's parts is drawn at all. Where the chain is cut is chosen for every
prior, budget and seed on training points, and so is the rival's sigma_max. Networks, samples and finished (set, seed)
pairs are kept in the work folder: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import metrics, records  # noqa: E402
from benchmarks.toy_data import DRAWN, STD, ToySet  # noqa: E402
from benchmarks.toy_nets import ToyDenoiser, ToyGenerator  # noqa: E402
from benchmarks.toy_sampling import CLOSED, CUT_STEPS, CUTS, LEARNED, Arms, after_a_lost_part, choices  # noqa: E402
from benchmarks.toy_training import ADVERSARIES, Training, train_denoiser, train_prior  # noqa: E402
from tdpm_ext.fit import fit_prior  # noqa: E402

SCHEMA = "tdpm-toy/1"
MEASURES = ("sw", "coverage", "stray", "rarest")
CHOOSING, JUDGING, SHOWN = 10_000, 20_000, 30_000  # first seeds: of the search, of the verdict, of the figure's points
LOST = tuple(STD * ratio for ratio in (0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0))
NOISE = 0.02  # deviation of a distance over the std between samples of real points, at the counts of a search
PANELS = (("ancestral", 5), ("dpmpp_2m", 5), ("mixture", 3), ("generator", 3), ("shared", 3), ("raw", 3), ("gan", 1))


@dataclass(frozen=True)
class Size:
    """How large a study is.

    Attributes:
        samples: points per verdict. searched: per setting in the search, at the budgets ``tuned``. shown: per panel.
        fitted: points behind the closed-form priors.
        long: steps of DDPM beyond the budgets that all arms share (its ODE goes without the last).
    """

    training: Training = Training()
    samples: int = 2000
    searched: int = 2000
    shown: int = 1500
    budgets: tuple[int, ...] = (2, 3, 5, 10, 20, 50)
    tuned: tuple[int, ...] = (2, 3, 5, 10)
    fitted: int = 10_000
    long: tuple[int, ...] = (100, 250, 1000)
    lost_steps: int = 20


QUICK = Size(Training(150, 128, 3e-3, 40, 64), 300, 100, 100, (2, 3), (2,), 1000, (10, 20), 4)


def trained(points: ToySet, seed: int, size: Size, work: Path) -> Arms:
    """The networks of one set and seed, from ``work`` where they are kept; closed-form priors are fitted anew."""
    nets = {}
    for kind in ("denoiser", *ADVERSARIES):
        path = work / f"{points.name}-{seed}-{kind}.safetensors"
        net = ToyDenoiser() if kind in ("denoiser", "shared") else ToyGenerator()
        if not path.exists():
            made = (
                train_denoiser(points.train, size.training, seed)
                if kind == "denoiser"
                else train_prior(points.train, kind, size.training, seed, nets["denoiser"])
            )
            save(made.state_dict(), path)
        net.load_state_dict(load_file(path))
        nets[kind] = net.eval()
    priors = {kind: fit_prior(kind, points.train[: size.fitted], progress=False) for kind in CLOSED}
    return Arms(nets, priors)


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def searched(arms: Arms, points: ToySet, size: Size, seed: int) -> list[dict]:
    """Every arm with something to choose, at every tuned budget and setting: its distance to training points."""
    rows = []
    for arm in ("dpmpp_2m", *CLOSED, *LEARNED):
        for budget in size.tuned:
            for at in choices(arm):
                x = arms.draw(arm, budget, size.searched, CHOOSING + seed, at).x
                near = {"sw": points.from_train(x) / STD, "stray": points.shares(x)[1]}
                rows.append({"arm": arm, "budget": budget, "at": at, **near})
    return rows


def best(rows: list[dict], arm: str, budget: int) -> float | None:
    """The choice for a budget, or for the nearest one below that was searched: of the settings whose distance is the
    lowest but for noise, the one with the fewest samples off the data."""
    searched = max((row["budget"] for row in rows if row["budget"] <= budget), default=None)
    own = [row for row in rows if row["arm"] == arm and row["budget"] == searched]
    if not own:
        return None
    lowest = min(row["sw"] for row in own)
    return min((row for row in own if row["sw"] <= lowest + NOISE), key=lambda row: row["stray"])["at"]


def study(name: str, seed: int, size: Size, work: Path) -> dict:
    """All measurements of one set and seed, JSON-able; kept in ``work``."""
    kept = work / f"{name}-{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    points = ToySet.make(name)
    arms = trained(points, seed, size, work)
    tried = searched(arms, points, size, seed)
    rows = []
    runs = [("gan", 1), ("generator", 1), ("shared", 1)]
    runs += [(arm, b) for arm in ("dpmpp_2m", *CLOSED, *LEARNED, "ddim", "ancestral") for b in size.budgets]
    runs += [("ddim", b) for b in size.long[:-1]] + [("ancestral", b) for b in size.long]
    for arm, budget in tqdm(runs, desc=f"{name}, seed {seed}", leave=False):
        at = best(tried, arm, budget)
        drawn = arms.draw(arm, budget, size.samples, JUDGING + seed, at)
        score = points.score(drawn.x)._asdict()
        rows.append({"arm": arm, "budget": budget, "evaluations": drawn.evaluations, "at": at, **score})
    lost = []
    for sigma in LOST:
        about = (points.train, points.train_parts, sigma, size.lost_steps, size.samples, JUDGING + seed)
        whole, less = after_a_lost_part(arms.nets["denoiser"], *about)
        shares = points.shares(less)[0][0], points.shares(whole)[0][0]
        lost.append({"sigma_trunc": sigma, "share": float(shares[0]), "exact": float(shares[1]),
                     "sw": points.score(less).sw, "sw_exact": points.score(whole).sw})  # fmt: skip
    shown = {}
    for arm, budget in PANELS:
        near = min(size.budgets, key=lambda b: abs(b - budget)) if arm != "gan" else 1
        x = arms.draw(arm, near, size.shown, SHOWN + seed, best(tried, arm, near)).x
        shown[f"{arm}-{near}"] = x.contiguous()
    save(shown, work / f"{name}-{seed}-shown.safetensors")
    out = {"floor": [score._asdict() for score in points.floor(size.samples)], "rows": rows, "tried": tried,
           "lost": lost}  # fmt: skip
    temporary = kept.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(out))
    temporary.replace(kept)
    return out


def over_seeds(values: list[float]) -> dict:
    return records.estimate(metrics.over_blocks(values))


def grouped(parts: list[list[dict]], keys: tuple[str, ...], values: tuple[str, ...], listed: tuple[str, ...] = ()):
    """Rows of all seeds that agree in ``keys``: estimates of ``values``, and the ``listed`` fields seed by seed."""
    out = []
    for rows in zip(*parts, strict=True):
        if any(row[key] != rows[0][key] for row in rows for key in keys):
            raise ValueError(f"the seeds have different rows at {rows[0]}: empty the work folder and run again")
        row = {key: rows[0][key] for key in keys} | {key: over_seeds([row[key] for row in rows]) for key in values}
        out.append(row | {key: [row[key] for row in rows] for key in listed})
    return out


def combined(name: str, parts: list[dict]) -> dict:
    """What the record says of one set."""
    points = ToySet.make(name)
    cuts = [[row for row in p["tried"] if row["arm"] != "dpmpp_2m"] for p in parts]
    return {
        "name": name,
        "title": points.title,
        "parts": points.count,
        "floor": {key: over_seeds([row[key] for row in parts[0]["floor"]]) for key in MEASURES},
        "arms": grouped([p["rows"] for p in parts], ("arm", "budget", "evaluations"), MEASURES, ("at",)),
        "cuts": grouped(cuts, ("arm", "budget", "at"), ("sw", "stray")),
        "lost": grouped([p["lost"] for p in parts], ("sigma_trunc",), ("share", "exact", "sw", "sw_exact")),
    }


def work_folder(size: Size, base: Path) -> Path:
    """Below ``base``, one folder per size of study, so that nothing kept from another one is taken."""
    key = hashlib.sha256(json.dumps(asdict(size), sort_keys=True).encode()).hexdigest()[:12]
    return base / key


def run(args: argparse.Namespace, size: Size, argv: list[str] | None) -> dict:
    work, start = work_folder(size, args.work), time.time()
    work.mkdir(parents=True, exist_ok=True)
    names = [name for _ in range(args.seeds) for name in args.sets]
    seeds = [seed for seed in range(args.seeds) for _ in args.sets]
    call = partial(study, size=size, work=work)
    if args.jobs == 1:
        done = list(tqdm(map(call, names, seeds), total=len(names), desc="toy study", unit="set"))
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (1,)) as pool:
            done = list(tqdm(pool.map(call, names, seeds), total=len(names), desc="toy study", unit="set"))
    parts = {name: [part for own, part in zip(names, done, strict=True) if own == name] for name in args.sets}
    return {
        "schema": SCHEMA,
        "seeds": args.seeds,
        "std": STD,
        "cuts": [{"step": i, "sigma": sigma} for i, sigma in zip(CUT_STEPS, CUTS, strict=True)],
        "size": asdict(size),
        "sets": [combined(name, parts[name]) for name in args.sets],
        "command": records.command("toy.py", argv),
        "environment": records.environment(),
        "seconds": time.time() - start,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sets", nargs="+", choices=tuple(DRAWN), default=list(DRAWN), help="(default: all six)")
    p.add_argument("--seeds", type=int, default=1, help="trainings per set (default 1)")
    p.add_argument("--jobs", type=int, default=1, help="processes, one core each (default 1)")
    p.add_argument("--quick", action="store_true", help="a study of seconds: shows that it runs, measures nothing")
    p.add_argument("--figures", action="store_true", help="only draw the figures again")
    p.add_argument("--work", type=Path, default=ROOT / "out" / "toy", help="kept networks and samples")
    p.add_argument("--out", type=Path, help="record (default benchmarks/results/toy.json; --quick: in the work folder)")
    args = p.parse_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        p.error(f"--seeds {args.seeds} --jobs {args.jobs}: give 1 or more")
    args.out = args.out or (args.work / "quick.json" if args.quick else records.RESULTS / "toy.json")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    size = QUICK if args.quick else Size()
    torch.set_num_threads(1)  # networks this small only lose by more
    if not args.figures:
        records.write(run(args, size, argv), args.out)
    from benchmarks import toy_figures

    for path in toy_figures.draw(records.read(args.out), work_folder(size, args.work), args.out.with_suffix("")):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
