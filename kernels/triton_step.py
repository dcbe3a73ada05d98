"""One step of a sampler in one launch: guidance, preconditioning, and the weighted sum of estimates and noise.

Every coefficient is a float32 argument at run time, so one compiled kernel serves all steps of all schedules. All
tensors are read in the order in which they lie in memory: any strides without gaps, the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tdpm_ext.kernels.reference import check_sampler_step
from tdpm_ext.kernels.variant import Variant

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MOST_PREVIOUS = 3
BLOCK, NUM_WARPS = 1024, 4  # 8 elements per thread: one load of 16 bytes in half precision, two in float32
NUM_STAGES = 3  # Triton's default: there is no loop to pipeline
TENSORS = ("x", "estimate", "uncond", "model_input", "noise", "p0", "p1", "p2", "x_out", "estimate_out")
FACTORS = ("a", "b", "c0", "c1", "c2", "d", "cond_scale", "c_skip", "c_out")


@triton.jit
def _read(pointer, offsets, numel, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointer + offsets).to(tl.float32)
    return tl.load(pointer + offsets, mask=offsets < numel, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, value, offsets, numel, WHOLE: tl.constexpr):
    value = value.to(pointer.dtype.element_ty)
    if WHOLE:
        tl.store(pointer + offsets, value)
    else:
        tl.store(pointer + offsets, value, mask=offsets < numel)


@triton.jit
def _step(
    x, estimate, uncond, model_input, noise, p0, p1, p2, x_out, estimate_out,
    a, b, c0, c1, c2, d, cond_scale, c_skip, c_out, offsets, numel,
    PRECONDITIONED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    state = _read(x, offsets, numel, WHOLE)
    denoised = _read(estimate, offsets, numel, WHOLE)
    if uncond is not None:
        without = _read(uncond, offsets, numel, WHOLE)
        denoised = without + cond_scale * (denoised - without)
    if PRECONDITIONED:
        skipped = state
        if model_input is not None:
            skipped = _read(model_input, offsets, numel, WHOLE)
        denoised = c_skip * skipped + c_out * denoised
    if estimate_out is not None:
        _write(estimate_out, denoised, offsets, numel, WHOLE)
    result = a * state + b * denoised
    if p0 is not None:
        result += c0 * _read(p0, offsets, numel, WHOLE)
    if p1 is not None:
        result += c1 * _read(p1, offsets, numel, WHOLE)
    if p2 is not None:
        result += c2 * _read(p2, offsets, numel, WHOLE)
    if noise is not None:
        result += d * _read(noise, offsets, numel, WHOLE)
    _write(x_out, result, offsets, numel, WHOLE)


@triton.jit(do_not_specialize=["numel"])
def step_kernel(
    x, estimate, uncond, model_input, noise, p0, p1, p2, x_out, estimate_out,
    a, b, c0, c1, c2, d, cond_scale, c_skip, c_out, numel,
    PRECONDITIONED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements. A tensor that is not there is None, and its lines are not compiled."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    # Only the last program compares: with a bound that is not a multiple of 16 there are no wide loads.
    if first + BLOCK <= numel:
        _step(
            x, estimate, uncond, model_input, noise, p0, p1, p2, x_out, estimate_out,
            a, b, c0, c1, c2, d, cond_scale, c_skip, c_out, offsets, numel, PRECONDITIONED, True,
        )  # fmt: skip
    else:
        _step(
            x, estimate, uncond, model_input, noise, p0, p1, p2, x_out, estimate_out,
            a, b, c0, c1, c2, d, cond_scale, c_skip, c_out, offsets, numel, PRECONDITIONED, False,
        )  # fmt: skip


def supported(
    x: torch.Tensor,
    denoised: torch.Tensor,
    previous: Sequence[torch.Tensor] = (),
    noise: torch.Tensor | None = None,
    uncond: torch.Tensor | None = None,
    model_input: torch.Tensor | None = None,
) -> list[str]:
    """Every reason why the kernel cannot do this call; [] if it can. Reads metadata only, so meta tensors do."""
    tensors = {"x": x, "denoised": denoised, "noise": noise, "uncond": uncond, "model_input": model_input}
    tensors |= {f"previous[{i}]": older for i, older in enumerate(previous)}
    given = {name: t for name, t in tensors.items() if t is not None}
    reasons = []
    wrong = [f"{name} is {t.dtype}" for name, t in given.items() if t.dtype not in TYPES]
    if wrong:
        reasons.append(f"takes float16, bfloat16 and float32; {', '.join(wrong)}")
    if len(previous) > MOST_PREVIOUS:
        reasons.append(f"takes at most {MOST_PREVIOUS} previous estimates, not {len(previous)}")
    if not _dense(x):
        reasons.append(f"x has gaps or overlaps: shape {tuple(x.shape)}, strides {x.stride()}; give x.contiguous()")
    order = _order(x)
    other = [f"{name} has {t.stride()}" for name, t in given.items() if t.shape == x.shape and _order(t) != order]
    if other:
        reasons.append(f"reads all tensors in one order; x has strides {x.stride()}, {', '.join(other)}")
    if len({t.device for t in given.values()}) > 1:
        reasons.append("the tensors are on different devices")
    return reasons


def _order(t: torch.Tensor) -> tuple[int, ...]:
    # a stride along an axis of size 1 is never used, and may be anything
    return tuple(stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True))


def _dense(t: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def sampler_step(
    x: torch.Tensor,
    denoised: torch.Tensor,
    previous: Sequence[torch.Tensor] = (),
    *,
    a: float,
    b: float,
    c: Sequence[float] = (),
    noise: torch.Tensor | None = None,
    d: float = 0.0,
    uncond: torch.Tensor | None = None,
    cond_scale: float = 1.0,
    c_skip: float | None = None,
    c_out: float | None = None,
    model_input: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as of `reference.sampler_step`, computed in float32; no gradients.

    Where there is neither guidance nor preconditioning, the estimate returned is ``denoised`` in x's dtype.

    Raises:
        ValueError: shapes or coefficients do not fit, or the kernel cannot do the call; the message has every reason.
    """
    check_sampler_step(x, denoised, previous, c, noise, d, uncond, c_skip, c_out, model_input)
    reasons = supported(x, denoised, previous, noise, uncond, model_input)
    if reasons:
        raise ValueError("Triton sampler_step cannot do this call: " + "; ".join(reasons))
    x_out = torch.empty_like(x)
    computed = uncond is not None or c_skip is not None
    estimate_out = torch.empty_like(x) if computed else None
    missing = MOST_PREVIOUS - len(previous)
    tensors = (x, denoised, uncond, model_input, noise, *previous, *[None] * missing, x_out, estimate_out)
    factors = (a, b, *c, *[0.0] * missing, d, cond_scale, c_skip or 0.0, c_out or 0.0)
    if x.numel():
        with torch.cuda.device_of(x):
            step_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                *tensors, *map(float, factors), x.numel(),
                PRECONDITIONED=c_skip is not None, BLOCK=BLOCK,
                num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=True,
            )  # fmt: skip
    return x_out, estimate_out if computed else denoised.to(x.dtype)


