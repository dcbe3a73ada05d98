"""accelerate(model) on the U-Net class that ComfyUI carries: the same numbers with everything a job puts into it."""

from __future__ import annotations

import copy

import pytest
import torch

from tdpm_ext.kernels import accelerate


@pytest.fixture
def model(comfy):
    """A ModelPatcher around ComfyUI's own UNetModel with random weights."""
    model = comfy.tiny.tiny_model()
    model.model.diffusion_model.__class__ = type(model.model.diffusion_model).__base__
    model.model.diffusion_model.requires_grad_(False)
    return model


@pytest.fixture
def network(model):
    return model.model.diffusion_model


def run(network, batch=3, seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    width = network.input_blocks[1][1].transformer_blocks[0].attn2.to_k.in_features
    args = {
        "x": torch.randn(batch, 4, 8, 8, generator=g),
        "timesteps": torch.arange(batch) * 100.0 + 5,
        "context": torch.randn(batch, 7, width, generator=g),
        "transformer_options": {},
    }
    with torch.inference_mode():
        return network(**{**args, **changes})


def test_the_network_gives_the_same_pictures_and_is_given_back(network):
    cases = [(1, 0), (3, 0), (3, 1), (3, 0)]
    before = [run(network, *case) for case in cases]
    handle = accelerate(network)
    assert handle.families == ["OpenAI / latent-diffusion UNetModel"]
    assert not handle.skipped and sum(kind == "ResBlock" for _, kind, _ in handle.patched) >= 4
    for case, expected in zip(cases, before, strict=True):
        torch.testing.assert_close(run(network, *case), expected, rtol=1e-5, atol=1e-5)
    handle.undo()
    assert run(network, *cases[0]).equal(before[0])


def test_a_lora_applied_by_comfyui_meanwhile_counts(comfy, model):
    plain = copy.deepcopy(model.model.diffusion_model)
    accelerate(model.model.diffusion_model)
    first = run(model.model.diffusion_model)
    torch.testing.assert_close(first, run(plain), rtol=1e-5, atol=1e-5)
    patched = comfy.with_lora(model)
    patched.patch_model(device_to=torch.device("cpu"))
    changed = run(model.model.diffusion_model)
    handle = accelerate(model.model.diffusion_model)
    handle.undo()
    torch.testing.assert_close(changed, run(model.model.diffusion_model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed, first, atol=1e-4)
    patched.unpatch_model()


def test_a_network_with_a_forward_of_its_own_is_left_alone(network):
    class Other(type(network)):
        def forward(self, *args, **kwargs):
            return -super().forward(*args, **kwargs)

    network.__class__ = Other
    handle = accelerate(network)
    assert not handle.patched and "overrides UNetModel.forward" in handle.report()


def test_weights_that_comfyui_casts_in_every_call_are_not_remembered(network):
    plain = copy.deepcopy(network)
    accelerate(network)
    run(network)
    for m in (network, plain):
        for module in m.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights = True
            if type(module).__name__ == "Linear" and hasattr(module, "weight_function"):
                module.weight_function = [lambda weight: weight * 1.25]
    torch.testing.assert_close(run(network), run(plain), rtol=1e-5, atol=1e-5)
