"""When the prior takes the place of ComfyUI's x: every case against the real sampling code, with a tiny real UNet."""

import math

import pytest
import torch

SCALE = 0.18215  # of SD 1.5 latents


def prior_start(tiny, noise, level):
    return tiny.prior.sample(noise, level)


def noise_of(seed, shape):
    return torch.randn(shape, generator=torch.manual_seed(seed))


def ordinary_like(comfy, tiny, **job):
    """The same job with ComfyUI's own dpmpp_2m, whose update is that of our ordinary solver."""
    return comfy.ksampler(tiny.bare, sampler="dpmpp_2m", **job)


def assert_ordinary(ours, theirs, reason):
    assert not ours.used_prior
    assert any(reason in line for line in ours.log), ours.log
    assert ours.sigmas == pytest.approx(theirs.sigmas)
    torch.testing.assert_close(ours.samples, theirs.samples, rtol=1e-4, atol=1e-4)


def test_text_to_image_starts_from_the_prior(comfy, tiny):
    run = comfy.ksampler(tiny.model, comfy.latent(2))
    plan = tiny.prior.plan_for(4)
    assert run.log == [f"tdpm: prior used, sigma_trunc={plan.sigma_trunc:.4g}, 4 calls"]
    assert run.sigmas == pytest.approx(plan.sigmas[:-1])
    expected = prior_start(tiny, noise_of(5, (2, 4, 8, 8)), plan.sigma_trunc)
    torch.testing.assert_close(run.inputs[0], expected)
    assert 0.3 < float(run.samples.std()) * SCALE < 1.2  # a picture in the VAE's units


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("scheduler", ["normal", "karras", "ddim_uniform", "beta"])
def test_evaluations_equal_steps_and_the_bar_ends_full(comfy, tiny, steps, scheduler):
    run = comfy.ksampler(tiny.model, steps=steps, scheduler=scheduler)
    hosts = comfy.ksampler(tiny.bare, steps=steps, scheduler=scheduler, sampler="euler")
    assert len(run.sigmas) == len(hosts.sigmas)  # ddim_uniform makes one more than asked for, and 1 step starts at .04
    assert run.used_prior == (hosts.sigmas[0] > tiny.prior.sigma_trunc)
    assert run.bar == hosts.bar and run.bar[-1] == (len(hosts.sigmas), len(hosts.sigmas))


def test_ddim_uniform_starts_low_and_is_text_to_image_all_the_same(comfy, tiny):
    run = comfy.ksampler(tiny.model, scheduler="ddim_uniform", steps=4)
    assert run.used_prior and run.sigmas[0] == pytest.approx(tiny.prior.sigma_trunc)


@pytest.mark.parametrize("denoise", [1.0, 0.75, 0.5, 0.2])
def test_image_to_image_is_left_alone_at_any_denoise(comfy, tiny, denoise):
    job = {"latent": comfy.latent(picture=comfy.picture()), "denoise": denoise}
    theirs = ordinary_like(comfy, tiny, **job)
    reason = "image to image" if theirs.sigmas[0] >= tiny.prior.sigma_trunc else "below sigma_trunc"
    assert_ordinary(comfy.ksampler(tiny.model, **job), theirs, reason)


def test_an_empty_latent_at_low_denoise_is_left_alone(comfy, tiny):
    job = {"denoise": 0.2}
    assert_ordinary(comfy.ksampler(tiny.model, **job), ordinary_like(comfy, tiny, **job), "below sigma_trunc")


def test_what_a_mask_keeps_is_kept(comfy, tiny):
    picture, mask = comfy.picture(), torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1
    job = {"latent": comfy.latent(picture=picture, mask=mask)}
    run = comfy.ksampler(tiny.model, **job)
    assert_ordinary(run, ordinary_like(comfy, tiny, **job), "a mask keeps part of the picture")
    assert float((run.samples - picture)[..., :4].abs().max()) * SCALE < 1e-6


def test_an_empty_latent_under_a_mask_is_left_alone(comfy, tiny):
    job = {"latent": comfy.latent(mask=torch.ones(1, 8, 8))}
    assert_ordinary(comfy.ksampler(tiny.model, **job), ordinary_like(comfy, tiny, **job), "a mask keeps")


