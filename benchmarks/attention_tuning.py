"""Which attention is fastest on this GPU: times every class of calls and proposes rows of the committed table.

    python benchmarks/attention_tuning.py                 # measure, print, write out/attention_table.json
    python benchmarks/attention_tuning.py --promote       # and put the rows into kernels/attention_table.json

SDPA stays first unless another backend takes at most 97 % of its median time on every call probed in a class, in
float16 and bfloat16, alone and as two pictures of a guided batch; the row keeps the probe with the smallest gain. Times
are those of one call of twenty in a CUDA graph, inputs in the cache where they fit, as inside a captured network; the
backends take turns. A backend whose error against float64 is more than twice SDPA's is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != ROOT / "benchmarks"), str(ROOT)]

from benchmarks import records  # noqa: E402
from benchmarks.gpu import device_facts  # noqa: E402
from tdpm_ext.kernels import KernelError, attention, attention_table, reference, use_backend  # noqa: E402
from tdpm_ext.kernels.attention_tiles import PARTS  # noqa: E402

LENGTHS = {"short": (64, 77), "medium": (256, 1024), "long": (4096,)}  # probed, by class of the table
CALLS = 20  # in one graph
DTYPES = (torch.float16, torch.bfloat16)
BATCHES = (1, 2)
HEADS = 8
SLACK = 2.0


def inputs(batch: int, queries: int, keys: int, dim: int, dtype: torch.dtype, masked: bool) -> tuple[Tensor, ...]:
    """q, k, v as projections leave them, [B, L, H, D] seen as [B, H, L, D], and a mask or None."""
    make = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, n, HEADS, dim, generator=make, device="cuda").to(dtype).transpose(1, 2)
        for n in (queries, keys, keys)
    )
    mask = torch.rand(batch, 1, 1, keys, generator=make, device="cuda") > 0.2 if masked else None
    return q, k, v, mask


def captured(backend: str, given: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
    """A graph of ``CALLS`` calls."""
    q, k, v, mask = given
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with use_backend(backend, "attention"):
        with torch.cuda.stream(stream):
            attention(q, k, v, mask=mask)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                attention(q, k, v, mask=mask)
    return graph


def timed(graphs: dict[str, torch.cuda.CUDAGraph], runs: int) -> dict[str, list[float]]:
    """Microseconds of one call, ``runs`` times; the graphs take turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(-3, runs):
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(begin.elapsed_time(end) * 1e3 / CALLS)
    return times


def usable(backend: str, given: tuple[Tensor, ...], truth: Tensor, own: float) -> bool:
    """Whether the backend does the call, and as exactly as SDPA."""
    q, k, v, mask = given
    try:
        with use_backend(backend, "attention"):
            found = attention(q, k, v, mask=mask)
    except KernelError:
        return False
    return _error(found, truth) <= SLACK * own


def _error(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth).abs().max().item()


def probe(shape: tuple[int, int, int, int], dtype: torch.dtype, masked: bool, runs: int) -> dict[str, list[float]]:
    """Times of all usable backends for one call; ``shape`` is batch, queries, keys, head dimension."""
    given = inputs(*shape, dtype, masked)
    q, k, v, mask = given
    truth = reference.attention(q.double(), k.double(), v.double(), mask=mask)
    with use_backend("sdpa", "attention"):
        own = _error(attention(q, k, v, mask=mask), truth)
    names = ["sdpa", *(b for b in attention_table.PROMOTED if usable(b, given, truth, own))]
    del truth
    return timed({name: captured(name, given) for name in names}, runs)


def classes(dims: list[int]) -> Iterator[tuple[int, str, str, bool]]:
    """All keys of the table: head dimension, class of queries, class of keys, masked."""
    return itertools.product(dims, LENGTHS, LENGTHS, (False, True))


