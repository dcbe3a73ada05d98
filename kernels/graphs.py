"""CUDA graphs: one denoiser call, or a whole few-step trajectory, captured once and replayed.

At a batch of one a few-step sampler waits for launches, not for arithmetic; a graph is one launch. What makes graphs
dangerous is all that they silently assume, so here every assumption is in the key, or a static input, or a refusal
with a reason, after which the call simply runs eagerly. Rules: three warm-ups on a side stream; one memory pool per
device, gone with its last graph; few graphs per object, then eager calls; a capture that fails is freed and never
tried again; any change of weights drops all graphs; outputs are copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdpm_ext.kernels.facts import KernelError, switches
from tdpm_ext.kernels.graph_keys import Baked, Call, Refused, Watched, take_apart
from tdpm_ext.kernels.graph_runtime import CudaRuntime, Pool, StaticInput, conditions_of_capture
from tdpm_ext.kernels.registry import note

__all__ = ["Baked", "GraphedForward", "GraphedTrajectory", "Stats", "graphed"]

MAX_GRAPHS = 4  # of one object: each holds memory for all activations that live at once
WARM_UPS = 3
WASTED = 3  # graphs dropped before their first reuse after which weights count as ever-changing

_lock = threading.RLock()  # one capture at a time in a process; copy in, replay and copy out belong together
_cuda = CudaRuntime()


@dataclass
class Stats:
    """What an object did: graphs captured, replays, eager calls, and how often all graphs were dropped."""

    captures: int = 0
    replays: int = 0
    eager: int = 0
    resets: int = 0


@dataclass
class _Entry:
    """One graph, with all memory that it reads or writes and that is not its own."""

    graph: Any
    pool: Pool
    inputs: list[StaticInput]
    outputs: list[Tensor | None]
    spec: Any
    replays: int = 0


class GraphedForward:
    """A callable that replays a CUDA graph of ``fn`` where that is sure to give what ``fn`` would, and calls it else.

    A Python float among the arguments is refused, as it would be baked in: pass a tensor, or `Baked`. Also refused:
    tensors that are not on the GPU, gradients, hooks inside, results other than tensors (and None) in a pytree, a
    function that writes into its arguments or its weights. `reasons` has every refusal so far; ``TDPM_GRAPHS=0`` in
    the environment turns all graphs off.

    Args:
        fn: a module, a module's bound ``forward`` (then its own hooks run outside, as they should when this object
            takes the place of ``forward``), or a function.
        watch: modules and tensors whose memory ``fn`` reads; a module, or that of a bound ``forward``, is added by
            itself. For any other function say what it reads, () for nothing: it is never guessed.
        copy_outputs: False lends the graph's own outputs, which the next replay overwrites.
        max_graphs: cap; calls of further kinds run eagerly.
        warm_ups: eager runs on a side stream before a capture, at least 3.
        generators: CUDA generators other than the default one that ``fn`` draws from.
        runtime: how graphs are captured; CUDA's by default.

    Raises:
        KernelError: what ``fn`` reads is not known. In a call, with ``TDPM_KERNELS_STRICT=1``: a failed capture.
    """

    _floats = False

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        watch: Iterable[nn.Module | Tensor] | None = None,
        copy_outputs: bool = True,
        max_graphs: int = MAX_GRAPHS,
        warm_ups: int = WARM_UPS,
        generators: Sequence[torch.Generator] = (),
        runtime: CudaRuntime | None = None,
    ):
        owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
        owner = owner if isinstance(owner, nn.Module) else None
        if watch is None and owner is None:
            name = getattr(fn, "__qualname__", type(fn).__name__)
            raise KernelError(f"graphed: say which modules and tensors {name} reads: watch=[...], or watch=() for none")
        self._settings = {
            "watch": tuple(watch or ()),
            "copy_outputs": copy_outputs,
            "max_graphs": max_graphs,
            "warm_ups": max(warm_ups, WARM_UPS),
            "generators": tuple(generators),
            "runtime": runtime,
        }
        self.__wrapped__ = fn  # so that inspect.signature sees the arguments of fn
        is_forward = owner is not None and owner is not fn and getattr(fn, "__name__", "") == "forward"
        items = self._settings["watch"]
        if owner is not None and not any(item is owner for item in items):
            items = (owner, *items)
        self._watched = Watched(items, forward_of=owner if is_forward else None)
        self._runtime = runtime or _cuda
        self._forget()
        self.stats = Stats()
        self.reasons: dict[str, None] = {}

    def _forget(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._poisoned: dict[Hashable, str] = {}
        self._fingerprint: tuple = ()
        self._wasted = 0

    def reset(self) -> None:
        """Drop all graphs and all that is known about failures."""
        with _lock:
            self._drop()
            self._forget()

    def __deepcopy__(self, memo: dict) -> GraphedForward:
        from copy import deepcopy

        settings = {**self._settings, "watch": deepcopy(self._settings["watch"], memo)}
        return type(self)(deepcopy(self.__wrapped__, memo), **settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``fn`` returns for these arguments."""
        if torch.compiler.is_compiling() or switches().TDPM_GRAPHS == "0" or self._runtime.busy():
            return self._eagerly(args, kwargs)
        try:
            call = take_apart(args, kwargs, self._runtime.device_type, floats=self._floats)
            with _lock:
                entry = self._entry(call)
                return self._replay(entry, call.inputs)
        except Refused as refusal:
            self._say(str(refusal))
        return self._eagerly(args, kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> bool:
        """Capture ahead of serving, for calls like this one; whether a graph now stands ready."""
        before = self.stats.replays
        self(*args, **kwargs)
        return self.stats.replays > before

    def _eagerly(self, args: tuple, kwargs: dict) -> Any:
        self.stats.eager += 1
        args, kwargs = pytree.tree_map_only(Baked, lambda b: b.value, (args, kwargs))
        return self.__wrapped__(*args, **kwargs)

    def _say(self, reason: str) -> None:
        self.reasons[reason] = None
        note("graph", "eager", reason)

    def _entry(self, call: Call) -> _Entry:
        """The graph for this call, captured now if it is the first of its kind."""
        self._follow_weights()
        if self._watched.needs_grad() or any(isinstance(t, Tensor) and t.requires_grad for t in call.inputs):
            raise Refused("gradients are needed")
        entry = self._entries.get(call.key)
        if entry is not None:
            return entry
        if call.key in self._poisoned:
            raise Refused(self._poisoned[call.key])
        if self._wasted >= WASTED:
            raise Refused("the weights change between calls (reset() tries again)")
        if len(self._entries) + len(self._poisoned) >= self._settings["max_graphs"]:
            raise Refused(f"calls of {self._settings['max_graphs']} other kinds were captured, or tried")
        self._entries[call.key] = entry = self._capture_or_poison(call)
        return entry

    def _follow_weights(self) -> None:
        try:
            now = (self._runtime.epoch, *self._watched.fingerprint())
        except RuntimeError as error:  # a tensor subclass without an address of its own
            raise Refused(f"the state of the weights cannot be told ({error})") from error
        if now != self._fingerprint:
            self._drop()
            self._poisoned = {}
            self._fingerprint = now

    def _drop(self) -> None:
        if not self._entries:
            return
        self._wasted = 0 if any(entry.replays > 1 for entry in self._entries.values()) else self._wasted + 1
        self.stats.resets += 1
        entries = list(self._entries.values())
        self._entries = {}
        self._runtime.free(entries[0].inputs[0].tensor.device, [entry.graph for entry in entries])

    def _capture_or_poison(self, call: Call) -> _Entry:
        # Whatever goes wrong here is not the end: an error of fn's own will be raised again by the eager call.
        try:
            entry = self._capture(call)
        except Refused as refusal:
            self._poisoned[call.key] = str(refusal)
            raise
        except Exception as error:
            reason = f"capture failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            self._poisoned[call.key] = reason
            failure = error if switches().strict else None
        else:
            self.stats.captures += 1
            return entry
        self._runtime.release_memory()  # outside of the handler, which still holds what the capture allocated
        if failure is not None:
            raise KernelError(f"{reason}; TDPM_KERNELS_STRICT=1 forbids going on without the graph") from failure
        raise Refused(reason)

    def _capture(self, call: Call) -> _Entry:
        runtime, generators = self._runtime, self._settings["generators"]
        device = next(t.device for t in call.inputs if isinstance(t, Tensor))
        self._watched.check_for_capture(device)
        inputs = [StaticInput(value, device) for value in call.inputs]
        for static, value in zip(inputs, call.inputs, strict=True):
            static.load(value)
        versions = [static.version for static in inputs]
        args, kwargs = call.rebuild([static.tensor for static in inputs])

        def work() -> Any:
            return self.__wrapped__(*args, **kwargs)

        pool = runtime.pool(device)
        runtime.wait_for_last_replay(pool)
        with runtime.random_state_kept(device, generators), conditions_of_capture(runtime.device_type):
            runtime.warm_up(pool, work, 1)
            settled = self._watched.fingerprint()  # a first call may still fill what is made lazily
            runtime.warm_up(pool, work, self._settings["warm_ups"] - 1)
            graph, result = runtime.capture(pool, work, generators)
        if versions != [static.version for static in inputs]:
            raise Refused("it writes into its arguments")
        if settled != self._watched.fingerprint():
            raise Refused("it changes its own weights or buffers")
        self._fingerprint = (runtime.epoch, *settled)
        outputs, spec = pytree.tree_flatten(result)
        for leaf in outputs:
            if leaf is not None and not (type(leaf) is Tensor and leaf.device == device):
                raise Refused(f"it returns a {type(leaf).__name__} that is not a tensor on {device}")
        return _Entry(graph, pool, inputs, outputs, spec)

    def _replay(self, entry: _Entry, values: list[Tensor | float]) -> Any:
        self._runtime.wait_for_last_replay(entry.pool)
        for static, value in zip(entry.inputs, values, strict=True):
            static.load(value)
        self._runtime.replay(entry.pool, entry.graph)
        entry.replays += 1
        self.stats.replays += 1
        outputs = entry.outputs
        if self._settings["copy_outputs"]:
            outputs = [None if t is None else t.clone() for t in outputs]
        return pytree.tree_unflatten(outputs, entry.spec)


class GraphedTrajectory(GraphedForward):
    """A whole trajectory as one graph: the prior's transport and every step of the solver.

    ``run(z, *args, **kwargs)`` must be free of decisions that depend on values on the GPU. Its per-step constants are
    baked in: those it encloses must not change, those passed as `Baked` are part of the key. Python floats, such as a
    guidance scale, become static inputs: ``run`` receives them as 0-dimensional float32 tensors, eagerly as well.
    Noise is drawn outside and passed in, or drawn inside from a registered generator.
    """

    _floats = True

    def _eagerly(self, args: tuple, kwargs: dict) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        device = next((t.device for t in leaves if isinstance(t, Tensor)), None)
        given = pytree.tree_map_only(float, lambda f: torch.full((), f, device=device), (args, kwargs))
        return super()._eagerly(*given)


def graphed(
    fn: Callable[..., Any],
    *,
    watch: Iterable[nn.Module | Tensor] | None = None,
    copy_outputs: bool = True,
    max_graphs: int = MAX_GRAPHS,
    generators: Sequence[torch.Generator] = (),
) -> GraphedForward:
    """``fn`` behind CUDA graphs, one for each kind of call; `GraphedForward` has the options and what is refused."""
    options = {"copy_outputs": copy_outputs, "max_graphs": max_graphs, "generators": generators}
    return GraphedForward(fn, watch=watch, **options)
