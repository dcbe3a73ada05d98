"""Everything about the kernels and graphs that only a GPU can show. Skipped, and counted loudly, where there is none.

Errors are judged against float64, in units of the error that torch's own operation makes in the same dtype.
"""

import gc
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional

from tdpm_ext.kernels import attention, group_norm, ops, reference, registry, report, sampler_step, use_backend
from tdpm_ext.kernels.graph_runtime import CudaRuntime
from tdpm_ext.kernels.graphs import MAX_GRAPHS, Baked, GraphedForward, GraphedTrajectory

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
SLACK = 1.5  # times the error of torch's own operation


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def decisions(monkeypatch):
    """(operation, backend) of every decision taken in the test."""
    taken = {}
    monkeypatch.setattr(registry, "_decisions", taken)
    return lambda: {(op, backend) for op, backend, _ in taken}


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rounding(exact, dtype):
    """What one rounding of the result may cost."""
    return 2 * torch.finfo(dtype).eps * exact.abs().max().item()


def error(found, exact):
    return (found.double() - exact).abs().max().item()


# Operations


NORMS = [  # [N, C, H, W], groups
    ((1, 320, 64, 64), 32),  # Stable Diffusion 1.5, first level
    ((2, 640, 9, 7), 32),  # odd size, 20 channels in a group
    ((1, 2560, 8, 8), 32),  # widest
    ((3, 64, 1, 1), 32),  # nothing but channels
    ((1, 128, 512, 512), 32),  # a decoder: one group is a million elements
    ((64, 128, 16, 16), 4),  # k-diffusion's CIFAR network, 32 channels in a group
]


def norm_call(shape, groups, dtype, layout, mean=0.0):
    x = (seeded(*shape) + mean).to(dtype)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    rows = {n: 0.3 * seeded(*shape[:2], seed=s, dtype=dtype) for s, n in enumerate(("pre_add", "scale", "shift"), 1)}
    vectors = 1 + 0.2 * seeded(shape[1], seed=5, dtype=dtype), 0.2 * seeded(shape[1], seed=6, dtype=dtype)
    return (x, groups, *vectors), {**rows, "act": "silu"}


def doubled(arguments, options):
    def wide(t):
        return t.double() if isinstance(t, torch.Tensor) else t

    return [wide(a) for a in arguments], {name: wide(o) for name, o in options.items()}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), NORMS)
def test_group_norm_errs_no_more_than_torchs_own(shape, groups, dtype, layout, decisions):
    arguments, options = norm_call(shape, groups, dtype, layout)
    wide, wide_options = doubled(arguments, options)
    exact = reference.group_norm(*wide, **wide_options)
    with use_backend("triton"):
        ours = group_norm(*arguments, **options)
    with use_backend("native"):
        native = group_norm(*arguments, **options)
    assert ours.stride() == arguments[0].stride() and ours.dtype == dtype
    assert error(ours, exact) <= SLACK * error(native, exact) + rounding(exact, dtype)
    assert ("group_norm", "triton") in decisions()


@pytest.mark.parametrize("mean", [100.0, 1000.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), NORMS)
def test_a_mean_far_from_zero_costs_no_more_digits_than_in_torch(shape, groups, layout, mean):
    x = norm_call(shape, groups, torch.float32, layout, mean)[0][0]
    exact = reference.group_norm(x.double(), groups)
    with use_backend("triton"):
        ours = group_norm(x, groups)
    assert error(ours, exact) <= 2 * error(functional.group_norm(x, groups), exact) + rounding(exact, x.dtype)


ATTENTIONS = [  # B, H, Lq, Lk, D
    (1, 2, 4096, 4096, 40),
    (1, 8, 1024, 1024, 80),
    (2, 8, 256, 77, 160),  # the prompt
    (1, 4, 64, 1, 64),  # a single key
    (3, 2, 100, 130, 32),  # no multiple of a tile
    (1, 8, 256, 256, 128),
    (1, 3, 77, 77, 96),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTIONS, ids=str)
