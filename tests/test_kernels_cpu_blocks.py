"""The C++ blocks for CPUs: the numbers of the layers they replace, and a model that stays what it was."""

import copy
import ctypes
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tdpm_ext.kernels import accelerate, cpu_blocks, cpu_library, tiers
from tests.test_kernels_patch import EDITS, VARIANTS, Doubled, build, run

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, cpu_library.COMPILERS)), reason="no C++ compiler: the blocks cannot be built here"
)
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def plainest(tmp_path_factory):
    """The blocks for any processor of this kind: no wide vectors, no fused multiplication, no OpenMP."""
    path = tmp_path_factory.mktemp("blocks") / "plain.so"
    command = [cpu_library._compiler(), *cpu_library.FLAGS, "-O1", cpu_library.SOURCES[0], "-o", path]
    subprocess.run(command, check=True)
    return cpu_library.opened(path)


@pytest.fixture(params=["native", "plainest"])
def library(request, monkeypatch):
    """The blocks as they are used here, and for the plainest processor."""
    if request.param == "plainest":
        found = request.getfixturevalue("plainest")
        monkeypatch.setattr(cpu_blocks, "library", lambda: found)
    return cpu_blocks.library()


def picture(*shape, seed=0, mean=0.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) + mean).contiguous(memory_format=torch.channels_last)


def packed(module):
    """A convolution whose weights are ready for the blocks."""
    module.requires_grad_(False)
    assert cpu_blocks.fits(module)
    vars(module)[cpu_blocks.PACKED] = cpu_blocks.pack(module.weight)
    return module


def norm_of(n, channels, groups, shared, seed=1):
    """A norm, and the function that it stands for."""
    g = torch.Generator().manual_seed(seed)
    gain, shift = torch.randn(2, n, channels, generator=g)
    norm = cpu_blocks.Norm(groups, 1e-5, gain[:, :, None, None], shift[:, :, None, None])
    if shared:
        gain, shift = gain[:1], shift[:1]
        norm = cpu_blocks.Norm(groups, 1e-5, gain[0], shift[0])

    def plain(x):
        y = F.group_norm(x, groups, eps=1e-5)
        return y * gain.to(x.dtype)[:, :, None, None] + shift.to(x.dtype)[:, :, None, None]

    return norm, plain


ACTS = {None: lambda x: x, "gelu": F.gelu, "silu": F.silu}


def conv_in(x, module):
    """A convolution in x's dtype."""
    weight, bias = module.weight.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype)
    return F.conv2d(x, weight, bias, padding=module.padding)


def close(y, wanted, tolerance=3e-5):
    """Equal to ``tolerance`` of the result's size, and in channels_last."""
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y - wanted).abs().max() <= tolerance * max(1.0, wanted.std().item())


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 9),
    channels=st.sampled_from([16, 48, 64, 80]),
    out=st.sampled_from([16, 32, 48, 96]),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    act=st.sampled_from([None, "gelu", "silu"]),
    shared=st.booleans(),
    bias=st.booleans(),
)
def test_a_convolution_with_its_norm_and_activation(n, channels, out, height, width, act, shared, bias):
    if height * width == 1:
        height = 2
    module = packed(nn.Conv2d(channels, out, 3, padding=1, bias=bias))
    x, (norm, plain) = picture(n, channels, height, width), norm_of(n, channels, channels // 16, shared)
    close(cpu_blocks.convolution(x, module, norm, act), conv_in(ACTS[act](plain(x.double())), module))
    close(cpu_blocks.convolution(x, module, act=act), conv_in(ACTS[act](x.double()), module))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("n", "size"), [(1, 5), (7, 7), (3, 14)])
