"""accelerate(model): the same numbers, nothing lost of what a module can do, and all of it taken back by undo."""

import copy
import gc
import os
import shutil
import subprocess
import sys

os.environ.setdefault("K_DIFFUSION_USE_COMPILE", "0")

import pytest
import torch
import torch._inductor.config
from torch import nn

from tdpm_ext import open_checkpoint
from tdpm_ext.kernels import KernelError, accelerate, cpu_library, group_norm

K = pytest.importorskip("k_diffusion")
CHECKPOINT = "assets/fashion-mnist/denoiser.safetensors"
CONFIG = {
    "type": "image_v1",
    "input_channels": 3,
    "input_size": [12, 12],
    "patch_size": 1,
    "mapping_out": 16,
    "mapping_cond_dim": 5,
    "depths": [1, 2],
    "channels": [32, 64],
    "self_attn_depths": [False, True],
    "augment_wrapper": False,
    "sigma_data": 0.6,
    "sigma_min": 0.01,
    "sigma_max": 80,
}
VARIANTS = {
    "plain": {},
    "patches": {"patch_size": 2},
    "augment wrapper": {"augment_wrapper": True},
    "variance": {"has_variance": True},
    "skipped stage": {"skip_stages": 1},
    "prompt": {"cross_cond_dim": 24, "cross_attn_depths": [False, True]},
    "picture condition": {"unet_cond_dim": 2},
    "three stages": {
        "depths": [1, 1, 1],
        "channels": [32, 32, 64],
        "self_attn_depths": [False, True, True],
    },
}


def build(seed=0, **changes):
    """A k-diffusion denoiser whose zero-initialised weights are drawn at random."""
    config = K.config.load_config({"model": {**CONFIG, **changes}, "dataset": {}})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inner = K.config.make_model(config)
        for p in inner.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.1)
    return K.config.make_denoiser_wrapper(config)(inner).eval()


def inputs(model, batch=3, seed=0):
    """(x, sigma), and keyword arguments, all different for every picture."""
    g = torch.Generator().manual_seed(seed)
    net = model.inner_model
    net = getattr(net, "inner_model", net)
    x = torch.randn(batch, 3, 12, 12, generator=g)
    kw = {"mapping_cond": torch.randn(batch, 5, generator=g)}
    if any(type(m).__name__ == "CrossAttention2d" for m in net.modules()):
        kw["cross_cond"] = torch.randn(batch, 7, 24, generator=g)
        kw["cross_cond_padding"] = torch.zeros(batch, 7)
        kw["cross_cond_padding"][1:, 5:] = 1
    if net.unet_cond_dim:
        kw["unet_cond"] = torch.randn(batch, 2, 12, 12, generator=g)
    return (x, torch.rand(batch, generator=g) * 3 + 0.1), kw


@pytest.fixture
def model():
    return build()


def run(model, batch=3, seed=0, **more):
    args, kw = inputs(model, batch, seed)
    with torch.no_grad():
        return model(*args, **{**kw, **more})


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_image_v1_gives_the_same_pictures(variant):
    model = build(**VARIANTS[variant])
    before = [run(model, batch, batch) for batch in (1, 3, 3)]
    handle = accelerate(model)
    after = [run(model, batch, batch) for batch in (1, 3, 3)]
    assert handle.patched and not handle.skipped
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert a.stride() == b.stride()


def test_the_shipped_checkpoint_is_equal_to_1e_5_at_all_levels_and_classes():
    plain = open_checkpoint(CHECKPOINT).model
    fast = copy.deepcopy(plain)
    accelerate(fast)
    g = torch.Generator().manual_seed(0)
    for sigma in (80.0, 5.0, 1.0, 0.1, 0.02):
        x = torch.randn(10, 1, 28, 28, generator=g) * sigma
        kw = {"class_cond": torch.arange(10), "cond_scale": 2.0}
        with torch.no_grad():
            a, b = (m(x, torch.full((10,), sigma), **kw) for m in (plain, fast))
        assert (a - b).abs().max() <= 1e-5