def test_attention_errs_no_more_than_flash_attention_may(shape, dtype, masked, decisions):
    batch, heads, q_len, kv_len, dim = shape
    q = seeded(batch, heads, q_len, dim, dtype=dtype)
    k, v = (seeded(batch, heads, kv_len, dim, seed=s, dtype=dtype) for s in (1, 2))
    mask = seeded(1, 1, q_len, kv_len, seed=3) > 0 if masked else None
    exact = reference.attention(q.double(), k.double(), v.double(), mask=mask)
    plain = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if mask is not None:
        plain = plain.masked_fill(~mask.any(-1, keepdim=True), 0)
    with use_backend("triton"):
        ours = attention(q, k, v, mask=mask)
    slack = 2 * ((exact.to(dtype) + 0.3 - 0.3).double() - exact).abs().max().item()
    assert error(ours, exact) <= 2 * error(plain, exact) + slack
    assert ("attention", "triton") in decisions()


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_attention_reads_the_views_that_networks_hand_over(backend):
    packed = seeded(2, 256, 3, 4, 64, dtype=torch.float16).permute(2, 0, 3, 1, 4)
    nchw = [seeded(2, 4, 64, 256, seed=s, dtype=torch.float16).transpose(-1, -2) for s in range(3)]
    for q, k, v in (packed, nchw):
        exact = reference.attention(q.double(), k.double(), v.double())
        with use_backend(backend):
            assert error(attention(q, k, v), exact) <= 4 * torch.finfo(torch.float16).eps


def test_a_known_full_mask_is_dropped_without_waiting():
    q, mask = seeded(1, 2, 64, 64, dtype=torch.float16), torch.ones(64, 64, dtype=torch.bool, device=DEVICE)
    assert not ops.full_mask(mask, wait=False) and ops.full_mask(mask) and ops.full_mask(mask, wait=False)
    assert torch.equal(attention(q, q, q, mask=mask), attention(q, q, q))


def test_xformers_is_as_exact_as_torch():
    pytest.importorskip("xformers", reason="xformers is not installed")
    q = seeded(1, 8, 256, 64, dtype=torch.float16)
    exact = reference.attention(q.double(), q.double(), q.double())
    with use_backend("xformers"):
        found = attention(q, q, q)
    assert error(found, exact) <= 2 * error(functional.scaled_dot_product_attention(q, q, q), exact) + 1e-3


def step_call(shape, dtype):
    x, denoised, first, second, noise, uncond, given = (seeded(*shape, seed=s, dtype=dtype) for s in range(7))
    options = {"noise": noise, "uncond": uncond, "model_input": given, "c": (-0.2, 0.1), "d": 0.3, "cond_scale": 5.0}
    return (x, denoised, (first, second)), {**options, "a": 0.6, "b": 0.4, "c_skip": 0.3, "c_out": 0.8}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (5, 4, 7, 9), (1,)], ids=str)
def test_a_sampler_step_is_rounded_once(shape, dtype, decisions):
    (x, denoised, previous), options = step_call(shape, dtype)
    wide = [x.double(), denoised.double(), [p.double() for p in previous]]
    exact = reference.sampler_step(*wide, **doubled((), options)[1])
    found = sampler_step(x, denoised, previous, **options)
    for ours, right in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        assert error(ours, right) <= rounding(right, dtype) + 1e-5
    assert decisions() == {("sampler_step", "triton")}


