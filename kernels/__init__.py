"""Kernels that make the few remaining steps cheap, installed as ``tdpm_ext.kernels``.

Three operations with a choice of backends (`group_norm`, `attention`, `sampler_step`), CUDA graphs around a network or
a whole trajectory (`graphed`), and `accelerate`, which puts them into an existing model. Importing this needs neither
Triton nor xformers nor a GPU; `report` says what could be used.

The folder is named ``kernels`` in the source tree, but it is never installed as a top-level package of that name:
another package has that import name. Nothing here may import the rest of ``tdpm_ext``.
"""

from tdpm_ext.kernels.facts import KernelError
from tdpm_ext.kernels.graphs import graphed
from tdpm_ext.kernels.ops import attention, group_norm, sampler_step
from tdpm_ext.kernels.registry import report, use_backend

__all__ = [
    "KernelError",
    "accelerate",
    "attention",
    "graphed",
    "group_norm",
    "report",
    "sampler_step",
    "use_backend",
]


def __getattr__(name: str):
    if name == "accelerate":  # knows families of networks; most users of the operations do not need it
        from tdpm_ext.kernels.patch import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