def test_a_first_segment_that_ends_above_sigma_trunc_is_left_alone(comfy, tiny):
    job = {"steps": 10, "last_step": 2}
    assert_ordinary(comfy.ksampler(tiny.model, **job), ordinary_like(comfy, tiny, **job), "the segment ends at sigma")


def test_a_first_segment_that_ends_below_sigma_trunc_starts_from_the_prior(comfy, tiny):
    run = comfy.ksampler(tiny.model, steps=10, last_step=8)
    hosts = comfy.ksampler(tiny.bare, steps=10, last_step=8, sampler="euler")
    assert run.used_prior and len(run.sigmas) == 8 and run.sigmas[0] == pytest.approx(tiny.prior.sigma_trunc)
    assert run.told[0][-1] == hosts.told[0][-1] > 0  # and stops where the host stops
    assert run.bar == hosts.bar


def test_a_second_segment_without_noise_is_left_alone(comfy, tiny):
    first = comfy.ksampler(tiny.model, steps=10, last_step=4)
    job = {"latent": comfy.latent(picture=first.samples), "steps": 10, "start_step": 4, "disable_noise": True}
    assert_ordinary(comfy.ksampler(tiny.model, **job), ordinary_like(comfy, tiny, **job), "below sigma_trunc")


@pytest.mark.parametrize("picture", [True, False])
def test_without_added_noise_x_is_left_alone(comfy, tiny, picture):
    job = {"latent": comfy.latent(picture=comfy.picture() if picture else None), "disable_noise": True}
    reason = "image to image" if picture else "no noise was added"
    assert_ordinary(comfy.ksampler(tiny.model, **job), ordinary_like(comfy, tiny, **job), reason)


def test_rising_sigmas_are_left_alone(comfy, tiny):
    sampler = comfy.samplers.sampler_object("tdpm")
    sigmas = torch.tensor([0.03, 0.5, 2.0, 8.0, 14.6])
    latent = comfy.latent(picture=comfy.picture())
    run = comfy.custom(tiny.model, sampler, sigmas, latent, add_noise=False)
    assert not run.used_prior and "unsampling" in run.log[0]
    assert run.sigmas == pytest.approx(sigmas[:-1].tolist()) and bool(run.samples.isfinite().all())


def test_a_control_net_keeps_acting_and_a_range_that_ends_too_early_is_named(comfy, tiny):
    with_control = lambda end: comfy.controlled(comfy.tiny.conditioning(1), end)  # noqa: E731
    plain = comfy.ksampler(tiny.model)
    late = comfy.ksampler(tiny.model, positive=with_control(1.0))
    early = comfy.ksampler(tiny.model, positive=with_control(0.3))  # sigma 3.33, and the prior cuts at 3
    assert late.used_prior and float((late.samples - plain.samples).abs().max()) > 0.01
    assert not any("ControlNet" in line for line in late.log)
    assert early.log[0].startswith("tdpm: a ControlNet range ends at sigma 3.3")
    assert "above sigma_trunc" in early.log[0]
    torch.testing.assert_close(early.samples, plain.samples, rtol=1e-5, atol=1e-5)


def test_no_warning_about_ranges_where_the_prior_stays_out(comfy, tiny):
    latent = comfy.latent(picture=comfy.picture())
    run = comfy.ksampler(tiny.model, latent, positive=comfy.controlled(comfy.tiny.conditioning(1), 0.3))
    assert len(run.log) == 1 and "image to image" in run.log[0]


def test_a_prompt_range_that_ends_too_early_is_named(comfy, tiny):
    early = [[comfy.tiny.conditioning(1)[0][0], {"start_percent": 0.0, "end_percent": 0.3}]]
    run = comfy.ksampler(tiny.model, positive=early + comfy.tiny.conditioning(3))
    assert run.log[0].startswith("tdpm: a conditioning range ends at sigma 3.3") and run.used_prior


