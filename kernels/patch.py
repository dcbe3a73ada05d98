"""``accelerate(model)``: the same network, faster, and back again.

Modules that are known by class and structure get another ``forward``, on the instance; nothing else about them
changes. Parameters stay the same objects with the same names and values, so state dicts, optimisers, hooks, LoRA
edits and deepcopy go on working. ``torch.nn.functional`` is never touched.
"""

from __future__ import annotations

import logging
from types import MethodType

import torch
from torch import nn

from tdpm_ext.kernels import cpu_blocks, cpu_library, family_k_diffusion, family_resnet, family_transformer, winograd
from tdpm_ext.kernels.facts import KernelError
from tdpm_ext.kernels.family import Family, Rule, why_not
from tdpm_ext.kernels.graphs import GraphedForward
from tdpm_ext.kernels.tiers import Blocks, Compiled, Half

log = logging.getLogger("tdpm_ext")
GRAPHS = ("auto", "on", "off")
PRECISIONS = ("exact", "half", "compile")
FAMILIES = (family_k_diffusion.FAMILY, *family_transformer.FAMILIES, *family_resnet.FAMILIES)
MARK = "_tdpm_"  # of everything that is put on a module


class Handle:
    """What ``accelerate`` did to a model.

    Attributes: ``families`` found in it; ``patched`` [(name, class, what), ...]; ``skipped`` [(name, class, why),
    ...]; ``precision`` and ``graphs`` as asked for; ``notes``: what those came to, some of them only after the first
    call. ``report()`` says all of it in words.
    """

    def __init__(self, model: nn.Module, graphs: str, precision: str):
        self.model, self.graphs, self.precision = model, graphs, precision
        self.families: list[str] = []
        self.patched: list[tuple[str, str, str]] = []
        self.skipped: list[tuple[str, str, str]] = []
        self.notes: list[str] = []
        self._modules: list[nn.Module] = []
        self._moved: list[nn.Parameter] = []
        self._halves: list[Half] = []
        self._graphs: list[GraphedForward] = []

    @property
    def active(self) -> bool:
        """True while there is something to undo."""
        return vars(self.model).get(MARK + "handle") is self

    def _mark(self, module: nn.Module) -> None:
        """``undo`` takes away whatever was put on this module."""
        if not any(m is module for m in self._modules):
            self._modules.append(module)

    def refresh(self) -> None:
        """Drop everything remembered. Needed only after weights on a GPU were edited through ``.data``."""
        for graphed in self._graphs:
            graphed.reset()
        for module in self._modules:
            for value in vars(module).values():
                for cache in value if isinstance(value, tuple) else (value,):
                    if hasattr(cache, "weights"):
                        cache.weights.forget()

    def undo(self) -> None:
        """The model as it was, bit for bit, except for edits made to its weights meanwhile. Again: nothing happens."""
        if not self.active:
            return
        for graphed in self._graphs:
            graphed.reset()
        for half in self._halves:
            half.restore()
        for module in self._modules:
            for name in [n for n in vars(module) if n.startswith(MARK)]:
                delattr(module, name)
            vars(module).pop("forward", None)
        for parameter in self._moved:
            parameter.data = parameter.data.contiguous()
        self._modules, self._moved, self._halves, self._graphs = [], [], [], []
        vars(self.model).pop(MARK + "handle", None)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def report(self) -> str:
        """What was patched, what was left alone and why, and what the options came to."""
        lines = [f"accelerate: {', '.join(self.families) or 'no known network'}; precision {self.precision}"]
        for what in dict.fromkeys((kind, what) for _, kind, what in self.patched):
            count = sum((kind, text) == what for _, kind, text in self.patched)
            lines.append(f"  {count:4d} x {what[0]}: {what[1]}")
        lines += [f"  left alone: {name or 'the model'} ({kind}): {why}" for name, kind, why in self.skipped]
        reasons = [f"graphs: not for {reason}" for graphed in self._graphs for reason in graphed.reasons]
        return "\n".join(lines + [f"  {note}" for note in self.notes + reasons])

    def __repr__(self) -> str:
        return f"Handle({len(self.patched)} patched, {len(self.skipped)} skipped, active={self.active})"


def accelerate(model: nn.Module, *, graphs: str = "auto", precision: str = "exact") -> Handle:
    """Make a denoiser's network faster where it is, without changing what it computes.

    Known networks are found inside whatever wraps them: k-diffusion's ``image_v1`` and its transformers, diffusers'
    ``UNet2DModel`` and ``UNet2DConditionModel``, the OpenAI / latent-diffusion ``UNetModel`` of ComfyUI and A1111.
    Their norms, activations and conditioning are fused, memory is channels_last throughout, and what depends on the
    noise level or the prompt alone is computed once. It applies in inference (``torch.no_grad``) and steps aside
    where gradients, autocast or hooks on fused modules are at work.

    Args:
        model: any module that contains a known network.
        graphs: CUDA graphs of whole calls: "auto" uses them on a GPU, "on" insists, "off" does not.
        precision: "exact": equal to rounding. "half": bfloat16 (CPU) or float16 (GPU). "compile": C++ of this package
            for k-diffusion's ``image_v1`` on a CPU, Inductor elsewhere. The last two are used only where a short
            measurement at the first call finds them faster, and ``notes`` say so.

    Returns:
        A handle; ``handle.undo()`` takes everything back. Called again with the same options it returns the same
        handle; with others, it starts over.

    Raises:
        TypeError: not a module. ValueError: an unknown option. KernelError: graphs="on" without a GPU.
    """
    _check(model, graphs, precision)
    before = vars(model).get(MARK + "handle")
    if before is not None:
        if (before.graphs, before.precision) == (graphs, precision):
            return before
        before.undo()
    handle = Handle(model, graphs, precision)
    vars(model)[MARK + "handle"] = handle
    for name, root in model.named_modules():
        family = next((f for f in FAMILIES if _is_a(root, f.root)), None)
        if family is not None:
            _accelerate_root(handle, family, name, root)
    if not handle.families:
        known = ", ".join(f.title for f in FAMILIES)
        handle.notes.append(f"nothing done: none of the known networks is in {type(model).__name__} ({known})")
    log.info("tdpm: %s", handle.report())
    return handle


