"""Which backend does a call: constraints checked before it, reasons given, a request honoured or refused.

``select`` is a pure function of `Facts`. Backends of each operation, in words:

- "reference": the definition in plain torch, float32 inside; differentiable, and what `torch.compile` fuses.
- "native" (group_norm, sampler_step) and "sdpa" (attention): torch's own operations with fewest passes, in the input's
  dtype.
- "triton": the kernels here, NVIDIA GPUs from compute capability 8.0 up.
- "xformers" (attention): its memory-efficient kernel.

Environment, read once: ``TDPM_KERNELS`` = auto | off (torch's own kernels only) | reference | triton;
``TDPM_ATTENTION`` = auto | sdpa | triton | xformers, which goes before it for attention; ``TDPM_GRAPHS`` = 0 | 1;
``TDPM_KERNELS_STRICT=1`` makes an error of what is otherwise done in another way after something went wrong: a broken
installation of Triton, a graph that cannot be captured.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import torch

from tdpm_ext.kernels.attention_tiles import MIN_CC, PARTS
from tdpm_ext.kernels.facts import SWITCHES, Facts, KernelError, Switches, switches, unavailable

log = logging.getLogger("tdpm_ext.kernels")

BACKENDS = ("auto", "reference", "native", "triton", "sdpa", "xformers")
BACKENDS_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "group_norm": ("triton", "native", "reference"),
        "attention": ("triton", "xformers", "sdpa", "reference"),
        "sampler_step": ("triton", "native", "reference"),
    }
)
OPS = tuple(BACKENDS_OF)
ATTENTION, STEP = ("attention",), ("sampler_step",)

HEAD_DIMS = tuple(PARTS)
EXACT = (torch.float32, torch.float64)  # where the reference computes in the input's own dtype
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A Triton launch costs the CPU about 12 us, an operation of torch about 5 (reported figures): below some size the GPU
# waits for launches, and torch's two or three cost no more. An estimate, to be replaced by a measurement.
NORM_BYTES = 1 << 20


class Choice(NamedTuple):
    """The backend, and a reason for every backend of the operation: why it was taken, or why it was not."""

    backend: str
    reasons: Mapping[str, str]


class Constraint(NamedTuple):
    """What keeps a backend from doing a call: where ``broken(facts)`` holds, ``reason`` (formatted with the facts)."""

    backend: str
    broken: Callable[[Facts], bool]
    reason: str
    ops: tuple[str, ...] = OPS


CONSTRAINTS = (
    Constraint("triton", lambda f: f.device != "cuda", "needs CUDA tensors, these are on {f.device}"),
    Constraint("triton", lambda f: f.device == "cuda" and not f.cc, "no CUDA GPU answers"),
    Constraint(
        "triton",
        lambda f: 0 < f.cc < MIN_CC,
        f"needs compute capability {MIN_CC / 10}, this GPU has {{f.capability}}",
    ),
    Constraint("triton", lambda f: f.dtype not in DTYPES, "takes float32, float16 and bfloat16, not {f.type_name}"),
    Constraint("triton", lambda f: f.needs_grad, "has no backward, and gradients are needed"),
    Constraint("triton", lambda f: f.compiling, "has no place under torch.compile, which fuses the definition"),
    Constraint(
        "triton",
        lambda f: f.head_dim not in HEAD_DIMS,
        f"has head dimensions {', '.join(map(str, HEAD_DIMS))}, not {{f.head_dim}}",
        ATTENTION,
    ),
    Constraint("xformers", lambda f: f.device != "cuda", "needs CUDA tensors, these are on {f.device}"),
    Constraint("xformers", lambda f: f.dtype not in DTYPES, "takes float32, float16 and bfloat16, not {f.type_name}"),
    Constraint("xformers", lambda f: f.needs_grad, "is called without a backward, and gradients are needed"),
    Constraint("xformers", lambda f: f.compiling, "is not traced by torch.compile"),
    Constraint("native", lambda f: f.mixed, "takes parameters of the input's dtype only"),
    Constraint("native", lambda f: f.needs_grad, "works in place, and gradients are needed", STEP),
    Constraint("native", lambda f: f.dtype not in EXACT, "would round {f.type_name} after each operation", STEP),
)


def violations(op: str, backend: str, facts: Facts) -> tuple[str, ...]:
    """Every reason why ``backend`` cannot do this call; empty if it can."""
    rules = [rule for rule in CONSTRAINTS if rule.backend == backend and op in rule.ops]
    found = [reason for name, reason in facts.unavailable if name == backend]
    found += [rule.reason.format(f=facts) for rule in rules if rule.broken(facts)]
    found += facts.refused if backend == "triton" else ()
    return tuple(dict.fromkeys(found))


@lru_cache(maxsize=4096)
def select(op: str, facts: Facts) -> Choice:
    """The backend for one call. Pure: it looks at nothing but its arguments.

    Raises:
        KernelError: ``facts.request`` names a backend that cannot do the call; the message has every reason.
    """
    broken = {backend: violations(op, backend, facts) for backend in BACKENDS_OF[op]}
    if facts.request != "auto":
        if facts.request not in broken:
            raise KernelError(f"{op} has no backend {facts.request!r}: give auto, {', '.join(broken)}")
        if broken[facts.request]:
            raise KernelError(_refusal(op, facts, broken))
        return Choice(facts.request, _reasons(broken, facts.request, "asked for"))
    backend, why = _AUTO[op](facts, {name for name, reasons in broken.items() if not reasons})
    return Choice(backend, _reasons(broken, backend, why))


def _reasons(broken: dict[str, tuple[str, ...]], taken: str, why: str) -> Mapping[str, str]:
    said = {name: "; ".join(reasons) or f"could, but {taken}: {why}" for name, reasons in broken.items()}
    return MappingProxyType({**said, taken: why})


def _refusal(op: str, facts: Facts, broken: dict[str, tuple[str, ...]]) -> str:
    size = f", head dimension {facts.head_dim}" if op == "attention" else ""
    lines = [f"{op} on {facts.device}, {facts.type_name}{size}: {facts.request!r} was asked for and cannot do it"]
    lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in broken.items() if reasons]
    possible = ", ".join(name for name, reasons in broken.items() if not reasons)
    return "\n".join([*lines, f"  possible here: auto, {possible} (use_backend, TDPM_KERNELS, TDPM_ATTENTION)"])


# What "auto" takes, among the backends that can do the call


def _auto_group_norm(facts: Facts, able: set[str]) -> tuple[str, str]:
    if facts.needs_grad or facts.compiling:
        return "reference", "gradients are needed" if facts.needs_grad else "torch.compile fuses it"
    native = "native" if "native" in able else "reference"
    if "triton" not in able:
        return native, "the kernels cannot do this call" if facts.device == "cuda" else "not on a GPU"
    if facts.capturing:
        return "triton", "in a CUDA graph launches are free, and it moves fewest bytes"
    if facts.layout == "channels_last" and not facts.native_nhwc:
        return "triton", "torch's own GroupNorm would undo channels_last"
    if facts.nbytes >= NORM_BYTES:
        return "triton", f"{NORM_BYTES >> 20} MiB or more: one pass over the memory pays for the launch"
    return native, f"under {NORM_BYTES >> 20} MiB outside a CUDA graph launches dominate"


def _auto_attention(facts: Facts, able: set[str]) -> tuple[str, str]:
    if facts.table not in ("", "sdpa") and facts.table in able:
        return facts.table, "first in the committed measurements"
    return "sdpa", "no measurement puts another one first"


def _auto_sampler_step(facts: Facts, able: set[str]) -> tuple[str, str]:
    if "triton" in able:
        return "triton", "one launch instead of several"
    if facts.needs_grad or facts.compiling:
        return "reference", "gradients are needed" if facts.needs_grad else "torch.compile fuses it"
    plain = "native" if "native" in able else "reference"
    return plain, "the kernels cannot do this call" if facts.device == "cuda" else "not on a GPU"


_AUTO = {"group_norm": _auto_group_norm, "attention": _auto_attention, "sampler_step": _auto_sampler_step}


# What was asked for

_overrides: ContextVar[Mapping[str, str] | None] = ContextVar("tdpm_ext_kernels_backends", default=None)


@contextlib.contextmanager
def use_backend(name: str, op: str | None = None) -> Iterator[None]:
    """Ask for one backend inside a ``with`` block, in this thread or task; the innermost block counts.

    A call that the backend cannot do then raises `KernelError` instead of being done by another one. Code under
    ``torch.compile`` is always decomposed into plain torch, whatever is asked for.

    Args:
        name: one of `BACKENDS`.
        op: "group_norm", "attention" or "sampler_step"; None asks for it wherever an operation has it.

    Raises:
        KernelError: no operation, or not this one, has such a backend.
    """
    if op is not None and op not in OPS:
        raise KernelError(f"use_backend: no operation {op!r}; there are {', '.join(OPS)}")
    having = [o for o in ((op,) if op else OPS) if name == "auto" or name in BACKENDS_OF[o]]
    if not having:
        known = ", ".join(BACKENDS if op is None else ("auto", *BACKENDS_OF[op]))
        raise KernelError(f"use_backend: no backend {name!r}{f' of {op}' if op else ''}; give one of {known}")
    token = _overrides.set({**(_overrides.get() or {}), **dict.fromkeys(having, name)})
    try:
        yield
    finally:
        _overrides.reset(token)


def requested(op: str) -> str:
    """What is asked for here and now: the innermost `use_backend`, else the environment."""
    inner = _overrides.get()
    return (inner and inner.get(op)) or _from_environment(switches())[op]


def requests() -> tuple[str, ...]:
    """`requested` of every operation: part of a CUDA graph's key."""
    return tuple(requested(op) for op in OPS)