def test_context_windows_meet_the_sigmas_they_were_told(comfy, tiny):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    options = {"context_length": 4, "context_overlap": 2, "context_schedule": "standard_static", "context_stride": 1}
    options |= {"closed_loop": False, "fuse_method": "pyramid", "dim": 2}
    model = ContextWindowsManualNode.execute(tiny.model, **options).args[0]
    run = comfy.ksampler(model)
    windows = len(run.sigmas) // 4
    assert run.used_prior and windows > 1
    assert run.told[0].tolist() == pytest.approx(tiny.prior.plan_for(4).sigmas)
    assert sorted(set(run.sigmas)) == pytest.approx(sorted(run.told[0].tolist())[1:])


def test_previews_are_shown(comfy, tiny):
    from comfy.cli_args import LatentPreviewMethod, args

    before, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    try:
        run = comfy.ksampler(tiny.model)
    finally:
        args.preview_method = before
    assert run.previews == 4 == len(run.bar)


def test_the_stricter_callback_of_newer_releases_finds_what_it_reads(comfy, tiny):
    seen = []

    def strict(inner):
        def callback(info):
            if not seen:
                assert info["x"].shape == info["denoised"].shape == (1, 4, 8, 8)
            seen.append(info["i"])
            return inner(info) if inner is not None else None

        return callback

    def wrapped(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return comfy.sampling.sample_tdpm(model, x, sigmas, extra_args, strict(callback), disable)

    run = comfy.custom(tiny.model, comfy.samplers.KSAMPLER(wrapped), torch.tensor([14.6, 6.0, 3.5, 1.0, 0.0]))
    assert run.used_prior and seen == [0, 1, 2, 3]


@pytest.mark.parametrize("image", [False, True])
def test_interruption_ends_the_job_at_once(comfy, tiny, image):
    calls = []

    def stop_after_two(model_function, call):
        calls.append(1)
        if len(calls) == 2:
            comfy.management.interrupt_current_processing()
        comfy.management.throw_exception_if_processing_interrupted()
        return model_function(call["input"], call["timestep"], **call["c"])

    model = tiny.model.clone()
    model.set_model_unet_function_wrapper(stop_after_two)
    comfy.watched = lambda model, run: model  # keep ours
    try:
        with pytest.raises(comfy.management.InterruptProcessingException):
            comfy.ksampler(model, comfy.latent(picture=comfy.picture() if image else None))
    finally:
        del comfy.watched
    assert len(calls) == 2


def test_an_exception_of_the_progress_hook_gets_through(comfy, tiny):
    def hook(value, total, preview, node_id=None):
        raise comfy.management.InterruptProcessingException

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        with pytest.raises(comfy.management.InterruptProcessingException):
            positive, negative = comfy.tiny.conditioning(1), comfy.tiny.conditioning(2)
            comfy.nodes.common_ksampler(tiny.model, 5, 4, 1.0, "tdpm", "normal", positive, negative, comfy.latent())
    finally:
        comfy.utils.set_progress_bar_global_hook(None)


def test_a_batch_of_four_equals_four_singles_and_a_repeat_equals_to_the_bit(comfy, tiny):
    together = comfy.ksampler(tiny.model, comfy.latent(4), cfg=4.0)
    again = comfy.ksampler(tiny.model, comfy.latent(4), cfg=4.0)
    assert torch.equal(together.samples, again.samples)
    for k in range(4):  # as the node Latent From Batch asks for one of them
        alone = comfy.ksampler(tiny.model, comfy.latent(1, batch_index=[k]), cfg=4.0)
        torch.testing.assert_close(alone.samples[0] * SCALE, together.samples[k] * SCALE, rtol=0, atol=1e-4)


def test_guidance_and_the_negative_prompt_act(comfy, tiny):
    one, four = comfy.ksampler(tiny.model, cfg=1.0), comfy.ksampler(tiny.model, cfg=4.0)
    assert one.used_prior and four.used_prior and len(four.sigmas) == 4  # both prompts in one call
    assert float((one.samples - four.samples).abs().max()) > 1e-3


def test_a_lora_acts_and_keeps_the_prior(comfy, tiny):
    patched = comfy.with_lora(tiny.model)
    plain, run = comfy.ksampler(tiny.model), comfy.ksampler(patched)
    assert run.used_prior and run.log == plain.log
    assert float((run.samples - plain.samples).abs().max()) > 1e-3
    assert torch.equal(comfy.ksampler(tiny.model).samples, plain.samples)  # and comes off again


def test_a_rectified_flow_model_is_refused_with_the_reason(comfy, tiny):
    from tdpm_ext.hosts.comfyui_nodes import with_prior

    flow = comfy.tiny.tiny_model(prediction="flow")
    for model in (flow, with_prior(flow, tiny.pick)):
        run = comfy.ksampler(model, scheduler="simple")
        theirs = comfy.ksampler(flow, scheduler="simple", sampler="dpmpp_2m")
        assert len(run.log) == 1
        assert_ordinary(run, theirs, "the model is a rectified-flow model, whose x is not data + sigma * noise")


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_priors_live_in_the_models_scaled_latents(comfy, tiny, prediction):
    """A prior of the wrong units would start at another level than the network expects."""
    from tdpm_ext.hosts.comfyui_nodes import with_prior
    from tdpm_ext.hosts.comfyui_priors import Pick

    prior = tiny.prior
    pick = Pick("free", type(prior).from_state(*prior.state()))  # tied to no checkpoint
    model = with_prior(comfy.tiny.tiny_model(prediction=prediction), pick)
    few = comfy.ksampler(model, comfy.latent(4), steps=4)
    many = comfy.ksampler(model, comfy.latent(4), steps=60, sampler="dpmpp_2m", scheduler="karras")
    assert few.used_prior
    error = float((few.samples - many.samples).std() / many.samples.std())
    assert error < 0.15, error


def test_a_wrapper_that_hides_the_picture_keeps_the_prior_out(comfy, tiny):
    def hiding(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def inner(x, sigma, **kwargs):
            return model(x, sigma, **kwargs)

        inner.inner_model, inner.sigmas = model.inner_model, model.sigmas
        return comfy.sampling.sample_tdpm(inner, x, sigmas, extra_args, callback, disable)

    sigmas = torch.tensor([14.6, 6.0, 2.0, 0.5, 0.0])
    run = comfy.custom(tiny.model, comfy.samplers.KSAMPLER(hiding), sigmas)
    theirs = comfy.custom(tiny.bare, comfy.samplers.sampler_object("dpmpp_2m"), sigmas)
    assert_ordinary(run, theirs, "a wrapper hides")


def test_a_bare_wrapper_still_finishes(comfy, tiny):
    def bare(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def inner(x, sigma, **kwargs):
            return model(x, sigma, **kwargs)

        return comfy.sampling.sample_tdpm(inner, x, sigmas, extra_args, callback, disable)

    run = comfy.custom(tiny.model, comfy.samplers.KSAMPLER(bare), torch.tensor([14.6, 6.0, 2.0, 0.5, 0.0]))
    assert not run.used_prior and len(run.log) == 1 and bool(run.samples.isfinite().all())


@pytest.mark.parametrize("sigmas", [[], [14.6], [14.6, 0.0], [14.6, 2.0]])
def test_short_schedules(comfy, tiny, sigmas):
    run = comfy.custom(tiny.model, comfy.samplers.sampler_object("tdpm"), torch.tensor(sigmas))
    assert len(run.sigmas) == max(0, len(sigmas) - 1) and bool(run.samples.isfinite().all())
    assert run.used_prior == (len(sigmas) > 1)


def test_full_denoise_scaling_does_not_reach_the_prior(comfy, tiny):
    """ComfyUI scales full-strength noise by sqrt(1 + sigma^2): z is its noise, not x over anything."""
    run = comfy.ksampler(tiny.model)
    z = run.inputs[0] / math.sqrt(tiny.prior.sigma_trunc**2 + comfy.tiny.DATA_STD**2)
    assert float(torch.corrcoef(torch.stack([z.flatten(), noise_of(5, z.shape).flatten()]))[0, 1]) > 0.98
