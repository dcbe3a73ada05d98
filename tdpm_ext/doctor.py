"""``tdpm doctor``: what is installed, what works, and what to do about the rest.

Every package is imported in a process of its own, all at the same time, so that one that crashes or hangs is a
line in the report and not the end of it.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec

from tdpm_ext.hosts import list_hosts
from tdpm_ext.optional import k_diffusion_advice

REQUIRED = ("torch", "numpy", "safetensors", "tqdm")
OPTIONAL = {  # import name: what it is for, what installs it
    "k_diffusion": ("checkpoints and the samplers to compare with", "tdpm-ext[kdiffusion]"),
    "PIL": ("picture files", "pillow"),
    "diffusers": ("diffusers pipelines", "tdpm-ext[hosts]"),
    "triton": ("GPU kernels", "tdpm-ext[triton]"),
    "xformers": ("attention on NVIDIA GPUs", "tdpm-ext[xformers]"),
}
KERNELS = "tdpm_ext.kernels"
DISTRIBUTIONS = {"k_diffusion": "k-diffusion", "PIL": "pillow"}
TIMEOUT = 180  # seconds for one import
# Prints one line of JSON; whatever the package prints while it is imported comes before it.
_PROBE = """
import importlib, json, sys
answer = {}
try:
    importlib.import_module(sys.argv[1])
    if sys.argv[1] == "torch":
        import torch
        gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        answer = {"build": f"CUDA {torch.version.cuda}" if torch.version.cuda else
                           f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only",
                  "gpus": [f"{torch.cuda.get_device_name(i)}, compute capability "
                           f"{'.'.join(map(str, torch.cuda.get_device_capability(i)))}, "
                           f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB" for i in gpus],
                  "mps": torch.backends.mps.is_available()}
    elif sys.argv[1] == "tdpm_ext.kernels":
        from tdpm_ext.kernels import report
        found = report()
        answer = {"backends": found["backends"], "requests": found["requests"], "lines": str(found).splitlines()}
except BaseException as error:
    answer = {"error": str(error), "kind": type(error).__name__, "name": getattr(error, "name", None)}
print()
print(json.dumps(answer))
"""


@dataclass
class Package:
    """One package: ``state`` is "works", "missing" or "broken", and ``reason`` says why it is broken."""

    name: str
    version: str | None
    state: str
    reason: str = ""
    facts: dict = field(default_factory=dict)


@dataclass
class Problem:
    """Something wrong, what to do about it, and whether ``tdpm`` is unusable until it is done."""

    what: str
    fix: str
    serious: bool


def run(*, as_json: bool = False) -> int:
    """Print the report; 0 if ``tdpm`` is usable here, else 1."""
    packages = probe((*REQUIRED, *OPTIONAL, KERNELS))
    found = examine(packages, packages.pop(KERNELS))
    print(json.dumps(found, indent=2) if as_json else "\n".join(_text(found)))
    return 0 if found["usable"] else 1


def probe(names: tuple[str, ...]) -> dict[str, Package]:
    """Import each package in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", _PROBE]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {name: subprocess.Popen([*command, name], **pipes) for name in names if _spec_exists(name)}
    return {name: _outcome(name, running.get(name)) for name in names}


def examine(packages: dict[str, Package], kernels: Package | None = None) -> dict:
    """The report as plain JSON: versions, GPU, hosts, kernels, problems with their fixes, and ``usable``."""
    kernels = kernels or Package(KERNELS, None, "missing")
    problems = [_problem(package) for package in packages.values() if package.state == "broken"]
    for package in packages.values():
        if package.state == "missing" and package.name in REQUIRED:
            problems.append(Problem(f"{package.name} is not installed", f"pip install {package.name}", True))
    facts = packages["torch"].facts
    gpus = facts.get("gpus", []) + (["Apple GPU (mps)"] if facts.get("mps") else [])
    build = facts.get("build", "unknown")
    if not gpus and packages["torch"].state == "works" and shutil.which("nvidia-smi"):
        what = f"an NVIDIA driver is here, and torch ({build}) sees no GPU"
        cure = "install the CUDA build of torch (pytorch.org/get-started)" if build == "CPU only" else "run nvidia-smi"
        problems.append(Problem(what, cure, False))
    return {
        "usable": not any(problem.serious for problem in problems),
        "tdpm_ext": _distribution_version("tdpm-ext") or "(not installed; imported from a folder)",
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {p.name: {"version": p.version, "state": p.state, "reason": p.reason} for p in packages.values()},
        "torch_build": build,
        "gpus": gpus,
        "hosts": {name: _host(name, packages) for name in list_hosts()},
        "kernels": kernels.facts or {"state": kernels.state, "reason": kernels.reason},
        "problems": [asdict(problem) for problem in problems],
    }


def _host(name: str, packages: dict) -> str:
    """State of a host that is a package; how to get into one that is a folder somewhere."""
    return packages[name].state if name in packages else f"tdpm install {name} --path FOLDER"


def _spec_exists(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # half-removed packages
        return False


def _distribution_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _outcome(name: str, process: subprocess.Popen | None) -> Package:
    version = _distribution_version(DISTRIBUTIONS.get(name, name))
    if process is None:
        return Package(name, version, "missing")
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Package(name, version, "broken", f"importing it takes more than {TIMEOUT} s")
    try:
        answer = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        last = (errors.strip().splitlines() or ["no message"])[-1]
        return Package(name, version, "broken", f"importing it ends Python with code {process.returncode} ({last})")
    if "error" not in answer:
        return Package(name, version, "works", facts=answer)
    reason = f"{answer['kind']}: {' '.join(answer['error'].split())}"[:300]
    if name == "k_diffusion" and "Error" in answer["kind"]:
        reason = k_diffusion_advice(ImportError(answer["error"], name=answer["name"]))
    return Package(name, version, "broken", reason)


def _problem(package: Package) -> Problem:
    required = package.name in REQUIRED
    what = f"{package.name} {package.version or ''} cannot be imported".replace("  ", " ")
    if package.name == "k_diffusion":  # its advice says both
        return Problem(what, package.reason, True)
    purpose, source = ("", package.name) if required else OPTIONAL[package.name]
    fix = f"pip install --force-reinstall '{source}'" + ("" if required else f", or do without ({purpose})")
    return Problem(f"{what} ({package.reason})", fix, required)


def _text(found: dict) -> list[str]:
    lines = [f"tdpm-ext {found['tdpm_ext']}, Python {found['python']}, {found['system']}", ""]
    for name, package in found["packages"].items():
        purpose = OPTIONAL.get(name, ("needed", ""))[0]
        lines.append(f"  {name:<12} {package['version'] or '-':<16} {package['state']:<8} {purpose}")
    lines += ["", f"torch build  {found['torch_build']}", f"GPU          {'; '.join(found['gpus']) or 'none'}"]
    lines += _kernel_lines(found["kernels"])
    lines += [f"hosts        {', '.join(f'{name} {state}' for name, state in found['hosts'].items())}", ""]
    for problem in found["problems"]:
        lines += [f"{'PROBLEM' if problem['serious'] else 'note'}: {problem['what']}", f"  do: {problem['fix']}"]
    missing = [n for n, p in found["packages"].items() if p["state"] == "missing" and n in OPTIONAL]
    lines += [f"without {n} ({OPTIONAL[n][0]}): pip install '{OPTIONAL[n][1]}'" for n in missing]
    return [*lines, "tdpm can be used here." if found["usable"] else "tdpm cannot be used here until this is mended."]


def _kernel_lines(kernels: dict) -> list[str]:
    if "lines" not in kernels:
        return [f"kernels      {kernels['state']}; plain torch is used {kernels['reason']}".rstrip()]
    return ["kernels", *(f"  {line}" for line in kernels["lines"])]
