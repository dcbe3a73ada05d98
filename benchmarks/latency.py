"""Time tdpm against k-diffusion's sampler on one checkpoint, on a CPU or a CUDA GPU.

    python benchmarks/latency.py --checkpoint assets/fashion-mnist/denoiser.safetensors --json out/latency.json
    python benchmarks/latency.py --overhead            # the samplers themselves, on a model that does nothing
    python benchmarks/latency.py --network cifar10 --batch 1 16   # one call, random weights: eager, channels_last, ..

What each figure is (all in milliseconds; the device is named above the table, CPU figures say CPU):
  min/p50/p90    one whole call from noise to finished pictures, the prior included; the arms take turns in one
                 process in rotating order, after warm-up rounds that are thrown away
  per picture    p50 divided by the batch
  model, prior   inside the denoiser, inside the prior: medians of separate, instrumented runs
  outside        what is left of those runs, per denoiser call: the sampler itself
  peak           MiB: on CUDA allocated, on a CPU resident in the whole process (weights and libraries included)
  first          one picture, the first call in a fresh process, after loading; loading is given apart
  rmse           to the checkpoint's own 60-evaluation pictures from the same seeds (dpmpp_2m, Karras, rho 7)
  nfe            denoiser calls, counted
  us per step    (--overhead) one picture and a model that returns a stored tensor: the whole call, less the time
                 inside the prior, divided by the steps, so that what a call costs once is in it; "a further
                 step" leaves that out: the slope of the minima between the fewest and the most steps
Before anything is timed, the outputs are checked: repeated runs agree; a picture is the same alone and in a batch;
another route to the same pictures agrees (dpmpp_2m: a plain loop in arms.py; tdpm: `tdpm_ext.sample` by seed);
nobody overspends; tdpm keeps the seed's picture, with --objective fidelity at least as well as the rival at the
same budget. If a check fails nothing is timed, no speed-up is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import calls, records, timing  # noqa: E402
from benchmarks.arms import LIMITS, PRIOR_METHODS, RIVAL, Arm, Setup, check_outputs, time_overhead  # noqa: E402
from benchmarks.networks import NETWORKS  # noqa: E402
from tdpm_ext import calibrate, fit_prior, load_prior, open_checkpoint, save_prior  # noqa: E402


def break_down(arm: Arm, setup: Setup, z: torch.Tensor, runs: int) -> dict:
    """Where the time of one call goes: medians of ``runs`` instrumented calls."""
    clock = timing.Clock(setup.device)
    model, prior, whole = (timing.Stopwatch(clock) for _ in range(3))
    rows = []
    with prior.methods_of(setup.prior, [m for m in PRIOR_METHODS if hasattr(setup.prior, m)]):
        call = whole.wrap(arm.ready(replace(setup, model=model.wrap(setup.model)), z))
        for _ in range(runs):
            for watch in (model, prior, whole):
                watch.reset()
            call()
            rows.append((model.ms, prior.ms, (whole.ms - model.ms - prior.ms) / max(1, model.calls)))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return dict(zip(("model_ms", "prior_ms", "outside_ms_per_step"), medians, strict=True)) | {"nfe": model.calls}


def time_arms(arms: list[Arm], setup: Setup, batch: int, rounds: int, warmup: int, rmses: dict, seed: int):
    """One row of the report per arm, for one batch size."""
    z, clock = setup.noise(batch, seed), timing.Clock(setup.device)
    calls = {arm.name: arm.ready(setup, z) for arm in arms}
    times = timing.interleave(calls, clock, rounds, warmup, f"batch {batch}")
    rows = []
    for arm in arms:
        row = {"arm": arm.name, "batch": batch, "budget": arm.budget} | timing.summary(times[arm.name])
        row["p50_ms_per_picture"] = row["p50_ms"] / batch
        row |= break_down(arm, setup, z, 3)
        row |= {"peak_mib": timing.peak_memory(calls[arm.name], setup.device), "rmse_to_reference": rmses[arm.name]}
        rows.append(row)
    return rows


def speedups(rows: list[dict]) -> list[dict]:
    """Median against median, for every tdpm arm against every rival arm of the same batch."""
    pairs = [(a, b) for a in rows for b in rows if a["batch"] == b["batch"]]
    return [
        {"arm": a["arm"], "against": b["arm"], "batch": a["batch"], "ratio": b["p50_ms"] / a["p50_ms"]}
        for a, b in pairs
        if a["arm"].startswith("tdpm") and not b["arm"].startswith("tdpm")
    ]


def break_even(rows: list[dict], seconds: float | None) -> list[dict]:
    """Pictures after which ``seconds`` of fitting and calibrating are paid back, for every tdpm arm that is faster."""
    found = []
    for a in rows if seconds else ():
        for b in rows:
            saved = b["p50_ms_per_picture"] - a["p50_ms_per_picture"]
            if (
                a["arm"].startswith("tdpm")
                and not b["arm"].startswith("tdpm")
                and a["batch"] == b["batch"]
                and saved > 0
            ):
                pictures = int(-(-seconds * 1e3 // saved))
                found.append({"arm": a["arm"], "against": b["arm"], "batch": a["batch"], "pictures": pictures})
    return found


def first_pictures(arms: list[Arm], prior_path: Path, args: argparse.Namespace) -> list[dict]:
    """One fresh process per arm: time to load, and time of the very first picture."""
    rows = []
    for arm in arms:
        command = [sys.executable, __file__, "--first", arm.name, "--prior", prior_path, "--device", args.device]
        command += ["--checkpoint", args.checkpoint, "--cond-scale", args.cond_scale, "--objective", args.objective]
        command += ["--sigma-max", args.sigma_max, "--sigma-min", args.sigma_min, "--dtype", args.dtype]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the first-picture process of {arm.name} failed: {done.stderr.strip()[-400:]}")
        rows.append({"arm": arm.name} | json.loads(done.stdout.splitlines()[-1]))
    return rows


def shown(path: Path) -> str:
    """A path as a report shows it: from the repository's root where it lies below it."""
    path = path.absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def load_setup(args: argparse.Namespace) -> Setup:
    """Open the checkpoint and the prior; without ``--prior``, fit a Gaussian one and calibrate it."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    opened = open_checkpoint(args.checkpoint, args.device, None if dtype is torch.float32 else dtype)
    common = {"device": device, "classes": opened.num_classes, "cond_scale": args.cond_scale}
    common |= {"sigma_max": args.sigma_max, "sigma_min": args.sigma_min, "objective": args.objective}
    if args.prior:
        prior = load_prior(args.prior, args.device, expect_shape=opened.shape, expect_checkpoint=opened.fingerprint)
        seconds = prior.card.get(f"{args.objective}_seconds")
        return Setup(opened.model, prior, limit=LIMITS[dtype], seconds=seconds, **common)
    if device.type != "cpu":
        raise ValueError("on CUDA pass --prior FILE (make one with: tdpm fit, then tdpm calibrate)")
    begin = time.perf_counter()
    prior = fit_prior("gaussian", args.data, sigma_max=args.sigma_max, checkpoint=opened.fingerprint)
    setup = Setup(opened.model, prior, limit=LIMITS[dtype], **common)
    extra = {k: v for k, v in setup.arguments(1).items() if k != "class_cond"}
    data = args.data if args.objective == "quality" else None
    calibrate(
        prior, opened.model, args.budgets, objective=args.objective, data=data, extra_args=extra,
        num_classes=opened.num_classes, sigma_min=args.sigma_min, samples=16 if args.quick else None,
    )  # fmt: skip
    return replace(setup, seconds=time.perf_counter() - begin)


def print_report(report: dict) -> None:
    print(f"\n{report['label']}")
    failed = [check for check in report["checks"] if not check["ok"]]
    for check in failed:
        print(f"  DISAGREES  {check['arm']}: {check['check']}: {check['value']:.4g}, limit {check['limit']:.4g}")
    if report["checks"]:
        print(f"checks: {len(report['checks']) - len(failed)} of {len(report['checks'])} passed")
    if report["arms"]:
        print(
            "ms             batch  nfe  rmse       min      p50      p90  per picture   model   prior   outside  peak"
        )
    for r in report["arms"]:
        times = f"{r['min_ms']:8.1f} {r['p50_ms']:8.1f} {r['p90_ms']:8.1f} {r['p50_ms_per_picture']:12.2f}"
        inside = f"{r['model_ms']:8.1f} {r['prior_ms']:7.2f} {r['outside_ms_per_step']:9.3f}"
        peak = "-" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}"
        print(f"{r['arm']:14} {r['batch']:5} {r['nfe']:4}  {r['rmse_to_reference']:.3f} {times} {inside} {peak:>5}")
    for r in report["first_picture"]:
        times = f"{r['first_ms']:.0f} ms, after {r['load_ms']:.0f} ms of loading"
        print(f"first picture in a fresh process, {r['arm']}: {times}")
    rmse = {r["arm"]: r["rmse_to_reference"] for r in report["arms"]}
    for s in report["speedups"]:
        kept = f"rmse {rmse[s['arm']]:.3f} against {rmse[s['against']]:.3f}"
        print(f"{s['arm']} takes 1/{s['ratio']:.2f} of the time of {s['against']} at batch {s['batch']} ({kept})")
    for e in report.get("break_even", ()):
        against = f"{e['against']} at batch {e['batch']}"
        print(f"{e['arm']} has paid back its prior's fit after {e['pictures']} pictures, against {against}")
    if report["speedups"] and report["settings"]["objective"] == "quality":
        print("these are quality plans: they are meant to differ from the reference; quality.py gives their distances")
    for r in report["overhead"]:
        times = f"p50 {r['p50_us_per_step']:7.1f}, min {r['min_us_per_step']:7.1f}"
        print(f"{r['arm']:22} {r['steps']:3} steps: us per step {times}; a further step {r['further_step_us']:.1f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = ROOT / "assets" / "fashion-mnist"
    add = parser.add_argument
    add("--checkpoint", type=Path, default=assets / "denoiser.safetensors", help="any that tdpm_ext opens")
    add("--prior", type=Path, help="a prior for it; without one a Gaussian is fitted on --data and calibrated first")
    add("--data", type=Path, default=assets / "fit.zip", help="pictures for that (default: the shipped fit half)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the denoiser")
    add("--batch", type=int, nargs="+", default=[1, 16], help="pictures per call (default: 1 16)")
    add("--budgets", type=int, nargs="+", default=[4], help="evaluations of the tdpm arms (default: 4)")
    add("--against", type=int, nargs="+", help=f"{RIVAL} at these too (default: 8 50; 8 with --quick)")
    add("--objective", choices=("fidelity", "quality"), default="fidelity", help="which plan of the prior")
    add("--cond-scale", type=float, default=1.0, help="guidance, the same for all arms")
    add("--sigma-max", type=float, default=80.0)
    add("--sigma-min", type=float, default=0.02)
    add("--rounds", type=int, help="timed rounds (default 15; 3 with --quick; 300 with --overhead)")
    add("--seed", type=int, default=0, help="of the first picture")
    add("--json", type=Path, help="write the report here")
    add("--quick", action="store_true", help="3 rounds, small checks, no fresh processes: to see that it runs")
    add("--overhead", action="store_true", help="time the samplers alone, on a model that does nothing")
    add("--network", choices=sorted(NETWORKS), help="time one call of this network with random weights instead")
    add("--baselines", nargs="+", choices=calls.BASELINES, default=list(calls.BASELINES), help="for --network")
    add("--first", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.given = argv
    args.against = args.against or ([8] if args.quick else [8, 50])
    wrong = [n for n in (*args.batch, *args.budgets, *args.against, args.rounds or 1) if n < 1]
    if wrong:
        parser.error(f"batches, budgets and rounds are whole numbers of at least 1, not {wrong[0]}")
    return args


def new_report(args: argparse.Namespace, device: torch.device) -> dict:
    env = timing.environment(device)
    unit = f"CPU figures: {env['name']}, {env['threads']} thread(s)" if device.type == "cpu" else f"GPU: {env['name']}"
    unsaid = ("first", "json", "given", "network", "baselines")
    told = {k: v for k, v in vars(args).items() if k not in unsaid}
    settings = {k: shown(v) if isinstance(v, Path) else v for k, v in told.items()}
    report = {"schema": timing.SCHEMA_NAME, "label": f"{unit}; torch {env['torch']}", "environment": env}
    report |= {"mode": "overhead" if args.overhead else "latency", "settings": settings, "agreed": True}
    return report | {name: [] for name in ("checks", "arms", "first_picture", "speedups", "overhead")}


def measure(args: argparse.Namespace) -> dict:
    """The whole report: gate, timing, first pictures; or the overhead of the samplers alone."""
    report = new_report(args, torch.device(args.device))
    rounds = args.rounds or (300 if args.overhead else 3 if args.quick else 15)
    if args.overhead:
        prior = load_prior(args.prior) if args.prior else fit_prior("gaussian", args.data)
        report["overhead"] = time_overhead(prior, (4, 8, 20), rounds)
        return report
    setup = load_setup(args)
    arms = [Arm("tdpm", b) for b in args.budgets]
    arms += [Arm(RIVAL, b) for b in sorted({*args.budgets, *args.against})]
    report["checks"], rmses = check_outputs(arms, setup, 8 if args.quick else 16, args.seed)
    report["agreed"] = all(check["ok"] for check in report["checks"])
    if not report["agreed"]:
        return report
    if not args.quick:
        with tempfile.TemporaryDirectory() as folder:
            saved = args.prior or save_prior(setup.prior, Path(folder) / "prior.safetensors")
            report["first_picture"] = first_pictures(arms, saved, args)
    for batch in args.batch:
        report["arms"] += time_arms(arms, setup, batch, rounds, 1 if args.quick else 3, rmses, args.seed)
    report["speedups"] = speedups(report["arms"])
    report["break_even"] = break_even(report["arms"], setup.seconds)
    return report


def first(args: argparse.Namespace) -> int:
    """The child process: load, then time one arm's first picture."""
    begin = time.perf_counter()
    setup = load_setup(args)
    sampler, budget = args.first.split("@")
    call, loaded = Arm(sampler, int(budget)).ready(setup, setup.noise(1, args.seed)), time.perf_counter()
    milliseconds = timing.Clock(setup.device).time(call)
    print(json.dumps({"load_ms": (loaded - begin) * 1e3, "first_ms": milliseconds}))
    return 0


def network(args: argparse.Namespace) -> int:
    """One call of a network with random weights, by every baseline."""
    record = calls.measure(args)
    if args.json:
        records.write(record, args.json)
    print(calls.show(record))
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch sees no CUDA device here: use --device cpu")
        if args.first:
            return first(args)
        if args.network:
            return network(args)
        report = measure(args)
        if args.json:
            timing.write_report(report, args.json)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"latency: {error}", file=sys.stderr)
        return 2
    print_report(report)
    if not report["agreed"]:
        print("latency: the outputs disagree, so nothing was timed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
