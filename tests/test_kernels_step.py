"""The Triton sampler step in the interpreter against float64, inside of poisoned storage."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdpm_ext import solver
from tdpm_ext.kernels import ops, reference, triton_step
from tests.interpreted import canary, changed, check_canary, load_interpreted

SHAPE = (3, 3, 21, 17)  # 3213 elements: three whole blocks and a ragged one
EVEN = (2, 4, 16, 16)  # two whole blocks
ARCHS = (80, 86, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def step():
    return load_interpreted("triton_step")


@pytest.fixture
def outputs(monkeypatch):
    """Outputs are poisoned and lie inside of poison; returns the list that they are added to."""
    made = []
    like = torch.empty_like

    def poisoned(t):
        made.append(canary(like(t), gaps=(), poisoned=True))
        return made[-1]

    monkeypatch.setattr(torch, "empty_like", poisoned)
    return made


def randoms(count, shape=SHAPE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [canary(torch.randn(shape, generator=generator).to(dtype), gaps=()) for _ in range(count)]


def check(step, outputs, x, denoised, previous=(), **options):
    """Both results within one rounding of the float64 ones; nothing written outside, or left unwritten."""
    found = step.sampler_step(x, denoised, previous, **options)
    check_canary(*outputs)
    assert found[0] is outputs[0]
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    exact = reference.sampler_step(x.double(), denoised.double(), [p.double() for p in previous], **double)
    # Rounded to the dtype once (bfloat16 stores of the interpreter truncate), after float32 terms of up to this size.
    size = 64 * max(1.0, options.get("cond_scale", 1.0))
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == x.dtype and ours.stride() == x.stride()
        allowed = theirs.abs() * torch.finfo(x.dtype).eps + size * torch.finfo(torch.float32).eps
        assert bool(((ours.double() - theirs).abs() <= allowed).all())
    return found


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", range(4))
def test_multistep(step, outputs, count, dtype):
    x, denoised, *previous = randoms(2 + count, dtype=dtype)
    _, estimate = check(step, outputs, x, denoised, previous, a=0.3, b=1.7, c=(-0.9, 0.2, 0.05)[:count])
    assert estimate is denoised  # nothing had to be computed


@pytest.mark.parametrize("shape", [SHAPE, EVEN], ids=str)
@pytest.mark.parametrize(
    ("guided", "preconditioned", "own_input", "noisy"),
    [o for o in itertools.product([False, True], repeat=4) if o[1] or not o[2]],
)
def test_every_combination(step, outputs, guided, preconditioned, own_input, noisy, shape):
    x, denoised, older, uncond, model_input, noise = randoms(6, shape)
    options = {"a": 0.25, "b": 0.75, "c": (-0.125,)}
    if guided:
        options |= {"uncond": uncond, "cond_scale": 7.5}
    if preconditioned:
        options |= {"c_skip": 0.4, "c_out": -1.2}
    if own_input:
        options |= {"model_input": model_input}
    if noisy:
        options |= {"noise": noise, "d": 0.6}
    check(step, outputs, x, denoised, (older,), **options)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_everything_in_half_precision(step, outputs, dtype):
    x, denoised, p0, p1, p2, uncond, model_input, noise = randoms(8, dtype=dtype)
    options = {"uncond": uncond, "cond_scale": 3.0, "c_skip": 0.4, "c_out": 1.2, "model_input": model_input}
    check(step, outputs, x, denoised, (p0, p1, p2), a=0.5, b=0.5, c=(0.1, 0.2, 0.3), noise=noise, d=0.7, **options)


def test_a_half_precision_estimate_of_a_float32_state(step, outputs):
    x, older = randoms(2)
    (denoised,) = randoms(1, dtype=torch.float16)
    _, estimate = check(step, outputs, x, denoised, (older,), a=0.5, b=0.6, c=(-0.1,))
    assert torch.equal(estimate, denoised.float())


@pytest.mark.parametrize("factor", [0, 1, 1e-30, 3.0e38])
def test_factors_are_float32_numbers(step, outputs, factor):
    # among them Python ints: their type must not make another kernel
    x, denoised = (t.clamp_(-1, 1) for t in randoms(2, (4, 4)))
    found, _ = step.sampler_step(x, denoised, a=factor, b=0)
    assert torch.equal(found, x * torch.tensor(float(factor)))


def test_channels_last_is_read_and_written_as_it_lies(step, outputs):
    tensors = [t.contiguous(memory_format=torch.channels_last) for t in randoms(3)]
    x, denoised, older = (canary(t, gaps=()) for t in tensors)
    found, _ = check(step, outputs, x, denoised, (older,), a=0.5, b=0.6, c=(-0.1,))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_strides_of_single_elements_do_not_matter(step, outputs):
    (x,) = randoms(1, (1, 4, 4, 4))
    denoised = x.clone().as_strided((1, 4, 4, 4), (999, 16, 4, 1))
    assert step.supported(x, denoised) == []
    found, _ = step.sampler_step(x, denoised, a=0.5, b=0.5)
    check_canary(*outputs)
    assert torch.equal(found, x)


def test_no_elements(step):
    x = torch.empty(0, 3, 8, 8)
    found, _ = step.sampler_step(x, x, a=0.5, b=0.5)
    assert found.shape == x.shape


def test_wrong_arguments_are_refused_as_by_the_definition(step):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="0 factors c for 1"):
        step.sampler_step(x, x, (x,), a=1.0, b=0.0)
    with pytest.raises(ValueError, match=r"noise has shape \(3, 2\)"):
        step.sampler_step(x, x, a=1.0, b=0.0, noise=x.T, d=1.0)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"x": meta(2, 3, dtype=torch.float64), "denoised": meta(2, 3)}, "x is torch.float64"),
        ({"x": meta(2, 3), "denoised": meta(2, 3), "previous": [meta(2, 3)] * 4}, "at most 3 previous"),
        ({"x": meta(2, 6)[:, ::2], "denoised": meta(2, 6)[:, ::2]}, "x has gaps or overlaps"),
        ({"x": meta(1, 3).expand(2, 3), "denoised": meta(1, 3).expand(2, 3)}, "x has gaps or overlaps"),
        ({"x": meta(3, 3), "denoised": meta(3, 3).T}, "x has strides (3, 1), denoised has (1, 3)"),
        ({"x": meta(3, 3), "denoised": torch.zeros(3, 3)}, "different devices"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_said(tensors, reason):
    (found,) = triton_step.supported(**tensors)
    assert reason in found


def test_a_call_that_cannot_be_done_raises_with_every_reason(step):
    x = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64.*at most 3.*strides"):
        step.sampler_step(x, x.T, (x,) * 4, a=1.0, b=0.0, c=(0.0,) * 4)


@given(order=st.permutations(range(4)), sizes=st.tuples(*[st.integers(1, 3)] * 4))
def test_exactly_the_permutations_of_contiguous_tensors_are_dense(order, sizes):
    t = meta(*sizes).permute(order)
    assert triton_step._dense(t)
    spread = meta(*[2 * size for size in sizes])[::2, ::2, ::2, ::2].permute(order)
    assert triton_step._dense(spread) == (spread.numel() == 1)


@given(numel=st.integers(1, 2**40))
def test_the_grid_covers_every_element_once(numel):
    programs = triton_step.triton.cdiv(numel, triton_step.BLOCK)
    assert (programs - 1) * triton_step.BLOCK < numel <= programs * triton_step.BLOCK


@pytest.mark.parametrize("cc", ARCHS)
def test_variants_cover_every_dtype(cc):
    variants = triton_step.aot_variants(cc)
    assert len({v.name for v in variants}) == len(variants)
    assert {v.signature["x"] for v in variants} == {"*fp32", "*fp16", "*bf16"}
    assert all(v.streaming and v.signature[name] == "fp32" for v in variants for name in triton_step.FACTORS)


FAULTS = {
    "guidance the wrong way round": ("without + cond_scale", "without - cond_scale"),
    "c_skip and c_out exchanged": ("c_skip * skipped + c_out * denoised", "c_out * skipped + c_skip * denoised"),
    "the network's input is forgotten": ("skipped = _read(model_input", "skipped = _read(x"),
    "older estimates exchanged": ("result += c1 * _read(p1", "result += c1 * _read(p0"),
    "no noise": ("result += d * _read", "result += 0 * _read"),
    "half of the grid": ("triton.cdiv(x.numel(), BLOCK)", "triton.cdiv(x.numel() // 2, BLOCK)"),
    "the last element is left out": ("mask=offsets < numel)", "mask=offsets < numel - 1)"),
    "the estimate is not written": ("if estimate_out is not None", "if estimate_out is None"),
    "a coefficient too many": ("result = a * state", "result = a * a * state"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_caught(fault, outputs, tmp_path: Path):
    faulty = load_interpreted("triton_step", changed(tmp_path, "triton_step.py", *FAULTS[fault]))
    with pytest.raises((AssertionError, AttributeError)):
        test_everything(faulty, outputs)


def test_everything(step, outputs):
    x, denoised, p0, p1, uncond, model_input, noise = randoms(7)
    options = {"uncond": uncond, "cond_scale": 3.0, "c_skip": 0.4, "c_out": 1.2, "model_input": model_input}
    check(step, outputs, x, denoised, (p0, p1), a=0.5, b=0.5, c=(0.1, 0.2), noise=noise, d=0.7, **options)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPE, EVEN, (64, 4, 64, 64)], ids=str)
def test_compiled(shape, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x, denoised, p0, p1, uncond, model_input, noise = (
        torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(7)
    )
    options = {"uncond": uncond, "cond_scale": 3.0, "c_skip": 0.4, "c_out": 1.2, "model_input": model_input}
    options |= {"a": 0.5, "b": 0.5, "c": (0.1, 0.2), "noise": noise, "d": 0.7}
    found = triton_step.sampler_step(x, denoised, (p0, p1), **options)
    expected = reference.sampler_step(x, denoised, (p0, p1), **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2 * torch.finfo(dtype).eps)


# The solver takes it on CUDA


def denoiser(x, sigma):
    return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1)))


SCHEDULES = {
    "from noise": ([10.0, 3.0, 1.0, 0.2, 0.0], {"orders": 3}),
    "order by step": ([10.0, 3.0, 1.0, 0.2], {"orders": [1, 2, 3]}),
    "rising": ([0.2, 1.0, 3.0], {"orders": 2}),
    "fitted weights": ([10.0, 3.0, 0.0], {"weights": [[1.0], [1.3, -0.3]]}),
    "seeded": ([10.0, 3.0, 1.0, 0.0], {"orders": 3, "history": (80.0, 30.0)}),
}


def solved(schedule, device="cpu"):
    sigmas, options = SCHEDULES[schedule]
    generator = torch.Generator().manual_seed(0)
    x, *known = (torch.randn(2, 3, 8, 8, generator=generator).to(device) for _ in range(3))
    options = dict(options)
    if "history" in options:
        options["history"] = list(zip(options["history"], known, strict=True))
    return solver.solve(denoiser, x * sigmas[0], sigmas, disable=True, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_solver_does_its_steps_with_the_fused_one(schedule, monkeypatch):
    expected, steps = solved(schedule), []

    def fused(*args, **options):
        steps.append(options)
        return ops.sampler_step(*args, **options)

    monkeypatch.setattr(solver, "_fused_update", lambda x: fused)  # as on CUDA
    torch.testing.assert_close(solved(schedule), expected, atol=2e-6, rtol=2e-6)
    assert len(steps) == len(SCHEDULES[schedule][0]) - 1


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_solver_on_a_gpu_agrees_with_the_cpu(schedule):
    torch.testing.assert_close(solved(schedule, "cuda").cpu(), solved(schedule), atol=1e-5, rtol=1e-5)


def test_an_estimate_in_another_dtype_is_stepped_in_plain_torch(monkeypatch):
    monkeypatch.setattr(solver, "_fused_update", lambda x: lambda *args, **options: pytest.fail("was called"))
    x = torch.zeros(1, 1, 2, 2)
    assert solver.solve(lambda x, sigma: x.half(), x, [1.0, 0.5], disable=True).dtype == torch.float16


def test_on_the_cpu_the_solver_does_not_even_import_the_kernels():
    code = (
        "import sys, torch; from tdpm_ext.solver import solve\n"
        "solve(lambda x, sigma: 0 * x, torch.ones(1, 2), [1.0, 0.5, 0.0], disable=True)\n"
        "assert not [name for name in sys.modules if name.startswith('tdpm_ext.kernels')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
