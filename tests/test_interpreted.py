"""The tools that the kernels are tested with: what they must see, and what they must leave alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import tdpm_ext.kernels
from tests.interpreted import canary, changed, check_canary, load_interpreted

TOY = '''
import triton
import triton.language as tl

from . import toy_part


@triton.jit
def double(x, y, read, write, BLOCK: tl.constexpr):
    """y = 2 x for each of the columns, one program per row; reads and writes as many columns as it is told."""
    row = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    value = tl.load(x + row * 16 + o, mask=o < read, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=0) / read
    tl.store(y + row * 16 + o, toy_part.twice(value - mean) + 2 * mean, mask=o < write)
'''
PART = """
import triton


@triton.jit
def twice(x):
    return 2 * x
"""


@pytest.fixture
def toy(tmp_path: Path):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toy_part.py").write_text(PART)
    return load_interpreted("toy", tmp_path)


def run(toy, dtype: torch.dtype = torch.float32, read: int = 10, write: int = 10, rows: int = 3):
    x = canary(torch.arange(30.0).reshape(3, 10).to(dtype), gap=6)
    y = canary(x, gap=6, poisoned=True)
    toy.double[(rows,)](x, y, read, write, BLOCK=16, num_warps=1, enable_fp_fusion=True)
    return x, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_run_on_the_cpu(toy, dtype):
    x, y = run(toy, dtype)
    check_canary(x, y)
    torch.testing.assert_close(y, 2 * x, rtol=1e-2, atol=1e-2)


def test_a_stray_write_is_seen(toy):
    with pytest.raises(AssertionError, match="3 elements written outside, the first 10 away"):
        check_canary(run(toy, write=11)[1])


def test_a_stray_write_of_what_was_read_outside_is_seen(toy):
    with pytest.raises(AssertionError, match="written outside"):
        check_canary(run(toy, read=11, write=11)[1])


def test_a_forgotten_element_is_seen(toy):
    for y in (run(toy, write=9)[1], run(toy, rows=2)[1]):
        with pytest.raises(AssertionError, match="of 30 elements never written"):
            check_canary(y)
        check_canary(y, written=False)


def test_a_stray_read_spoils_the_result(toy):
    assert bool(run(toy, read=11)[1].isnan().all())


@pytest.mark.parametrize("gaps", [(0,), (1,), (0, -1), (2, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_canary_is_the_tensor_with_gaps(gaps, memory_format):
    x = torch.randn(2, 3, 4, 5).to(memory_format=memory_format)
    y = canary(x, gaps=gaps)
    assert torch.equal(x, y)
    assert sorted(range(4), key=y.stride) == sorted(range(4), key=x.stride)
    y.zero_()
    check_canary(y)


def test_what_was_imported_before_stays_what_it_was(tmp_path, monkeypatch):
    from tdpm_ext.kernels import triton_norm

    before = {place: vars(place).copy() for place in (tl, tl.core)}
    copy = load_interpreted("triton_norm")
    copy.group_norm(torch.ones(1, 2, 3), 1)
    assert copy is not triton_norm
    assert sys.modules["tdpm_ext.kernels.triton_norm"] is triton_norm is tdpm_ext.kernels.triton_norm
    for place, attributes in before.items():
        assert [key for key, value in vars(place).items() if attributes.get(key) is not value] == []
    # and the kernels that were there before still compile
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    variant = next(v for v in triton_norm.aot_variants(90) if "merge" in v.name)
    source = ASTSource(variant.kernel, variant.signature, variant.constexprs)
    options = {"num_warps": variant.num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "ld.global" in compiled.asm["ptx"]


def test_a_change_must_find_its_place(tmp_path):
    with pytest.raises(AssertionError, match="does not hold"):
        changed(tmp_path, "norm_kernels.py", "no such line", "")
