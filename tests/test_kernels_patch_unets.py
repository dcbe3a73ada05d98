"""accelerate(model) on diffusers' U-Nets: the same numbers, whatever the conditioning, and all of it taken back."""

import copy

import pytest
import torch
from torch import nn

from tdpm_ext.kernels import accelerate

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
CROSS = {
    **SMALL,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
}
PLAIN = {
    **SMALL,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
NETWORKS = {
    "conditional": ("UNet2DConditionModel", CROSS),
    "conditional, scale and shift": ("UNet2DConditionModel", {**CROSS, "resnet_time_scale_shift": "scale_shift"}),
    "conditional, skip time act": ("UNet2DConditionModel", {**CROSS, "resnet_skip_time_act": True}),
    "conditional, output scale": ("UNet2DConditionModel", {**CROSS, "mid_block_scale_factor": 1.41}),
    "sdxl-like": (
        "UNet2DConditionModel",
        {
            **CROSS,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
        },
    ),
    "unconditional": ("UNet2DModel", PLAIN),
    "unconditional, resampling blocks": (
        "UNet2DModel",
        {
            **PLAIN,
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
        },
    ),
    "class labels": ("UNet2DModel", {**PLAIN, "num_class_embeds": 5}),
}


def build(kind, seed=0):
    name, config = NETWORKS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(diffusers, name)(**config).eval().requires_grad_(False)


def inputs(model, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    kw = {"sample": torch.randn(batch, 4, 8, 8, generator=g), "timestep": torch.arange(batch) * 100 + 7}
    if type(model).__name__ == "UNet2DConditionModel":
        kw["encoder_hidden_states"] = torch.randn(batch, 6, 24, generator=g)
        if model.config.addition_embed_type:
            kw["added_cond_kwargs"] = {
                "text_embeds": torch.randn(batch, 16, generator=g),
                "time_ids": torch.rand(batch, 6, generator=g) * 64,
            }
    elif model.config.num_class_embeds:
        kw["class_labels"] = torch.arange(batch)
    return kw


def run(model, batch=3, seed=0, **changes):
    with torch.no_grad():
        return model(**{**inputs(model, batch, seed), **changes}).sample


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_kind_of_network_gives_the_same_pictures(kind):
    model = build(kind)
    cases = [(1, 0), (3, 0), (3, 1), (3, 0)]
    before = [run(model, *case) for case in cases]
    handle = accelerate(model)
    for case, expected in zip(cases, before, strict=True):
        torch.testing.assert_close(run(model, *case), expected, rtol=1e-5, atol=1e-5)
    assert sum(name == "ResnetBlock2D" for _, name, _ in handle.patched) >= 5
    handle.undo()
    assert run(model, *cases[0]).equal(before[0])
    assert not [n for m in model.modules() for n in vars(m) if n.startswith("_tdpm_") or n == "forward"]


def test_the_prompt_may_be_written_over_where_it_lies():
    model = build("conditional")
    plain = copy.deepcopy(model)
    accelerate(model)
    kw = inputs(model)
    with torch.inference_mode():
        prompt = kw.pop("encoder_hidden_states").clone()
        for factor in (1, 2, -1):
            prompt.mul_(factor)
            a, b = (m(**kw, encoder_hidden_states=prompt).sample for m in (model, plain))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["to_k.weight", "time_emb_proj.weight", "time_emb_proj.bias", "linear_1.weight"])
def test_a_weight_edited_meanwhile_counts_at_once(name):
    model = build("conditional")
    plain = copy.deepcopy(model)
    accelerate(model)
    first = run(model)
    for m in (model, plain):
        with torch.no_grad():
            for n, p in m.named_parameters():
                if n.endswith(name):
                    p.mul_(1.5)
    assert not torch.allclose(first, run(model), atol=1e-4)
    torch.testing.assert_close(run(model), run(plain), rtol=1e-5, atol=1e-5)


def test_lora_layers_of_peft_work_before_and_after_acceleration():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_k", "to_v", "time_emb_proj", "conv1"], init_lora_weights=False)
    for first in ("lora", "accelerate"):
        model = build("conditional")
        plain = copy.deepcopy(model)
        if first == "accelerate":
            accelerate(model)
            run(model)
        for m in (model, plain):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                m.add_adapter(config)
        if first == "lora":
            accelerate(model)
        torch.testing.assert_close(run(model), run(plain), rtol=1e-5, atol=1e-5)
        for m in (model, plain):
            m.disable_adapters()
        torch.testing.assert_close(run(model), run(plain), rtol=1e-5, atol=1e-5)


def test_hooks_on_fused_modules_are_called():
    model = build("conditional")
    plain = copy.deepcopy(model)
    accelerate(model)
    for m in (model, plain):
        m.seen = []

        def hook(module, args, out, seen=m.seen):
            seen.append(type(module).__name__)
            return out * 1.05

        for module in m.modules():
            if type(module).__name__ in ("GroupNorm", "SiLU", "Linear", "ResnetBlock2D"):
                module.register_forward_hook(hook)
    torch.testing.assert_close(run(model), run(plain), rtol=1e-4, atol=1e-4)
    assert sorted(model.seen) == sorted(plain.seen)


def test_gradients_are_those_of_the_plain_network():
    model = build("conditional").requires_grad_(True)
    plain = copy.deepcopy(model)
    accelerate(model)
    for m in (model, plain):
        m(**inputs(m)).sample.square().mean().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_the_network_inside_a_pipeline_is_found():
    unet = build("conditional")
    handle = accelerate(nn.ModuleDict({"unet": unet, "other": nn.Linear(2, 2)}))
    assert handle.families == ["diffusers UNet2DConditionModel"]
    assert all(name.startswith("unet") for name, _, _ in handle.patched)


@pytest.mark.parametrize("kind", ["conditional", "unconditional", "sdxl-like"])
def test_half_precision_is_close_and_undone_to_the_bit(kind, monkeypatch):
    from tdpm_ext.kernels import tiers

    seconds = iter([[2.0], [1.0]])  # what the clock says decides which way is taken, not whether it is right
    monkeypatch.setattr(tiers, "race", lambda ways, args, kw: [way(*args, **kw) for way in ways] and next(seconds))
    model = build(kind)
    before = run(model)
    handle = accelerate(model, precision="half")
    args = inputs(model)
    positional = [args.pop("sample"), args.pop("timestep")]
    with torch.no_grad():
        after = model(*positional, **args).sample
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()) and after.dtype == torch.float32
    assert (after - before).abs().max() < 0.05 * before.abs().max()
    handle.undo()
    assert all(p.dtype == torch.float32 for p in model.parameters()) and run(model).equal(before)
