"""The nodes: what they load, fit, save and pass on."""

import copy

import pytest
import torch

from tdpm_ext.priors.io import load_prior, save_prior


@pytest.fixture(scope="module")
def n(comfy):
    from tdpm_ext.hosts import comfyui_nodes

    return comfyui_nodes


@pytest.fixture
def fit(comfy, n, folder):
    """The node Fit TDPM Prior on a small latent; returns its result and what was logged."""

    def run(model, **changed):
        options = {"positive": comfy.tiny.conditioning(1), "negative": comfy.tiny.conditioning(2)}
        options |= {"latent_image": comfy.latent(), "cfg": 1.0, "draws": 48, "calibrate_steps": "", "fit_seed": 0}
        options |= {"batch": 16, "name": "fitted", **changed}
        return comfy.job(lambda: n.FitTDPMPrior().fit(model, **options))

    return run


def test_every_node_and_input_is_explained(n):
    assert set(n.NODE_CLASS_MAPPINGS) == set(n.NODE_DISPLAY_NAME_MAPPINGS)
    for node in n.NODE_CLASS_MAPPINGS.values():
        kinds = node.INPUT_TYPES()
        assert node.DESCRIPTION and set(kinds) <= {"required", "optional"}
        for name, (_, options) in {**kinds["required"], **kinds.get("optional", {})}.items():
            assert options["tooltip"].endswith(".") and len(options["tooltip"]) < 200, (node, name)


# -- Load TDPM Prior ---------------------------------------------------------------------------------------------------


def test_a_loaded_prior_is_used_and_the_original_model_is_left_alone(comfy, tiny, n, folder):
    save_prior(tiny.prior, folder / "one.safetensors")
    assert n.LoadTDPMPrior.INPUT_TYPES()["required"]["prior_name"][0] == ["automatic", "one.safetensors"]
    model, pick = n.LoadTDPMPrior().load(tiny.bare, "one.safetensors")
    assert comfy.ksampler(model).used_prior and pick.prior.shape == (4, 8, 8)
    (folder / "one.safetensors").unlink()
    assert not comfy.ksampler(tiny.bare).used_prior


def test_patching_a_model_further_does_not_copy_the_prior(tiny, n):
    again = copy.deepcopy(tiny.model.model_options)
    assert again["tdpm_prior"].prior is tiny.prior
    assert tiny.model.clone().model_options["tdpm_prior"].prior is tiny.prior


def test_a_rewritten_file_is_read_again(comfy, tiny, n, folder):
    path = folder / "one.safetensors"
    save_prior(tiny.prior, path)
    before = n.LoadTDPMPrior.IS_CHANGED(None, "one.safetensors"), n.LoadTDPMPrior.IS_CHANGED(None, "automatic")
    first = n.LoadTDPMPrior().load(tiny.bare, "one.safetensors")[1].prior
    assert n.LoadTDPMPrior().load(tiny.bare, "one.safetensors")[1].prior is first  # read once
    lower = load_prior(path)
    lower.sigma_trunc = 2.0
    save_prior(lower, path)
    after = n.LoadTDPMPrior.IS_CHANGED(None, "one.safetensors"), n.LoadTDPMPrior.IS_CHANGED(None, "automatic")
    assert before[0] != after[0] and before[1] != after[1]
    assert n.LoadTDPMPrior().load(tiny.bare, "one.safetensors")[1].prior.sigma_trunc == 2.0


def test_the_only_prior_that_fits_is_found_without_a_node(comfy, tiny, folder):
    save_prior(tiny.prior, folder / "mine.safetensors")
    other = type(tiny.prior).from_state(*tiny.prior.state())
    other.card = {"checkpoint": "another"}
    save_prior(other, folder / "others.safetensors")
    run = comfy.ksampler(tiny.bare)
    assert run.used_prior and run.log[0] == "tdpm: mine.safetensors is the only prior for this model at 4x8x8"
    assert torch.equal(run.samples, comfy.ksampler(tiny.model).samples)
    assert not comfy.ksampler(comfy.tiny.tiny_model(seed=1)).used_prior


def test_a_lora_hides_no_prior(comfy, tiny, folder):
    """The fingerprint is that of the checkpoint, also while a LoRA is merged into its weights."""
    from tdpm_ext.hosts import comfyui_model

    save_prior(tiny.prior, folder / "mine.safetensors")
    comfyui_model._FINGERPRINTS.clear()
    assert comfy.ksampler(comfy.with_lora(tiny.bare)).used_prior


