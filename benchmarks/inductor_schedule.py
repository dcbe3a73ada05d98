"""What `torch.compile` would launch on a GPU, asked of Inductor's own scheduler, without a GPU.

The network is traced with fake CUDA tensors and goes through Inductor's whole pipeline up to the point where code
would be generated: every scheduled node is one kernel, and knows the bytes it reads and writes. Inductor asks the
driver for the card; the answers are those of an A100. Attention is traced as the fused kernel, as in `traffic`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from benchmarks import networks
from benchmarks.traffic import Launch

A100 = SimpleNamespace(
    name="NVIDIA A100-SXM4-80GB", major=8, minor=0, multi_processor_count=108, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    total_memory=80 << 30, L2_cache_size=40 << 20, shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=163 << 10, shared_memory_per_multiprocessor=164 << 10, gcnArchName="",
    clock_rate=1410000, memory_clock_rate=1593000, memory_bus_width=5120,
)  # fmt: skip


class NotCounted(RuntimeError):
    """This version of torch does not let itself be asked."""


class _Scheduled(Exception):  # noqa: N818 (not an error: the pipeline has come far enough)
    pass


def count(name: str, *, batch: int = 1, dtype: torch.dtype = torch.float16) -> list[Launch]:
    """What one call of network ``name`` launches after ``torch.compile``: one entry per kernel.

    Raises:
        NotCounted: Inductor stopped for another reason than having scheduled everything; the message says why.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch.fx.experimental.proxy_tensor import make_fx

    found: list[Launch] = []

    def schedule(graph: GraphLowering) -> None:
        graph.init_wrapper_code()
        graph._update_scheduler()
        found.extend(_launches(graph.scheduler.nodes))
        raise _Scheduled

    def inner(graph_module, example_inputs, **options):
        with _answers_of_a_card(), mock.patch.object(GraphLowering, "compile_to_module", schedule):
            try:
                compile_fx_inner(graph_module, example_inputs, **options)
            except Exception as stopped:  # Inductor wraps whatever happens inside of it
                if not found:
                    raise NotCounted(f"Inductor stopped early: {' '.join(str(stopped).split())[:300]}") from stopped
        return graph_module.forward

    # folding constants would run operations on a device that is not there
    settings = {"fx_graph_cache": False, "joint_graph_constant_folding": False}
    with FakeTensorMode(), torch.no_grad(), config.patch(settings):
        flat, inputs = _flattened(name, batch, dtype)
        compile_fx(make_fx(flat)(*inputs), inputs, inner_compile=inner)
    return found


def _flattened(name: str, batch: int, dtype: torch.dtype):
    """The network as a function of a flat list of tensors, weights included, and that list."""
    model = networks.build(name, "cuda", dtype, weights=False)
    with networks.defaults("cuda", dtype):
        args, kwargs = networks.NETWORKS[name].inputs(batch)
    for module in model.modules():  # else Inductor, which wants channels_last too, copies all weights in every call
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = [*weights, *kwargs]

    def flat(*tensors):
        given = dict(zip(names, tensors[len(args) :], strict=True))
        options = {key: given.pop(key) for key in kwargs}
        with _FusedAttention():
            return (torch.func.functional_call(model, given, tensors[: len(args)], options),)

    return flat, [*args, *weights.values(), *kwargs.values()]


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


def _launches(nodes) -> Iterator[Launch]:
    from torch._inductor.ir import MultiOutput

    for node in nodes:
        if type(node).__name__.startswith("Nop") or isinstance(node.node, MultiOutput):
            continue
        op = "fused" if not node.is_extern() else str(getattr(node.node, "python_kernel_name", None) or "extern")
        # the scheduler knows reads and writes together; both are counted once
        yield Launch(op.split(".")[-1], 1, node.get_read_write_buffers_sizes(), 0, 0)


@contextlib.contextmanager
def _answers_of_a_card() -> Iterator[None]:
    """The questions that Inductor asks a driver, answered as by an A100."""
    from torch._inductor import scheduler

    answers = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda *_: None,
        "get_device_properties": lambda *_: A100,
        "_get_device_properties": lambda *_: A100,
        "get_device_capability": lambda *_: (A100.major, A100.minor),
        "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8, device="cpu"),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda *_: 0,
        "_maybe_exchange_device": lambda *_: 0,
        "_lazy_init": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer, create=True))
        stack.enter_context(mock.patch.object(scheduler, "has_triton", lambda *_: True))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda *_: 0, create=True))
        yield