def test_a_residual_block(library, n, size, skip):
    convolutions = packed(nn.Conv2d(48, 64, 3, padding=1)), packed(nn.Conv2d(64, 80 if skip else 48, 3, padding=1))
    shortcut = packed(nn.Conv2d(48, 80, 1)) if skip else None
    x = picture(n, 48, size, size)
    (norm1, plain1), (norm2, plain2) = norm_of(n, 48, 3, False), norm_of(n, 64, 2, True)
    y = cpu_blocks.residual(x, (norm1, norm2), "gelu", convolutions, shortcut)
    wide = x.double()
    h = conv_in(F.gelu(plain2(conv_in(F.gelu(plain1(wide)), convolutions[0]))), convolutions[1])
    close(y, h + (conv_in(wide, shortcut) if skip else wide))


@pytest.mark.parametrize(("heads", "channels", "size"), [(1, 96, 7), (2, 64, 5), (3, 48, 12), (1, 64, 1)])
def test_self_attention(library, heads, channels, size):
    qkv, project = packed(nn.Conv2d(channels, 3 * channels, 1)), packed(nn.Conv2d(channels, channels, 1))
    x, (norm, plain) = picture(3, channels, size, size), norm_of(3, channels, channels // 16, False)
    y = cpu_blocks.attention(x, norm, heads, qkv, project)
    wide = x.double()
    rows = conv_in(plain(wide), qkv).flatten(2).unflatten(1, (3, heads, channels // heads)).transpose(3, 4)
    h = F.scaled_dot_product_attention(*rows.unbind(1)).transpose(2, 3).reshape(x.shape)
    close(y, wide + conv_in(h, project))


def test_a_pointwise_convolution(library):
    module = packed(nn.Conv2d(32, 48, 1))
    x = picture(3, 32, 5, 7)
    close(cpu_blocks.pointwise(x, module), conv_in(x.double(), module))


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 3), (7, 9), (14, 14)])
def test_resampling_is_k_diffusions(library, height, width):
    layers = pytest.importorskip("k_diffusion.layers")
    x = picture(2, 32, height, width)
    close(cpu_blocks.downsample(x), layers.Downsample2d("linear")(x), 1e-6)
    close(cpu_blocks.upsample(x), layers.Upsample2d("linear")(x), 1e-6)


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
def test_norms_stay_exact_when_the_mean_is_far_from_zero(library, mean):
    """A convolution that hands its input on shows what the norm made."""
    module = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    nn.init.dirac_(module.weight.data)
    x, (norm, plain) = picture(2, 64, 9, 7, mean=mean), norm_of(2, 64, 4, False)
    close(cpu_blocks.convolution(x, packed(module), norm), plain(x.double()), 1e-5)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_activations_are_exact_from_one_end_to_the_other(library, act):
    module = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    nn.init.dirac_(module.weight.data)
    x = torch.linspace(-100, 100, 16 * 64 * 64).view(1, 64, 64, 16).permute(0, 3, 1, 2)
    error = cpu_blocks.convolution(x, packed(module), act=act) - ACTS[act](x.double())
    assert (error / x.clamp(min=1)).abs().max() <= 2e-6


def test_what_is_not_a_number_stays_visible(library):
    x = picture(2, 32, 6, 6)
    x[0, 3, 2, 2] = float("nan")
    norm, _ = norm_of(2, 32, 2, False)
    y = cpu_blocks.convolution(x, packed(nn.Conv2d(32, 32, 3, padding=1)), norm, "gelu")
    assert y[0].isnan().any() and not y[1].isnan().any()


