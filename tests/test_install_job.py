"""`tdpm install PROGRAM` and its undo, on folders that look like the programs'."""

from __future__ import annotations

from pathlib import Path

import pytest

import tdpm_ext.hosts
from tdpm_ext.cli import main
from tdpm_ext.install_job import LIST, PROGRAMS


@pytest.fixture(params=sorted(PROGRAMS))
def program(request):
    return PROGRAMS[request.param]


@pytest.fixture
def run(program, tmp_path):
    """The command on a folder that has what the program's folder has."""
    name = next(name for name, each in PROGRAMS.items() if each is program)
    (tmp_path / program.into).mkdir(parents=True)
    return lambda verb: main([verb, name, "--path", str(tmp_path)])


def tree(folder: Path) -> dict[str, bytes | None]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_install_copies_the_folder_and_uninstall_leaves_no_trace(program, run, tmp_path, capsys):
    before = tree(tmp_path)
    assert run("install") == 0
    target = tmp_path / program.into / program.name
    source = Path(tdpm_ext.hosts.__file__).parent / program.source
    ours = {name: data for name, data in tree(source).items() if data is not None and "__pycache__" not in name}
    there = {name: data for name, data in tree(target).items() if data is not None}
    assert there.pop(LIST).decode().splitlines() == sorted(ours) and there == ours and len(ours) >= 1
    assert all((tmp_path / folder).is_dir() for folder in program.makes)
    assert f"installed: {target}" in capsys.readouterr().out
    (target / "__pycache__").mkdir()
    (target / "__pycache__" / "x.pyc").write_bytes(b"")
    assert run("uninstall") == 0
    left = {name for name in tree(tmp_path) if name not in before}
    assert left <= {"models"}  # of a program, and empty


def test_installing_again_replaces_what_is_old_and_keeps_what_is_not_ours(program, run, tmp_path):
    run("install")
    target = tmp_path / program.into / program.name
    fresh = tree(target)
    (target / "old.py").write_text("old")
    (target / LIST).write_text((target / LIST).read_text() + "old.py\n")
    changed = next(name for name, data in fresh.items() if name.endswith(".py"))
    (target / changed).write_text("changed")
    (target / "mine.txt").write_text("mine")
    assert run("install") == 0
    assert tree(target) == {**fresh, "mine.txt": b"mine"}
    assert run("uninstall") == 0
    assert tree(target) == {"mine.txt": b"mine"}


def test_priors_of_the_user_stay(program, run, tmp_path):
    run("install")
    for folder in program.makes:
        (tmp_path / folder / "prior.safetensors").write_bytes(b"x")
    run("uninstall")
    assert all((tmp_path / folder / "prior.safetensors").exists() for folder in program.makes)


def test_a_folder_that_is_not_the_program_is_refused(program, tmp_path, capsys):
    name = next(name for name, each in PROGRAMS.items() if each is program)
    assert main(["install", name, "--path", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert f"is not {program.title}'s folder: it has no folder {program.into}" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_else_put_there_is_left_alone(program, run, tmp_path, capsys):
    target = tmp_path / program.into / program.name
    target.mkdir()
    (target / "__init__.py").write_text("theirs")
    for verb in ("install", "uninstall"):
        assert run(verb) == 1
        assert "was not put there by tdpm install" in capsys.readouterr().err
    assert tree(target) == {"__init__.py": b"theirs"}


def test_a_list_that_points_outside_removes_nothing_outside(program, run, tmp_path):
    run("install")
    target = tmp_path / program.into / program.name
    outside = tmp_path / "keep.txt"
    outside.write_text("keep")
    (target / LIST).write_text((target / LIST).read_text() + "../../keep.txt\n")
    assert run("uninstall") == 0
    assert outside.read_text() == "keep" and not target.exists()


def test_uninstalling_what_is_not_there_says_so(program, run, capsys):
    assert run("uninstall") == 1
    assert "is not there: nothing to uninstall" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(program, run, tmp_path, capsys):
    (tmp_path / program.into).rmdir()
    (tmp_path / program.into).symlink_to("/proc")  # nobody can make folders there
    assert run("install") == 1
    assert capsys.readouterr().err.count("\n") == 1
