"""Everything that only a GPU can show, in one command of at most ten minutes: ``make gpu``.

1. every test marked ``gpu``: a failure, or a single skipped one, fails the run (tests of xformers and of a second GPU
   may be skipped where there is none);
2. the same small calls under compute-sanitizer's memcheck and racecheck, where it is installed;
3. each operation against torch's own (gpu_operations.py), whole trajectories against eager, channels_last and
   torch.compile (gpu_trajectories.py), the shipped checkpoint from noise to pictures (gpu_sampling.py): no times for
   what is wrong, no speed-up for what does not agree.

Writes benchmarks/results/gpu.json and gpu.png. Lock the clocks first if you can (nvidia-smi -lgc); what they were is
in the report either way.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# without this folder, in which files have the names of packages that diffusers looks for
sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != HERE), str(ROOT)]

from benchmarks import gpu_operations, gpu_sampling, gpu_trajectories, kernel_figure, records  # noqa: E402
from benchmarks.networks import NETWORKS  # noqa: E402

SCHEMA = "tdpm-gpu/1"
NO_GPU = "make gpu: torch sees no CUDA GPU here, so nothing was run"
SMI = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "persistence_mode",
       "mig.mode.current", "temperature.gpu")  # fmt: skip
MINUTES = {"tests": 5, "sanitizer": 2}
WORKERS = 8  # most time goes into Triton's compilations
PARTS = ("tests", "sanitizer", "times")
NOT_RUN = {"passed": 0, "failed": 0, "skipped": 0, "optional": {}, "seconds": 0.0}
# Lacking these, a test has nothing to test; any other reason to skip fails the run.
OPTIONAL = ("xformers is not installed", "xformers cannot be used here", "needs a second GPU")


def tests() -> dict:
    """Run the tests marked gpu: {"passed", "failed", "skipped", "optional", "seconds"}.

    ``optional`` counts, by reason, tests of what a machine need not have; they are not among the skipped.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "junit.xml"
        workers = str(min(WORKERS, os.cpu_count() or 1))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "--ignore=tests/hosts",
            "-q",
            "-n",
            workers,
            f"--junitxml={log}",
        ]
        subprocess.run(command, cwd=ROOT, timeout=MINUTES["tests"] * 60)
        suite = ElementTree.parse(log).getroot().find("testsuite")
    count = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    reasons = Counter(entry.get("message") for entry in suite.iter("skipped"))
    optional = {reason: n for reason, n in reasons.items() if reason.startswith(OPTIONAL)}
    skipped = count["skipped"] - sum(optional.values())
    seconds = time.monotonic() - begin
    return {"passed": passed, "failed": failed, "skipped": skipped, "optional": optional, "seconds": seconds}


