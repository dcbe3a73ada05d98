"""The first thing to run: fit a prior for the shipped checkpoint and see what four evaluations give.

    python benchmarks/demo.py [--pictures 300] [--out out]

A Fashion-MNIST checkpoint, trained with k-diffusion, is sampled class by class from the same seeds: by its own
50-step run, by k-diffusion's best tuned sampler at 4 and 8 evaluations, and by `tdpm` at 4, with a prior fitted here
from 5,000 pictures. OUT receives grid.png, table.txt, table.json and prior.safetensors. The evaluation pictures are
others than those the prior was fitted on. Times are this machine's CPU, the prior's own cost included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import tdpm_ext as tdpm  # noqa: E402
from benchmarks import features as judges  # noqa: E402
from benchmarks import metrics, rivals  # noqa: E402
from tdpm_ext.grid import picture_grid, save_png  # noqa: E402
from tdpm_ext.kernels import accelerate  # noqa: E402
from tdpm_ext.pictures import load_pictures, to_uint8, to_unit  # noqa: E402

ASSETS = ROOT / "assets" / "fashion-mnist"
RESULTS = ROOT / "benchmarks" / "results" / "quality-fashion-mnist-checkpoint.json"
NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
BATCH = 50
SEEDS = {"fidelity": 40, "quality": 160}  # used in calibration


def tuned_rivals() -> dict[tuple[str, int], dict]:
    """k-diffusion's best sampler and settings per target and count, as the quality benchmark found them."""
    rows = json.loads(RESULTS.read_text())["rows"]
    return {(r["arm"].split(":")[1], r["budget"]): r for r in rows if r["arm"].startswith("rival:")}


def fit(checkpoint, pictures):
    """A mixture prior of the fit pictures, calibrated for four evaluations under both objectives."""
    start = time.time()
    prior = tdpm.fit_prior("mixture", pictures, checkpoint=checkpoint.fingerprint)
    seconds = {"fit": time.time() - start}
    for objective, samples in SEEDS.items():
        start = time.time()
        tdpm.calibrate(
            prior, checkpoint.model, (4,), objective=objective, data=pictures, samples=samples,
            num_classes=checkpoint.num_classes,
        )  # fmt: skip
        seconds[f"calibrate {objective}"] = time.time() - start
    return prior, seconds


def arms(checkpoint, prior, count: int):
    """(label, evaluations, function of (noise, extra_args, seeds)) for every row of the table."""
    best = tuned_rivals()

    def rival(budget, name, sigma_max, rho):
        def run(z, extra, seeds):
            model = checkpoint.model
            return rivals.run_rival(model, name, budget, sigma_max, rho, z, extra_args=extra, batch=len(z)).x

        return run

    def ours(objective):
        def run(z, extra, seeds):
            return tdpm.sample(
                checkpoint.model, prior, steps=4, seed=seeds, extra_args=extra, objective=objective, batch=len(z)
            )

        return run

    rows = [("dpmpp_2m, 50", 50, rival(50, "dpmpp_2m", 80.0, 7.0))]
    for budget in (8, 4):
        row = best["fd", budget]
        rows.append((f"{row['sampler']} tuned, {budget}", budget, rival(budget, *_setting(row))))
    rows.append(("tdpm quality, 4", 4, ours("quality")))
    rows.append(("tdpm fidelity, 4", 4, ours("fidelity")))
    return rows


def _setting(row: dict) -> tuple[str, float, float]:
    return row["sampler"], row["sigma_max"], row["rho"]


