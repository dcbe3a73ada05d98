"""Faults made by rule are found by the checks: a vacuous test of the kernels would let them pass.

Every mask, bound, selection and update of every Triton kernel is broken once, and every eighth sum and factor (all of
them with TDPM_ALL_MUTANTS=1). The checks are those of the kernels' own tests, on small shapes, under a memcheck.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tdpm_ext.kernels import reference  # noqa: E402
from tests import test_kernels_attention as attention  # noqa: E402
from tests import test_kernels_group_norm as norm  # noqa: E402
from tests.interpreted import canary, load_interpreted  # noqa: E402
from tests.mutants import FOLDER, Mutant, mutants, survives  # noqa: E402
from tests.watched_memory import StrayAccess, watched_memory  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each faulty kernel runs in a process of its own")

EVERY = 1 if os.environ.get("TDPM_ALL_MUTANTS") == "1" else 8
# Faults that change nothing: what stands in the mutant's text, and why
HARMLESS = {
    "leader, member)": "the same for a whole group, so that it cancels",
    "pivot - (back)": "what rounding loses is measured afterwards, whatever was rounded",
    "merge_kernel: inside": "beyond the splits lies the next sample's part, which the selection leaves out",
    "_pivot: c * stride_c": "measured from another channel's pixel: as good, where channels are alike",
    "in: return stride_l * ALIGN, stride_d * ALIGN": "where neither stride is 1, ALIGN is",
    "FIRST - (REST)": "only a mask that could have been spared is not",
    "apply_kernel: c_in": "beyond the channels lies the next plane of the same scratch; the lanes are never stored",
}
# Which forms of group normalisation run a function; the others are shared, and one form is enough
FORMS = {"_stream": ("loop", "split"), "loop_kernel": ("loop",)} | dict.fromkeys(
    ("part_kernel", "merge_kernel", "apply_kernel"), ("split",)
)


def check_norm(folder: Path, function: str) -> None:
    module = load_interpreted("triton_norm", folder)
    for form in FORMS.get(function, ("tile",)):
        first = norm.problem((2, 6, (33, 35), 2) if form == "split" else (2, 12, (9, 7), 2), act="gelu")
        second = norm.problem((2, 30, (3, 3), 10), channels_last=True, act="silu")
        many = norm.problem((1, 68, (12, 13), 2), channels_last=True, names=(), act=None)
        for p in (first, second, many):
            assert norm.error(norm.run(module, form, p), p.exact()) <= norm.FP32_BAR
        far = norm.problem((1, 8, (5, 5), 2), channels_last=True, names=("weight", "pre_add"), act=None)
        far.x += torch.tensor([1e3] * 4 + [3e4] * 4).reshape(1, 8, 1, 1)  # each group somewhere else
        assert norm.error(norm.run(module, form, far), far.exact()) <= 2e-6


def check_attention(folder: Path, function: str) -> None:
    module = load_interpreted("triton_attn", folder)
    generator = torch.Generator().manual_seed(1)
    added = torch.randn(2, 2, 72, 24, generator=generator)
    cases = [  # queries, keys, head dimension, dtype, layout, scale, mask
        (33, 37, 40, torch.float32, "rows", None, None),
        (64, 64, 40, torch.float16, "large", None, None),
        (9, 20, 80, torch.float16, "spread", -0.3, attention.bool_mask(2, 1, 9, 20)),
        (72, 24, 32, torch.float32, "columns", None, added),
    ]
    for q_len, kv_len, head_dim, dtype, layout, scale, mask in cases:
        q, k, v = (LAYOUTS[layout](t) for t in attention.inputs(q_len, kv_len, head_dim, dtype, heads=2))
        out = LAYOUTS[layout](torch.full_like(q, float("nan")))
        module._attention_into(out, q, k, v, scale, mask)
        attention.check(out, q, k, v, scale=scale, mask=mask)


LAYOUTS = {
    "rows": lambda t: canary(t, gaps=(0, 1, 2)),
    "columns": lambda t: canary(t.mT.contiguous().mT, gaps=(0, 1)),  # as views of pictures
    "spread": lambda t: t.repeat_interleave(8, dim=-1)[..., ::8],
    "large": lambda t: t * 20,  # scores far beyond the range of exp
}


def check_step(folder: Path, function: str) -> None:
    module = load_interpreted("triton_step", folder)
    generator = torch.Generator().manual_seed(0)
    x, denoised, p0, p1, p2, uncond, model_input, noise = (
        canary(torch.randn(2, 3, 21, 17, generator=generator), gaps=()) for _ in range(8)
    )
    everything = {"noise": noise, "d": 0.7, "uncond": uncond, "cond_scale": 3.0, "model_input": model_input}
    for previous, options in (
        ((p0, p1, p2), {"a": 0.5, "b": 0.7, "c": (0.1, 0.2, -0.3), "c_skip": 0.4, "c_out": 1.2, **everything}),
        ((), {"a": 0.3, "b": 1.7, "c_skip": 0.4, "c_out": 1.3}),
        ((p0,), {"a": 0.2, "b": 0.4, "c": (0.3,)}),
    ):
        found = module.sampler_step(x, denoised, previous, **options)
        exact = {name: o.double() if isinstance(o, torch.Tensor) else o for name, o in options.items()}
        exact = reference.sampler_step(x.double(), denoised.double(), [p.double() for p in previous], **exact)
        for ours, theirs in zip(found, exact, strict=True):
            assert float((ours.double() - theirs).abs().max()) <= 1e-5


CHECKS = {"norm_kernels.py": check_norm, "triton_attn.py": check_attention, "triton_step.py": check_step}


def chosen(file: str) -> list[Mutant]:
    """The faults of a file that are tried: all of the first four kinds, some of the others."""
    found = mutants(file)
    frequent = [m for m in found if m.kind in ("sign", "factor")]
    return [m for m in found if m not in frequent or frequent.index(m) % EVERY == 0]


def functions() -> list:
    names = {(file, m.function): None for file in CHECKS for m in mutants(file)}
    return [pytest.param(*name, id=":".join(name)) for name in names]


@pytest.mark.parametrize("file", CHECKS)
def test_the_kernels_as_they_are_pass(file):
    for function in ("", *FORMS):  # the others run what "" does
        assert survives(None, lambda folder, f=function: watched(CHECKS[file], folder, f))
        if CHECKS[file] is not check_norm:
            break


@pytest.mark.slow
@pytest.mark.parametrize(("file", "function"), functions())
def test_every_fault_is_found(file, function):
    tried = [m for m in chosen(file) if m.function == function]
    alive = [m for m in tried if survives(m, lambda folder: watched(CHECKS[file], folder, function))]
    unexplained = [str(m) for m in alive if not any(text in str(m) for text in HARMLESS)]
    assert unexplained == []


def watched(checks, folder: Path, function: str) -> None:
    with watched_memory():
        checks(folder, function)


def test_each_rule_makes_faults():
    found = {m.kind for file in CHECKS for m in mutants(file)}
    assert found == {"mask", "bound", "selection", "update", "sign", "factor"}
    for m in mutants("norm_kernels.py"):
        text = (FOLDER / m.file).read_text(encoding="utf-8")
        assert text[m.start :].startswith(m.old) and m.source() != text
        compile(m.source(), m.file, "exec")


def test_a_crash_and_an_endless_loop_are_found_too(monkeypatch):
    monkeypatch.setattr("tests.mutants.SECONDS", 1)
    assert survives(None, lambda folder: None)
    assert not survives(mutants("triton_step.py")[0], lambda folder: os.abort())
    assert not survives(mutants("triton_step.py")[0], endless)


def endless(folder: Path) -> None:
    while True:
        pass


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_stray_read_is_an_error_although_its_value_is_not_used():
    module = load_interpreted("triton_step")
    x = torch.ones(1, 1, 3, 5)
    with watched_memory():
        module.sampler_step(x, x, a=1.0, b=1.0)
        kernel, out = module.step_kernel, torch.empty(8)
        arguments = {name: 0.0 for name in module.FACTORS} | dict.fromkeys(module.TENSORS)
        arguments |= {"x": x.flatten()[:8], "estimate": x.flatten()[:8], "x_out": out}
        with pytest.raises(StrayAccess, match="load of 2 elements outside"):
            kernel[(1,)](**arguments, numel=10, PRECONDITIONED=False, BLOCK=16)