def measure(dims: list[int], runs: int) -> list[dict]:
    """A row for every class of calls: its probes with all times, and the backend that won all of them, or None."""
    rows = []
    for dim, queries, keys, masked in tqdm(list(classes(dims)), desc="attention", unit="class"):
        probes = []
        for q_len, kv_len, batch, dtype in itertools.product(LENGTHS[queries], LENGTHS[keys], BATCHES, DTYPES):
            times = probe((batch, q_len, kv_len, dim), dtype, masked, runs)
            quantiles = {name: _quantiles(values) for name, values in times.items()}
            probes.append({"shape": [batch, HEADS, q_len, kv_len, dim], "dtype": str(dtype)[6:], "us": quantiles})
        row = {"head_dim": dim, "queries": queries, "keys": keys, "masked": masked}
        rows.append({**row, "backend": winner(probes), "probes": probes})
    return rows


def _quantiles(values: list[float]) -> dict[str, float]:
    p50, p90 = (round(float(np.percentile(values, q)), 3) for q in (50, 90))
    return {"p50": p50, "p90": p90, "n": len(values)}


def gain(one: dict, backend: str) -> float:
    """The backend's median time over SDPA's; infinite where it cannot do the call."""
    return one["us"][backend]["p50"] / one["us"]["sdpa"]["p50"] if backend in one["us"] else float("inf")


def winner(probes: list[dict]) -> str | None:
    """The backend with the best worst gain, if that is one."""
    best = min(attention_table.PROMOTED, key=lambda b: max(gain(one, b) for one in probes))
    return best if max(gain(one, best) for one in probes) <= attention_table.GAIN else None


def table(rows: list[dict], command: str) -> dict:
    """The rows that won, as `tdpm_ext.kernels.attention_table` takes them."""
    facts = device_facts()
    major, minor = torch.cuda.get_device_capability()
    where = {
        "gpu": facts["name"],
        "driver": facts["nvidia_smi"].get("driver_version", "unknown"),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": records.version("triton") or "none",
        "cudnn": str(torch.backends.cudnn.version()),
        "date": date.today().isoformat(),
        "command": command,
    }
    promoted = []
    for row in rows:
        backend = row["backend"]
        if backend is None:
            continue
        least = max(row["probes"], key=lambda one: gain(one, backend))
        measured = {"shape": least["shape"], "dtype": least["dtype"], "sdpa_us": least["us"]["sdpa"]}
        key = {name: row[name] for name in ("head_dim", "queries", "keys", "masked")}
        measured |= {"backend_us": least["us"][backend]}
        promoted.append({"cc": 10 * major + minor, **key, "backend": backend, "measured": where | measured})
    return {"schema": attention_table.SCHEMA, "rows": promoted}


def main(argv: list[str] | None = None) -> int:
    """Measure and write; 0 if done, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", type=int, choices=list(PARTS), default=list(PARTS), help="head dimensions")
    parser.add_argument("--runs", type=int, default=60, help="timed replays of each graph (default: 60)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "attention_table.json", help="proposed table")
    parser.add_argument("--promote", action="store_true", help="replace this GPU generation's rows in the package's")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("attention_tuning: torch sees no CUDA GPU here, so nothing was measured", file=sys.stderr)
        return 2
    runs = max(args.runs, attention_table.SAMPLES)
    with torch.inference_mode():
        rows = measure(args.dims, runs)
    for row in rows:
        best = min(attention_table.PROMOTED, key=lambda b: max(gain(one, b) for one in row["probes"]))
        worst = max(gain(one, best) for one in row["probes"])
        print(
            f"d {row['head_dim']:<4} {row['queries']:>6} x {row['keys']:<6} {'masked' if row['masked'] else '':6} "
            f"{row['backend'] or 'sdpa':8} {best} takes {worst:.2f} of SDPA's time where it gains least"
        )
    proposed = table(rows, records.command("attention_tuning.py", argv))
    _write(proposed, args.out)
    if args.promote:
        _write(merged(proposed, attention_table.PATH), attention_table.PATH)
    return 0


def merged(proposed: dict, path: Path) -> dict:
    """``proposed`` with what the table at ``path`` holds for other GPU generations."""
    mine = {torch.cuda.get_device_capability()[0] * 10 + torch.cuda.get_device_capability()[1]}
    others = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["cc"] not in mine]
    return {**proposed, "rows": others + proposed["rows"]}


def _write(content: dict, path: Path) -> None:
    """Checked by the package's own reader, then put in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    attention_table.load(temporary)
    temporary.replace(path)
    print(f"{len(content['rows'])} rows: {path}")


if __name__ == "__main__":
    sys.exit(main())
