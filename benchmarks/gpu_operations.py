"""Each fused operation against torch's own, on one GPU: right first, then fast.

Times in microseconds, medians:
  cold   the L2 cache is overwritten before every call; between two events, behind a long kernel, so that the cost of
         launching is hidden
  warm   one of many calls in a CUDA graph, inputs in the cache where they fit: as inside a captured trajectory
  eager  one of many calls from Python, launches included
The share is of what the same GPU reaches in the same run: of the bandwidth of a large copy (least bytes / cold time)
for norms and steps, of the rate of a large matrix product for attention. A backend whose error against float64 is more
than 1.5 times torch's, plus one rounding, gets no times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpm_ext.kernels import KernelError, attention, group_norm, reference, sampler_step, use_backend

OPERATIONS = {"group_norm": group_norm, "attention": attention, "sampler_step": sampler_step}
ARMS = {
    "group_norm": ("native", "triton"),
    "attention": ("sdpa", "triton", "xformers"),
    "sampler_step": ("reference", "triton"),
}
FLUSH = 256 << 20  # bytes: more than any L2
SLACK = 1.5


@dataclass(frozen=True)
class Case:
    """One call: operation, name, tensors and numbers, least bytes, floating point operations."""

    op: str
    name: str
    args: tuple
    options: dict
    least_bytes: int
    flops: int = 0


class Timer:
    """Times calls on one device. On a CPU the three ways are one: the clock around a call."""

    def __init__(self, device: torch.device, runs: int):
        self.device, self.runs = device, runs
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH if self.cuda else 1, dtype=torch.uint8, device=device)

    def all(self, call: Callable[[], object]) -> dict[str, float]:
        """{"cold_us", "warm_us", "eager_us"}."""
        for _ in range(3):
            call()
        if not self.cuda:
            us = self.eager(call)
            return {"cold_us": us, "warm_us": us, "eager_us": us}
        return {"cold_us": self.cold(call), "warm_us": self.warm(call), "eager_us": self.eager(call)}

    def cold(self, call: Callable[[], object]) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.runs)]
        for begin, end in pairs:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) * 1e3

    def warm(self, call: Callable[[], object], calls: int = 20) -> float:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        graph.replay()
        return self._between(graph.replay, max(3, self.runs // 5)) / calls

    def eager(self, call: Callable[[], object]) -> float:
        times = []
        for _ in range(max(3, self.runs // 5)):
            self._wait()
            begin = time.perf_counter()
            for _ in range(5):
                call()
            self._wait()
            times.append((time.perf_counter() - begin) / 5)
        return statistics.median(times) * 1e6

    def _between(self, call: Callable[[], object], runs: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(runs):
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def rates(timer: Timer, small: bool) -> dict[str, float]:
    """What this device reaches: {"copy_gb_s", "matmul_tflops"}."""
    n, side = (1 << 20, 256) if small else (1 << 28, 8192)
    dtype = torch.float16 if timer.cuda else torch.float32
    source = torch.empty(n, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, dtype=dtype, device=timer.device)
    copy = timer.all(lambda: target.copy_(source))["cold_us"]
    product = timer.all(lambda: square @ square)["warm_us"]
    return {"copy_gb_s": 2 * n / copy / 1e3, "matmul_tflops": 2 * side**3 / product / 1e6}


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """The calls: shapes of Stable Diffusion 1.5, its decoder and k-diffusion's CIFAR network; or tiny ones."""
    make = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device=device).to(dtype)

    for channels, side, groups, act in NORMS[:1] if small else NORMS:
        side = 4 if small else side
        rows = {key: randn(1, channels) * 0.2 for key in ("pre_add", "scale", "shift")}
        for layout in (torch.contiguous_format, torch.channels_last):
            x = randn(1, channels, side, side).contiguous(memory_format=layout)
            name = f"{channels}x{side}x{side} {'nhwc' if layout is torch.channels_last else 'nchw'} {act}"
            yield Case("group_norm", name, (x, groups), {**rows, "act": act}, 2 * x.numel() * x.element_size())
    for heads, queries, keys, dim in ATTENTIONS[:1] if small else ATTENTIONS:
        queries, keys = (16, 16) if small else (queries, keys)
        q, k, v = (randn(1, length, heads, dim).transpose(1, 2) for length in (queries, keys, keys))
        least = 2 * (q.numel() + k.numel()) * q.element_size()
        yield Case(
            "attention", f"{heads}x{queries}x{keys}, d {dim}", (q, k, v), {}, least, 4 * heads * queries * keys * dim
        )
    for shape in STEPS[:1] if small else STEPS:
        x, denoised, previous = (randn(*shape) for _ in range(3))
        options = {"previous": (previous,), "a": 0.7, "b": 0.5, "c": (-0.2,)}
        yield Case("sampler_step", "x".join(map(str, shape)), (x, denoised), options, 4 * x.numel() * x.element_size())


