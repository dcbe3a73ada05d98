"""Makes faulty copies of Triton kernels, one small fault each, and runs checks on a copy where a crash does no harm.

Faults are made by rule, not by hand, wherever they are possible: a mask that lets everything through, a bound moved by
one, a selection that always takes its first side, an update left out, a sum taken for a difference, a factor dropped.
A good set of checks finds every one of them, but for those that change nothing.
"""

from __future__ import annotations

import ast
import faulthandler
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tdpm_ext.kernels

FOLDER = Path(tdpm_ext.kernels.__file__).parent
SECONDS = 60  # a fault may make a loop endless


@dataclass(frozen=True)
class Mutant:
    """A faulty copy of one source file: in ``function``, the text ``old`` at ``start`` has become ``new``."""

    file: str
    function: str
    kind: str
    start: int
    old: str
    new: str
    line: str  # the first one it is in

    def __str__(self) -> str:
        change = f"{' '.join(self.old.split())}  ->  {' '.join(self.new.split())}"
        return f"{self.function}: {change}, in: {self.line.strip()}"

    def source(self) -> str:
        """The whole faulty file."""
        text = (FOLDER / self.file).read_text(encoding="utf-8")
        return text[: self.start] + self.new + text[self.start + len(self.old) :]


def mutants(file: str) -> list[Mutant]:
    """Every fault that the rules can put into the Triton kernels of a source file."""
    text = (FOLDER / file).read_text(encoding="utf-8")
    begins = [0]
    for line in text.encode().splitlines(keepends=True):
        begins.append(begins[-1] + len(line.decode()))
    found = []
    for function in ast.parse(text).body:
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list):
            for statement in function.body:
                for node in ast.walk(statement):
                    for kind, part, new in _faults(node):
                        start = begins[part.lineno - 1] + part.col_offset
                        old = ast.get_source_segment(text, part)
                        line = text.splitlines()[part.lineno - 1]
                        found.append(Mutant(file, function.name, kind, start, old, new, line))
    return found


def _faults(node: ast.AST) -> Iterator[tuple[str, ast.expr, str]]:
    """(kind, the expression that is replaced, what stands in its place) for one node of a kernel."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store"):
        for keyword in node.keywords:
            if keyword.arg == "mask":
                yield "mask", keyword.value, f"(({ast.unparse(keyword.value)}) | True)"
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt):
        yield "bound", node, f"({ast.unparse(node.left)} <= {ast.unparse(node.comparators[0])})"
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.where":
        yield "selection", node, f"({ast.unparse(node.args[1])})"
    if isinstance(node, ast.AugAssign):
        neutral = "+ 1" if isinstance(node.op, ast.Mult) else "+ 0"
        yield "update", node.value, f"(({ast.unparse(node.value)}) * 0 {neutral})"
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        sign = "-" if isinstance(node.op, ast.Add) else "+"
        yield "sign", node, f"({ast.unparse(node.left)} {sign} ({ast.unparse(node.right)}))"
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        yield "factor", node, f"({ast.unparse(node.left)})"


def survives(mutant: Mutant | None, checks: Callable[[Path], None]) -> bool:
    """Whether ``checks`` pass on a folder with the faulty copy; ``None`` stands for the kernels as they are.

    They run in a process of their own: what a fault reads and writes outside of its tensors may bring it down.
    """
    with tempfile.TemporaryDirectory() as name:
        for path in FOLDER.glob("*.py"):
            (Path(name) / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        if mutant is not None:
            (Path(name) / mutant.file).write_text(mutant.source(), encoding="utf-8")
        child = os.fork()
        if child == 0:
            _in_child(Path(name), checks, silent=mutant is not None)
        _, status = os.waitpid(child, 0)
    return status == 0


def _in_child(folder: Path, checks: Callable[[Path], None], silent: bool) -> None:
    status = 1
    try:
        faulthandler.disable()  # a crash is an expected end here
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        if silent:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # numpy's warnings about wrong numbers
        checks(folder)
        status = 0
    except BaseException:
        if not silent:
            traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)  # nothing of the parent's is cleaned up twice
