"""A stand-in for CUDA's graphs that runs on the CPU: it records the operations of a call, and runs them again.

It has the properties that make graphs dangerous. A replay reads the memory that the capture read and writes the
memory that the capture wrote, so a static input that was not filled gives the old answer. Results of a capture are
NaN until a replay. Looking at a value during a capture fails, as does drawing from a generator that was not
registered. A pool dies with its last graph, and naming a dead one is an error.
"""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdpm_ext.kernels.facts import is_building_graph
from tdpm_ext.kernels.graph_runtime import CudaRuntime, Pool


class CaptureError(RuntimeError):
    """What CUDA would say."""


class RecordedGraph:
    """Operations with the very tensors they read and wrote."""

    def __init__(self, handle):
        self.handle, self.steps, self.replays, self.alive = handle, [], 0, True

    def replay(self):
        assert self.alive, "a graph that was reset is replayed"
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, results in self.steps:
                again = tree_leaves(func(*args, **kwargs))
                for old, new in zip(tree_leaves(results), again, strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self):
        self.alive, self.steps = False, []


class _Recorder(TorchDispatchMode):
    def __init__(self, graph, generators):
        super().__init__()
        self.graph, self.generators = graph, generators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise CaptureError("operation not permitted when stream is capturing")
        generator = kwargs.get("generator")
        # torch hands over another Python object for the same generator
        if generator is not None and generator._cdata not in [g._cdata for g in self.generators]:
            raise CaptureError("a generator that was not registered draws during a capture")
        results = func(*args, **kwargs)
        self.graph.steps.append((func, args, kwargs, results))
        return results


class RecordingRuntime(CudaRuntime):
    """`CudaRuntime` with its CUDA calls replaced; what the manager asks for is written down in ``log``."""

    device_type = "cpu"

    def __init__(self):
        super().__init__()
        self.log: list[str] = []
        self.graphs: list[weakref.ref] = []
        self.handles = 0
        self.streams: list[str] = ["main"]  # the current one last

    def busy(self):
        return is_building_graph()

    def pool(self, device):
        pool = self._pools.get(device)
        if pool is None:
            self.handles += 1
            pool = self._pools[device] = Pool(self.handles, "side")
        return pool

    def living(self):
        return [graph for graph in (ref() for ref in self.graphs) if graph is not None and graph.alive]

    def warm_up(self, pool, work, times):
        self.log += ["warm-up"] * times
        for _ in range(times):
            work()

    def capture(self, pool, work, generators):
        self.log.append("capture")
        others = {graph.handle for graph in self.living()}
        assert not others or pool.handle in others, "graphs of one device must share a pool while one is alive"
        assert pool.handle == self.handles, "the pool died with its last graph"
        graph = RecordedGraph(pool.handle)
        with _Recorder(graph, generators):
            outputs = work()
        self.graphs.append(weakref.ref(graph))
        _forget_results(graph)
        return graph, outputs

    def replay(self, pool, graph):
        self.log.append("replay")
        graph.replay()
        pool.last = self.streams[-1]

    def wait_for_last_replay(self, pool):
        if pool.last is not None and pool.last != self.streams[-1]:
            self.log.append(f"{self.streams[-1]} waits for {pool.last}")

    def free(self, device, graphs):
        self.log.append(f"free {len(graphs)}")
        for graph in graphs:
            graph.reset()

    def release_memory(self):
        self.log.append("release memory")

    @contextlib.contextmanager
    def random_state_kept(self, device, generators):
        kept = [(g, g.get_state()) for g in (torch.default_generator, *generators)]
        try:
            yield
        finally:
            for generator, state in kept:
                generator.set_state(state)


def _forget_results(graph):
    """A capture computes nothing: what it made holds NaN, where it did not alias what was there before."""
    made, known = [], set()
    for _, args, kwargs, results in graph.steps:
        known |= {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)} - {
            _storage(t) for t in made
        }
        made += [t for t in tree_leaves(results) if isinstance(t, Tensor) and _storage(t) not in known]
    for tensor in made:
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(torch.nan)


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()