@pytest.mark.parametrize("n", [1, 2, 9])
def test_several_threads_give_the_same_bits(n):
    convolutions = packed(nn.Conv2d(64, 48, 3, padding=1)), packed(nn.Conv2d(48, 32, 3, padding=1))
    skip, x = packed(nn.Conv2d(64, 32, 1)), picture(n, 64, 14, 14)
    norms = norm_of(n, 64, 4, False)[0], norm_of(n, 48, 3, False)[0]
    before, ways = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            ways.append(
                (
                    cpu_blocks.residual(x, norms, "gelu", convolutions, skip),
                    cpu_blocks.convolution(x, convolutions[0], norms[0], "silu"),
                    cpu_blocks.downsample(x),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(*ways, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_size": 5, "padding": 2},
        {"padding": 0},
        {"stride": 2},
        {"padding": 2, "dilation": 2},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"dtype": torch.float64},
        {"in_channels": 40},
        {"out_channels": 4},
    ],
)
def test_only_plain_convolutions_fit(changes):
    usual = {"in_channels": 32, "out_channels": 32, "kernel_size": 3, "padding": 1}
    assert cpu_blocks.fits(nn.Conv2d(**usual)) and cpu_blocks.fits(nn.Conv2d(32, 32, 1))
    assert not cpu_blocks.fits(nn.Conv2d(**{**usual, **changes}))


# in a model


@pytest.fixture
def always(monkeypatch):
    """Blocks are used whatever the clock says, which decides only which way is taken."""
    monkeypatch.setattr(tiers, "race", lambda ways, args, kw: [way(*args, **kw) for way in ways] and (2.0, 1.0))


@pytest.fixture
def called(monkeypatch):
    """Names of the blocks that were called."""
    names = []
    for name in ("residual", "attention", "downsample", "upsample"):
        block = getattr(cpu_blocks, name)
        monkeypatch.setattr(cpu_blocks, name, lambda *a, name=name, block=block: names.append(name) or block(*a))
    return names


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_image_v1_gives_the_same_pictures(variant, always, called):
    model = build(**VARIANTS[variant])
    before = [run(model, batch, batch) for batch in (1, 3, 3, 18)]
    handle = accelerate(model, precision="compile")
    after = [run(model, batch, batch) for batch in (1, 3, 3, 18)]
    assert {"residual", "downsample", "upsample", "attention"} - set(called) <= {"downsample", "upsample"}
    assert "used" in handle.report()
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
        assert a.stride() == b.stride() and not a.equal(b)


def test_undo_gives_back_the_same_bits_and_leaves_nothing_behind(always):
    model = build()
    before, names = run(model), [sorted(vars(m)) for m in model.modules()]
    handle = accelerate(model, precision="compile")
    run(model)
    handle.undo()
    assert run(model).equal(before)
    assert [sorted(vars(m)) for m in model.modules()] == names


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("name", ["main.2.weight", "main.6.bias", "skip.weight", "qkv_proj.weight", "mapper.weight"])
def test_a_weight_edited_meanwhile_counts_at_once(how, name, always):
    model = build()
    accelerate(model, precision="compile")
    before = run(model)
    plain = copy.deepcopy(model)
    accelerate(plain).undo()
    for m in (model, plain):
        with torch.no_grad():
            for _, p in [(n, p) for n, p in m.named_parameters() if n.endswith(name)]:
                EDITS[how](p)
    assert not torch.allclose(run(plain), before, atol=1e-4)
    torch.testing.assert_close(run(model), run(plain), rtol=0, atol=2e-5)


def test_an_edit_that_nobody_can_see_counts_after_refresh(always):
    model = build()
    handle = accelerate(model, precision="compile")
    before = run(model)
    conv = next(m for m in model.modules() if type(m) is nn.Conv2d and m.kernel_size == (3, 3))
    conv.weight.data[0, 0, 0, 1] += 10.0  # between the values that are looked at
    handle.refresh()
    assert not torch.allclose(run(model), before, atol=1e-4)


def test_tensors_without_memory_take_the_usual_way(always, called):
    model = build()
    accelerate(model, precision="compile")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        x, sigma, condition = map(mode.from_tensor, (torch.randn(2, 3, 12, 12), torch.ones(2), torch.randn(2, 5)))
        assert vars(model.inner_model.u_net)["forward"](x.new_empty(2, 32, 12, 12), {"cond": x.new_empty(2, 16)}).shape
    assert not called


