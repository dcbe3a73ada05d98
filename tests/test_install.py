"""What an installation brings: the packages, the command, the version, and an import that needs four packages only."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "numpy", "safetensors", "tqdm")

# Run first in a subprocess: from then on only the standard library and the packages in ALLOWED can be found.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Block())
"""


def import_names_of_requirements() -> set[str]:
    """Import names of the four needed packages and of all that they require, Triton left out: it is optional for us."""
    names_of: dict[str, set[str]] = {}
    for import_name, distributions in metadata.packages_distributions().items():
        for distribution in distributions:
            names_of.setdefault(normalised(distribution), set()).add(import_name)
    waiting, seen = list(NEEDED), {"triton"}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # required on another platform
            continue
        waiting += [normalised(re.split(r"[^\w.-]", r)[0]) for r in requirements if "extra ==" not in r]
    return set().union(*(names_of.get(name, set()) for name in seen - {"triton"}))


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def run_python(code: str, *flags: str, **options) -> str:
    """Standard output of ``code`` in a fresh interpreter; its traceback is the failure message."""
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_four_packages_only():
    allowed = {"tdpm_ext", *import_names_of_requirements()}
    assert not allowed & {"triton", "PIL", "k_diffusion", "scipy", "torchvision", "accelerate", "matplotlib", "sklearn"}
    code = f"""
ALLOWED = {sorted(allowed)!r}
{BLOCK}
for name in ("PIL", "k_diffusion", "triton", "scipy.linalg", "torchvision"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        assert "blocked" in str(error), error
    else:
        raise AssertionError(name + " can still be imported: this test proves nothing")
import tdpm_ext
missing = [name for name in tdpm_ext.__all__ if not hasattr(tdpm_ext, name)]
assert not missing, missing
import torch
prior = tdpm_ext.fit_prior("gaussian", torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
print(tuple(prior.sample(torch.zeros(2, 1, 4, 4)).shape))
"""
    assert run_python(code).strip().splitlines()[-1] == "(2, 1, 4, 4)"


def test_import_adds_little_to_what_torch_has_loaded():
    code = """
import sys, json
import numpy, safetensors.torch, torch, tqdm
before = set(sys.modules)
import tdpm_ext
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    added = json.loads(run_python(code))
    ours = [name for name in added if name.split(".")[0] == "tdpm_ext"]
    other = sorted({name.split(".")[0] for name in added} - {"tdpm_ext", *NEEDED} - sys.stdlib_module_names)
    rooms = {name.split(".")[1] for name in ours if "." in name}
    assert not rooms & {"kernels", "hosts", "training", "cli"}, ours
    assert other == [], "packages beyond the four that are needed"
    assert len(added) <= 60, added


def test_version_is_the_installed_one():
    import tdpm_ext

    assert metadata.version("tdpm-ext") == tdpm_ext.__version__, "reinstall: pip install -e ."


def test_command_is_installed():
    (script,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "tdpm"]
    assert script.value == "tdpm_ext.cli:main"
    assert callable(script.load())


def test_kernels_are_part_of_the_installed_package_and_hide_nothing():
    code = """
import importlib.util, tdpm_ext.kernels
print(tdpm_ext.kernels.__name__)
found = importlib.util.find_spec("kernels")
print(found and found.origin)
"""
    name, origin = run_python(code, "-P" if sys.version_info >= (3, 11) else "-I").split()
    assert name == "tdpm_ext.kernels"
    assert not origin.startswith(str(ROOT))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the source, offline, with the setuptools that is installed."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tdpm_ext", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(target)!r})"
    run_python(build, cwd=source, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    (path,) = target.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_no_other_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        modules = sorted(name for name in archive.namelist() if name.endswith(".py"))
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tdpm_ext").rglob("*.py")}
    kernels = {"tdpm_ext/" + path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.py")}
    assert modules == sorted(ours | kernels)


def test_wheel_holds_every_file_of_the_hosts_extensions(wheel):
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if name.startswith("tdpm_ext/hosts/")}
    ours = {path for path in (ROOT / "tdpm_ext" / "hosts").rglob("*") if path.is_file()}
    ours = {path.relative_to(ROOT).as_posix() for path in ours if "__pycache__" not in path.parts}
    assert there == ours and any(name.endswith(".json") for name in ours)


def test_wheel_can_be_imported_from_where_it_is_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import tdpm_ext.kernels
print(tdpm_ext.__file__); print(tdpm_ext.kernels.__file__)
"""
    files = [Path(line) for line in run_python(code).split()]
    assert files == [tmp_path / "tdpm_ext" / "__init__.py", tmp_path / "tdpm_ext" / "kernels" / "__init__.py"]


def test_wheel_says_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    required = {
        re.split(r"[^\w-]", line.split(": ")[1])[0] for line in lines if re.match(r"Requires-Dist: [^;]*$", line)
    }
    extras = {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra: ")}
    assert required == set(NEEDED)
    assert extras == {"kdiffusion", "triton", "xformers", "train", "bench", "hosts", "tldm", "dev"}
    assert "Requires-Python: >=3.10" in lines


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_pin_one_version_of_everything_and_keep_k_diffusion_importable(python):
    pins: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            assert requirement.name not in pins, f"{requirement.name} has two versions for Python {python}"
            pins[requirement.name] = Version(pin.version)
    assert {*NEEDED, "torchvision", "k-diffusion", "pytest", "hypothesis", "ruff"} <= pins.keys()
    assert Version("77.0.3") <= pins["setuptools"] < Version("82"), (
        "clip, which k-diffusion imports, needs pkg_resources"
    )
    assert (pins["numpy"] < Version("2")) == (python != "3.13"), "dctorch refuses numpy 2; Python 3.13 has no other"
