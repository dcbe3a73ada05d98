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
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file, save

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import tdpm_ext as tdpm  # noqa: E402
from benchmarks import metrics, records  # noqa: E402
from benchmarks.judging import Judge  # noqa: E402
from benchmarks.rivals import noise_for, reference_run  # noqa: E402
from benchmarks.timing import Clock, interleave  # noqa: E402
from tdpm_ext.kernels import accelerate  # noqa: E402
from tdpm_ext.pictures import class_sequence, load_pictures  # noqa: E402
from tdpm_ext.training.state import write_atomically  # noqa: E402
from tdpm_ext.training_job import CLOCKS  # noqa: E402

ASSETS = ROOT / "assets" / "fashion-mnist"
BLOCKS, FIRST_SEED = 3, 1_000_000
BUDGETS = (2, 3)
QUALITY = ROOT / "benchmarks" / "results" / "quality-fashion-mnist-checkpoint.json"
# the paper's form: a clean picture and fresh noise, compared where the chain is cut
FRESH = "--sigma-init 1 --sigma-trunc 0.2 --noise fresh --sigma-low 0.1 --sigma-high 0.5 --label-dropout 0"
BRIEF = f"{FRESH} --lr 1e-4"
# a step of the checkpoint's own path, learned from its trajectories alone; they also fit the closed form it starts from
PATH = "--sigma-init 4.5 --sigma-trunc 1 --noise kept --adversarial 0 --regression 1 --teacher-steps 20"
SLOWER = "--lr 3e-5 --disc-lr 5e-4 --ema 0.995"  # a second phase: smaller steps, a longer mean
SOON = "--warmup 20"  # for runs of minutes
ARMS = {  # name -> flags of one phase, or of several that follow on each other
    "regression": (
        f"--kind shared {PATH} --teacher 7168 --lr 3e-4 --steps 401",
        f"--kind shared {PATH} --teacher 7168 --lr 1e-4 --ema 0.99 --steps 850",
        f"--kind shared {PATH} --teacher 10240 --lr 1e-4 --ema 0.99 --steps 1100",
        f"--kind shared {PATH} --teacher 10240 --lr 3e-5 --ema 0.995 --steps 1350",
    ),
    "regression-lora": f"--kind shared --rank 3 {PATH} --teacher 7168 --lr 1e-3 --steps 450",
    "regression-generator": f"--kind generator {PATH} --teacher 7168 --lr 1e-3 --steps 2000",
    "half-hour": f"--kind shared {BRIEF} --steps 772",  # the first phase of "shared" alone
    "shared": (f"--kind shared {BRIEF} --steps 772", f"--kind shared {FRESH} {SLOWER} --steps 1900"),
    "lora": f"--kind shared --rank 3 {FRESH} --lr 1e-3",
    # one phase each, to be compared at equal --minutes
    "relativistic": f"--kind shared {BRIEF} {SOON}",
    "generator": f"--kind generator {FRESH} {SOON} --lr 4e-4",
    "non-saturating": f"--kind shared {BRIEF} {SOON} --loss non_saturating",
    "transport": f"--kind shared {BRIEF} {SOON} --loss transport",
    "hybrid": f"--kind shared {BRIEF} {SOON} --regression 10 --teacher 512 --teacher-steps 20",
    "own-critic": f"--kind shared {BRIEF} {SOON} --critic own",
    "raw-shared": f"--kind raw-shared {BRIEF} {SOON}",
    "raw-generator": f"--kind raw-generator {FRESH} {SOON} --lr 4e-4",
}


def train_commands(name: str, args: argparse.Namespace) -> list[list[str]]:
    """The words after ``tdpm`` for each phase of an arm; flags given twice count as given last."""
    phases, commands = ARMS[name], []
    for k, flags in enumerate([phases] if isinstance(phases, str) else phases):
        words = ["train", str(ASSETS / "denoiser.safetensors"), "--disc-lr", "1e-3", "--ema", "0.98", *flags.split()]
        if "--adversarial 0" in flags:
            words += ["--teacher-folder", str(args.out / "teacher"), "--accelerate", "compile"]
        else:
            words += ["--data", str(args.data), "--base", str(ASSETS / "prior.safetensors")]
        words += ["--batch", str(args.batch), "--minutes", str(args.minutes), "--clock", args.clock]
        words += ["--device", args.device, "--check-every", str(args.check_every)]
        words += ["--out", str(phase_folder(args, name, k))]
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

    def accelerated(self, prior) -> ExitStack:
        """A context in which denoiser and prior are faster, and equal to rounding."""
        stack = ExitStack()
        for network in {self.checkpoint.model, getattr(prior, "network", None)} - {None}:
            stack.enter_context(accelerate(network, precision="compile"))
        return stack

    def draw(self, prior, budget: int, objective: str) -> torch.Tensor:
        settings = {"objective": objective, "batch": 100, "device": self.device, "disable": True}
        with self.accelerated(prior):
            model = self.checkpoint.model
            x = tdpm.sample(model, prior, steps=budget, seed=self.seeds, extra_args=self.extra, **settings)
        return x.cpu()


