"""The opt-in tiers of ``accelerate``: half precision and compiled code, taken where a measurement says that they pay.

Both change results, half precision visibly, so neither is ever chosen by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn

from tdpm_ext.kernels.caches import Fingerprint
from tdpm_ext.kernels.cpu_blocks import PackedWeights, Switch

WIDE = {"sigma", "mapping_cond", "timestep", "timesteps"}
REPEATS = 5  # timed calls of each way; the fastest of each counts


class _Measured:
    """A module's body in two ways: as it is, and another one, used for the shapes for which it is faster.

    Takes the place of the module's ``forward``. The first call with new shapes times both ways; what was decided is
    appended to ``notes``.

    Args:
        usual: the module's forward.
        weights: ``weights.update()`` is called before every call, for what is derived from them.
    """

    def __init__(self, usual: Callable, notes: list[str], weights):
        self._usual, self.notes, self._weights = usual, notes, weights
        self._chosen: dict[tuple, Callable] = {}

    @property
    def weights(self) -> Fingerprint:
        """Of what is derived from them."""
        return self._weights.weights

    def _race(self, other: Callable, args: tuple, kwargs: dict) -> Callable:
        usual, seconds = race((self._usual, other), args, kwargs)
        self.notes.append(
            f"compile: {seconds * 1e3:.3g} ms against {usual * 1e3:.3g} ms for {tuple(args[0].shape)}; "
            f"{'used' if seconds < usual else 'not used'}"
        )
        return other if seconds < usual else self._usual

    def __deepcopy__(self, memo):
        return type(self)(*(deepcopy(part, memo) for part in (self._usual, self.notes, self._weights)))


class Compiled(_Measured):
    """A body compiled by Inductor for each shape it meets, which takes from seconds to minutes."""

    _compiled: Callable | None = None

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self._usual(*args, **kwargs)
        self._weights.update()
        args, kwargs = _dense(args), _dense(kwargs)
        key = shapes_of((args, kwargs))
        if key not in self._chosen:
            self._chosen[key] = self._choose(args, kwargs)
        return self._chosen[key](*args, **kwargs)

    def _choose(self, args: tuple, kwargs: dict) -> Callable:
        if self._compiled is None:
            self._compiled = torch.compile(self._usual, dynamic=False, fullgraph=True)
        try:
            self._compiled(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = str(error).strip().splitlines()[0]
            self.notes.append(f"compile: not possible here ({reason}); the exact tier is used")
            return self._usual
        return self._race(self._compiled, args, kwargs)


class Blocks(_Measured):
    """A body whose modules use the C++ blocks of `cpu_blocks` while its ``switch`` is on."""

    def __init__(self, usual: Callable, notes: list[str], weights: PackedWeights, switch: Switch):
        super().__init__(usual, notes, weights)
        self._switch = switch

    def __call__(self, *args, **kwargs):
        x = args[0]
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor
        if traced or torch.is_grad_enabled() or not x.is_cpu:
            return self._usual(*args, **kwargs)
        self._weights.update()
        key = x.shape, x.dtype, torch.get_num_threads()
        way = self._chosen.get(key)
        if way is None:
            way = self._chosen[key] = self._race(self._in_blocks, args, kwargs)
        return way(*args, **kwargs)

    def _in_blocks(self, *args, **kwargs):
        self._switch.on = True
        try:
            return self._usual(*args, **kwargs)
        finally:
            self._switch.on = False

    def __deepcopy__(self, memo):
        return Blocks(*(deepcopy(p, memo) for p in (self._usual, self.notes, self._weights, self._switch)))


def _map(value, change: Callable[[Tensor], Tensor]):
    """Every tensor inside tuples, lists and dicts, changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map(inner, change) for name, inner in value.items()}
    return type(value)(_map(inner, change) for inner in value) if isinstance(value, (tuple, list)) else value


def _dense(value):
    """Without repeated rows, which compiled code would be specialised to."""
    return _map(value, lambda t: t.contiguous() if 0 in t.stride() else t)


def race(ways: tuple[Callable, ...], args: tuple, kwargs: dict) -> list[float]:
    """Seconds of the fastest call of each way, called in turns."""
    best = [float("inf")] * len(ways)
    device = next((a.device for a in _tensors(args)), torch.device("cpu"))
    for _ in range(REPEATS):
        for i, way in enumerate(ways):
            _wait(device)
            start = time.perf_counter()
            way(*args, **kwargs)
            _wait(device)
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shapes_of(args: tuple) -> tuple:
    """What a compiled body depends on, of its arguments: (shape, dtype, device) of every tensor in them."""
    return tuple((tuple(t.shape), t.dtype, t.device) for t in _tensors(args))


def _tensors(value) -> list[Tensor]:
    found: list[Tensor] = []
    _map(value, lambda t: found.append(t) or t)
    return found


class Half:
    """A network in half precision behind a float32 face, if that is faster; the float32 weights are kept for undo.

    Takes the place of the network's ``forward``; ``modules`` are those whose weights are cast. The first call times
    both ways and decides for all shapes.
    """

    def __init__(self, modules: Iterable[nn.Module], usual: Callable, notes: list[str]):
        self._modules, self._usual, self.notes = tuple(modules), usual, notes
        self._originals: list[tuple[nn.Parameter, Tensor, tuple]] = []
        self._decided = False
        self.dtype: torch.dtype | None = None

    def __call__(self, *args, **kwargs):
        if torch.is_grad_enabled() and not self._originals:
            return self._usual(*args, **kwargs)
        if not self._decided:
            self._decide(args, kwargs)
        return self._usual(*args, **kwargs) if self.dtype is None else self._in_half(*args, **kwargs)

    def _decide(self, args: tuple, kwargs: dict) -> None:
        self._decided = True
        device = args[0].device
        wide, narrow = args[0].dtype, torch.bfloat16 if device.type == "cpu" else torch.float16
        if wide.itemsize < 4:
            self.notes.append(f"half: the network already takes {wide}")
            return

        full = race((self._usual,), args, kwargs)[0]
        self._cast(narrow)
        half = race((self._in_half,), args, kwargs)[0]
        used = half < full
        if not used:
            self.restore()
        self.notes.append(
            f"half: {half * 1e3:.3g} ms in {narrow} against {full * 1e3:.3g} ms; {'used' if used else 'not used'}"
        )

    def _in_half(self, *args, **kwargs):
        wide, narrow = args[0].dtype, self.dtype

        def cast(value, dtype):
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        # the noise level (second) and what is added to its embedding stay wide: they are projected in float32
        args = tuple(a if i == 1 else cast(a, narrow) for i, a in enumerate(args))
        kwargs = {k: v if k in WIDE else cast(v, narrow) for k, v in kwargs.items()}
        out = self._usual(*args, **kwargs)
        if isinstance(out, dict):  # diffusers' outputs are ordered dicts with attributes
            return type(out)(**{k: cast(v, wide) for k, v in out.items()})
        return tuple(cast(o, wide) for o in out) if isinstance(out, tuple) else cast(out, wide)

    def _cast(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        for parameter in {id(p): p for m in self._modules for p in m.parameters()}.values():
            if parameter.is_floating_point():
                original = parameter.data
                parameter.data = original.to(dtype)
                self._originals.append((parameter, original, (parameter.data_ptr(), parameter._version)))

    def restore(self) -> None:
        """The float32 weights again; a weight that was edited meanwhile keeps its edit."""
        for parameter, original, seen in self._originals:
            same = (parameter.data_ptr(), parameter._version) == seen
            parameter.data = original if same else parameter.data.to(original.dtype)
        self._originals, self.dtype = [], None
