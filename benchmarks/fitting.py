"""What it costs to fit the closed-form priors, and to use them, on one core.

    python benchmarks/fitting.py --json out/fitting.json
    python benchmarks/fitting.py --only lowrank latents

Each row is one fresh process with one thread. What the columns are:
  seconds        one fit, wall clock, reading and checking the pictures included; making synthetic ones is not
  cpu            processor time of the same: what the wall clock would be with the core to itself
  peak           MiB resident at the highest point of the process, PyTorch itself included
  transport      milliseconds for a batch of 64 from sigma_max to three times the data's std, alone and with two
                 history points on the way: medians of rounds that take turns with one denoiser call of the same
                 batch, and the ratio of the two
Data: `gaussian` and `mixture` are fitted to the 10,000 pictures of assets/fashion-mnist (both halves, 28x28, ten
classes); `lowrank` to 50,000 pictures of 3x64x64 that are made batch by batch (64 directions and noise) and never
exist all at once; `latents` to 2,000 of 4x128x128, `small latents` to 4,000 of 4x64x64, made likewise.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import records, timing  # noqa: E402
from tdpm_ext import fit_prior, load_prior, open_checkpoint, save_prior  # noqa: E402
from tdpm_ext.pictures import Pictures, load_pictures  # noqa: E402

ASSETS = ROOT / "assets" / "fashion-mnist"
STREAMS = {  # name -> pictures, shape, batch, rank of the prior
    "lowrank": (50_000, (3, 64, 64), 250, 256),
    "small latents": (4_000, (4, 64, 64), 250, 256),
    "latents": (2_000, (4, 128, 128), 125, 256),
}
NAMES = ("gaussian", "mixture", *STREAMS, "transport")
LIMITS = {"gaussian": 20.0, "mixture": 60.0}  # seconds
MEMORY_LIMIT, SHARE_LIMIT = 4096.0, 0.25  # MiB while streaming; of one denoiser call
DIRECTIONS, NOISE = 64, 0.05
HISTORY = (1.6, 2.56)


class Synthetic:
    """Batches [B, *shape] of low-rank pictures and noise, made on demand; ``seconds`` (cpu and wall) spent making."""

    def __init__(self, count: int, shape: tuple[int, ...], batch: int, seed: int = 0):
        self.count, self.shape, self.batch = count, shape, batch
        self.generator = torch.Generator().manual_seed(seed)
        scale = 0.5 / math.sqrt(DIRECTIONS)
        self.mix = torch.randn(DIRECTIONS, math.prod(shape), generator=self.generator) * scale
        self.wall = self.cpu = 0.0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for k in range(0, self.count, self.batch):
            wall, cpu = time.perf_counter(), time.process_time()
            rows = min(self.batch, self.count - k)
            x = torch.randn(rows, DIRECTIONS, generator=self.generator) @ self.mix
            x += NOISE * torch.randn(x.shape, generator=self.generator)
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu
            yield x.reshape(rows, *self.shape)


def all_pictures() -> Pictures:
    """Both halves of the pictures in the repository."""
    halves = [load_pictures(ASSETS / name) for name in ("fit.zip", "eval.zip")]
    labels = torch.cat([half.labels for half in halves])
    return Pictures(torch.cat([half.images for half in halves]), labels, halves[0].classes)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def measure_fit(name: str, keep: Path | None = None) -> dict:
    """Fit one prior; one row of the report."""
    if name in STREAMS:
        count, shape, batch, rank = STREAMS[name]
        source, kind, options = Synthetic(count, shape, batch), "lowrank", {"rank": rank}
        data = iter(source)
    else:
        data, source, kind, options = all_pictures(), None, name, {}
    wall, cpu = time.perf_counter(), time.process_time()
    prior = fit_prior(kind, data, progress=False, **options)
    row = {"name": name, "kind": kind, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    if source is not None:
        row["seconds"] -= source.wall
        row["cpu_seconds"] -= source.cpu
        row["making_seconds"] = source.wall
    if keep:
        save_prior(prior, keep)
    row |= {"pictures": prior.card["pictures"], "shape": list(prior.shape), "peak_mib": peak_mib()}
    row |= {"axes": prior.tensors["basis"].shape[1], "components": prior.components}
    return row | {"data_std": prior.card["data_std"]}


def measure_transport(checkpoint: str, batch: int, rounds: int, folder: Path) -> list[dict]:
    """The draw of each kind of prior as a share of one denoiser call, for one batch."""
    opened, clock = open_checkpoint(checkpoint), timing.Clock(torch.device("cpu"))
    z = torch.randn(batch, *opened.shape, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(batch) % 10
    sigma = torch.full([batch], 3.0)
    arms = {"denoiser": lambda: opened.model(3 * z, sigma, class_cond=classes if opened.num_classes else None)}
    for name in ("gaussian", "mixture"):
        prior = load_prior(folder / f"{name}.safetensors")
        cut = 3.0 * prior.card["data_std"]
        levels = tuple(h * cut for h in HISTORY)
        for cond in (None, classes) if name == "mixture" else (None,):
            label = name if cond is None else f"{name}, class_cond"
            arms[label] = lambda p=prior, s=cut, c=cond: p.sample(z, s, class_cond=c)
            arms[f"{label}, history"] = lambda p=prior, s=cut, h=levels, c=cond: p.start(z, s, h, class_cond=c)
    with torch.no_grad():
        times = timing.interleave(arms, clock, rounds, 2)
    rows = {name: {"name": name, "batch": batch, **timing.summary(values)} for name, values in times.items()}
    for row in rows.values():
        row["share_of_a_call"] = row["p50_ms"] / rows["denoiser"]["p50_ms"]
    return list(rows.values())


def in_a_fresh_process(name: str, args: argparse.Namespace, folder: Path) -> dict | list[dict]:
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    command += ["--checkpoint", args.checkpoint, "--rounds", str(args.rounds), "--batch", str(args.batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"measuring {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def print_fit(row: dict) -> None:
    line = f"{row['name']:14} {row['pictures']:>6} x {'x'.join(map(str, row['shape'])):10} {row['seconds']:7.1f} s"
    line += f"  cpu {row['cpu_seconds']:6.1f} s  peak {row['peak_mib']:6.0f} MiB  {row['axes']} axes"
    line += f", {row['components']} components" if row["components"] else ""
    if row["name"] in LIMITS:
        line += f"  (limit {LIMITS[row['name']]:.0f} s)"
    elif row["name"] in STREAMS:
        line += f"  (limit {MEMORY_LIMIT:.0f} MiB; making the pictures took {row['making_seconds']:.1f} s more)"
    print(line, flush=True)


def print_transport(rows: list[dict]) -> None:
    for row in rows:
        line = f"{row['name']:28} batch {row['batch']}  p50 {row['p50_ms']:7.1f} ms  p90 {row['p90_ms']:7.1f} ms"
        share = f"  {row['share_of_a_call']:6.1%} of a denoiser call" if row["name"] != "denoiser" else ""
        print(line + share)
    print(f"(limit {SHARE_LIMIT:.0%} of a denoiser call)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time fitting and drawing of the closed-form priors on one core.")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="measure these alone")
    parser.add_argument("--checkpoint", default=str(ASSETS / "denoiser.safetensors"), help="denoiser to compare with")
    parser.add_argument("--batch", type=int, default=64, help="pictures per draw (default 64)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of drawing (default 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--measure", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("out") / "fitting", help="where fitted priors are left")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.measure == "transport":
        print(json.dumps(measure_transport(args.checkpoint, args.batch, args.rounds, args.folder)))
        return
    if args.measure:
        keep = None if args.measure in STREAMS else args.folder / f"{args.measure}.safetensors"
        print(json.dumps(measure_fit(args.measure, keep)))
        return
    names = list(args.only)
    if "transport" in names:  # it draws from these
        names += [n for n in ("gaussian", "mixture") if n not in names]
    environment = timing.environment(torch.device("cpu"))
    report = {"schema": "tdpm-fitting/1", "environment": environment, "fits": [], "transport": []}
    print(f"one core of a {report['environment']['name']} (CPU), load {report['environment']['load']}")
    for name in sorted(names, key=NAMES.index):
        measured = in_a_fresh_process(name, args, args.folder)
        if name == "transport":
            report["transport"] = measured
            print_transport(measured)
        else:
            report["fits"].append(measured)
            print_fit(measured)
    if args.json:
        records.write(report, args.json)
        print(f"figures: {args.json}")


if __name__ == "__main__":
    main()
