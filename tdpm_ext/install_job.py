"""``tdpm install`` and ``tdpm uninstall``: put a host's extension folder into a program, and take it out again.

The folders are part of this package and hold little: they import ``tdpm_ext``, which must be installed for the Python
that runs the program. What was put there is listed in a file beside it, so that nothing else is ever removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import uuid
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

LIST = ".tdpm-ext"  # in an installed folder: the files that belong to it, one a line


@dataclass(frozen=True)
class Program:
    """A program with a folder for extensions.

    Attributes:
        title: its name.
        source: our folder for it, below ``tdpm_ext/hosts``.
        into: the program's folder for extensions, which also tells that it is this program.
        name: what our folder is called there.
        makes: folders for the user's own files, made where they are missing, removed when empty.
    """

    title: str
    source: str
    into: str
    name: str
    makes: tuple[str, ...] = ()


PROGRAMS = {
    "a1111": Program("the web UI (A1111, Forge, reForge)", "a1111_extension", "extensions", "tdpm", ("models/tdpm",)),
    "comfyui": Program("ComfyUI", "comfyui_node", "custom_nodes", "comfyui-tdpm", ("models/tdpm",)),
}


def install(args: argparse.Namespace) -> None:
    """Copy the extension folder; files of an older version are replaced, or removed where the new one has none."""
    program, target = _target(args)
    with resources.as_file(resources.files("tdpm_ext.hosts") / program.source) as source:
        files = sorted(
            path.relative_to(source).as_posix()
            for path in source.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        )
        old = _listed(target)
        for folder in [target, *(args.path / name for name in program.makes)]:
            folder.mkdir(parents=True, exist_ok=True)
        _write(target / LIST, "".join(f"{name}\n" for name in sorted({*old, *files})).encode())  # if cut short below
        for name in files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            _write(target / name, (source / name).read_bytes())
    _remove(target, [name for name in old if name not in files])
    _write(target / LIST, "".join(f"{name}\n" for name in files).encode())
    print(f"installed: {target}")
    print(f"restart {program.title}; it must run with a Python that has tdpm-ext, such as {sys.executable}")


def uninstall(args: argparse.Namespace) -> None:
    """Remove what `install` put there; priors stay."""
    program, target = _target(args)
    if not target.exists():
        raise FileNotFoundError(f"{target} is not there: nothing to uninstall")
    _remove(target, [*_listed(target), LIST])
    for folder in program.makes:
        place = args.path / folder
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    print(f"removed: {target}" + (" (it held files of yours, which stay)" if target.exists() else ""))


def _target(args: argparse.Namespace) -> tuple[Program, Path]:
    program = PROGRAMS[args.program]
    if not (args.path / program.into).is_dir():
        raise ValueError(
            f"{args.path} is not {program.title}'s folder: it has no folder {program.into}. Give --path the folder "
            f"that {program.title} is started from"
        )
    target = args.path / program.into / program.name
    if target.is_symlink() or (target.exists() and not (target / LIST).is_file()):
        raise ValueError(f"{target} was not put there by tdpm install: remove it yourself")
    return program, target


def _listed(target: Path) -> list[str]:
    """What an earlier installation put there; a list that names anything outside of the folder is not ours."""
    if not target.exists():
        return []
    names = (target / LIST).read_text(encoding="utf-8").splitlines()
    return [name for name in names if (target / name).resolve().is_relative_to(target.resolve())]


def _remove(target: Path, names: list[str]) -> None:
    """Delete the named files and Python's caches, then the folders that are left empty."""
    for name in names:
        (target / name).unlink(missing_ok=True)
    for cache in list(target.rglob("__pycache__")):
        shutil.rmtree(cache)
    folders = [path for path in target.rglob("*") if path.is_dir() and not path.is_symlink()]
    for folder in [*sorted(folders, key=lambda path: len(path.parts), reverse=True), target]:
        if not any(folder.iterdir()):
            folder.rmdir()


def _write(path: Path, content: bytes) -> None:
    """The file is there whole or as it was."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
