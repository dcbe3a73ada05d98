"""Counts what a forward pass asks of a GPU, without one: launches, bytes read and written, and by which operation.

The pass runs on fake CUDA tensors, so shapes, strides, dtypes and the choice of kernels are those of a GPU, and
nothing is computed. The rules, the same for every arm:

- An ATen call that is neither a view nor an allocation counts as one launch. That is a floor for eager: torch's own
  GroupNorm launches two or three kernels, a convolution with bias often two.
- An operation of ours counts as many launches as its plan makes.
- Attention counts as one launch of a fused kernel that reads q, k, v and writes its result, in every arm, also where
  torch would fall back to a chain of matrix products: a floor for eager again.
- Every tensor an operation takes is read once and every one it makes is written once; entries that broadcasting
  repeats count once. A kernel that goes over its input twice has ``reread`` bytes: they come from the cache where the
  input fits, so both sums are given.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import networks
from tdpm_ext.kernels import caches, facts, norm_plan

aten = torch.ops.aten
# no launch: views that torch does not mark as such, allocations, questions about a tensor
FREE = {
    aten._unsafe_view.default, aten.detach.default, aten.lift_fresh.default, aten.alias.default,
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip
REREADS = {aten.native_group_norm.default, aten.native_layer_norm.default}  # statistics first, then the result
NORMS = ("native_group_norm", "group_norm")
FILLS = {aten.fill_.Scalar, aten.zero_.default}
POINTWISE = {"silu", "silu_", "gelu", "gelu_"}
PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # of a large card of each generation
AFFINE = {"addcmul", "addcmul_", "mul", "mul_", "add", "add_"}


@dataclass
class Launch:
    """One counted operation: ``launches`` kernels; bytes read, read again and written; whether in a norm's chain."""

    op: str
    launches: int
    read: int
    reread: int
    write: int
    chain: bool = False
    picture: int = 0  # bytes of what a GroupNorm normalises


def size(x: Tensor) -> int:
    """Bytes of a tensor, without the repetitions that broadcasting makes."""
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0)


class Traffic(TorchDispatchMode):
    """Records every operation that is called while it is active, in ``launches``.

    A norm's chain is the GroupNorm, the broadcast additions right before it, and what follows it entry by entry with
    per-channel operands only: activation, scale, shift. A sum of two whole pictures is not part of it.
    """

    def __init__(self, processors: int):
        super().__init__()
        self.processors = processors
        self.launches: list[Launch] = []
        self._alive: list[Tensor] = []  # no id is used twice
        self._made: dict[int, Launch] = {}
        self._attention = _Attention(self)

    def __enter__(self):
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        return self._attention.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or func in FREE or func.namespace == "prim":
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.record(func, args, given, made)
        return result

    def record(self, func, args: tuple, given: list[Tensor], made: list[Tensor]) -> None:
        """Count one call that took the tensors ``given`` and made ``made``."""
        name = func.name().split("::")[-1].split(".")[0]
        launches, again = 1, 0
        if func in REREADS:
            again = size(given[0])
        elif func.namespace == "tdpm_ext" and name == "group_norm":
            launches, again = self._norm(given[0], args[1])
        if func in FILLS:
            given = []
        elif name == "copy_":
            given = given[1:]
        elif name == "index_put_":  # the entries that are set, not the tensor they are set in
            given, made = given[1:], given[-1:]
        entry = Launch(name, launches, sum(map(size, given)), again, sum(map(size, made)))
        entry.chain = self._in_chain(name, given, made)
        if name in NORMS:
            entry.picture = size(given[0])
        self.launches.append(entry)
        self._made.update((id(x), entry) for x in made)
        self._alive += made

    def _norm(self, x: Tensor, groups: int) -> tuple[int, int]:
        """(launches, bytes read a second time) of our group normalisation."""
        view = norm_plan.strides_of(x.shape, x.stride())
        plan = norm_plan.plan(tuple(x.shape), view, x.dtype, groups, self.processors)
        return (3 if plan.form == "split" else 1), (0 if plan.form == "tile" else size(x))

    def _in_chain(self, name: str, given: list[Tensor], made: list[Tensor]) -> bool:
        if name in NORMS:
            before = self._made.get(id(given[0]))
            if before is not None and before.op == "add" and before.read < 2 * size(given[0]):
                before.chain = True
            return True
        if name not in POINTWISE | AFFINE or not made:
            return False
        whole = [x for x in given if x.numel() == made[0].numel()]
        before = self._made.get(id(whole[0])) if len(whole) == 1 else None
        return before is not None and before.chain


class _Attention(TorchFunctionMode):
    """Takes scaled_dot_product_attention as one operation: fake tensors would always take its slowest path."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        batch, heads, length, _ = q.shape
        y = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)  # the layout of the fused kernels
        given = [x for x in (q, k, v, mask) if isinstance(x, Tensor)]
        self.traffic.record(aten._scaled_dot_product_flash_attention.default, args, given, [y])
        return y


@contextlib.contextmanager
def pretended_gpu(cc: int) -> Iterator[None]:
    """Choices as on a GPU of compute capability ``cc`` / 10, for fake CUDA tensors on a machine that has none.

    Fake tensors have neither values nor memory, so the caches are told what they would read from them: one noise
    level for all samples and one prompt, the same in every call, and weights that nobody edits.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(facts.assume_gpu(cc))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        stack.enter_context(mock.patch.object(caches, "_bits", lambda x: np.zeros((len(x), 1), dtype=np.int32)))
        stack.enter_context(mock.patch.object(caches.LastPrompt, "number_of", lambda self, prompt: 1))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", lambda self: id(self)))
        yield


ARMS = ("eager", "accelerate")


def count(
    name: str, arm: str, *, batch: int = 1, dtype: torch.dtype = torch.float16, cc: int = 80, inner: bool = False
) -> list[Launch]:
    """What one call of network ``name`` launches on a GPU of compute capability ``cc`` / 10.

    Args:
        name: of `networks.NETWORKS`.
        arm: "eager", as its library wrote it, or "accelerate": after `tdpm_ext.kernels.accelerate`, at a noise level
            and a prompt that were seen before, without a CUDA graph.
        batch: pictures.
        dtype: of weights and inputs.
        cc: as in ``PROCESSORS``.
        inner: without k-diffusion's preconditioning around the network.
    """
    from tdpm_ext.kernels import accelerate

    with FakeTensorMode(), torch.no_grad(), pretended_gpu(cc):
        model = networks.build(name, "cuda", dtype, weights=False)
        with networks.defaults("cuda", dtype):
            args, kwargs = networks.NETWORKS[name].inputs(batch)
        if arm == "accelerate":
            accelerate(model, graphs="off")
            model(*args, **kwargs)
        part = model.inner_model if inner else model
        with Traffic(PROCESSORS[cc]) as traffic:
            part(*args, **kwargs)
    return traffic.launches


def totals(launches: list[Launch]) -> dict[str, int]:
    """Launches and bytes in all: ``once`` with every input read once, ``passes`` with what is read again."""
    read, again, write = (sum(getattr(entry, part) for entry in launches) for part in ("read", "reread", "write"))
    return {"launches": sum(entry.launches for entry in launches), "once": read + write, "passes": read + again + write}


def chain_floor(launches: list[Launch]) -> int:
    """Bytes that no implementation of the norms' chains can avoid: every normalised picture read and written once."""
    return sum(2 * entry.picture for entry in launches if entry.picture)
