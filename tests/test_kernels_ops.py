"""The public operations: right layout, right choice, right under torch.compile, autograd and tracing, without a GPU."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tdpm_ext.kernels import KernelError, attention, group_norm, ops, reference, registry, sampler_step, use_backend
from tdpm_ext.kernels.facts import assume_gpu

LAYOUTS = ("contiguous", "channels_last", "sliced")


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid_out(x, layout):
    """x in another memory layout; "sliced" is a view into a wider tensor."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]] if layout == "sliced" else x


def norm_arguments(channels=6, dtype=torch.float32, samples=2):
    vectors = [1 + seeded(channels, seed=1, dtype=dtype), seeded(channels, seed=2, dtype=dtype)]
    rows = [seeded(samples, channels, seed=s, dtype=dtype) for s in (3, 4, 5)]
    return vectors, dict(zip(("pre_add", "scale", "shift"), rows, strict=True))


class Called(TorchDispatchMode):
    """Names of the operations that reach the dispatcher, but for questions about the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.name().startswith("prim::"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def __contains__(self, part):
        return any(part in name for name in self.names)


# Group normalisation


@settings(max_examples=40)
@given(
    samples=st.integers(1, 3),
    per_group=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    layout=st.sampled_from(LAYOUTS),
    given_=st.sets(st.sampled_from(["affine", "pre_add", "scale", "shift"])),
    act=st.sampled_from([None, "silu", "gelu"]),
)
def test_native_group_norm_is_the_reference_in_any_layout(samples, per_group, groups, size, layout, given_, act):
    channels = per_group * groups
    x = laid_out(seeded(samples, channels, *size), layout)
    vectors, rows = norm_arguments(channels, samples=samples)
    vectors = vectors if "affine" in given_ else (None, None)
    rows = {name: rows[name] for name in given_ - {"affine"}}
    with torch.no_grad(), use_backend("native"):
        y = group_norm(x, groups, *vectors, act=act, **rows)
    expected = reference.group_norm(x, groups, *vectors, act=act, **rows)
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5)
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_to_the_reference(dtype):
    x = seeded(2, 6, 5, 3, dtype=dtype)
    vectors, rows = norm_arguments(dtype=dtype)
    y = group_norm(x, 3, *vectors, act="gelu", **rows)
    assert y.dtype == dtype
    exact = reference.group_norm(x.double(), 3, *(v.double() for v in vectors), act="gelu",
                                 **{n: r.double() for n, r in rows.items()})  # fmt: skip
    assert (y - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_parameters_of_another_dtype_are_not_rounded_to_the_inputs():
    x, (vectors, rows) = seeded(2, 6, 4, dtype=torch.bfloat16), norm_arguments()
    y = group_norm(x, 3, *vectors, **rows)
    assert y.dtype == torch.bfloat16 and torch.equal(y, reference.group_norm(x, 3, *vectors, **rows))


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 4},
        {"weight": torch.ones(5)},
        {"scale": torch.ones(3, 6)},
        {"pre_add": torch.ones(6)},
        {"act": "relu"},
    ],
)
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_every_backend_refuses_the_same_arguments(wrong, backend):
    arguments = {"groups": 3, **wrong}
    with use_backend(backend), pytest.raises(ValueError, match="group_norm"):
        group_norm(seeded(2, 6, 4), arguments.pop("groups"), **arguments)


# Attention


@pytest.mark.parametrize("layout", ["nchw", "packed", "contiguous"])
def test_attention_reads_the_layouts_that_networks_hand_over(layout):
    heads, dim, length = 2, 8, 9
    if layout == "nchw":  # k-diffusion's SelfAttention2d on contiguous pictures: the last dimension is not contiguous
        q, k, v = (seeded(1, heads, dim, length, seed=s).transpose(-1, -2) for s in range(3))
        assert q.stride(-1) == length
    elif layout == "packed":
        q, k, v = seeded(1, length, 3, heads, dim).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = (seeded(1, heads, length, dim, seed=s) for s in range(3))
    expected = reference.attention(q, k, v, scale=0.3)
    torch.testing.assert_close(attention(q, k, v, scale=0.3), expected, rtol=1e-5, atol=1e-5)


def test_a_view_with_a_strided_last_dimension_still_gets_a_fused_kernel():
    q = seeded(1, 2, 8, 40).transpose(-1, -2)
    with torch.no_grad():
        with Called() as directly:
            functional.scaled_dot_product_attention(q, q, q)
        with Called() as ours:
            attention(q, q, q)
    assert "flash" not in directly and "flash" in ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks_mean_the_same_in_every_backend(kind, dtype):
    q, k, v = (seeded(2, 2, 5, 8, seed=s, dtype=dtype) for s in range(3))
    mask = seeded(2, 1, 5, 5, seed=7) > 0
    mask[:, :, 0] = False  # a row that may attend to nothing
    if kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    y = attention(q, k, v, mask=mask)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y, reference.attention(q, k, v, mask=mask), rtol=tolerance, atol=tolerance)
    assert y.dtype == dtype and not y[:, :, 0].any()


@pytest.mark.parametrize(
    ("mask", "full"),
    [
        (torch.ones(5, 5, dtype=torch.bool), True),
        (torch.zeros(1, 1, 1, 5), True),
        (torch.eye(5, dtype=torch.bool), False),
        (torch.full((5, 5), -10000.0), False),
    ],
)
def test_a_mask_that_lets_everything_through_is_dropped(mask, full, monkeypatch):
    given_ = []
    sdpa = functional.scaled_dot_product_attention

    def watch(q, k, v, attn_mask=None, scale=None):
        given_.append(attn_mask)
        return sdpa(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watch)
    q = seeded(1, 1, 5, 8)
    attention(q, q, q, mask=mask)
    assert (given_[0] is None) is full is ops.full_mask(mask)


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_known_of_a_mask_is_forgotten_when_it_changes(inference):
    with torch.inference_mode(inference):
        mask = torch.ones(3, 3, dtype=torch.bool)
        assert ops.full_mask(mask)
        mask[0, 0] = False
        assert not ops.full_mask(mask)


def test_a_mask_that_learns_is_not_dropped():
    q, bias = seeded(1, 1, 3, 8), torch.zeros(3, 3, requires_grad=True)
    attention(q, q, q, mask=bias).square().sum().backward()
    assert bias.grad.abs().sum() > 0


# One step of a sampler


STEP = {"a": 0.7, "b": 0.4, "c": (-0.1, 0.05), "d": 0.3, "cond_scale": 3.0, "c_skip": 0.2, "c_out": 0.9}


def step_tensors(dtype=torch.float32, layout="contiguous"):
    made = [laid_out(seeded(2, 3, 4, 5, seed=s, dtype=dtype), layout) for s in range(7)]
    names = ("x", "denoised", "noise", "uncond", "model_input")
    return {**dict(zip(names, made, strict=False)), "previous": made[5:]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_a_sampler_step_is_the_formula_and_leaves_its_inputs_alone(backend, layout):
    t = step_tensors(torch.float64, layout)
    before = {name: [u.clone() for u in (v if isinstance(v, list) else [v])] for name, v in t.items()}
    with torch.no_grad(), use_backend(backend):
        following, estimate = sampler_step(t["x"], t["denoised"], t["previous"], noise=t["noise"], uncond=t["uncond"],
                                           model_input=t["model_input"], **STEP)  # fmt: skip
    guided = t["uncond"] + 3.0 * (t["denoised"] - t["uncond"])
    wanted = 0.2 * t["model_input"] + 0.9 * guided
    torch.testing.assert_close(estimate, wanted)
    first, second = t["previous"]
    torch.testing.assert_close(following, 0.7 * t["x"] + 0.4 * wanted - 0.1 * first + 0.05 * second + 0.3 * t["noise"])
    for name, values in before.items():
        now = t[name] if isinstance(t[name], list) else [t[name]]
        assert all(torch.equal(a, b) for a, b in zip(values, now, strict=True)), name


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_guidance_may_be_a_tensor_for_graphs(backend):
    t = step_tensors()
    with torch.no_grad(), use_backend(backend):
        by_number = sampler_step(t["x"], t["denoised"], a=0.5, b=0.5, uncond=t["uncond"], cond_scale=2.5)
        by_tensor = sampler_step(t["x"], t["denoised"], a=0.5, b=0.5, uncond=t["uncond"], cond_scale=torch.tensor(2.5))
    for a, b in zip(by_number, by_tensor, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_steps_are_rounded_once():
    t = step_tensors(torch.bfloat16)
    following, _ = sampler_step(t["x"], t["denoised"], t["previous"], a=0.7, b=0.4, c=(-0.1, 0.05))
    exact = 0.7 * t["x"].double() + 0.4 * t["denoised"].double()
    exact += -0.1 * t["previous"][0].double() + 0.05 * t["previous"][1].double()
    assert torch.equal(following, exact.float().bfloat16()) and following.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_a_step_refuses_what_does_not_fit(backend):
    x = seeded(2, 3)
    with use_backend(backend):
        with pytest.raises(ValueError, match="previous"):
            sampler_step(x, x, (x,), a=1.0, b=1.0)
        with pytest.raises(ValueError, match="noise"):
            sampler_step(x, x, a=1.0, b=1.0, d=1.0)
        with pytest.raises(ValueError, match="denoised has shape"):
            sampler_step(x, x[:1], a=1.0, b=1.0)


# What the dispatcher is told


def registered(layout, dtype):
    x = laid_out(seeded(2, 6, 4, 5, dtype=dtype), layout)
    (weight, bias), rows = norm_arguments(dtype=dtype)
    yield "group_norm", (x, 3, weight, bias, 1e-5, rows["pre_add"], rows["scale"], rows["shift"], "silu")
    yield "group_norm", (x, 2, None, None, 1e-5, None, None, None, None)
    q = laid_out(seeded(2, 6, 4, 8, dtype=dtype), layout)
    k = seeded(2, 6, 3, 8, seed=1, dtype=dtype)
    yield "attention", (q, k, k, None, None)
    yield "attention", (q, k, k, 0.5, torch.tensor([True, False, True]))
    yield "sampler_step", (x, x, [], 1.0, 0.5, [], None, 0.0, None, 1.0, None, None, None)
    yield "sampler_step", (x, x, [x, x], 1.0, 0.5, [0.1, 0.2], x, 0.3, x, 2.0, 0.5, 0.6, x)


CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operations_are_registered_rightly(layout):
    """Schema, aliasing, and fake kernels with the right strides, which torch itself checks."""
    for name, arguments in registered(layout, torch.float32):
        answers = opcheck(getattr(torch.ops.tdpm_ext, name).default, arguments, test_utils=CHECKS)
        assert set(answers.values()) == {"SUCCESS"}, (name, answers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_registered_operation_is_its_reference_on_the_cpu(dtype):
    for name, arguments in registered("channels_last", dtype):
        y = getattr(torch.ops.tdpm_ext, name)(*arguments)
        if name == "group_norm":
            x, groups, weight, bias, eps, pre_add, scale, shift, act = arguments
            options = {"eps": eps, "pre_add": pre_add, "scale": scale, "shift": shift, "act": act}
            expected = reference.group_norm(x, groups, weight, bias, **options)
        elif name == "attention":
            expected = reference.attention(*arguments[:3], scale=arguments[3], mask=arguments[4])
        else:
            x, denoised, previous, a, b, c, *rest = arguments
            options = dict(
                zip(("noise", "d", "uncond", "cond_scale", "c_skip", "c_out", "model_input"), rest, strict=True)
            )
            expected = list(reference.sampler_step(x, denoised, previous, a=a, b=b, c=c, **options))[: len(y)]
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_planning_on_fake_cuda_tensors_sees_one_operation_each_and_its_layout(layout):
    """What counts launches and bytes without a GPU: a call is one operation, and keeps channels_last."""
    pytest.importorskip("triton")
    with FakeTensorMode(), assume_gpu(90), torch.no_grad():
        x = torch.empty(2, 64, 16, 16, device="cuda", dtype=torch.float16)
        x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
        row = torch.empty(2, 64, device="cuda", dtype=torch.float16)
        q = torch.empty(2, 8, 256, 40, device="cuda", dtype=torch.float16)
        with use_backend("triton"), Called() as called:
            y = group_norm(x, 32, scale=row, shift=row, act="gelu")
            z = attention(q, q, q)
            following, estimate = sampler_step(x, x, a=1.0, b=0.5, uncond=x, cond_scale=2.0)
    assert called.names == ["tdpm_ext::group_norm", "tdpm_ext::attention", "tdpm_ext::sampler_step"]
    assert y.stride() == following.stride() == estimate.stride() == x.stride() and z.shape == q.shape
    assert y.device.type == "cuda" and y.dtype == torch.float16


def test_automatic_choice_on_fake_cuda_tensors():
    pytest.importorskip("triton")
    with FakeTensorMode(), torch.no_grad():
        small = torch.empty(1, 32, 8, 8, device="cuda", dtype=torch.float16)
        large = torch.empty(4, 320, 64, 64, device="cuda", dtype=torch.float16)
        q = torch.empty(1, 8, 64, 40, device="cuda", dtype=torch.float16)
        with assume_gpu(80), Called() as on_ampere:
            group_norm(small, 32)
            group_norm(large, 32)
            attention(q, q, q)
            sampler_step(large, large, a=1.0, b=0.5)
        with assume_gpu(75), Called() as on_turing:
            group_norm(large, 32)
            sampler_step(large, large, a=1.0, b=0.5)
    assert [name for name in on_ampere.names if "tdpm_ext" in name] == [
        "tdpm_ext::group_norm",
        "tdpm_ext::sampler_step",
    ]
    assert "native_group_norm" in on_ampere and "softmax" in on_ampere
    assert "tdpm_ext" not in on_turing and "native_group_norm" in on_turing


# Under torch.compile and autograd


class Block(nn.Module):
    """One of each operation, as a network would use them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x, row, mask=None):
        h = group_norm(x, 2, self.norm.weight, self.norm.bias, pre_add=row, scale=row, shift=row, act="gelu")
        q = h.flatten(2).transpose(1, 2).unflatten(2, (2, 4)).transpose(1, 2)
        h = h + attention(q, q, q, mask=mask).transpose(2, 3).reshape(x.shape)
        return sampler_step(x, h, (x,), a=0.5, b=0.4, c=(0.1,), uncond=x, cond_scale=2.0)[0]


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_code_is_one_graph_of_plain_torch(grad):
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    block, x, row = Block(), seeded(2, 8, 3, 3), seeded(2, 8, seed=1)
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(block, backend=backend, fullgraph=True)(x, row)
        torch.testing.assert_close(compiled, block(x, row), rtol=1e-5, atol=1e-5)
        last = seeded(2, 8, 3, 3, seed=2).to(memory_format=torch.channels_last)
        torch.testing.assert_close(torch.compile(block, backend=backend, fullgraph=True)(last, row), block(last, row))
    assert graphs and not any("tdpm_ext" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    torch._dynamo.reset()


def test_gradients_are_right():
    x, row = (seeded(*s, seed=9, dtype=torch.float64).requires_grad_() for s in ((2, 8, 2, 2), (2, 8)))
    block = Block().double()
    assert torch.autograd.gradcheck(lambda x, row: block(x, row), (x, row))
    weights = [p for p in block.parameters()]
    block(x, row).square().sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in weights)


