"""Learned priors on the shipped Fashion-MNIST checkpoint: train, plan and judge each arm; table and JSON.

    python benchmarks/learned.py train --only regression shared
    python benchmarks/learned.py judge --json benchmarks/results/learned.json

An arm is one `tdpm train` command (`ARMS`), sized for CPU cores. ``--jobs`` of them run at a time, each in a process of
its own, and a second call goes on where the first stopped. Then its prior gets plans for 2 and 3 evaluations in all,
its own call counted, from the pictures it was trained on or from the checkpoint's own trajectories. Judged are three
blocks of 2,000 seeds against `eval.zip`, which nothing here has seen; rmse is to the checkpoint's own 60-evaluation
pictures from the first of these seeds. What the closed form, the tuned k-diffusion sampler and the checkpoint's own run
give stands in the record of `benchmarks/quality.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import tdpm_ext as tdpm  # noqa: E402
from benchmarks import metrics, records  # noqa: E402
from benchmarks.judging import Judge  # noqa: E402
from benchmarks.rivals import noise_for, reference_run  # noqa: E402
from tdpm_ext.pictures import class_sequence, load_pictures  # noqa: E402
from tdpm_ext.training.state import write_atomically  # noqa: E402

ASSETS = ROOT / "assets" / "fashion-mnist"
BLOCKS, FIRST_SEED = 3, 1_000_000
BUDGETS = (2, 3)
QUALITY = ROOT / "benchmarks" / "results" / "quality-fashion-mnist-checkpoint.json"
# the paper's form: a clean picture and fresh noise, compared where the chain is cut
FRESH = "--sigma-init 1 --sigma-trunc 0.2 --noise fresh --sigma-low 0.1 --sigma-high 0.5 --label-dropout 0"
# a step of the checkpoint's own path, from where the closed form is all but exact
PATH = (
    "--sigma-init 4.5 --sigma-trunc 0.85 --noise kept --adversarial 0 --regression 1 --teacher 1536 --teacher-steps 24"
)
SLOWER = "--lr 3e-5 --disc-lr 5e-4 --ema 0.995"  # a second phase: smaller steps, a longer mean
ARMS = {  # name -> flags of one phase, or of several that follow on each other
    "regression": f"--kind shared {PATH} --lr 3e-4 --steps 450",
    "regression-lora": f"--kind shared --rank 3 {PATH} --lr 1e-3 --steps 450",
    "regression-generator": f"--kind generator {PATH} --lr 1e-3 --steps 2000",
    "shared": (f"--kind shared {FRESH} --lr 1e-4 --steps 772", f"--kind shared {FRESH} {SLOWER} --steps 1900"),
    "lora": f"--kind shared --rank 3 {FRESH} --lr 1e-3",
    "generator": f"--kind generator {FRESH} --lr 4e-4",
    "non-saturating": f"--kind shared {FRESH} --loss non_saturating",
    "transport": f"--kind shared {FRESH} --loss transport",
    "own-critic": f"--kind shared {FRESH} --critic own",
    "raw-shared": f"--kind raw-shared {FRESH}",
    "raw-generator": f"--kind raw-generator {FRESH} --lr 4e-4",
}


def train_commands(name: str, args: argparse.Namespace) -> list[list[str]]:
    """The words after ``tdpm`` for each phase of an arm; flags given twice count as given last."""
    phases, commands = ARMS[name], []
    for k, flags in enumerate([phases] if isinstance(phases, str) else phases):
        words = ["train", str(ASSETS / "denoiser.safetensors"), "--data", str(args.data)]
        words += ["--base", str(ASSETS / "prior.safetensors"), "--disc-lr", "1e-3", "--ema", "0.98", *flags.split()]
        words += ["--batch", str(args.batch), "--minutes", str(args.minutes), "--device", args.device]
        words += ["--check-every", str(args.check_every), "--out", str(phase_folder(args, name, k))]
        commands.append(words if k == 0 else [*words, "--start", str(phase_folder(args, name, k - 1))])
    return commands


def phase_folder(args: argparse.Namespace, name: str, phase: int = -1) -> Path:
    """Where a phase of an arm works; the last one by default: there the finished prior lies."""
    count = 1 if isinstance(ARMS[name], str) else len(ARMS[name])
    phase %= count
    return args.out / (name if phase == 0 else f"{name}-{phase + 1}")


def train(args: argparse.Namespace) -> None:
    """Every arm in its own process; what it says goes to its folder."""

    def one(name: str) -> tuple[str, int]:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / f"{name}.txt").open("a") as said:
            for words in train_commands(name, args):
                command = [sys.executable, "-m", "tdpm_ext.cli", *words]
                if code := subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT).returncode:
                    return name, code
        return name, 0

    with ThreadPoolExecutor(args.jobs) as pool:
        for name, code in pool.map(one, args.only):
            print(f"{name}: {'done' if code == 0 else f'failed ({code}), see {args.out / name}.txt'}", flush=True)


class Bench:
    """The checkpoint, its judge, the seeds, and its own long run from the first of them."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        self.checkpoint = tdpm.open_checkpoint(ASSETS / "denoiser.safetensors", self.device)
        self.judge = Judge.for_set("fashion-mnist")
        self.seeds = list(range(args.first_seed, args.first_seed + BLOCKS * args.samples))
        labels = class_sequence(self.judge.real.labels, self.checkpoint.num_classes, len(self.seeds))
        self.extra = {"class_cond": labels.to(self.device)}
        self.own = self._own_run()

    def _own_run(self) -> torch.Tensor:
        count = self.args.reference
        path = self.args.out / f"own-60-{self.args.first_seed}-{count}.safetensors"
        if not path.exists():
            z = noise_for(self.seeds[:count], self.checkpoint.shape).to(self.device)
            extra = {"class_cond": self.extra["class_cond"][:count]}
            write_atomically(
                path, save({"x": reference_run(self.checkpoint.model, z, extra_args=extra, batch=64).cpu()})
            )
        return load_file(path)["x"]

    def draw(self, prior, budget: int, objective: str) -> torch.Tensor:
        settings = {"objective": objective, "batch": 100, "device": self.device, "disable": True}
        x = tdpm.sample(self.checkpoint.model, prior, steps=budget, seed=self.seeds, extra_args=self.extra, **settings)
        return x.cpu()


