"""How long ``import tdpm_ext`` takes beyond ``import torch``: medians over fresh interpreters.

    python benchmarks/import_time.py --runs 9

Each run is one new process that times ``import torch`` and then ``import tdpm_ext``, with the file cache warm (one
run before is thrown away). The second figure is what the package costs somebody who uses torch anyway; numpy,
safetensors and tqdm count as part of it where torch has not loaded them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

TIMED = """
from time import perf_counter
start = perf_counter()
import torch
between = perf_counter()
import tdpm_ext
print(between - start, perf_counter() - between, torch.__version__, tdpm_ext.__version__)
"""


def measure(runs: int) -> dict:
    """Medians in seconds over ``runs`` >= 1 processes, after one that is thrown away."""
    rows = []
    for _ in range(runs + 1):
        done = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"import tdpm_ext failed:\n{done.stderr}")
        rows.append(done.stdout.split())
    without = [float(row[0]) for row in rows[1:]]
    beyond = [float(row[1]) for row in rows[1:]]
    return {
        "runs": runs,
        "torch_s": statistics.median(without),
        "with_tdpm_ext_s": statistics.median(a + b for a, b in zip(without, beyond, strict=True)),
        "beyond_torch_s": statistics.median(beyond),
        "beyond_torch_min_s": min(beyond),
        "beyond_torch_max_s": max(beyond),
        "torch": rows[0][2],
        "tdpm_ext": rows[0][3],
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time import tdpm_ext beyond import torch, in fresh interpreters.")
    parser.add_argument("--runs", type=int, default=9, help="processes measured (default 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error(f"--runs {args.runs}: at least 1")
    result = measure(args.runs)
    print(f"import torch                 {result['torch_s']:.3f} s")
    print(f"import torch, then tdpm_ext  {result['with_tdpm_ext_s']:.3f} s")
    spread = f"{result['beyond_torch_min_s']:.3f} to {result['beyond_torch_max_s']:.3f}"
    print(f"beyond torch                 {result['beyond_torch_s']:.3f} s  ({spread}; median of {args.runs} processes)")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        draft = args.json.with_name(f".{args.json.name}.{os.getpid()}")
        draft.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, args.json)


if __name__ == "__main__":
    main()
