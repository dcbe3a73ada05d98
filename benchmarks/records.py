"""Results as files: one JSON schema for all of them, checked when they are written and when they are read.

The schema is ``benchmarks/schema.json``; each kind of record names itself and its version in the field ``schema``
("tdpm-samples/1"). Fields are never silently dropped or added: an unknown one is an error.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = json.loads((ROOT / "benchmarks" / "schema.json").read_text(encoding="utf-8"))
KINDS = tuple(SCHEMA["$defs"]["kinds"])


def problems(record) -> list[str]:
    """What in ``record`` does not follow the schema, with the place of each; empty if nothing."""
    from jsonschema import Draft202012Validator

    found = record.get("schema") if isinstance(record, dict) else None
    if found not in KINDS:
        return [f"schema is {found!r}, not one of {', '.join(KINDS)}"]
    own = {"$schema": SCHEMA["$schema"], "$defs": SCHEMA["$defs"], **SCHEMA["$defs"]["kinds"][found]}
    errors = sorted(Draft202012Validator(own).iter_errors(record), key=lambda e: list(map(str, e.absolute_path)))
    texts = [f"{'.'.join(map(str, e.absolute_path)) or 'record'}: {e.message[:200]}" for e in errors]
    return texts + _not_finite(record, "record")


def _not_finite(value, where: str) -> list[str]:
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{where} is {value}"]
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [text for key, inner in pairs for text in _not_finite(inner, f"{where}.{key}")]


def check(record, where: str) -> None:
    """Raise ValueError with the first problems of ``record``."""
    found = problems(record)
    if found:
        more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
        raise ValueError(f"{where} does not follow the schema: {'; '.join(found[:5])}{more}")


def read(path: str | Path) -> dict:
    """A checked record. Raises ValueError naming the file and the fields that are wrong."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    check(record, str(path))
    return record


def write(record: dict, path: str | Path) -> Path:
    """Check ``record`` and write it, atomically; nothing is written if it is wrong."""
    record = json.loads(json.dumps(record))  # as it will be read: keys are strings, tuples are lists
    check(record, f"the record for {path}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def estimate(value) -> dict:
    """A ``metrics.Estimate`` as the schema has it; the deviation of a single block is null."""
    return {"mean": float(value.value), "sd": float(value.error) if math.isfinite(value.error) else None}


def environment(device: str | torch.device = "cpu") -> dict:
    """What ran: versions, threads, device, commit and whether the tree differed from it."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": "GPU" if device.type == "cuda" else "CPU",
        "name": name,
        "commit": git("rev-parse", "--short", "HEAD") or None,
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def version(name: str) -> str | None:
    """Of an installed package; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git(*words: str) -> str:
    """What git says of this repository; empty outside of one."""
    try:
        run = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    except OSError:  # no git here
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def processor() -> str:
    """The CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def command(script: str, argv: list[str] | None) -> str:
    """The command that would run this again, from the repository's root."""
    return f"python benchmarks/{script} {shlex.join(map(shown, sys.argv[1:] if argv is None else argv))}".strip()


def shown(word) -> str:
    """A path below the repository as seen from its root; everything else as it is."""
    text = str(word)
    return text[len(str(ROOT)) + 1 :] if text.startswith(f"{ROOT}/") else text
