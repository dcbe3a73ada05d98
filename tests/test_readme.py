"""The README says what is so: its code runs, its commands exist, its figures are there."""

import re
from pathlib import Path

from benchmarks import tables
from tdpm_ext import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run_as_written(tmp_path, monkeypatch):
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "open_checkpoint" in b)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    # As written, but for fewer calibration seeds: this is a test of the code, not of the plan it finds.
    shorter = block.replace("budgets=(4,)", "budgets=(4,), samples=6, progress=False")
    assert shorter != block
    scope = {}
    exec(compile(shorter, "README.md", "exec"), scope)
    assert tuple(scope["x"].shape) == (4, 1, 28, 28)
    assert scope["prior"].plans["fidelity"][4].steps == 4


def test_every_command_and_option_in_the_readme_is_accepted(capsys):
    blocks = "\n".join(text for kind, text in re.findall(r"```(\w*)\n(.*?)```", README, re.S) if not kind)
    lines = [line.split("#")[0].split() for line in blocks.splitlines() if line.startswith("tdpm ")]
    assert len(lines) >= 5
    for _, command, *words in lines:
        assert cli.main([command, "--help"]) == 0
        known = capsys.readouterr().out
        for option in (w for w in words if w.startswith("-")):
            assert option in known, f"tdpm {command} has no {option}"


def test_every_make_target_and_linked_file_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def test_files_named_in_backticks_exist():
    for name in set(re.findall(r"`((?:assets|benchmarks|tests)/[\w./-]+)`", README)):
        assert (ROOT / name).exists(), name


def test_the_tables_are_those_of_the_committed_results():
    assert tables.replaced(README) == README
