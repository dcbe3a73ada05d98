"""A memcheck for Triton's interpreter: every load and store must stay inside of a tensor that the kernel was given.

On a GPU a stray read may hit an unmapped page, and even where it does not, it is a fault that results need not show:
the lane may be discarded later. The interpreter reads anywhere without a word; here each address is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from tests import interpreted


class StrayAccess(AssertionError):
    """A load or store outside of all tensors of the launch."""


class _Span:
    """The memory of one tensor: which of the elements from its first to its last belong to it."""

    def __init__(self, t: torch.Tensor):
        self.start, self.step = t.data_ptr(), t.element_size()
        offsets = np.zeros(1, dtype=np.int64)
        for size, stride in zip(t.shape, t.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
        self.own = np.zeros(int(offsets.max()) + 1 if offsets.size else 0, dtype=bool)
        self.own[offsets] = True

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        place = (addresses - self.start) // self.step
        inside = (place >= 0) & (place < self.own.size)
        inside[inside] = self.own[place[inside]]
        return inside


@contextmanager
def watched_memory() -> Iterator[None]:
    """While the block runs, a stray access in any interpreted kernel raises StrayAccess."""
    spans: list[_Span] = []
    run, load, store = (
        interpreted._Interpreted.run,
        interpreter.InterpreterBuilder.create_masked_load,
        interpreter.InterpreterBuilder.create_masked_store,
    )

    def look(what: str, pointers, mask) -> None:
        addresses = pointers.data.astype(np.int64)[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        left = np.ones(addresses.shape, dtype=bool)
        for span in spans:
            left &= ~span.holds(addresses)
        if left.any():
            raise StrayAccess(f"{what} of {int(left.sum())} elements outside of the kernel's tensors")

    def watched_run(self, *args, **kwargs):
        before = list(spans)
        spans[:] = [_Span(t) for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.numel()]
        try:
            return run(self, *args, **kwargs)
        except InterpreterError as error:
            raise error.__cause__ if isinstance(error.__cause__, StrayAccess) else error from None
        finally:
            spans[:] = before

    def watched_load(self, pointers, mask, *rest):
        look("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        look("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder = interpreter.InterpreterBuilder
    with (
        mock.patch.object(interpreted._Interpreted, "run", watched_run),
        mock.patch.object(builder, "create_masked_load", watched_load),
        mock.patch.object(builder, "create_masked_store", watched_store),
    ):
        yield