def _check(model: object, graphs: str, precision: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: give a torch.nn.Module that contains the network")
    for name, value, known in (("graphs", graphs, GRAPHS), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}")
    if graphs == "on" and not any(p.is_cuda for p in model.parameters()):
        raise KernelError('graphs="on", but the model is not on a GPU: move it there, or take graphs="auto"')


def _is_a(module: nn.Module, kind: str) -> bool:
    return any(c.__name__ == kind for c in type(module).__mro__)


def _accelerate_root(handle: Handle, family: Family, name: str, root: nn.Module) -> None:
    """Patch one network; nothing at all if its own forward cannot be replaced."""
    rules = {rule.kind: rule for rule in family.rules}
    why = why_not(rules[family.root], root)
    if why is not None:
        handle.skipped.append((name, type(root).__name__, why))
        return
    handle.families.append(family.title)
    for path, module in root.named_modules(prefix=name):
        _patch(handle, rules, path, module)
    paths = {id(module): path for path, module in root.named_modules(prefix=name)}

    def replace(module, forward, what):
        _replace(handle, module, MethodType(forward, module))
        handle.patched.append((paths[id(module)], type(module).__name__, what))

    family.prepare(root, replace)
    _move(handle, root)
    if handle.precision == "compile":
        _compile(handle, family, root)
    narrow = family.narrow(root)
    if handle.precision == "half" and narrow:
        half = Half(narrow, vars(root)["forward"], handle.notes)
        handle._halves.append(half)
        _replace(handle, root, half)
    elif handle.precision == "half":
        handle.notes.append(f"half: not for {family.title}, whose embeddings need float32")
    if handle.graphs != "off" and any(p.is_cuda for p in root.parameters()):
        graphed = GraphedForward(vars(root)["forward"], watch=(root,))
        handle._graphs.append(graphed)
        _replace(handle, root, graphed)


def _compile(handle: Handle, family: Family, root: nn.Module) -> None:
    """The body of a network in C++ blocks if its modules know them, else by Inductor with Winograd's convolutions."""
    body = family.body(root)
    if family.blocks and _use_blocks(handle, body):
        return
    places = [(owner, name) for owner in body.modules() for name, m in owner.named_children() if winograd.fits(m)]
    for owner, name in places:
        module = getattr(owner, name)
        _replace(handle, module, MethodType(winograd.forward, module))
    usual = vars(body).get("forward") or MethodType(type(body).forward, body)
    root._tdpm_compiled = True
    transformed = winograd.TransformedWeights(places)
    _replace(handle, body, Compiled(usual, handle.notes, transformed))


def _use_blocks(handle: Handle, body: nn.Module) -> bool:
    """Whether the modules of a body could be given the C++ blocks of `cpu_blocks`."""
    places = [(owner, name) for owner in body.modules() for name, m in owner.named_children() if cpu_blocks.fits(m)]
    if not places:
        return False
    try:
        cpu_library.library()
    except cpu_library.NoLibrary as error:
        handle.notes.append(f"compile: no C++ blocks here ({error})")
        return False
    switch = cpu_blocks.Switch()
    for module in body.modules():
        if "forward" in vars(module):
            vars(module)[cpu_blocks.SWITCH] = switch
    for owner, name in places:
        handle._mark(getattr(owner, name))
    usual = vars(body).get("forward") or MethodType(type(body).forward, body)
    _replace(handle, body, Blocks(usual, handle.notes, cpu_blocks.PackedWeights(places), switch))
    return True


def _patch(handle: Handle, rules: dict[str, Rule], path: str, module: nn.Module) -> None:
    rule = next((rules[c.__name__] for c in type(module).__mro__ if c.__name__ in rules), None)
    if rule is None:
        return
    why = why_not(rule, module)
    if why is None:
        _replace(handle, module, MethodType(rule.forward, module))
        handle.patched.append((path, type(module).__name__, rule.what))
    else:
        handle.skipped.append((path, type(module).__name__, why))


def _replace(handle: Handle, module: nn.Module, forward) -> None:
    vars(module)["forward"] = forward
    handle._mark(module)


def _move(handle: Handle, root: nn.Module) -> None:
    """Weights of convolutions in channels_last, in place: the same parameters, another order in memory."""
    for module in root.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Conv2d) and isinstance(weight, nn.Parameter) and weight.is_contiguous():
            moved = weight.data.contiguous(memory_format=torch.channels_last)
            if moved.data_ptr() != weight.data_ptr():  # 1x1 kernels are both at once
                weight.data = moved
                handle._moved.append(weight)