def test_state_dict_and_parameters_stay_the_same_objects(model):
    parameters = dict(model.named_parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    accelerate(model)
    assert list(model.state_dict()) == list(state)
    assert all(model.state_dict()[k].equal(v) for k, v in state.items())
    assert all(p is parameters[k] for k, p in model.named_parameters())


def test_undo_gives_back_the_same_bits_and_layout(model):
    before, layout = run(model), [p.stride() for p in model.parameters()]
    names = [sorted(vars(m)) for m in model.modules()]
    handle = accelerate(model)
    run(model)
    handle.undo()
    handle.undo()
    assert not handle.active
    assert run(model).equal(before)
    assert [p.stride() for p in model.parameters()] == layout
    assert [sorted(vars(m)) for m in model.modules()] == names


def test_a_second_call_changes_nothing_and_other_options_start_over(model):
    first = accelerate(model)
    assert accelerate(model) is first
    second = accelerate(model, precision="half")
    assert second is not first and second.active and not first.active


def test_a_hundred_times_there_and_back_leaves_nothing_behind(model):
    before = run(model)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    count = None
    for i in range(100):
        handle = accelerate(model)
        if i % 20 == 0:
            run(model)
        handle.undo()
        del handle
        if i == 0:
            count = tensors()
    assert tensors() <= count
    assert run(model).equal(before)


EDITS = {
    "in place": lambda p: p.mul_(1.5),
    "through data": lambda p: p.data.mul_(1.5),
    "new data": lambda p: setattr(p, "data", p.data * 1.5),
}
WEIGHTS = ["mapper.weight", "mapper.bias", "mapping.0.weight", "mapping_cond.weight", "kv_proj.weight", "norm_enc.bias"]


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize(
    "name",
    ["mapper.weight", "mapper.bias", "mapping.0.weight", "mapping_cond.weight", "kv_proj.weight", "norm_enc.bias"],
)
def test_a_weight_edited_meanwhile_counts_at_once(how, name):
    model = build(**VARIANTS["prompt"])
    accelerate(model)
    run(model)
    plain = copy.deepcopy(model)
    accelerate(plain).undo()
    for m in (model, plain):
        with torch.no_grad():
            for _, p in [(n, p) for n, p in m.named_parameters() if n.endswith(name)]:
                EDITS[how](p)
    assert not torch.allclose(run(plain), run(build(**VARIANTS["prompt"])), atol=1e-4)
    torch.testing.assert_close(run(model), run(plain), rtol=0, atol=1e-5)


def test_a_parameter_replaced_or_loaded_meanwhile_counts_at_once(model):
    other = build(seed=1)
    accelerate(model)
    run(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(run(model), run(other), rtol=0, atol=1e-5)
    net = model.inner_model
    net.mapping[0].weight = nn.Parameter(net.mapping[0].weight * 2)
    with torch.no_grad():
        other.inner_model.mapping[0].weight *= 2
    torch.testing.assert_close(run(model), run(other), rtol=0, atol=1e-5)


class Doubled(nn.Module):
    """What a LoRA wrapper looks like from outside: another module where a layer was."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


@pytest.mark.parametrize("name", ["mapper", "kv_proj", "norm_enc", "mapping.0", "mapping_cond", "timestep_embed"])
def test_a_layer_replaced_after_acceleration_counts_at_once(name):
    model = build(**VARIANTS["prompt"])
    before = run(model)
    plain = copy.deepcopy(model)
    accelerate(model)
    run(model)
    for m in (model, plain):
        owner, _, last = name.rpartition(".")
        for path, module in list(m.named_modules()):
            if path.endswith(owner) and last in module._modules:
                module._modules[last] = Doubled(module._modules[last])
    assert not torch.allclose(run(plain), before, atol=1e-4)
    torch.testing.assert_close(run(model), run(plain), rtol=0, atol=1e-5)


def test_a_buffer_edited_meanwhile_counts_at_once(model):
    plain = copy.deepcopy(model)
    accelerate(model)
    run(model)
    for m in (model, plain):
        m.inner_model.timestep_embed.weight.mul_(1.5)
    torch.testing.assert_close(run(model), run(plain), rtol=0, atol=1e-5)


def test_a_lora_layer_put_in_after_acceleration_is_called(model):
    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base, nn.Conv2d(base.in_channels, 2, 1), nn.Conv2d(2, base.out_channels, 1)

        def forward(self, x):
            y = self.base(x)
            return y + nn.functional.interpolate(self.up(self.down(x)), y.shape[2:])

    plain = copy.deepcopy(model)
    accelerate(model)
    torch.manual_seed(0)
    block = next(m for m in plain.modules() if type(m).__name__ == "ResConvBlock")
    fast = next(m for m in model.modules() if type(m).__name__ == "ResConvBlock")
    lora = Lora(block.main[2])
    block.main[2] = lora
    fast.main[2] = copy.deepcopy(lora)
    torch.testing.assert_close(run(model), run(plain), rtol=0, atol=1e-5)


def test_hooks_on_fused_modules_are_called_and_may_change_the_result(model):
    plain = copy.deepcopy(model)
    accelerate(model)
    for m in (model, plain):
        seen = []
        for module in m.modules():
            if type(module).__name__ in ("GELU", "AdaGN", "Linear", "Downsample2d", "ResConvBlock"):
                module.register_forward_hook(
                    lambda mod, args, out, seen=seen: seen.append(type(mod).__name__) or out * 1.1
                )
        m.seen = seen
    torch.testing.assert_close(run(model), run(plain), rtol=1e-4, atol=1e-4)
    assert sorted(model.seen) == sorted(plain.seen) and len(plain.seen) > 10


def test_a_copy_is_independent(model):
    expected = run(model)
    handle = accelerate(model)
    run(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert not torch.allclose(run(twin), expected, atol=1e-3)
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    handle.undo()
    assert accelerate(twin) is not handle and accelerate(twin).active
    torch.testing.assert_close(run(model), expected, rtol=0, atol=0)


def test_gradients_are_those_of_the_plain_network(model):
    plain = copy.deepcopy(model)
    accelerate(model)
    args, kw = inputs(model)
    for m in (model, plain):
        m(*args, **kw).square().mean().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_autocast_steps_aside(model):
    plain = copy.deepcopy(model)
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(model), run(plain), rtol=2e-2, atol=2e-2)


def test_dropout_in_training_stays_random():
    model = build(dropout_rate=0.5).train()
    accelerate(model)
    assert not run(model).equal(run(model))


def test_a_module_changed_by_others_is_left_alone_and_named(model):
    class AdaGN(K.layers.AdaGN):
        def forward(self, input, cond):
            return super().forward(input, cond) * 2

    block = next(m for m in model.modules() if type(m).__name__ == "ResConvBlock")
    attention = next(m for m in model.modules() if type(m).__name__ == "SelfAttention2d")
    block.main[0].__class__ = AdaGN
    vars(attention)["forward"] = lambda input, cond: input
    before = run(model)
    handle = accelerate(model)
    why = {kind: text for _, kind, text in handle.skipped}
    assert "overrides" in why["AdaGN"] and "another program" in why["SelfAttention2d"]
    torch.testing.assert_close(run(model), before, rtol=0, atol=1e-5)
    assert "left alone" in handle.report()


def test_an_unknown_network_is_left_as_it_is_and_said_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    handle = accelerate(model)
    assert not handle.patched and "nothing done" in handle.report()
    assert "forward" not in vars(model[1])


def test_it_is_found_as_the_readme_writes_it():
    code = "import tdpm_ext, sys; assert 'tdpm_ext.kernels' not in sys.modules; tdpm_ext.kernels.accelerate"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrong_arguments_say_what_is_allowed(model):
    with pytest.raises(ValueError, match="precision='int4'.*exact, half, compile"):
        accelerate(model, precision="int4")
    with pytest.raises(ValueError, match="graphs='maybe'.*auto, on, off"):
        accelerate(model, graphs="maybe")
    with pytest.raises(TypeError, match="list.*torch.nn.Module"):
        accelerate([model])
    with pytest.raises(KernelError, match="not on a GPU"):
        accelerate(model, graphs="on")


def test_half_precision_is_timed_and_undone_to_the_bit(model):
    before, weights = run(model), [p.clone() for p in model.parameters()]
    handle = accelerate(model, precision="half")
    after = run(model)
    assert after.dtype == before.dtype
    assert any("used" in note and "bfloat16" in note for note in handle.notes)
    torch.testing.assert_close(after, before, rtol=0, atol=0.1)
    handle.undo()
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(model.parameters(), weights, strict=True))
    assert run(model).equal(before)


def test_half_precision_taken_is_close_and_keeps_edits_made_meanwhile(model, monkeypatch):
    from tdpm_ext.kernels import tiers

    seconds = iter([[2.0], [1.0]])  # what the clock says decides which way is taken, not whether it is right
    monkeypatch.setattr(tiers, "race", lambda ways, args, kw: [way(*args, **kw) for way in ways] and next(seconds))
    before = run(model)
    handle = accelerate(model, precision="half")
    torch.testing.assert_close(run(model), before, rtol=0, atol=0.1)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.dtype == torch.bfloat16 for m in convs)
    untouched = convs[1].weight.clone()
    with torch.no_grad():
        convs[0].weight.mul_(2)
    handle.undo()
    assert convs[0].weight.dtype == convs[1].weight.dtype == torch.float32
    fresh = [m for m in build().modules() if isinstance(m, nn.Conv2d)]
    assert convs[1].weight.equal(fresh[1].weight) and convs[1].weight.to(torch.bfloat16).equal(untouched)
    torch.testing.assert_close(convs[0].weight, fresh[0].weight * 2, rtol=1e-2, atol=1e-3)


TRANSFORMERS = {
    "image_transformer_v1": {"patch_size": [2, 2], "depth": 2, "width": 64},
    "image_transformer_v2": {
        "patch_size": [2, 2],
        "depths": [1, 2],
        "widths": [64, 128],
        "self_attns": [
            {"type": "shifted-window", "d_head": 32, "window_size": 3},
            {"type": "global", "d_head": 32},
        ],
    },
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_give_the_same_pictures_and_notice_edits(kind):
    pytest.importorskip(f"k_diffusion.models.{kind}")
    base = {"type": kind, "input_channels": 3, "input_size": [12, 12], "sigma_max": 80, "sigma_min": 0.01}
    config = K.config.load_config({"model": {**base, **TRANSFORMERS[kind]}, "dataset": {"num_classes": 4}})
    torch.manual_seed(0)
    inner = K.config.make_model(config).eval().requires_grad_(False)
    for p in inner.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    model = K.config.make_denoiser_wrapper(config)(inner)

    def draw(model):
        g = torch.Generator().manual_seed(0)
        x, sigma = torch.randn(3, 3, 12, 12, generator=g), torch.tensor([0.1, 1.0, 1.0])
        with torch.no_grad():
            return model(x, sigma, class_cond=torch.tensor([0, 1, 1]))

    plain = copy.deepcopy(model)
    handle = accelerate(model)
    assert not handle.skipped and sum(name == "AdaRMSNorm" for _, name, _ in handle.patched) >= 4
    for _ in range(2):
        torch.testing.assert_close(draw(model), draw(plain), rtol=1e-5, atol=1e-5)
    for m in (model, plain):
        for n, p in m.named_parameters():
            if n.endswith("norm.linear.weight"):
                p.mul_(2)
    torch.testing.assert_close(draw(model), draw(plain), rtol=1e-5, atol=1e-5)
    handle.undo()
    assert draw(model).equal(draw(plain))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: Inductor cannot build CPU code here")
def test_the_compiled_tier_gives_the_same_pictures_and_says_what_it_measured():
    model = build(depths=[1], channels=[40], self_attn_depths=[False])  # 40 channels: not for the C++ blocks
    before = run(model, 2)
    handle = accelerate(model, precision="compile")
    for _ in range(2):
        torch.testing.assert_close(run(model, 2), before, rtol=0, atol=1e-5)
    assert len(handle.notes) == 1 and "compile: " in handle.notes[0] and " ms against " in handle.notes[0]
    handle.undo()
    assert run(model, 2).equal(before)


@torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
def test_without_a_compiler_the_exact_tier_goes_on_and_says_why(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpu_library, "library", cpu_library.library.__wrapped__)  # not what was loaded before
    torch.compiler.reset()
    model = build(depths=[1], channels=[64], self_attn_depths=[False])
    before = run(model, 2)
    with torch._inductor.utils.fresh_cache():
        handle = accelerate(model, precision="compile")
        torch.testing.assert_close(run(model, 2), before, rtol=0, atol=1e-5)
    assert "not possible here" in handle.report() and "no C++ compiler" in handle.report()


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
def test_norms_stay_exact_in_channels_last_when_the_mean_is_far_from_zero(mean):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 64, 9, 7, generator=g) + mean).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(2, 2, 64, generator=g)
    with torch.no_grad():
        y = group_norm(x, 4, eps=1e-5, scale=scale, shift=shift)
    wide = nn.functional.group_norm(x.double(), 4, eps=1e-5)
    wanted = wide * (scale.double() + 1)[:, :, None, None] + shift.double()[:, :, None, None]
    assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