def planned(bench: Bench, folder: Path):
    """The arm's prior with plans; kept in ``NAME/planned.safetensors``."""
    path, source = folder / "planned.safetensors", folder / "prior.safetensors"
    if path.exists() and path.stat().st_mtime > source.stat().st_mtime:
        return tdpm.load_prior(path, bench.device).bind(bench.checkpoint.model, bench.checkpoint.fingerprint)
    prior = tdpm.load_prior(source, bench.device).bind(bench.checkpoint.model, bench.checkpoint.fingerprint)
    data = load_pictures(bench.args.data, limit=5000)
    classes = bench.checkpoint.num_classes
    for objective in ("fidelity",) if prior.coupled else ("quality",):
        trained = dict(prior.plans.get(objective, {}))
        missing = [b for b in BUDGETS if b - prior.prior_nfe not in trained]
        if missing:
            settings = {"objective": objective, "num_classes": classes, "progress": False}
            tdpm.calibrate(prior, bench.checkpoint.model, missing, data=data, **settings)
    tdpm.save_prior(prior, path)
    return prior


def judged(bench: Bench, name: str) -> dict:
    """One arm: its prior's facts and a row per budget and objective."""
    folder = phase_folder(bench.args, name)
    prior = planned(bench, folder)
    rows = []
    for objective in sorted(prior.plans):
        for budget in BUDGETS:
            x = bench.draw(prior, budget, objective)
            plan = prior.plan_for(budget - prior.prior_nfe, objective)
            found = bench.judge.over_blocks(bench.judge.features(x), BLOCKS)
            row = {"objective": objective, "budget": budget, "nfe": plan.steps, "prior_nfe": prior.prior_nfe}
            row |= {"sigmas": list(plan.sigmas), "rmse": metrics.paired_rmse(x[: len(bench.own)], bench.own)}
            rows.append(row | {"measures": {key: records.estimate(value) for key, value in found.items()}})
    card = prior.card
    facts = {key: card[key] for key in ("added_parameters", "steps", "minutes", "pictures")}
    denoiser = sum(p.numel() for p in bench.checkpoint.model.parameters())
    facts |= {"kind": prior.kind, "bytes": (folder / "planned.safetensors").stat().st_size}
    facts["added_share"] = card["added_parameters"] / denoiser
    return {
        "arm": name,
        "flags": ARMS[name] if isinstance(ARMS[name], str) else "; then ".join(ARMS[name]),
        **facts,
        "rows": rows,
    }


