"""The few things that graphs need of CUDA, behind one small class, so that the manager's logic runs anywhere."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tdpm_ext.kernels.facts import building_graph, is_capturing


class Pool:
    """Memory that the graphs of one device share, and the stream they are captured on.

    Graphs of one pool use each other's scratch memory, so their replays must follow one another: ``last`` is the
    stream of the newest one. A pool dies with its last graph; a new graph must not name a dead one.
    """

    def __init__(self, handle: Any, stream: Any):
        self.handle, self.stream, self.last = handle, stream, None


class CudaRuntime:
    """Capture and replay through `torch.cuda`.

    Args:
        check_input_liveness: let torch raise when a graph is replayed after memory that it reads was freed (torch
            2.14 and later; slow, for tests).
    """

    device_type = "cuda"

    def __init__(self, *, check_input_liveness: bool = False):
        self._options = {"check_input_liveness": True} if check_input_liveness else {}
        self.epoch = 0  # graphs of an older one must not be replayed
        self._pools: weakref.WeakValueDictionary[torch.device, Pool] = weakref.WeakValueDictionary()

    def busy(self) -> bool:
        """Whether this thread's work already goes into a graph."""
        return is_capturing()

    def pool(self, device: torch.device) -> Pool:
        """The device's pool, a new one unless a graph keeps the old one alive."""
        pool = self._pools.get(device)
        if pool is None:
            pool = self._pools[device] = Pool(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))
        return pool

    def warm_up(self, pool: Pool, work: Callable[[], Any], times: int) -> None:
        """Run ``work`` on the side stream: lazy initialisation, autotuning and Triton's compilation happen here."""
        device = pool.stream.device
        current = torch.cuda.current_stream(device)
        pool.stream.wait_stream(current)
        with torch.cuda.stream(pool.stream):
            for _ in range(times):
                work()
        current.wait_stream(pool.stream)

    def capture(self, pool: Pool, work: Callable[[], Any], generators: Sequence[torch.Generator]) -> tuple[Any, Any]:
        """(graph, what ``work`` returned); nothing of it has been computed yet."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        current = torch.cuda.current_stream(pool.stream.device)
        try:
            # "thread_local": an allocation in another thread of the host must not spoil the capture
            with torch.cuda.graph(
                graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local", **self._options
            ):
                outputs = work()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
        return graph, outputs

    def replay(self, pool: Pool, graph: Any) -> None:
        """Run the graph on the current stream."""
        graph.replay()
        pool.last = torch.cuda.current_stream(pool.stream.device)

    def wait_for_last_replay(self, pool: Pool) -> None:
        """Order what follows on the current stream after the pool's newest replay, on whatever stream that was."""
        current = torch.cuda.current_stream(pool.stream.device)
        if pool.last is not None and pool.last != current:
            current.wait_stream(pool.last)

    def free(self, device: torch.device, graphs: Sequence[Any]) -> None:
        """Release graphs once the device is done with them."""
        torch.cuda.synchronize(device)
        for graph in graphs:
            graph.reset()

    def release_memory(self) -> None:
        """Give back what a failed capture had reserved."""
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def random_state_kept(self, device: torch.device, generators: Sequence[torch.Generator]) -> Iterator[None]:
        """Warm-up draws must not be seen: the first replay draws what an eager call would have drawn."""
        kept = [(g, g.get_state()) for g in (torch.cuda.default_generators[device.index], *generators)]
        try:
            yield
        except BaseException:
            for generator, _ in kept:
                self._leave_capture_mode(generator, device)
            raise
        finally:
            for generator, state in kept:
                generator.set_state(state)

    def _leave_capture_mode(self, generator: torch.Generator, device: torch.device) -> None:
        """After a failed capture a generator may still believe in it, and refuse to draw: give it a fresh state.

        Graphs that registered the old state would then follow no seed any more, hence a new epoch.
        """
        try:
            torch.rand(1, generator=generator, device=device)
        except RuntimeError:
            generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
            self.epoch += 1


@contextlib.contextmanager
def conditions_of_capture(device_type: str) -> Iterator[None]:
    """Around warm-up and capture alike."""
    with building_graph(), contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device_type):
            # autocast would keep weights cast during warm-up, and free them under the graph when the caller leaves it
            dtype = torch.get_autocast_dtype(device_type)
            stack.enter_context(torch.autocast(device_type, dtype=dtype, cache_enabled=False))
        yield


class StaticInput:
    """Memory that a graph reads an input from, laid out like the tensor of the first call."""

    def __init__(self, like: Tensor | float, device: torch.device):
        with torch.inference_mode(False):
            if isinstance(like, float):
                self._owned = self.tensor = torch.empty((), device=device)
                return
            # an expanded dimension stays one: a single copy, and the same strides as in an eager call
            self._first = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in like.stride())
            single = [
                1 if stride == 0 and size else size for size, stride in zip(like.shape, like.stride(), strict=True)
            ]
            self._owned = torch.empty_strided(single, like.stride(), dtype=like.dtype, device=device)
            self.tensor = self._owned.expand(like.shape)

    def load(self, value: Tensor | float) -> None:
        """Copy a value in, without waiting for the device."""
        with torch.no_grad():
            if isinstance(value, float):
                self._owned.fill_(value)
            else:
                self._owned.copy_(value[self._first], non_blocking=True)

    @property
    def version(self) -> int:
        """Counts writes, so that a network which writes into its inputs is found out."""
        return self._owned._version
