"""Which backend does an attention best, as measured: ``attention_table.json``.

SDPA is first everywhere until a measurement on a GPU of that generation puts another one first. A row says for which
calls, and keeps the measurement that promoted it:

    {"cc": 90, "head_dim": 40, "queries": "long", "keys": "short", "masked": false, "backend": "triton",
     "measured": {"gpu", "driver", "cuda", "torch", "triton", "cudnn", "date", "command": text,
                  "shape": [B, H, Lq, Lk, D], "dtype": "float16" or "bfloat16",
                  "sdpa_us" and "backend_us": {"p50", "p90": microseconds, "n": samples}}}

Rows are for half precision; in float32 SDPA stays.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("attention_table.json")
SCHEMA = 1
DEFAULT = "sdpa"
PROMOTED = ("triton", "xformers")
LENGTHS = {"short": 128, "medium": 1024, "long": math.inf}  # class -> the longest sequence in it; 77 keys are short
DTYPES = ("float16", "bfloat16")
WORDS = ("gpu", "driver", "cuda", "torch", "triton", "cudnn", "date", "command")  # of a measurement
GAIN = 0.97  # a backend is promoted when its median time is at most this share of SDPA's ...
SAMPLES = 50  # ... over at least so many samples of each

Key = tuple[int, int, str, str, bool]  # cc, head_dim, class of queries, class of keys, masked


def length_class(length: int) -> str:
    """The name in ``LENGTHS`` for a sequence of ``length`` tokens."""
    return next(name for name, longest in LENGTHS.items() if length <= longest)


def preferred(cc: int, head_dim: int, q_len: int, kv_len: int, masked: bool) -> str:
    """The backend that the committed table puts first: "sdpa", "triton" or "xformers".

    Args:
        cc: compute capability times ten.
        head_dim: elements per head.
        q_len: number of queries.
        kv_len: number of keys.
        masked: whether there is a mask.
    """
    return _committed().get((cc, head_dim, length_class(q_len), length_class(kv_len), masked), DEFAULT)


@lru_cache(maxsize=1)
def _committed() -> dict[Key, str]:
    return load(PATH)


def load(path: Path) -> dict[Key, str]:
    """Read and check a table.

    Raises:
        ValueError: what is wrong, in which row.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("rows"), list):
        raise ValueError(f'{path.name}: must be {{"schema": {SCHEMA}, "rows": [...]}}')
    table: dict[Key, str] = {}
    for number, row in enumerate(content["rows"]):
        wrong = _wrong(row)
        if wrong:
            raise ValueError(f"{path.name}, row {number}: {'; '.join(wrong)}")
        key = (row["cc"], row["head_dim"], row["queries"], row["keys"], row["masked"])
        if key in table:
            raise ValueError(f"{path.name}, row {number}: another row is for the same calls")
        table[key] = row["backend"]
    return table


def _wrong(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return [f"is {row!r}, not an object"]
    expected = {
        "cc": lambda x: type(x) is int and x >= 80,
        "head_dim": lambda x: type(x) is int and x > 0,
        "queries": LENGTHS.__contains__,
        "keys": LENGTHS.__contains__,
        "masked": lambda x: type(x) is bool,
        "backend": PROMOTED.__contains__,
        "measured": lambda x: isinstance(x, dict),
    }
    wrong = [f"{name} is {row.get(name)!r}" for name, right in expected.items() if not _holds(right, row.get(name))]
    wrong += [f"unknown entry {name!r}" for name in row if name not in expected]
    return wrong or _wrong_measurement(row)


def _wrong_measurement(row: dict[str, Any]) -> list[str]:
    measured = row["measured"]
    wrong = [f"measured.{name} is missing" for name in WORDS if not _holds(str.strip, measured.get(name))]
    if measured.get("dtype") not in DTYPES:
        wrong.append(f"measured.dtype is {measured.get('dtype')!r}, not one of {', '.join(DTYPES)}")
    shape = measured.get("shape")
    if not (isinstance(shape, list) and len(shape) == 5 and all(type(n) is int and n > 0 for n in shape)):
        wrong.append(f"measured.shape is {shape!r}, not [B, H, Lq, Lk, D]")
    elif (length_class(shape[2]), length_class(shape[3]), shape[4]) != (row["queries"], row["keys"], row["head_dim"]):
        wrong.append(f"measured.shape {shape} is not among the calls that the row is for")
    times = [measured.get(name) for name in ("sdpa_us", "backend_us")]
    if not all(_holds(_is_timing, t) for t in times):
        wrong.append(f"measured.sdpa_us and backend_us must have p50 <= p90, and n of at least {SAMPLES}")
    elif times[1]["p50"] > GAIN * times[0]["p50"]:
        wrong.append(f"the backend takes {times[1]['p50']} us and SDPA {times[0]['p50']}: no gain, no promotion")
    return wrong


def _is_timing(t: dict[str, float]) -> bool:
    return 0 < t["p50"] <= t["p90"] < math.inf and t["n"] >= SAMPLES


def _holds(right, value: Any) -> bool:
    """``right(value)``, where a value of the wrong kind does not hold."""
    try:
        return bool(right(value))
    except (TypeError, KeyError, AttributeError):
        return False