def sample(rows, shape, num_classes: int, count: int) -> tuple[dict, dict]:
    """Pictures and milliseconds per picture of every arm; arms take turns batch by batch."""
    pictures, times = {label: [] for label, *_ in rows}, {label: [] for label, *_ in rows}
    starts = range(0, count, BATCH)
    with tqdm(total=len(starts) * sum(nfe for _, nfe, _ in rows), desc="sampling", unit="call") as bar:
        for first in starts:
            seeds = list(range(first, min(first + BATCH, count)))
            z = rivals.noise_for(seeds, shape)
            extra = {"class_cond": torch.tensor(seeds) % num_classes}
            for label, nfe, run in rows:
                start = time.perf_counter()
                pictures[label].append(run(z, extra, seeds))
                times[label].append(1000 * (time.perf_counter() - start) / len(seeds))
                bar.update(nfe)
    return {k: torch.cat(v) for k, v in pictures.items()}, {k: float(np.median(v)) for k, v in times.items()}


def judge(rows, pictures: dict, times: dict, real: torch.Tensor, fitted: torch.Tensor, labels):
    """Table rows, and the floor: real pictures against real pictures at the same count."""
    net = judges.load_features(ASSETS / "features.safetensors")
    reference = judges.extract(net, real)
    count = len(next(iter(pictures.values())))
    standard, other = metrics.standardise(reference, judges.extract(net, fitted))
    floor = metrics.floor(standard, other, count, labels=labels).value
    table = []
    for label, nfe, _ in rows:
        x = pictures[label]
        standard, other = metrics.standardise(reference, judges.extract(net, x.clamp(-1, 1)))
        rmse = metrics.paired_rmse(x, pictures[rows[0][0]])
        fd = metrics.frechet_distance(other, standard)
        table.append({"arm": label, "nfe": nfe, "ms_per_picture": times[label], "fd": fd, "rmse_to_50": rmse})
    return table, floor


def show(table: list[dict], floor: float, count: int) -> str:
    lines = [
        f"FD-CNN128 against 5,000 pictures not used in fitting, N={count}: floor (real against real) {floor:.2f}",
        "rmse against the 50-evaluation picture of the same seed; ms per picture on this CPU, prior included",
        f"{'sampler, evaluations':22s} {'nfe':>4s} {'ms':>7s} {'FD':>7s} {'rmse':>7s}",
    ]
    for r in table:
        lines.append(f"{r['arm']:22s} {r['nfe']:4d} {r['ms_per_picture']:7.1f} {r['fd']:7.2f} {r['rmse_to_50']:7.3f}")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300, help="pictures per sampler (default 300)")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="where results go (default out/)")
    args = parser.parse_args(argv)
    if args.pictures < 20:
        raise SystemExit(f"--pictures {args.pictures}: give at least 20")
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = tdpm.open_checkpoint(ASSETS / "denoiser.safetensors")
    accelerate(checkpoint.model)  # equal to rounding, and the same for every row
    pictures = load_pictures(ASSETS / "fit.zip")
    prior, seconds = fit(checkpoint, pictures)
    tdpm.save_prior(prior, args.out / "prior.safetensors")
    rows = arms(checkpoint, prior, args.pictures)
    samples, times = sample(rows, checkpoint.shape, checkpoint.num_classes, args.pictures)
    real = to_unit(load_pictures(ASSETS / "eval.zip").images)
    table, floor = judge(rows, samples, times, real, to_unit(pictures.images), pictures.labels)
    grid = [[to_uint8(x) for x in samples[label][:20]] for label, *_ in rows]
    save_png(
        picture_grid(grid, [label for label, *_ in rows], [NAMES[i % 10] for i in range(20)]), args.out / "grid.png"
    )
    text = show(table, floor, args.pictures)
    (args.out / "table.txt").write_text(text + "\n")
    report = {"rows": table, "floor": floor, "pictures": args.pictures, "seconds": seconds, "device": "CPU"}
    (args.out / "table.json").write_text(json.dumps(report, indent=1) + "\n")
    print(", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    print(text)
    shown = args.out.relative_to(Path.cwd()) if args.out.is_relative_to(Path.cwd()) else args.out
    print(f"pictures: {shown / 'grid.png'}   table: {shown / 'table.txt'}   prior: {shown / 'prior.safetensors'}")


if __name__ == "__main__":
    main()
