"""A plan: how a budget of network evaluations is spent below ``sigma_trunc``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

MAX_STEPS = 1000
MAX_HISTORY = 2
MAX_WEIGHT = 100.0
FIELDS = ("sigmas", "orders", "history", "weights", "error")


@dataclass(frozen=True)
class Plan:
    """One row of a calibration table; the solver runs it as it stands.

    Attributes:
        sigmas: [n+1] noise std in data units, strictly decreasing; the first is ``sigma_trunc``, the last 0.
            n is the number of network evaluations.
        orders: [n] order of the multistep update at each step, 1 to 3.
        history: 0 to 2 sigmas above ``sigma_trunc``, nearest first, at which the prior's own denoised estimate
            seeds the multistep history.
        weights: [n] rows, each summing to 1: how a step mixes the newest, the previous and the older denoised
            estimate. Fitted by `calibrate`; empty: what ``orders`` says.
        error: expected error under the plan's objective; NaN when it was not measured.

    Raises:
        ValueError: a field breaks the rules above; the message says which and what was given.
    """

    sigmas: tuple[float, ...]
    orders: tuple[int, ...]
    history: tuple[float, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    error: float = math.nan

    def __post_init__(self):
        object.__setattr__(self, "sigmas", _numbers("sigmas", self.sigmas))
        object.__setattr__(self, "history", _numbers("history", self.history))
        object.__setattr__(self, "orders", _orders(self.orders))
        object.__setattr__(self, "error", _number("error", self.error))
        _check_sigmas(self.sigmas)
        object.__setattr__(self, "weights", _weights(self.weights, self.steps, len(self.history)))
        if len(self.orders) != self.steps:
            raise ValueError(f"plan has {len(self.orders)} orders for {self.steps} steps: give one per step")
        _check_history(self.history, self.sigma_trunc)

    @property
    def steps(self) -> int:
        """Network evaluations the plan makes."""
        return len(self.sigmas) - 1

    @property
    def sigma_trunc(self) -> float:
        """Where the chain is cut: the first sigma."""
        return self.sigmas[0]

    def to_json(self) -> dict:
        """A dict that ``json.dumps`` writes as standard JSON (an unmeasured error becomes null)."""
        return {
            "sigmas": list(self.sigmas),
            "orders": list(self.orders),
            "history": list(self.history),
            "weights": [list(row) for row in self.weights],
            "error": self.error if math.isfinite(self.error) else None,
        }

    @classmethod
    def from_json(cls, value: dict) -> Plan:
        """Read what ``to_json`` wrote. The value is untrusted: anything wrong raises ``ValueError``."""
        if not isinstance(value, dict):
            raise ValueError(f"a plan is a JSON object, not {type(value).__name__}")
        missing = [name for name in ("sigmas", "orders") if name not in value]
        unknown = sorted(str(name) for name in value if name not in FIELDS)
        if missing or unknown:
            raise ValueError(f"plan fields are {', '.join(FIELDS)}: missing {missing}, unknown {unknown[:5]}")
        fields = dict(value)
        if fields.get("error", math.nan) is None:
            fields["error"] = math.nan
        return cls(**fields)


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"plan {name} holds {value!r}: give a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"plan {name} holds a number too large for a float") from None


def _numbers(name: str, values) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"plan {name} is {type(values).__name__}: give a list of numbers")
    if len(values) > MAX_STEPS + 1:
        raise ValueError(f"plan {name} has {len(values)} entries: at most {MAX_STEPS + 1}")
    numbers = tuple(_number(name, value) for value in values)
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"plan {name} {numbers[:12]} must be finite")
    return numbers


def _weights(rows, steps: int, known: int) -> tuple[tuple[float, ...], ...]:
    if not isinstance(rows, (list, tuple)):
        raise ValueError(f"plan weights are {type(rows).__name__}: give a list of rows")
    rows = tuple(_numbers("weights", row) for row in rows)
    if rows and len(rows) != steps:
        raise ValueError(f"plan has {len(rows)} rows of weights for {steps} steps: give one per step, or none")
    for i, row in enumerate(rows):
        most = min(MAX_HISTORY, known + i) + 1
        if not 1 <= len(row) <= most or abs(sum(row) - 1) > 1e-6 or max(map(abs, row)) > MAX_WEIGHT:
            limits = f"1 to {most} numbers up to {MAX_WEIGHT} in size that sum to 1"
            raise ValueError(f"plan weights of step {i} are {row[:5]}: give {limits}")
    return rows


def _orders(values) -> tuple[int, ...]:
    orders = _numbers("orders", values)
    if any(order not in (1, 2, 3) for order in orders):
        raise ValueError(f"plan orders are {orders[:12]}: each is 1, 2 or 3")
    return tuple(int(order) for order in orders)


def _check_sigmas(sigmas: tuple[float, ...]) -> None:
    if len(sigmas) < 2:
        raise ValueError(f"plan sigmas {sigmas}: give at least sigma_trunc and the final 0")
    if sigmas[-1] != 0 or any(high <= low for high, low in pairwise(sigmas)):
        raise ValueError(f"plan sigmas {sigmas[:12]} must fall strictly and end in 0")


def _check_history(history: tuple[float, ...], sigma_trunc: float) -> None:
    if len(history) > MAX_HISTORY:
        raise ValueError(f"plan history has {len(history)} points: at most {MAX_HISTORY}")
    rising = (sigma_trunc, *history)
    if any(low >= high for low, high in pairwise(rising)):
        raise ValueError(f"plan history {history} must rise strictly from above sigma_trunc={sigma_trunc}")