def planned(bench: Bench, folder: Path, part: str):
    """The arm's prior, or the closed form it starts from, with plans; kept in ``NAME/planned-PART.safetensors``."""
    path, source = folder / f"planned-{part}.safetensors", folder / f"{part}.safetensors"
    known = path.exists() and path.stat().st_mtime > source.stat().st_mtime
    prior = tdpm.load_prior(path if known else source, bench.device)
    if prior.prior_nfe:
        prior.bind(bench.checkpoint.model, bench.checkpoint.fingerprint)
    if known:
        return prior
    data = load_pictures(bench.args.data, limit=5000)
    classes = bench.checkpoint.num_classes
    for objective in ("fidelity",) if prior.coupled else ("quality",):
        trained = dict(prior.plans.get(objective, {}))
        missing = [b for b in BUDGETS if b - prior.prior_nfe not in trained]
        if missing:
            settings = {"objective": objective, "num_classes": classes, "progress": False}
            settings |= {"samples": 128} if objective == "fidelity" and prior.prior_nfe else {}
            with bench.accelerated(prior):
                tdpm.calibrate(prior, bench.checkpoint.model, missing, data=data, **settings)
    tdpm.save_prior(prior, path)
    return prior


@torch.no_grad()
def call_share(bench: Bench, prior) -> float:
    """Time of the prior's network over that of one denoiser call for the same pictures, neither accelerated."""
    z = noise_for(bench.seeds[:32], bench.checkpoint.shape).to(bench.device)
    cond = {"class_cond": bench.extra["class_cond"][: len(z)]}
    start, sigma = prior.begin(z, **cond), z.new_full([len(z)], prior.sigma_init)
    calls = {"prior": lambda: prior.emit(start, **cond), "own": lambda: bench.checkpoint.model(start.x, sigma, **cond)}
    times = interleave(calls, Clock(bench.device), rounds=5, warmup=1)
    return min(times["prior"]) / min(times["own"])


def judged(bench: Bench, name: str, part: str) -> dict:
    """One arm (part "prior"), or the closed form that it starts from ("base"): facts, and a row per budget and
    objective."""
    folder = phase_folder(bench.args, name)
    prior = planned(bench, folder, part)
    rows = []
    for objective in sorted(prior.plans):
        for budget in BUDGETS:
            x = bench.draw(prior, budget, objective)
            plan = prior.plan_for(budget - prior.prior_nfe, objective)
            found = bench.judge.over_blocks(bench.judge.features(x), BLOCKS)
            row = {"objective": objective, "budget": budget, "nfe": plan.steps, "prior_nfe": prior.prior_nfe}
            row |= {"sigmas": list(plan.sigmas), "rmse": metrics.paired_rmse(x[: len(bench.own)], bench.own)}
            rows.append(row | {"measures": {key: records.estimate(value) for key, value in found.items()}})
    card = {"added_parameters": 0, "steps": 0, "minutes": 0.0, **prior.card}
    facts = {key: card[key] for key in ("added_parameters", "steps", "minutes", "pictures")}
    denoiser = sum(p.numel() for p in bench.checkpoint.model.parameters())
    facts |= {"kind": prior.kind, "bytes": (folder / f"planned-{part}.safetensors").stat().st_size}
    facts["added_share"] = card["added_parameters"] / denoiser
    facts["call_share"] = call_share(bench, prior) if prior.prior_nfe else 0.0
    flags = ARMS[name] if isinstance(ARMS[name], str) else "; then ".join(ARMS[name])
    return {"arm": name if part == "prior" else f"{name}, its base alone", "flags": flags, **facts, "rows": rows}


def judge(args: argparse.Namespace) -> None:
    """Judge every trained arm; with ``--json``, all of them in one record."""
    args.out.mkdir(parents=True, exist_ok=True)
    bench, arms = Bench(args), []
    parts = [(name, part) for name in args.only for part in ("base", "prior")]
    for name, part in parts:
        folder = phase_folder(args, name)
        prior = folder / f"{part}.safetensors"
        kept = folder / f"judged-{part}-{args.first_seed}-{args.samples}-{args.reference}.json"
        if not prior.exists():
            continue
        if not kept.exists() or kept.stat().st_mtime < prior.stat().st_mtime:
            kept.write_text(json.dumps(judged(bench, name, part)))
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
             "| prior | added parameters | objective | evaluations | FD | coverage, recall (own run = 1) | rmse "
             "| its call / the denoiser's |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    names = {"tdpm": "closed form", "rival": "tuned k-diffusion"}
    for row in others:
        who, objective = row["arm"].split(":")
        share = [row[key] / own[key] for key in ("coverage", "recall")]
        cells = (names[who], "", objective, str(row["budget"]), f"{row['fd']:.2f}")
        lines.append(f"| {' | '.join(cells)} | {share[0]:.2f}, {share[1]:.2f} | {row['rmse']:.3f} | |")
    for arm in arms:
        for row in arm["rows"]:
            m = row["measures"]
            share = [m[key]["mean"] / own[key] for key in ("coverage", "recall")]
            fd = f"{m['fd']['mean']:.2f} ± {m['fd']['sd'] or 0:.2f}"
            cells = (arm["arm"], f"{arm['added_share']:.1%}", row["objective"], str(row["budget"]), fd)
            cells = (*cells, f"{share[0]:.2f}, {share[1]:.2f}", f"{row['rmse']:.3f}", f"{arm['call_share']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
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
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="of --minutes, as of `tdpm train`")
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
