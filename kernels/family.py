"""What families of networks share: how a module is recognised, and when its fast path may run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdpm_ext.kernels.caches import hooked


@dataclass(frozen=True)
class Rule:
    """How one class of modules is accelerated.

    Args:
        kind: name of the class, as its library spells it.
        parameters: what its ``forward`` takes, in order; another signature is another version of the class. None
            where ``forward`` passes on whatever it gets.
        forward: takes its place, called with the module first. It must hand over to ``ordinary`` whenever it does not
            apply, and call submodules as modules, so that hooks and LoRA layers in them keep working.
        variants: subclasses, by name, whose own ``forward`` is known to compute the same.
        refuse: says why this instance cannot be accelerated, or None.
        what: for the report.
    """

    kind: str
    parameters: tuple[str, ...] | None
    forward: Callable
    what: str
    refuse: Callable[[nn.Module], str | None] = lambda module: None
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A kind of network: how its ``root`` class is spelled, the rules for its modules, and what else it needs.

    Args:
        title: for people.
        root: class of the whole network, found inside whatever wraps it.
        rules: of the root and of the modules in it.
        prepare: ``prepare(root, replace)`` gives the patched modules of a root their caches; ``replace(module,
            forward, what)`` patches one more.
        body: the module that is compiled: most of the work, and nothing that is remembered.
        narrow: the modules that half precision applies to.
        blocks: whether its modules know the C++ blocks of `cpu_blocks`.
    """

    title: str
    root: str
    rules: tuple[Rule, ...]
    prepare: Callable[[nn.Module, Callable], None]
    body: Callable[[nn.Module], nn.Module]
    narrow: Callable[[nn.Module], list[nn.Module]]
    blocks: bool = False


def why_not(rule: Rule, module: nn.Module) -> str | None:
    """The reason why a module with this rule's class among its ancestors is left alone, or None."""
    owner = [c for c in type(module).__mro__ if c.__name__ == rule.kind][-1]  # a subclass may have the same name
    if type(module).forward is not owner.forward and type(module).__name__ not in rule.variants:
        return f"{type(module).__name__} overrides {rule.kind}.forward"
    if "forward" in vars(module):
        return "another program has replaced its forward"
    given = tuple(inspect.signature(owner.forward).parameters)[1:]
    if rule.parameters is not None and given != rule.parameters:
        return f"forward takes ({', '.join(given)}), known is ({', '.join(rule.parameters)})"
    return rule.refuse(module)


def ordinary(module: nn.Module, *args, **kwargs):
    """The module as its library wrote it."""
    return type(module).forward(module, *args, **kwargs)


def may_run(x: Tensor, *fused: nn.Module) -> bool:
    """Whether a fast path applies: no gradients wanted, no autocast, nobody listening to what it would leave out."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    return torch.compiler.is_compiling() or not hooked(*fused)


def add_into(h: Tensor, other: Tensor) -> Tensor:
    """h + other, into h where the result has h's type and shape. h is a fresh intermediate."""
    if torch.compiler.is_compiling() or h.dtype != other.dtype or h.shape != other.shape:
        return h + other
    return h.add_(other)


def channels_last(x: Tensor) -> Tensor:
    """x [N, C, H, W] in channels_last memory format."""
    return x.contiguous(memory_format=torch.channels_last)


def network(self, *args, **kwargs):
    """The whole network as it is, told apart from its last call."""
    if not torch.compiler.is_compiling():
        for cache in self._tdpm_caches:
            cache.new_call()
    return ordinary(self, *args, **kwargs)


network.__name__ = "forward"  # its bound method takes that one's place, and graphs look at the name
