"""The C++ blocks of ``cpu_blocks.cpp``, compiled for this processor at first use and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from tdpm_ext.kernels.aot_compile import default_cache

SOURCES = [Path(__file__).with_name(name) for name in ("cpu_blocks.cpp", "cpu_winograd.h", "cpu_vectors.h")]
COMPILERS = ("g++", "clang++", "c++")  # in this order, after $CXX
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TIMEOUT = 300  # seconds for one compilation

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_NORM, _SHAPE = [_P, _P, _I, _I, _I, _F], [_I] * 5
_ARGUMENTS = {
    "tdpm_strip": [],
    "tdpm_pack3x3": [_P, *[_I] * 6, _P],
    "tdpm_pack1x1": [_P, *[_I] * 4, _P],
    "tdpm_conv3x3": [_P, *_NORM, _I, *[_P] * 3, *_SHAPE, _I],
    "tdpm_residual": [_P, *_NORM, *_NORM, _I, *[_P] * 7, *_SHAPE, _I, _I],
    "tdpm_conv1x1": [*[_P] * 4, *_SHAPE, _I],
    "tdpm_attention": [_P, *_NORM, *[_P] * 5, *_SHAPE, _I],
    "tdpm_downsample": [_P, _P, *[_I] * 5],
    "tdpm_upsample": [_P, _P, *[_I] * 5],
}


class NoLibrary(RuntimeError):
    """The blocks cannot be compiled or loaded here; the message is the reason."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled blocks; compiles them, which takes a few seconds, unless an earlier process has.

    Raises:
        NoLibrary: no compiler, or none that can do it.
    """
    compiler = _compiler()
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    parts = (*(source.read_text("utf-8") for source in SOURCES), _version(compiler), *FLAGS, native, _cpu())
    path = default_cache() / f"cpu_blocks-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    if not path.exists():
        _compile(compiler, native, path)
    return opened(path)


def opened(path: Path) -> ctypes.CDLL:
    """The blocks that were compiled to ``path``."""
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoLibrary(f"{path} cannot be loaded: {error}") from error
    for name, arguments in _ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
        getattr(found, name).restype = _I if name == "tdpm_strip" else None
    return found


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    for name in names:
        if path := shutil.which(name):
            return path
    raise NoLibrary(f"no C++ compiler: looked for {', '.join(names)}")


def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _cpu() -> str:
    """What decides which instructions the compiler may use: homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def _compile(compiler: str, native: str, path: Path) -> None:
    """With several threads if the compiler has OpenMP, as PyTorch's own are then the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / "made.so"
            command = [compiler, *FLAGS, native, str(SOURCES[0]), "-o", str(made)]
            try:
                _run([*command, "-fopenmp"])
            except NoLibrary:
                _run(command)
            os.replace(made, path)
    except OSError as error:
        raise NoLibrary(f"{path.parent} cannot be written: {error}") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibrary(f"{command[0]}: {error}") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise NoLibrary(f"{command[0]} failed: {last[0]}")
    return done.stdout