def sanitize() -> list[dict]:
    """Small calls under compute-sanitizer: one row per tool; [] where it is not installed."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        return []
    rows = []
    for tool in ("memcheck", "racecheck"):
        command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--small-calls"]
        env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else stray accesses hit memory of the cache
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=MINUTES["sanitizer"] * 60
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        summary = [line for line in lines if "SUMMARY" in line] or lines[-1:]
        rows.append({"tool": tool, "clean": done.returncode == 0, "says": summary[0][:300] if summary else ""})
    return rows


def small_calls() -> None:
    """Each kernel once, on small shapes: what runs under compute-sanitizer."""
    device = torch.device("cuda")
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float16):
            for case in gpu_operations.cases(device, dtype, small=True):
                with gpu_operations.use_backend("triton", case.op):
                    gpu_operations.OPERATIONS[case.op](*case.args, **case.options)
    torch.cuda.synchronize()


def device_facts() -> dict:
    """The card and what runs on it, as strings and numbers."""
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "packages": {name: records.version(name) for name in ("triton", "xformers", "diffusers", "k-diffusion")},
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith(("TDPM_", "TORCH", "CUDA_", "NVIDIA_TF32"))
        },
    }
    try:
        asked = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
        answers = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
        facts["nvidia_smi"] = dict(zip(SMI, answers, strict=False))
    except (OSError, subprocess.CalledProcessError, IndexError):
        facts["nvidia_smi"] = {}
    return facts


def measure(args: argparse.Namespace, argv: list[str] | None) -> dict:
    """The whole report; tests first, so that nothing wrong is timed."""
    from tdpm_ext.kernels import report as backends

    device, begin = torch.device("cuda"), time.monotonic()
    done = tests() if "tests" in args.parts else dict(NOT_RUN)
    record = {
        "schema": SCHEMA,
        "command": records.command("gpu.py", argv),
        "environment": records.environment(device),
        "device": device_facts(),
        "tests": done,
        "sanitizer": sanitize() if "sanitizer" in args.parts else [],
        "operations": {"rates": {}, "rows": []},
        "trajectories": [],
        "sampling": [],
    }
    if not done["failed"] and "times" in args.parts:
        record["operations"] = gpu_operations.measure(device, torch.float16, runs=args.runs)
        for name, batch in (("cifar10", 1), ("cifar10", 16), ("fashion-mnist", 1), ("sd15", 1)):
            if name in args.networks:
                rounds = args.runs if name != "sd15" else max(5, args.runs // 4)
                record["trajectories"] += gpu_trajectories.measure(name, batch, device, torch.float16, rounds=rounds)
        record["sampling"] = gpu_sampling.measure(device, rounds=max(5, args.runs // 4))
    record["backends"] = dict(backends())
    record["seconds"] = time.monotonic() - begin
    return record


def print_report(record: dict) -> None:
    """The record as tables."""
    device, rates = record["device"], record["operations"]["rates"]
    print(f"\n{device['name']}, torch {record['environment']['torch']}, {device['packages']}")
    print(f"gpu tests: {record['tests']}")
    for row in record["sanitizer"]:
        print(f"compute-sanitizer {row['tool']}: {'clean' if row['clean'] else 'ERRORS'}; {row['says']}")
    if not record["sanitizer"]:
        print("compute-sanitizer is not installed: not run")
    if rates:
        print(f"copy {rates['copy_gb_s']:.0f} GB/s, matrix product {rates['matmul_tflops']:.1f} TFLOP/s, both measured")
        print(f"{'us':46}{'backend':>10}{'cold':>9}{'warm':>9}{'eager':>9}{'share':>8}")
    for row in record["operations"]["rows"]:
        name = f"{row['op']} {row['case']}"
        if row["why_not"]:
            print(f"{name:46}{row['backend']:>10}  {row['why_not'][:90]}")
        else:
            times = "".join(f"{row[key]:9.1f}" for key in ("cold_us", "warm_us", "eager_us"))
            print(f"{name:46}{row['backend']:>10}{times}{row['share']:8.0%}")
    if record["trajectories"]:
        heads = "".join(f"{head:>9}" for head in ("p50", "p90", "p99"))
        print(f"{'ms per trajectory of 4 steps':32}{'batch':>6}{heads}{'first':>10}{'speed-up':>10}")
    for row in record["trajectories"]:
        times = "".join(f"{row[key]:9.2f}" for key in ("p50_ms", "p90_ms", "p99_ms"))
        gain = f"{row['speedup']:.2f}" if row["agrees"] else "disagrees"
        print(f"{row['network']:16}{row['arm']:16}{row['batch']:6}{times}{row['first_ms']:10.0f}{gain:>10}")
    if record["sampling"]:
        print("\n".join(gpu_sampling.lines(record["sampling"])))


def passed(record: dict) -> bool:
    """Tests, sanitizer and every comparison."""
    right = record["tests"]["failed"] == record["tests"]["skipped"] == 0 < record["tests"]["passed"]
    clean = all(row["clean"] for row in record["sanitizer"])
    wrong = [row for row in record["operations"]["rows"] if (row["why_not"] or "").startswith("wrong")]
    agree = all(row["agrees"] for row in record["trajectories"]) and all(row["runs"] for row in record["sampling"])
    return right and clean and not wrong and agree


def main(argv: list[str] | None = None) -> int:
    """Run all of it; 0 if all is well, 1 if something is wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="leave some out (then it fails)")
    parser.add_argument("--runs", type=int, default=200, help="timed runs of each (default: 200)")
    parser.add_argument("--json", type=Path, default=records.RESULTS / "gpu.json", help="write the record here")
    parser.add_argument("--small-calls", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if args.small_calls:
        small_calls()
        return 0
    record = measure(args, argv)
    records.write(record, args.json)
    kernel_figure.draw_times(record, args.json.with_suffix(".png"))
    print_report(record)
    return 0 if passed(record) else 1


if __name__ == "__main__":
    sys.exit(main())