def judge(args: argparse.Namespace) -> None:
    """Judge every trained arm; with ``--json``, all of them in one record."""
    args.out.mkdir(parents=True, exist_ok=True)
    bench, arms = Bench(args), []
    for name in [n for n in args.only if (phase_folder(args, n) / "prior.safetensors").exists()]:
        folder = phase_folder(args, name)
        of = f"{args.first_seed}-{args.samples}-{args.reference}"
        kept, prior = folder / f"judged-{of}.json", folder / "prior.safetensors"
        fresh = kept.exists() and kept.stat().st_mtime > prior.stat().st_mtime
        if not fresh:
            kept.write_text(json.dumps(judged(bench, name)))
        arms.append(json.loads(kept.read_text()))
    own, others = known()
    print(table(arms, own, others))
    if args.json:
        about = {"judge": bench.judge.name, "blocks": BLOCKS, "per_block": args.samples, "reference": args.reference}
        record = {"schema": "tdpm-learned/1", "command": records.command("learned.py", None), **about}
        record |= {"environment": records.environment(args.device), "checkpoint": bench.checkpoint.fingerprint}
        records.write({**record, "own60": own, "compared": others, "arms": arms}, args.json)


def known() -> tuple[dict, list[dict]]:
    """The checkpoint's own 60-evaluation run, and the rows to compare with, as `quality.py` recorded them."""
    record = records.read(QUALITY)
    wanted = {("tdpm:quality", 2), ("tdpm:quality", 3), ("tdpm:fidelity", 2), ("tdpm:fidelity", 3), ("rival:fd", 8)}
    keys = ("arm", "budget", "fd", "rmse", "coverage", "recall")
    rows = [{key: row[key] for key in keys} for row in record["rows"] if (row["arm"], row["budget"]) in wanted]
    return record["own60"], rows


def table(arms: list[dict], own: dict, others: list[dict]) -> str:
    """Markdown: one line per arm, budget and objective, after the lines that they are compared with."""
    long = f"Own 60-evaluation run: FD {own['fd']:.2f}, coverage {own['coverage']:.3f}, recall {own['recall']:.3f}"
    lines = [long, "",
             "| prior | added parameters | objective | evaluations | FD | coverage, recall (own run = 1) | rmse |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    names = {"tdpm": "closed form", "rival": "tuned k-diffusion"}
    for row in others:
        who, objective = row["arm"].split(":")
        share = [row[key] / own[key] for key in ("coverage", "recall")]
        cells = (names[who], "", objective, str(row["budget"]), f"{row['fd']:.2f}")
        lines.append(f"| {' | '.join(cells)} | {share[0]:.2f}, {share[1]:.2f} | {row['rmse']:.3f} |")
    for arm in arms:
        for row in arm["rows"]:
            m = row["measures"]
            share = [m[key]["mean"] / own[key] for key in ("coverage", "recall")]
            fd = f"{m['fd']['mean']:.2f} ± {m['fd']['sd'] or 0:.2f}"
            cells = (arm["arm"], f"{arm['added_share']:.1%}", row["objective"], str(row["budget"]), fd)
            lines.append(f"| {' | '.join(cells)} | {share[0]:.2f}, {share[1]:.2f} | {row['rmse']:.3f} |")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("train", "judge"))
    parser.add_argument("--only", nargs="+", choices=sorted(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument(
        "--data", type=Path, default=ASSETS / "fit.zip", help="pictures to learn from (default fit.zip)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "learned")
    parser.add_argument("--minutes", type=float, default=30, help="of training per phase and call (default 30)")
    parser.add_argument("--jobs", type=int, default=1, help="arms at a time (default 1)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--check-every", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help=f"of the judged pictures ({FIRST_SEED})")
    parser.add_argument("--reference", type=int, default=256, help="seeds that rmse is measured on (default 256)")
    parser.add_argument("--samples", type=int, default=2000, help="per block (default 2000)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    args.out, args.data = args.out.resolve(), args.data.resolve()
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    {"train": train, "judge": judge}[args.verb](args)


if __name__ == "__main__":
    main()