def aot_variants(cc: int) -> list[Variant]:
    """What launches look like: our solver's third and later steps, and a call with everything, in each dtype."""
    solver = ("x", "estimate", "p0", "p1", "x_out")
    return [
        _variant(f"{TYPES[dtype]}/{name}", dtype, present)
        for dtype in TYPES
        for name, present in (("solver", solver), ("all", TENSORS))
    ]


def _variant(name: str, dtype: torch.dtype, present: Sequence[str]) -> Variant:
    constants = dict.fromkeys((t for t in TENSORS if t not in present), None)
    constants |= {"PRECONDITIONED": "model_input" in present, "BLOCK": BLOCK}
    kinds = {
        **dict.fromkeys(present, f"*{TYPES[dtype]}"),
        **dict.fromkeys(FACTORS, "fp32"),
        **dict.fromkeys(constants, "constexpr"),
        "numel": "i32",
    }
    loads = BLOCK * dtype.itemsize // 16 // (32 * NUM_WARPS)  # per tensor
    read = sum(not tensor.endswith("_out") for tensor in present)
    return Variant(
        name=f"sampler_step/{name}",
        kernel=step_kernel,
        signature={argument: kinds[argument] for argument in step_kernel.arg_names},
        constexprs=constants,
        aligned=tuple(present),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        vector_loads=read * loads,
        streaming=True,
    )