@lru_cache
def _from_environment(found: Switches) -> Mapping[str, str]:
    base = {
        "auto": dict.fromkeys(OPS, "auto"),
        "off": {
            "group_norm": "native",
            "attention": "sdpa",
            "sampler_step": "reference",
        },
        "reference": dict.fromkeys(OPS, "reference"),
        # attention is often better left to torch: it has a switch of its own
        "triton": {"group_norm": "triton", "attention": "auto", "sampler_step": "triton"},
    }[found.TDPM_KERNELS]
    return base if found.TDPM_ATTENTION == "auto" else {**base, "attention": found.TDPM_ATTENTION}


# What was decided

_decisions: dict[tuple[str, str, str], None] = {}


def note(op: str, backend: str, why: str) -> None:
    """Log one decision the first time that it is taken, and keep it for `report`."""
    if (op, backend, why) not in _decisions:
        _decisions[op, backend, why] = None
        log.info("%s: %s (%s)", op, backend, why)


def decide(op: str, facts: Facts) -> str:
    """`select`, noted."""
    backend, reasons = select(op, facts)
    note(op, backend, reasons[backend])
    return backend


class Report(dict):
    """`report()`: plain data; ``str()`` of it is for people."""

    def __str__(self) -> str:
        lines = [f"GPU          {'; '.join(self['gpus']) or 'none'}"]
        for op, states in self["backends"].items():
            lines.append(f"{op:<12} asked for: {self['requests'][op]}")
            lines += [f"  {name:<10} {state}" for name, state in states.items()]
        lines += [f"{name}={value}" for name, value in self["environment"].items()]
        lines += [f"decided: {op}: {backend} ({why})" for op, backend, why in self["decisions"]]
        return "\n".join(lines)


def report() -> Report:
    """Backends of every operation with what keeps each from being used here, switches, and decisions so far.

    Imports Triton and xformers if they are installed. Availability is for the first GPU, in half precision but for the
    sampler's step.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capabilities = [torch.cuda.get_device_capability(i) for i in range(count)]
    gpus = [f"{torch.cuda.get_device_name(i)} (compute capability {a}.{b})" for i, (a, b) in enumerate(capabilities)]
    major, minor = capabilities[0] if capabilities else (0, 0)
    backends = {}
    for op in OPS:
        facts = Facts(
            op,
            device="cuda" if count else "cpu",
            cc=10 * major + minor,
            dtype=torch.float32 if op == "sampler_step" else torch.float16,
            head_dim=64 if op == "attention" else 0,
            unavailable=unavailable(),
        )
        backends[op] = {name: "; ".join(violations(op, name, facts)) or "can be used here" for name in BACKENDS_OF[op]}
    found = switches()
    return Report(
        gpus=gpus,
        backends=backends,
        requests={op: requested(op) for op in OPS},
        environment={name: getattr(found, name) for name in SWITCHES},
        decisions=[list(decision) for decision in _decisions],
    )