def test_guidance_may_be_a_tensor():
    (x, denoised, _), _ = step_call((2, 3, 8, 8), torch.float32)
    options = {"a": 0.5, "b": 0.5, "uncond": x}
    by_number = sampler_step(x, denoised, cond_scale=2.5, **options)
    by_tensor = sampler_step(x, denoised, cond_scale=torch.tensor(2.5, device=DEVICE), **options)
    for a, b in zip(by_number, by_tensor, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_call_gives_the_same_bits(dtype):
    arguments, options = norm_call((1, 128, 256, 256), 32, dtype, "channels_last")
    q = seeded(1, 8, 512, 40, dtype=dtype)
    (x, denoised, previous), step = step_call((2, 4, 64, 64), dtype)
    with use_backend("triton"):
        for call in (
            lambda: group_norm(*arguments, **options),
            lambda: attention(q, q, q),
            lambda: torch.stack(sampler_step(x, denoised, previous, **step)),
        ):
            assert torch.equal(call(), call())


def test_automatic_choices_on_this_gpu(decisions):
    cc = torch.cuda.get_device_capability()
    expected = "triton" if cc >= (8, 0) and not dict(registry.unavailable()).get("triton") else "native"
    group_norm(seeded(8, 320, 64, 64, dtype=torch.float16), 32)
    assert decisions() == {("group_norm", expected)}
    assert report()["backends"]["group_norm"]["triton"] == "can be used here" or expected == "native"


def test_gradients_are_those_of_the_definition():
    (x, groups, weight, bias), options = norm_call((2, 8, 4, 4), 2, torch.float32, "contiguous")
    found, expected = [], []
    for operation, grads in ((group_norm, found), (reference.group_norm, expected)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with torch.enable_grad():
            operation(leaves[0], groups, *leaves[1:], **options).square().sum().backward()
        grads += [leaf.grad for leaf in leaves]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Graphs


class Denoiser(nn.Module):
    """Convolution, group norm, attention: what real networks launch."""

    def __init__(self, channels=64):
        super().__init__()
        self.first = nn.Conv2d(4, channels, 3, padding=1)
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.qkv, self.last = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x, sigma, cond=None):
        h = self.first(x) + sigma.reshape(-1, 1, 1, 1).log() / 4
        h = group_norm(h, 8, self.weight, self.bias, act="silu")
        if cond is not None:
            h = h * cond
        q, k, v = self.qkv(h).flatten(2).unflatten(1, (3, -1, 32)).transpose(-1, -2).unbind(1)
        return self.last(h + attention(q, k, v).transpose(-1, -2).reshape(h.shape))


@pytest.fixture
def runtime():
    checked = "check_input_liveness" in inspect.signature(torch.cuda.graph.__init__).parameters
    return CudaRuntime(check_input_liveness=checked)


@pytest.fixture(params=[torch.float32, torch.float16], ids=["float32", "float16"])
def model(request):
    torch.manual_seed(0)
    return Denoiser().to(DEVICE, request.param).eval()


def inputs(model, count=2, size=16, seed=0):
    dtype = model.weight.dtype
    return seeded(count, 4, size, size, seed=seed, dtype=dtype), seeded(count, seed=seed, dtype=dtype).abs() + 0.5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_replays_give_the_eager_bits(layout, model, runtime):
    """With the kernels that the graph captured: outside of a graph "auto" may take others for small tensors."""
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    fast = GraphedForward(model, runtime=runtime)
    with use_backend("triton", "group_norm"):
        for seed in range(5):
            x, sigma = inputs(model, seed=seed)
            assert torch.equal(fast(x, sigma), model(x, sigma)), fast.reasons
    assert (fast.stats.captures, fast.stats.replays, fast.stats.eager) == (1, 5, 0)


def test_inside_of_a_graph_the_kernels_are_chosen(model, runtime, decisions):
    fast = GraphedForward(model, runtime=runtime)
    fast(*inputs(model))
    assert ("group_norm", "triton") in decisions() and fast.stats.replays == 1


@pytest.mark.parametrize("change", ["in place", "replaced", "moved", "adapter"])
def test_any_change_of_weights_changes_the_output(change, model, runtime):
    fast, call = GraphedForward(model, runtime=runtime), inputs(model)
    before = fast(*call)
    if change == "in place":
        model.first.weight.mul_(1.5)
    elif change == "replaced":
        model.first.weight = nn.Parameter(model.first.weight * 1.5)
    elif change == "moved":
        model.cpu().to(DEVICE)
        model.first.weight.data = model.first.weight.data * 1.5
    else:
        model.first = nn.Sequential(model.first, nn.Conv2d(64, 64, 1).to(DEVICE, model.weight.dtype))
    after = fast(*call)
    assert not torch.equal(before, after) and fast.stats.captures == 2
    with use_backend("triton", "group_norm"):
        expected = model(*call)
    torch.testing.assert_close(after, expected)


def test_random_draws_are_those_of_eager_calls(runtime):
    own = torch.Generator(DEVICE)

    def fn(x):
        return x + torch.randn_like(x) + torch.randn(x.shape, device=DEVICE, generator=own)

    def run(call):
        torch.manual_seed(3)
        own.manual_seed(4)
        return [call(seeded(2, 3)) for _ in range(4)]

    fast = GraphedForward(fn, watch=(), generators=(own,), runtime=runtime)
    assert all(torch.equal(a, b) for a, b in zip(run(fast), run(fn), strict=True))
    assert fast.stats.replays == 4, fast.reasons


def test_a_failed_capture_leaves_cuda_usable(runtime):
    def fn(x, wait):
        x = x + torch.randn_like(x)
        return x * x.sum().item() if wait else x

    x = seeded(2, 3)
    stream = torch.cuda.current_stream()
    torch.manual_seed(0)
    expected = [fn(x, wait) for wait in (False, True, False, False)]
    torch.manual_seed(0)
    fast = GraphedForward(fn, watch=(), runtime=runtime)
    found = [fast(x, wait) for wait in (False, True, False, False)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert fast.stats.eager == 1 and any("capture failed" in reason for reason in fast.reasons)
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()


def test_a_hundred_shapes_do_not_grow_memory(model, runtime):
    fast = GraphedForward(model, runtime=runtime)

    def serve(sizes):
        for size in sizes:
            fast(*inputs(model, count=1, size=size))
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    allocated, reserved = serve(range(8, 8 + 2 * MAX_GRAPHS))
    later = serve(range(8, 108))
    assert later[0] <= allocated + (1 << 20) and later[1] <= reserved + (32 << 20)
    assert fast.stats.captures == MAX_GRAPHS


def test_a_reset_gives_all_memory_back(model, runtime):
    def taken():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    call = inputs(model, size=64)
    model(*call)
    before = taken()
    fast = GraphedForward(model, runtime=runtime)
    for _ in range(3):  # each time with a new pool: a stale one would be refused by the allocator
        fast(*call)
        assert taken() > before
        fast.reset()
        # the libraries' workspaces for the capture stream stay
        assert taken() <= before + (64 << 20)
    assert fast.stats.captures == 3, fast.reasons


def test_replays_on_changing_streams_are_ordered(model, runtime):
    fast = GraphedForward(model, runtime=runtime)
    with use_backend("triton", "group_norm"):
        calls = [inputs(model, seed=seed) for seed in range(6)]
        expected = [model(*call) for call in calls]
        found = []
        torch.cuda.synchronize()
        for call in calls:
            with torch.cuda.stream(torch.cuda.Stream()):
                found.append(fast(*call))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_leaves_nothing_dangling(runtime):
    torch.manual_seed(0)
    model = Denoiser().to(DEVICE)
    fast = GraphedForward(model, runtime=runtime)
    for seed in range(3):
        call = inputs(model, seed=seed)
        with torch.autocast(DEVICE, dtype=torch.float16), use_backend("triton", "group_norm"):
            found, expected = fast(*call), model(*call)
        torch.empty(1 << 24, device=DEVICE).fill_(torch.nan)  # whatever was freed is overwritten
        torch.testing.assert_close(found, expected)
    assert fast.stats.captures == 1, fast.reasons


def test_a_trajectory_is_one_graph(model, runtime):
    def run(z, cond, cond_scale, sigmas, noise):
        x = z * sigmas[0]
        for here, there in zip(sigmas, sigmas[1:], strict=False):
            level = torch.full((len(x),), here, device=x.device, dtype=x.dtype)
            uncond, guided = model(x, level), model(x, level, cond=cond)
            x = sampler_step(x, guided, a=there / here, b=1 - there / here, noise=noise, d=there, uncond=uncond,
                             cond_scale=cond_scale)[0]  # fmt: skip
        return x

    fast = GraphedTrajectory(run, watch=(model,), runtime=runtime)
    sigmas = (3.0, 1.0, 0.3, 0.0)
    with use_backend("triton", "group_norm"):
        for seed, scale in enumerate((1.5, 4.0, 2.0)):
            z, noise = inputs(model, seed=seed)[0], inputs(model, seed=9 + seed)[0]
            cond = torch.tensor(0.5 + seed, device=DEVICE, dtype=z.dtype)
            expected = run(z, cond, torch.full((), scale, device=DEVICE), sigmas, noise)
            assert torch.equal(fast(z, cond, scale, Baked(sigmas), noise), expected), fast.reasons
    assert (fast.stats.captures, fast.stats.replays) == (1, 3)


def test_the_device_is_that_of_the_tensors(runtime):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    model = Denoiser().to("cuda:1")
    fast = GraphedForward(model, runtime=runtime)
    with use_backend("triton", "group_norm"):
        for seed in range(3):
            x, sigma = (t.to("cuda:1") for t in inputs(model, seed=seed))
            assert torch.equal(fast(x, sigma), model(x, sigma))
    assert torch.cuda.current_device() == 0 and fast.stats.replays == 3