NORMS = (  # channels, side, groups, activation
    (320, 64, 32, "silu"),
    (640, 32, 32, "silu"),
    (1280, 16, 32, "silu"),
    (2560, 8, 32, "silu"),
    (512, 256, 32, "silu"),  # a decoder
    (128, 32, 4, "gelu"),
    (512, 8, 16, "gelu"),
)
ATTENTIONS = (  # heads, queries, keys, head dimension
    (8, 4096, 4096, 40),
    (8, 4096, 77, 40),
    (8, 1024, 1024, 80),
    (8, 256, 256, 160),
    (4, 256, 256, 64),
    (10, 4096, 4096, 64),
)
STEPS = ((1, 4, 64, 64), (16, 3, 32, 32), (4, 4, 128, 128))


def exact(case: Case) -> Tensor:
    """The result in float64."""

    def wide(value):
        if isinstance(value, Tensor):
            return value.double()
        return tuple(map(wide, value)) if isinstance(value, tuple) else value

    options = {key: wide(value) for key, value in case.options.items()}
    found = getattr(reference, case.op)(*wide(case.args), **options)
    return found[0] if isinstance(found, tuple) else found


def measure(device: torch.device, dtype: torch.dtype, *, runs: int = 100, small: bool = False) -> dict:
    """{"rates": ..., "rows": [one per case and backend]}."""
    timer = Timer(device, runs)
    reached, rows = rates(timer, small), []
    with torch.inference_mode():
        for case in cases(device, dtype, small):
            rows += _rows(case, timer, reached, dtype)
    return {"rates": reached, "rows": rows}


def _rows(case: Case, timer: Timer, reached: dict[str, float], dtype: torch.dtype) -> Iterator[dict]:
    truth = exact(case)
    own = None
    for backend in ARMS[case.op]:
        row = {"op": case.op, "case": case.name, "dtype": str(dtype).removeprefix("torch."), "backend": backend}
        row |= dict.fromkeys(("error", "cold_us", "warm_us", "eager_us", "share", "why_not"))
        try:
            error = _error(case, backend, truth)
        except KernelError as refused:
            own_line = (line.strip() for line in str(refused).splitlines() if line.strip().startswith(f"{backend}:"))
            yield row | {"why_not": next(own_line, str(refused))[:300]}
            continue
        own = error if own is None else own
        row["error"] = error
        limit = SLACK * own + 2 * torch.finfo(dtype).eps * truth.abs().max().item()
        if not error <= limit:
            yield row | {"why_not": f"wrong: error {error:.3g}, allowed {limit:.3g}"}
            continue
        with use_backend(backend, case.op):
            row |= timer.all(lambda: OPERATIONS[case.op](*case.args, **case.options))
        yield row | {"share": _share(case, row, reached)}


def _error(case: Case, backend: str, truth: Tensor) -> float:
    with use_backend(backend, case.op):
        found = OPERATIONS[case.op](*case.args, **case.options)
    found = found[0] if isinstance(found, tuple) else found
    return (found.double() - truth).abs().max().item()


def _share(case: Case, row: dict, reached: dict[str, float]) -> float:
    if case.flops:
        return case.flops / row["warm_us"] / 1e6 / reached["matmul_tflops"]
    return case.least_bytes / row["cold_us"] / 1e3 / reached["copy_gb_s"]
