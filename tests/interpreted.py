"""Runs Triton kernels on CPU tensors, in Triton's interpreter, and catches what the interpreter lets pass.

The interpreter reads and writes outside of a tensor without a word, and leaves what a kernel forgot to write as it was.
So tests give it tensors inside of storage filled with one particular NaN (``canary``): a stray read spoils the result,
a stray write is seen, and so is an element that was never written (``check_canary``).

What else the interpreter does not do as a GPU does: arithmetic on bfloat16 is wrong (kernels convert to float32 right
after the load), and stores of bfloat16 truncate, by up to one unit in the last place.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

import tdpm_ext.kernels

PACKAGE = "tdpm_ext.kernels"
FRONT, BACK = 64, 16384  # elements of poison before and after: more than a stray tile of a small test reaches
# bit patterns of quiet NaNs that no arithmetic makes; plain large numbers for integers
POISON = {
    torch.float16: 0x7E5A,
    torch.bfloat16: 0x7FDA,
    torch.float32: 0x7FC0BEEF,
    torch.float64: 0x7FF80000DEADBEEF,
    torch.int32: 0x5EADBEEF,
    torch.int64: 0x5EADBEEFDEADBEEF,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Interpreted(interpreter.InterpretedFunction):
    """A kernel that patches ``triton.language`` while it is launched, and puts everything back."""

    def run(self, *args, **kwargs):
        with _interpreting():
            return super().run(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)  # called from another kernel: everything is patched already

    def rewrite(self):
        # Rewritten once, against names that leaving `_interpreting` takes out of the library's globals again.
        for key, value in vars(interpreter).items():
            self.fn.__globals__.setdefault(key, value)
        return super().rewrite()


def load_interpreted(name: str, folder: Path | str | None = None) -> types.ModuleType:
    """A fresh copy of ``tdpm_ext.kernels.<name>`` whose kernels run in the interpreter, on CPU tensors.

    Modules that it imports from the package are fresh copies too; those that were imported before stay what they are.

    Args:
        name: of the module, "triton_norm".
        folder: where the package's source is read from instead, for instance a changed copy of it (see ``changed``).
            Must stay in place while the copy is in use.
    """
    package = tdpm_ext.kernels
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if key.startswith(PACKAGE + ".")}
    attributes, path = dict(vars(package)), package.__path__
    for key in before:  # `from . import name` looks here first
        vars(package).pop(key.removeprefix(PACKAGE + "."), None)
    try:
        if folder is not None:
            package.__path__ = [str(folder)]
        importlib.invalidate_caches()
        with _interpreting():
            return importlib.import_module(f"{PACKAGE}.{name}")
    finally:
        for key in [key for key in sys.modules if key.startswith(PACKAGE + ".")]:
            del sys.modules[key]
        sys.modules.update(before)
        package.__path__ = path
        _restore(package, attributes)


def changed(folder: Path, file: str, old: str, new: str) -> Path:
    """Copies the package's source to ``folder``, with ``old`` in ``file`` replaced by ``new``; for load_interpreted."""
    for source in Path(tdpm_ext.kernels.__file__).parent.glob("*.py"):
        text = source.read_text(encoding="utf-8")
        if source.name == file:
            assert old in text, f"{file} does not hold {old!r} (any more)"
            text = text.replace(old, new)
        (folder / source.name).write_text(text, encoding="utf-8")
    return folder


@contextmanager
def _interpreting() -> Iterator[None]:
    """Triton's language, its library and its ``jit`` as the interpreter wants them; afterwards as they were."""
    places = [tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base]
    before = [(place, dict(vars(place))) for place in places]
    decorated = interpreter.InterpretedFunction
    with triton.knobs.runtime.scope():
        try:
            triton.knobs.runtime.interpret = True
            interpreter.InterpretedFunction = _Interpreted
            # tl.sum and its like were compiled functions when triton was imported
            for place in (tl, tl.standard):
                for key, value in list(vars(place).items()):
                    if isinstance(value, JITFunction):
                        setattr(place, key, _library(value))
            # a launch patches only the modules that the kernel's own globals name; the library needs tl.core too
            interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            yield
        finally:
            interpreter.InterpretedFunction = decorated
            for place, attributes in before:
                _restore(place, attributes)


_LIBRARY: dict[JITFunction, _Interpreted] = {}  # one each: the interpreter recognises reductions by identity


def _library(function: JITFunction) -> _Interpreted:
    if function not in _LIBRARY:
        _LIBRARY[function] = _Interpreted(function.fn)
    return _LIBRARY[function]


def _restore(place: object, attributes: dict) -> None:
    for key in [key for key in vars(place) if key not in attributes]:
        delattr(place, key)
    for key, value in attributes.items():
        if vars(place).get(key) is not value:
            setattr(place, key, value)


def canary(like: Tensor, *, gaps: Sequence[int] = (0,), gap: int = 16, poisoned: bool = False) -> Tensor:
    """A tensor like ``like``, with its values and order of strides, inside of poisoned storage.

    Args:
        like: any strides without overlap.
        gaps: axes whose entries lie ``gap`` elements of poison apart: 0 is samples; 1 is channels in a contiguous
            tensor; -1 is pixels in a channels_last one.
        gap: elements; a multiple of 16 keeps the alignment that kernels are specialised on.
        poisoned: fill the tensor itself with poison too: an output.
    """
    order = sorted(range(like.ndim), key=lambda axis: (like.stride(axis), -axis))
    strides, extent = [0] * like.ndim, 1
    for axis in order:
        extent += gap if axis % like.ndim in [g % like.ndim for g in gaps] else 0
        strides[axis] = extent
        extent *= like.shape[axis]
    flat = torch.empty(FRONT + extent + BACK, dtype=like.dtype, device=like.device)
    # Outputs have another poison: one that was read outside of an input, and written outside of an output, is seen.
    poison = POISON[like.dtype] + poisoned
    flat.view(BITS[like.element_size()]).fill_(poison)
    view = flat.as_strided(like.shape, strides, FRONT)
    if not poisoned:
        view.copy_(like)
    view.poison = poison
    return view


def check_canary(*views: Tensor, written: bool = True) -> None:
    """Assert that nothing was written around tensors made by ``canary``, and, if ``written``, that all of them was."""
    for view in views:
        flat = view._base
        bits, poison = flat.view(BITS[view.element_size()]), view.poison
        inside = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        stray = ((bits != poison) & ~inside).nonzero().flatten()
        assert stray.numel() == 0, f"{stray.numel()} elements written outside, the first {int(stray[0]) - FRONT} away"
        if written:
            missing = int(((bits == poison) & inside).sum())
            assert missing == 0, f"{missing} of {view.numel()} elements never written"