# Requests


@pytest.mark.parametrize("name", ["triton", "xformers"])
def test_a_kernel_asked_for_on_the_cpu_is_refused(name):
    q = seeded(1, 1, 4, 64)
    with use_backend(name), pytest.raises(KernelError, match=f"'{name}' was asked for.*(?s:.*)on cpu"):
        attention(q, q, q)
    if name == "triton":
        with use_backend("triton"), pytest.raises(KernelError, match="needs CUDA tensors, these are on cpu"):
            group_norm(q, 1)
        with use_backend("triton"), pytest.raises(KernelError, match="needs CUDA tensors, these are on cpu"):
            sampler_step(q, q, a=1.0, b=1.0)


def test_a_request_is_what_runs_on_the_cpu_too():
    x = seeded(2, 6, 4)
    with torch.no_grad():
        with use_backend("reference"), Called() as called:
            group_norm(x, 3)
        assert "native_group_norm" not in called
        with use_backend("native"), Called() as called:
            group_norm(x, 3)
        assert "native_group_norm" in called


def test_everything_runs_where_triton_and_xformers_are_absent():
    code = (
        "import sys; sys.modules['triton'] = sys.modules['xformers'] = None\n"
        "import torch; from tdpm_ext.kernels import *\n"
        "x = torch.ones(1, 4, 2, 2)\n"
        "y = group_norm(x, 2), attention(x, x, x), *sampler_step(x, x, a=1.0, b=1.0)\n"
        "assert all(t.isfinite().all() for t in y); print(report()['backends']['attention'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout and "xformers is not installed" in done.stdout


def test_every_operation_has_a_backend_for_every_name_it_promises():
    """A name in the registry that no operation acts on would silently be the reference."""
    x, q = seeded(2, 6, 4), seeded(1, 1, 4, 64)
    calls = {
        "group_norm": lambda: group_norm(x, 3),
        "attention": lambda: attention(q, q, q),
        "sampler_step": lambda: sampler_step(x, x, a=1.0, b=1.0),
    }
    for op, call in calls.items():
        for backend in registry.BACKENDS_OF[op]:
            with torch.no_grad(), use_backend(backend, op), Called() as called:
                try:
                    call()
                except KernelError as error:
                    assert f"'{backend}' was asked for" in str(error)
                else:
                    assert called.names and "tdpm_ext" not in called