def test_a_merged_checkpoint_is_not_taken_for_its_parts(comfy, tiny, n, folder):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    save_prior(tiny.prior, folder / "mine.safetensors")
    (merged,) = ModelMergeSimple().merge(tiny.bare, comfy.tiny.tiny_model(seed=1), 0.5)
    run = comfy.ksampler(merged)
    assert not run.used_prior and "models/tdpm holds no prior for this model" in run.log[0]
    assert comfy.ksampler(n.LoadTDPMPrior().load(merged, "mine.safetensors")[0]).used_prior  # by hand it is yours
    assert comfy.ksampler(tiny.bare).used_prior


# -- Fit TDPM Prior ----------------------------------------------------------------------------------------------------


def test_a_fitted_prior_is_saved_found_and_good(comfy, tiny, n, fit, folder):
    run = fit(tiny.bare, draws=200, kind="gaussian")
    assert run.log == ["tdpm: saved models/tdpm/fitted.safetensors, sigma_trunc " + run.log[0].split()[-1]]
    assert run.bar[-1][0] == run.bar[-1][1] and all(a[0] <= b[0] for a, b in zip(run.bar, run.bar[1:], strict=False))
    prior = load_prior(folder / "fitted.safetensors")
    scale = comfy.tiny.DATA_STD
    assert 0.6 * scale < prior.card["data_std"] < 1.4 * scale  # in the model's own units, not the VAE's
    assert prior.card["comfyui"]["family"] == "SD15" and prior.card["cond_scale"] == 1.0
    found = comfy.ksampler(tiny.bare, comfy.latent(4))
    many = comfy.ksampler(tiny.bare, comfy.latent(4), steps=60, sampler="dpmpp_2m", scheduler="karras")
    error = float((found.samples - many.samples).std() / many.samples.std())
    assert found.used_prior and len(found.sigmas) == 4 and error < 0.15, error
    model, pick = run.samples["result"]
    assert torch.equal(comfy.ksampler(model, comfy.latent(4)).samples, found.samples)


def test_calibration_fills_the_table_for_the_steps_asked_for(comfy, tiny, fit, folder):
    run = fit(tiny.bare, calibrate_steps="2", kind="gaussian")
    prior = load_prior(folder / "fitted.safetensors")
    assert list(prior.plans["fidelity"]) == [2] and run.bar[-1][0] == run.bar[-1][1]
    used = comfy.ksampler(tiny.bare, steps=2)
    assert used.sigmas == pytest.approx(prior.plans["fidelity"][2].sigmas[:-1])


def test_the_same_seed_fits_the_same_prior(tiny, fit, folder):
    fit(tiny.bare, name="a", kind="gaussian")
    fit(tiny.bare, name="b", kind="gaussian", batch=7)
    a, b = load_prior(folder / "a.safetensors"), load_prior(folder / "b.safetensors")
    torch.testing.assert_close(a.tensors["mean"], b.tensors["mean"], rtol=0, atol=1e-5)
    assert a.card["checkpoint"] == b.card["checkpoint"]


def test_prompt_and_cfg_are_fitted_and_a_change_of_them_is_told(comfy, tiny, fit, folder):
    fit(tiny.bare, cfg=4.0, kind="gaussian")
    same = comfy.ksampler(tiny.bare, cfg=4.0)
    assert same.used_prior and not any("fit again" in line for line in same.log)
    other = comfy.ksampler(tiny.bare, cfg=2.0, positive=comfy.tiny.conditioning(8))
    assert "fitted.safetensors was fitted under cfg 4 (now 2) and another prompt" in other.log[1] and other.used_prior


def test_an_interrupted_fit_leaves_nothing(comfy, tiny, n, fit, folder):
    def stop(apply_model, call):
        comfy.management.interrupt_current_processing()
        return apply_model(call["input"], call["timestep"], **call["c"])

    model = tiny.bare.clone()
    model.set_model_unet_function_wrapper(stop)
    with pytest.raises(comfy.management.InterruptProcessingException):
        fit(model)
    assert list(folder.iterdir()) == []
    assert len(comfy.ksampler(tiny.bare).sigmas) == 4  # and the next job runs


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a\\b", ".hidden", "c:d", "x" * 101])
def test_a_name_cannot_leave_the_folder(tiny, fit, name):
    with pytest.raises(ValueError, match="give a plain file name"):
        fit(tiny.bare, name=name)


