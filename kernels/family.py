"""What families of networks share: how a module is recognised, when its fast path may run, what runs on the CPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpm_ext.kernels import ops
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
        body: the module that Inductor compiles: most of the work, and nothing that is remembered.
        narrow: the modules that half precision applies to.
    """

    title: str
    root: str
    rules: tuple[Rule, ...]
    prepare: Callable[[nn.Module, Callable], None]
    body: Callable[[nn.Module], nn.Module]
    narrow: Callable[[nn.Module], list[nn.Module]]


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


def norm_act(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    pre_add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """``group_norm`` with its neighbours: the fused kernel on a GPU, on the CPU torch's own with fewest passes.

    Shapes and meaning as in ``tdpm_ext.kernels.group_norm``; scale and shift are [N, C].
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        options = {"eps": eps, "pre_add": pre_add, "scale": scale, "shift": shift, "act": act}
        return ops.group_norm(x, groups, weight, bias, **options)
    if pre_add is not None:
        x = x + _beside(pre_add, x)
    if x.ndim == 4 and not x.is_contiguous():
        x = near_zero(x, groups)
    affine = scale is not None and weight is None and (len(scale) == 1 or scale.stride(0) == 0)
    if affine:  # one scale and shift for all pictures: torch's kernel applies them in the same pass
        weight, bias = scale[0] + 1, shift[0]
    h = torch.group_norm(x, groups, weight, bias, eps)
    if scale is not None and not affine:
        torch.addcmul(_beside(shift, h), h, _beside(scale + 1, h), out=h)
    if act == "silu":
        F.silu(h, inplace=True)
    elif act == "gelu":
        torch.ops.aten.gelu_(h)
    return h


def near_zero(x: Tensor, groups: int) -> Tensor:
    """x [N, C, H, W] less one of its values in each group, which changes no group norm.

    In channels_last torch's CPU kernel sums plain squares: at a mean of 100 standard deviations it is wrong in the
    third digit, at 1000 in the first.
    """
    width = x.shape[1] // groups
    grouped = x.unflatten(1, (groups, width))
    return (grouped - grouped[:, :, :1, :1, :1]).flatten(1, 2)


def _beside(rows: Tensor, x: Tensor) -> Tensor:
    """[N, C] -> [N, C, 1, ...] with as many dimensions as x."""
    return rows.reshape(*rows.shape, *[1] * (x.ndim - rows.ndim))


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