@pytest.mark.parametrize("name", ["main.6", "skip", "qkv_proj", "out_proj", "mapper"])
def test_a_layer_replaced_after_acceleration_counts_at_once(name, always):
    model = build()
    plain = copy.deepcopy(model)
    accelerate(model, precision="compile")
    before = run(model)
    for m in (model, plain):
        owner, _, last = name.rpartition(".")
        for path, module in list(m.named_modules()):
            if path.endswith(owner) and isinstance(module._modules.get(last), (nn.Conv2d, nn.Linear)):
                module._modules[last] = Doubled(module._modules[last])
    assert not torch.allclose(run(plain), before, atol=1e-4)
    torch.testing.assert_close(run(model), run(plain), rtol=0, atol=2e-5)


def test_hooks_are_called_and_may_change_the_result(always):
    model = build()
    plain = copy.deepcopy(model)
    accelerate(model, precision="compile")
    run(model)  # what its first call measures is not counted
    for m in (model, plain):
        seen = []
        for module in m.modules():
            if type(module).__name__ in ("Conv2d", "GELU", "AdaGN", "Identity", "Downsample2d"):
                module.register_forward_hook(
                    lambda mod, args, out, seen=seen: seen.append(type(mod).__name__) or out * 1.1
                )
        m.seen = seen
    torch.testing.assert_close(run(model), run(plain), rtol=1e-4, atol=1e-4)
    assert sorted(model.seen) == sorted(plain.seen) and len(plain.seen) > 20


def test_a_copy_is_independent(always):
    model = build()
    accelerate(model, precision="compile")
    expected = run(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    plain = copy.deepcopy(twin)
    accelerate(plain).undo()
    torch.testing.assert_close(run(twin), run(plain), rtol=0, atol=2e-5)
    assert run(model).equal(expected)


def test_gradients_and_other_types_take_the_usual_way(always, called):
    model = build()
    plain = copy.deepcopy(model)
    accelerate(model, precision="compile")
    x, sigma, condition = torch.randn(2, 3, 12, 12), torch.ones(2), torch.randn(2, 5)
    for m in (model, plain):
        m(x, sigma, mapping_cond=condition).square().mean().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        wide = [m.double()(x.double(), sigma.double(), mapping_cond=condition.double()) for m in (model, plain)]
    torch.testing.assert_close(*wide, rtol=1e-9, atol=1e-9)
    assert not called


def test_what_is_slower_is_not_used_and_said_so(monkeypatch, called):
    monkeypatch.setattr(tiers, "race", lambda ways, args, kw: (1.0, 2.0))
    model = build()
    handle = accelerate(model, precision="compile")
    run(model)
    assert not called and "not used" in handle.notes[0]


# compiling


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache of one's own, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cpu_library.library.__wrapped__


def test_it_is_compiled_once(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_library, "FLAGS", (*cpu_library.FLAGS, "-O0"))  # sooner done
    fresh()
    (made,) = (tmp_path / "tdpm_ext").iterdir()
    monkeypatch.setattr(cpu_library, "_compile", lambda *a: pytest.fail("compiled again"))
    assert isinstance(fresh(), ctypes.CDLL) and made.suffix == ".so"


@pytest.mark.parametrize(
    ("compiler", "words"), [("no-such-compiler", "looked for no-such-compiler"), ("false", "fail")]
)
def test_without_a_compiler_the_reason_is_given(fresh, monkeypatch, compiler, words):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(cpu_library.NoLibrary, match=words):
        fresh()


def test_a_cache_that_cannot_be_written_is_named(fresh, monkeypatch, tmp_path):
    (tmp_path / "tdpm_ext").write_text("a file")
    with pytest.raises(cpu_library.NoLibrary, match="tdpm_ext cannot be written"):
        fresh()


def test_a_model_without_blocks_says_why(monkeypatch):
    def library():
        raise cpu_library.NoLibrary("no C++ compiler: looked for g++")

    monkeypatch.setattr(cpu_library, "library", library)
    assert "no C++ blocks here (no C++ compiler: looked for g++)" in accelerate(build(), precision="compile").report()