@pytest.mark.parametrize("text", ["four", "0", "-2", "4.5", "101"])
def test_step_counts_are_checked(n, text):
    assert n.step_counts("8, 4 6,4") == (4, 6, 8) and n.step_counts(" ") == ()
    with pytest.raises(ValueError, match="whole numbers from 1 to 100"):
        n.step_counts(text)


# -- TDPM Sampler and TDPM Scheduler -----------------------------------------------------------------------------------

HOST = torch.tensor([14.6146, 8.0, 4.5, 2.5, 1.4, 0.7, 0.25, 0.0])  # seven steps


def sampler(n, **changed):
    options = {"sigma_trunc": 0.0, "schedule": "prior", "init": "auto", "solver": "built-in"}
    return n.SamplerTDPM().get_sampler(**{**options, "objective": "fidelity", **changed})[0]


def test_the_sampler_node_takes_its_own_prior(comfy, tiny, n):
    run = comfy.custom(tiny.bare, sampler(n, prior=tiny.pick), HOST)
    assert run.used_prior and len(run.sigmas) == 7
    assert torch.equal(run.samples, comfy.custom(tiny.model, sampler(n), HOST).samples)


@pytest.mark.parametrize("schedule", ["prior", "respace", "cut"])
def test_schedules(comfy, tiny, n, schedule):
    run = comfy.custom(tiny.model, sampler(n, schedule=schedule, sigma_trunc=2.0), HOST)
    assert run.used_prior and run.sigmas[0] == pytest.approx(2.0)
    assert len(run.sigmas) == {"prior": 7, "respace": 7, "cut": 4}[schedule]
    assert run.bar[-1] == (7, 7)


def test_init_never_and_always(comfy, tiny, n):
    latent = comfy.latent(picture=comfy.picture())
    assert not comfy.custom(tiny.model, sampler(n, init="never"), HOST).used_prior
    assert comfy.custom(tiny.model, sampler(n, init="always"), HOST, latent).used_prior
    with pytest.raises(ValueError, match="init='always' cannot be met: models/tdpm holds no prior"):
        comfy.custom(tiny.bare, sampler(n, init="always"), HOST)


def test_no_solver_costs_more_than_the_steps(comfy, tiny, n):
    for name in n.SOLVERS:
        run = comfy.custom(tiny.model, sampler(n, solver=name), HOST)
        assert run.used_prior and len(run.sigmas) <= 7, name
        assert bool(run.samples.isfinite().all()) and run.bar[-1] == (7, 7), name


def test_a_noisy_solver_repeats_to_the_bit(comfy, tiny, n):
    runs = [comfy.custom(tiny.model, sampler(n, solver="dpmpp_2m_sde"), HOST) for _ in range(2)]
    assert torch.equal(runs[0].samples, runs[1].samples)


def test_the_scheduler_gives_the_priors_levels(comfy, tiny, n):
    sigmas = n.TDPMScheduler().get_sigmas(tiny.model, 4, 0.0, "fidelity")[0]
    assert sigmas.tolist() == pytest.approx(tiny.prior.plan_for(4).sigmas)
    run = comfy.custom(tiny.model, sampler(n), sigmas)
    assert run.used_prior and torch.equal(run.samples, comfy.ksampler(tiny.model).samples)
    given = n.TDPMScheduler().get_sigmas(tiny.bare, 4, 2.0, "fidelity", tiny.pick)[0]
    assert float(given[0]) == 2.0 and len(given) == 5


def test_the_scheduler_without_a_prior_gives_the_models_own_levels(comfy, tiny, n):
    run = comfy.job(lambda: n.TDPMScheduler().get_sigmas(tiny.bare, 4, 0.0, "fidelity"))
    assert float(run.samples[0][0]) == pytest.approx(14.6146, rel=1e-4)
    assert run.log[0].startswith("tdpm: no noise levels of a prior: models/tdpm holds no prior for this model:")


def test_sampler_custom_advanced(comfy, tiny, n):
    from comfy_extras import nodes_custom_sampler as custom

    run = comfy.job(
        lambda: custom.SamplerCustomAdvanced.execute(
            custom.RandomNoise.execute(5).args[0],
            custom.CFGGuider.execute(tiny.model, comfy.tiny.conditioning(1), comfy.tiny.conditioning(2), 1.0).args[0],
            sampler(n),
            n.TDPMScheduler().get_sigmas(tiny.model, 4, 0.0, "fidelity")[0],
            comfy.latent(),
        ).args[0]["samples"],
    )
    assert torch.equal(run.samples, comfy.ksampler(tiny.model).samples)
