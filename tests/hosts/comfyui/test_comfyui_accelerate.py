"""TDPM Accelerate: the same pictures from a changed network, and the network as it was as soon as a run is over."""

import pytest
import torch


@pytest.fixture(scope="module")
def n(comfy):
    from tdpm_ext.hosts import comfyui_nodes

    return comfyui_nodes


@pytest.fixture(scope="module")
def fast(tiny, n):
    return n.TDPMAccelerate().accelerate(tiny.model, "exact")[0]


def state_of(model):
    """Every instance attribute and weight of every module, and how the weights lie in memory."""
    modules = {name: dict(vars(module)) for name, module in model.model.named_modules()}
    weights = {name: (p, p.stride(), p.detach().clone()) for name, p in model.model.named_parameters()}
    return modules, weights


def same(before, after):
    for name, attributes in before[0].items():
        assert attributes.keys() == after[0][name].keys(), name
    for name, (parameter, stride, value) in before[1].items():
        now = after[1][name]
        assert now[0] is parameter and now[1] == stride and torch.equal(now[2], value), name


@pytest.mark.parametrize("sampler", ["tdpm", "euler_ancestral"])
def test_the_picture_is_the_same_to_rounding(comfy, tiny, fast, sampler):
    job = {"latent": comfy.latent(2), "cfg": 4.0, "sampler": sampler}
    plain, quick = comfy.ksampler(tiny.model, **job), comfy.ksampler(fast, **job)
    scale = 0.18215
    torch.testing.assert_close(quick.samples * scale, plain.samples * scale, rtol=0, atol=1e-4)
    assert quick.used_prior == (sampler == "tdpm") and len(quick.sigmas) == len(plain.sigmas)


def test_the_network_is_changed_during_a_run_and_as_before_afterwards(comfy, tiny, n):
    comfy.ksampler(tiny.model)  # loaded
    before, seen = state_of(tiny.model), []

    def look(apply_model, call):
        seen.append("_tdpm_handle" in vars(tiny.model.model))
        return apply_model(call["input"], call["timestep"], **call["c"])

    fast = n.TDPMAccelerate().accelerate(tiny.model, "exact")[0]
    fast.set_model_unet_function_wrapper(look)
    comfy.watched = lambda model, run: model  # keep ours
    try:
        run = comfy.ksampler(fast)
    finally:
        del comfy.watched
    assert seen == [True] * 4
    assert any("OpenAI / latent-diffusion UNetModel" in line for line in run.log)
    same(before, state_of(tiny.model))


def test_other_models_give_the_same_bits_before_between_and_after(comfy, tiny, fast):
    runs = [comfy.ksampler(model).samples for model in (tiny.model, fast, tiny.model, fast, tiny.model)]
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[0], runs[4]) and torch.equal(runs[1], runs[3])


def test_the_report_is_given_once(comfy, tiny, n):
    fast = n.TDPMAccelerate().accelerate(tiny.model, "exact")[0]
    reports = [sum("accelerate:" in line for line in comfy.ksampler(fast).log) for _ in range(3)]
    assert reports == [1, 0, 0]


def test_accelerating_twice_is_accelerating_once(comfy, tiny, fast, n):
    again = n.TDPMAccelerate().accelerate(fast, "exact")[0]
    assert len(again.get_all_callbacks("on_pre_run")) == len(again.get_all_callbacks("on_cleanup")) == 1
    assert torch.equal(comfy.ksampler(again).samples, comfy.ksampler(fast).samples)


def test_an_error_in_a_run_leaves_the_network_as_it_was(comfy, tiny, fast):
    before = state_of(tiny.model)

    def fail(apply_model, call):
        raise RuntimeError("ours")

    model = fast.clone()
    model.set_model_unet_function_wrapper(fail)
    comfy.watched = lambda model, run: model
    try:
        with pytest.raises(RuntimeError, match="ours"):
            comfy.ksampler(model)
    finally:
        del comfy.watched
    same(before, state_of(tiny.model))


def test_loras_and_control_nets_act_as_before(comfy, tiny, fast):
    controlled = {"positive": comfy.controlled(comfy.tiny.conditioning(1), 1.0)}
    for slow, quick, job in (
        (comfy.with_lora(tiny.model), comfy.with_lora(fast), {}),
        (tiny.model, fast, controlled),
    ):
        plain, run = comfy.ksampler(slow, **job).samples, comfy.ksampler(quick, **job).samples
        torch.testing.assert_close(run * 0.18215, plain * 0.18215, rtol=0, atol=1e-4)
        assert float((plain - comfy.ksampler(tiny.model).samples).abs().max()) > 1e-3


@pytest.mark.parametrize("precision", ["half", "compile"])
def test_other_precisions_give_nearly_the_same_picture_and_leave_nothing(comfy, tiny, n, precision):
    before = state_of(tiny.model)
    run = comfy.ksampler(n.TDPMAccelerate().accelerate(tiny.model, precision)[0])
    plain = comfy.ksampler(tiny.model)
    error = float((run.samples - plain.samples).std() / plain.samples.std())
    assert error < 0.02, error
    same(before, state_of(tiny.model))
