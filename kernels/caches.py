"""What a few-step sampler computes again and again: projections of the noise level, keys and values of the prompt.

A schedule of four steps asks for four noise levels, picture after picture. Everything a network derives from the
level (and the class) alone is kept here, a row for each; what it derives from the prompt alone is kept for the last
prompt. Both are dropped as soon as a weight that they came from has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from tdpm_ext.kernels.facts import is_capturing

MAX_BATCHES = 64  # kept ready as a whole: a schedule's steps for a few batches
MAX_ROWS = 4096  # a row is as long as all projections together: 40 kB for a CIFAR-sized network
PROBES = 64  # values looked at per weight, besides its version


class Fingerprint:
    """Tells whether some submodules, or any weight or buffer in them, have changed since it was last asked.

    A change is seen through the identity of the modules and tensors, their storage and their version counters. Edits
    through ``.data`` bypass the counter: on the CPU a sample of the values is compared as well, on a GPU that would
    cost a transfer for every call, so there only what torch counts is seen (``Handle.refresh`` drops everything).

    Args:
        places: (module, name of a submodule) pairs: what stands there may be exchanged, by a LoRA say.
    """

    def __init__(self, places: Sequence[tuple[nn.Module, str]]):
        self._places = tuple(places)
        self._edges: list[tuple] = []
        self._seen: list[tuple] = []
        self._known = False

    def changed(self) -> bool:
        """True once after every change, and at the first call."""
        same = self._known and all(held.get(name) is inner for held, name, inner in self._edges)
        if same and all(
            held.get(name) is p
            and p.data_ptr() == pointer
            and (version is None or p._version == version)
            and (sample is None or sample.tobytes() == values)
            for held, name, p, pointer, version, sample, values in self._seen
        ):
            return False
        self._edges, self._seen = [], []
        for module, name in self._places:
            self._walk(module._modules, name)
        self._known = True
        return True

    def _walk(self, held: dict, name: str) -> None:
        module = held.get(name)
        self._edges.append((held, name, module))
        if module is None:
            return
        for tensors in (module._parameters, module._buffers):
            self._seen += [(tensors, key, *_state(t)) for key, t in tensors.items() if t is not None]
        for key in module._modules:
            self._walk(module._modules, key)

    def forget(self) -> None:
        """Report a change at the next call, whatever has happened."""
        self._known = False

    def __deepcopy__(self, memo):
        return Fingerprint(deepcopy(self._places, memo))


def _state(p: Tensor) -> tuple:
    """(p, address, version, a view of some values, their bytes now)."""
    # tensors made in inference mode keep no version
    version = None if p.is_inference() else p._version
    sample = _sample(p)
    return p, p.data_ptr(), version, sample, None if sample is None else sample.tobytes()


def _sample(p: Tensor):
    """Some of the values, as a numpy view of the parameter's own memory; None on a GPU."""
    if p.device.type != "cpu" or not p.numel():
        return None
    # in memory order, so that this is a view; as integers, since numpy knows no bfloat16
    flat = p.detach().as_strided((p.numel(),), (1,)) if _dense(p) else p.detach().reshape(-1)
    return flat.view(_INTEGERS[p.element_size()]).numpy()[:: max(1, flat.numel() // PROBES)]


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _dense(p: Tensor) -> bool:
    """Whether the elements fill their storage without gaps, in some order."""
    return torch.ops.aten.is_non_overlapping_and_dense(p)


def hooked(*modules: nn.Module) -> bool:
    """Whether somebody listens to one of these modules, which a fused path would leave out."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules) or bool(
        nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    )


def capturing(x: Tensor) -> bool:
    """Whether x is part of a graph in the making: what is remembered now would stay in that graph for ever."""
    return torch.compiler.is_compiling() or (x.is_cuda and is_capturing())


def remembered(cache: PromptCache | None, prompt: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, through the cache if there is one."""
    return compute() if cache is None else cache.get(prompt, compute)


class RowCache:
    """One row of derived values for each distinct row of inputs, kept until a weight changes.

    ``get(inputs, compute)`` takes tensors [B, ...] and a function that makes [n, width] from n of their rows.
    ``added`` says whether the last call had to compute any.
    """

    def __init__(self, places: Sequence[tuple[nn.Module, str]]):
        self.weights = Fingerprint(places)
        self.clear()

    def clear(self) -> None:
        """Drop all rows."""
        self._index: dict[bytes, int] = {}
        self._table: Tensor | None = None
        self._arranged: dict[tuple, Any] = {}
        self.added = False

    def get(self, inputs: Sequence[Tensor], compute: Callable[..., Tensor]) -> Tensor:
        """[B, width]: known rows looked up, the others computed. On a GPU this waits for ``inputs``."""
        if self.weights.changed():
            self.clear()
        return self._gather(inputs, compute)

    def arranged(self, inputs: Sequence[Tensor], compute: Callable[..., Tensor], arrange: Callable[[Tensor], Any]):
        """``arrange(get(inputs, compute))``, kept for the last few different batches."""
        if self.weights.changed():
            self.clear()
        key = tuple(_bits(t).tobytes() for t in inputs)
        self.added = False
        known = self._arranged.get(key)
        if known is None:
            known = arrange(self._gather(inputs, compute))
            if len(self._arranged) >= MAX_BATCHES:
                self._arranged.pop(next(iter(self._arranged)))
            self._arranged[key] = known
        return known

    def _gather(self, inputs: Sequence[Tensor], compute: Callable[..., Tensor]) -> Tensor:
        keys = row_keys(inputs)
        missing = [i for i, key in enumerate(keys) if key not in self._index]
        self.added = bool(missing)
        if missing:
            self._add(keys, missing, inputs, compute)
        rows = [self._index[key] for key in keys]
        if all(row == rows[0] for row in rows):
            return self._table[rows[0]].expand(len(rows), -1)
        return self._table.index_select(0, torch.tensor(rows, device=self._table.device))

    def _add(self, keys: list[bytes], missing: list[int], inputs: Sequence[Tensor], compute) -> None:
        if len(self._index) + len(missing) > MAX_ROWS:
            self.clear()
            missing = list(range(len(keys)))
        fresh = {keys[i]: i for i in missing}  # one for each distinct key
        where = torch.tensor(list(fresh.values()), device=inputs[0].device)
        values = compute(*(t.index_select(0, where) for t in inputs)).detach()
        start = 0 if self._table is None else len(self._table)
        self._table = values if self._table is None else torch.cat([self._table, values])
        self._index.update({key: start + i for i, key in enumerate(fresh)})

    def __deepcopy__(self, memo):
        copy = RowCache(())
        copy.weights = deepcopy(self.weights, memo)
        return copy


def row_keys(inputs: Sequence[Tensor]) -> list[bytes]:
    """The bits of each row of the tensors [B, ...], as one key."""
    flat = [_bits(t).reshape(len(t), -1) for t in inputs]
    return [b"".join(part.tobytes() for part in parts) for parts in zip(*flat, strict=True)]


def _bits(t: Tensor):
    """A tensor's values as a numpy array of integers, for comparing to the bit. On a GPU this waits for them."""
    t = t.detach()
    t = (t if t.device.type == "cpu" else t.cpu()).contiguous()
    return t.view(_INTEGERS[t.element_size()]).numpy() if t.is_floating_point() else t.numpy()


class LastPrompt:
    """Recognises the prompt of the last call of a network, so that what was derived from it can be used again.

    ``new_call()`` stands at the start of each call of the network: within one call a tensor is known by being the same
    object, from one to the next by its values, since callers build theirs anew or write into the old one.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._seen: weakref.ref | None = None
        self._number = 0  # counts different prompts

    def new_call(self) -> None:
        """Forget which object the prompt was."""
        self._seen = None

    def number_of(self, prompt: Tensor) -> int:
        """A number that stays while the prompt's values do."""
        if self._seen is not None and self._seen() is prompt:
            return self._number
        last = self._last
        same = last is not None and last.shape == prompt.shape and last.dtype == prompt.dtype
        if not (same and last.device == prompt.device and torch.equal(last, prompt)):
            self._last = prompt.detach().clone()  # the caller may overwrite its own
            self._number += 1
        self._seen = weakref.ref(prompt)
        return self._number

    def __deepcopy__(self, memo):
        return LastPrompt()


class Projections:
    """What all blocks of a network project from one embedding [B, features], computed together and kept by its bits.

    ``compute(block, embedding)`` gives a block's own [B, width], by the submodule of the given name. Each block finds
    its columns by its ``SLOT``; ``of`` computes directly where the table may not be used.
    """

    def __init__(self, blocks: Sequence[nn.Module], name: str, compute: Callable[[nn.Module, Tensor], Tensor]):
        self._blocks, self._name, self._compute = tuple(blocks), name, compute
        self._rows = RowCache([(block, name) for block in blocks])
        self.new_call()
        start = 0
        for block in blocks:
            part = getattr(block, name)
            width = last_layer(part).out_features
            vars(block)[SLOT] = (self, part, slice(start, start + width))  # in vars: it is no submodule of the block
            start += width

    @property
    def weights(self) -> Fingerprint:
        """Of all projections."""
        return self._rows.weights

    def new_call(self) -> None:
        """Forget which object the embedding was."""
        self._seen: weakref.ref | None = None
        self._value: Tensor | None = None

    def get(self, embedding: Tensor) -> Tensor:
        """[B, sum of widths], in the order of the blocks."""
        if self._seen is None or self._seen() is not embedding:
            self._value = self._rows.get((embedding,), self._all)
            self._seen = weakref.ref(embedding)
        return self._value

    def _all(self, embedding: Tensor) -> Tensor:
        return torch.cat([self._compute(block, embedding) for block in self._blocks], dim=1)

    def __deepcopy__(self, memo):
        return Projections(deepcopy(self._blocks, memo), self._name, self._compute)


SLOT = "_tdpm_columns"


def projected(block: nn.Module, name: str, embedding: Tensor, compute: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """``compute(block, embedding)``: from the network's table unless the layer was exchanged or somebody listens."""
    part = getattr(block, name)
    shared, known, columns = vars(block).get(SLOT, (None, None, None))
    direct = shared is None or known is not part or capturing(embedding) or cast_by_host(last_layer(part))
    if direct or hooked(*part.modules()):
        return compute(block, embedding)
    return shared.get(embedding)[:, columns]


def last_layer(part: nn.Module) -> nn.Module:
    """The layer with the weights, alone or last in a sequence."""
    return part[-1] if isinstance(part, nn.Sequential) else part


def cast_by_host(module: nn.Module) -> bool:
    """Whether a host makes the weights anew in every ``forward`` (ComfyUI, with LoRA in it): nothing can be kept."""
    return bool(getattr(module, "comfy_cast_weights", False) or getattr(module, "weight_function", None))


class PromptCache:
    """What one module derives from the prompt, kept while prompt and weights stay."""

    def __init__(self, prompt: LastPrompt, places: Sequence[tuple[nn.Module, str]]):
        self._prompt, self.weights = prompt, Fingerprint(places)
        self._number, self._value = -1, None

    def get(self, prompt: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, or what it gave last time."""
        number = self._prompt.number_of(prompt)
        if self.weights.changed() or number != self._number:
            self._value, self._number = compute().detach(), number
        return self._value

    def __deepcopy__(self, memo):
        copy = PromptCache(deepcopy(self._prompt, memo), ())
        copy.weights = deepcopy(self.weights, memo)
        return copy
