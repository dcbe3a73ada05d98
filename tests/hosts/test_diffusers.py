"""diffusers pipelines from a prior: what the network sees, how often, and when the prior stays out."""

import logging
import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import (  # noqa: E402
    ControlNetModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

import tdpm_ext  # noqa: E402
import tests.hosts.tiny_diffusers as tiny  # noqa: E402
from tdpm_ext.decide import seeded_noise  # noqa: E402
from tdpm_ext.hosts import diffusers as host  # noqa: E402
from tdpm_ext.hosts.diffusers_denoiser import PipelineDenoiser  # noqa: E402
from tdpm_ext.plan import Plan  # noqa: E402
from tdpm_ext.schedule import karras  # noqa: E402
from tdpm_ext.solver import solve  # noqa: E402
from tests.hosts.tiny_diffusers import Calls  # noqa: E402

LATENT = {"output_type": "latent"}
TEXT = {"prompt": "a b", "guidance_scale": 3.0, **LATENT}
SPACINGS = ("linspace", "leading", "trailing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def sd(folder):
    return tiny.sd(StableDiffusionPipeline, folder)


@pytest.fixture(scope="module")
def sdxl(folder):
    return tiny.sdxl(StableDiffusionXLPipeline, folder)


@pytest.fixture
def heard(caplog):
    caplog.set_level(logging.INFO, logger="tdpm_ext")
    return caplog


def exact(folder, prediction="epsilon", **options):
    """A pipeline around the exact denoiser."""
    parts = {"unet": tiny.ExactUNet(prediction), "scheduler": tiny.scheduler(prediction, **options)}
    return tiny.sd(StableDiffusionPipeline, folder, **parts)


def planned(prior):
    """The prior with a calibrated table: odd sigmas, orders, seeded history and fitted weights."""
    rows = ((1.4, -0.4), (1.3, -0.2, -0.1), (1.1, -0.1), (1.0,))
    plan = Plan((5.0, 2.0, 0.9, 0.2, 0.0), (3, 3, 2, 1), (8.0, 12.0), rows, 0.1)
    prior.plans = {"fidelity": {4: plan, 5: Plan((5.0, 3.0, 1.2, 0.5, 0.1, 0.0), (2, 3, 3, 2, 1), (7.0,))}}
    return prior


def at_sigma(sent, timestep):
    """x behind a network input: (x, sigma)."""
    sigma = tdpm_ext.schedule.index_to_sigma(timestep, tdpm_ext.schedule.sd_sigmas())
    return sent * (sigma**2 + 1) ** 0.5, sigma


def ordinary(pipe, **call):
    """What the pipeline makes with the same scheduler and no prior."""
    with host.attach(pipe, tiny.prior(), init="never"):
        return pipe(**call)[0]


# -- the prior takes the place of fresh noise ------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_the_network_sees_the_priors_draw_of_the_seeds(cls, prediction, folder, heard):
    build = tiny.sdxl if cls is StableDiffusionXLPipeline else tiny.sd
    pipe, prior = build(cls, folder, prediction), planned(tiny.prior())
    with Calls(pipe.unet) as calls:
        made = host.sample(pipe, prior, seeds=[7, 8], num_inference_steps=4, **TEXT)[0]
    x, sigma = at_sigma(*calls.seen[0])
    assert sigma == pytest.approx(5.0, rel=1e-4)
    torch.testing.assert_close(
        x.chunk(2)[0], prior.sample(seeded_noise(prior.shape, [7, 8]), 5.0), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(*x.chunk(2))  # the two halves of guidance
    assert len(calls) == 4 and made.isfinite().all()
    assert "prior used, sigma_trunc=5, 4 calls" in heard.text


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_spacing_of_the_pipelines_own_schedule_does_not_matter(spacing, folder):
    prior = tiny.prior()
    pipe = tiny.sd(StableDiffusionPipeline, folder, scheduler=tiny.scheduler(timestep_spacing=spacing))
    with Calls(pipe.unet) as calls:
        host.sample(pipe, prior, seeds=[0], num_inference_steps=2, **TEXT)
    x, _ = at_sigma(*calls.seen[0])
    torch.testing.assert_close(x[:1], prior.sample(seeded_noise(prior.shape, [0]), 4.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_the_network_is_called_as_often_as_steps_were_asked_for(steps, sd):
    for schedule in ("prior", "respace", "cut"):
        with Calls(sd.unet) as calls:
            host.sample(sd, tiny.prior(), seeds=[0], num_inference_steps=steps, schedule=schedule, **TEXT)
        assert len(calls) == steps or (schedule == "cut" and len(calls) < steps)


def test_the_priors_own_network_calls_count_as_steps(sd, heard):
    prior = tiny.prior()
    prior.prior_nfe = 1
    for height in (16, 32):  # the latter has no use for the prior, and is finished all the same
        with Calls(sd.unet) as calls:
            made = host.sample(sd, prior, seeds=[0], num_inference_steps=4, height=height, width=16, **TEXT)[0]
        assert len(calls) == 3 and made.shape[2] == height // 2 and made.isfinite().all()
    with Calls(sd.unet) as calls:
        host.sample(sd, prior, seeds=[0], num_inference_steps=1, **TEXT)
    assert len(calls) == 1 and "makes 1 network calls and the budget is 1" in heard.text


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_it_is_our_own_solver_to_the_last_digits(prediction, folder):
    pipe, prior = exact(folder, prediction), planned(tiny.prior())
    asked = {**tiny.asking(1, 3), "guidance_scale": 2.0}
    denoiser = PipelineDenoiser(pipe, **asked)
    for steps in (4, 5, 6):
        wanted = tdpm_ext.sample(denoiser, prior, seed=[0, 1, 2], steps=steps)
        made = host.sample(pipe, prior, seeds=[0, 1, 2], num_inference_steps=steps, **asked, **LATENT)[0]
        assert (made - wanted).abs().max() < 1e-5


def test_four_steps_from_a_fitted_prior_are_nearer_the_full_run_than_the_usual_samplers(folder):
    pipe = exact(folder)
    asked = {**tiny.asking(2), "guidance_scale": 1.5}
    prior = host.fit(pipe, draws=192, samples=24, budgets=(4,), batch=64, progress=False, **asked)
    z = seeded_noise(prior.shape, range(100, 132))
    run = {**tiny.asking(2, len(z)), "guidance_scale": 1.5, "latents": z, **LATENT}
    full = solve(PipelineDenoiser(pipe, batch=64, **asked), z * 14.6146, karras(60, 14.6146, 0.03), disable=True)
    with host.attach(pipe, prior):
        errors = {"tdpm": (pipe(num_inference_steps=4, **run)[0] - full).square().mean().sqrt()}
    for cls in (EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        for karras_sigmas in (False, True):
            pipe.scheduler = cls.from_config(tiny.scheduler().config, use_karras_sigmas=karras_sigmas)
            error = (pipe(num_inference_steps=4, **run)[0] - full).square().mean().sqrt()
            errors[cls.__name__, karras_sigmas] = error
    assert errors["tdpm"] < 0.5 * min(error for name, error in errors.items() if name != "tdpm"), errors


def test_latents_are_unit_noise_as_everywhere_in_diffusers(sd):
    prior, z = tiny.prior(), seeded_noise(tiny.LATENTS, [3])
    given = host.sample(sd, prior, latents=z, num_inference_steps=3, **TEXT)[0]
    assert torch.equal(given, host.sample(sd, prior, seeds=[3], num_inference_steps=3, **TEXT)[0])


def test_a_seed_is_a_picture_alone_and_in_a_batch_and_again(sd, sdxl):
    for pipe in (sd, sdxl):
        prior, call = planned(tiny.prior()), {"num_inference_steps": 4, **TEXT}
        together = host.sample(pipe, prior, seeds=[4, 5, 6, 7], **call)[0]
        alone = torch.cat([host.sample(pipe, prior, seeds=[seed], **call)[0] for seed in (4, 5, 6, 7)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        assert torch.equal(together, host.sample(pipe, prior, seeds=[4, 5, 6, 7], **call)[0])


def test_lists_of_prompts_take_a_seed_each(sd):
    pictures = host.sample(sd, tiny.prior(), seeds=[0, 1], prompt=["a", "b"], num_inference_steps=2)[0]
    assert len(pictures) == 2 and pictures[0].size == (16, 16)
    with pytest.raises(ValueError, match="seeds and generator both say which noise"):
        host.sample(sd, tiny.prior(), seeds=[0], generator=torch.Generator(), **TEXT)


def test_other_dtypes_stay_what_they_are(folder):
    pipe = tiny.sd(StableDiffusionPipeline, folder).to(torch.bfloat16)
    with Calls(pipe.unet) as calls:
        made = host.sample(pipe, planned(tiny.prior()), seeds=[0], num_inference_steps=4, **TEXT)[0]
    assert made.dtype == torch.bfloat16 and made.isfinite().all()
    assert {sent.dtype for sent, _ in calls.seen} == {torch.bfloat16}


# -- what the pipeline offers keeps working --------------------------------------------------------------------------


def test_callbacks_see_every_step_and_may_change_x(sd):
    seen = []

    def watch(pipe, i, timestep, tensors):
        seen.append((i, float(timestep), tensors["latents"].clone()))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 1 else {}

    with Calls(sd.unet) as calls:
        host.sample(sd, tiny.prior(), seeds=[0], num_inference_steps=4, callback_on_step_end=watch, **TEXT)
    assert [i for i, *_ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep, _ in seen] == [timestep for _, timestep in calls.seen]
    assert calls.seen[1][0].any() and not calls.seen[2][0].any()


def test_an_exception_from_a_callback_escapes_and_the_pipeline_is_restored(sd):
    before = sd.scheduler

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.sample(sd, tiny.prior(), seeds=[0], num_inference_steps=4, callback_on_step_end=stop, **TEXT)
    assert sd.scheduler is before


def test_guidance_and_its_rescaling_reach_the_picture(sd):
    def made(**call):
        return host.sample(sd, tiny.prior(), seeds=[0], num_inference_steps=3, prompt="a", **LATENT, **call)[0]

    plain, guided, negative = made(guidance_scale=1.0), made(guidance_scale=4.0), made(negative_prompt="b c")
    rescaled = made(guidance_scale=4.0, guidance_rescale=0.7)
    for one, other in ((plain, guided), (guided, rescaled), (guided, negative)):
        assert not torch.equal(one, other)


def test_controlnet_steers_the_truncated_chain(folder):
    torch.manual_seed(5)
    control = ControlNetModel.from_unet(tiny.unet(), conditioning_embedding_out_channels=(8, 8)).eval()
    for p in control.parameters():
        p.data += 0.05 * torch.randn_like(p)  # its output layers start at zero
    pipe = tiny.sd(StableDiffusionControlNetPipeline, folder, controlnet=control)
    prior, picture = tiny.prior(), torch.rand(1, 3, 16, 16)
    call = {"image": picture, "num_inference_steps": 3, **TEXT}
    with Calls(pipe.unet) as calls, Calls(control) as steers:
        made = host.sample(pipe, prior, seeds=[0], **call)[0]
    x, _ = at_sigma(*calls.seen[0])
    torch.testing.assert_close(x[:1], prior.sample(seeded_noise(prior.shape, [0]), 4.0), rtol=1e-4, atol=1e-4)
    assert len(calls) == 3 and torch.equal(steers.seen[0][0], calls.seen[0][0])
    guess = host.sample(pipe, prior, seeds=[0], guess_mode=True, **call)[0]  # asks twice for the first input
    without = host.sample(pipe, prior, seeds=[0], controlnet_conditioning_scale=0.0, **call)[0]
    assert not torch.equal(made, without) and not torch.equal(made, guess)


# -- when the prior stays out ----------------------------------------------------------------------------------------

PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(16) > 7).float().expand(1, 1, 16, 16)


def first_calls(pipe, scheduler=None, **call):
    """Inputs of the network under the pipeline's own or another scheduler."""
    if scheduler is not None:
        pipe.scheduler = scheduler
    with Calls(pipe.unet) as calls:
        pipe(generator=torch.Generator().manual_seed(0), **call)
    return calls.seen


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_runs_the_ordinary_solver_on_its_own_sigmas(strength, folder, heard):
    pipe = tiny.sd(StableDiffusionImg2ImgPipeline, folder)
    call = {"image": PICTURE, "strength": strength, "num_inference_steps": 4, **TEXT}
    stock = first_calls(pipe, **call)
    with host.attach(pipe, tiny.prior(), schedule="respace"):
        ours = first_calls(pipe, **call)
    assert len(ours) == len(stock) == 4 * strength
    assert [t for _, t in ours] == [t for _, t in stock]
    torch.testing.assert_close(ours[0][0], stock[0][0])  # the picture, and as much noise as was asked for
    assert "prior not used: StableDiffusionImg2ImgPipeline starts from a picture" in heard.text


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_scheduler_shared_with_an_image_to_image_pipeline_gives_way(strength, sd, heard):
    sd.scheduler = tiny.scheduler()
    call = {"image": PICTURE, "strength": strength, "num_inference_steps": 4, **TEXT}
    other = tiny.quiet(StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False))
    stock = first_calls(other, **call)
    with host.attach(sd, tiny.prior()):
        other.scheduler = sd.scheduler
        ours = first_calls(other, **call)
    assert [t for _, t in ours] == [t for _, t in stock]
    torch.testing.assert_close(ours[0][0], stock[0][0])
    assert "image to image" in heard.text


def test_inpainting_keeps_what_the_mask_keeps(folder, heard):
    pipe = tiny.sd(StableDiffusionInpaintPipeline, folder)
    call = {"image": PICTURE, "mask_image": MASK, "strength": 1.0, "num_inference_steps": 4, **TEXT}
    stock = first_calls(pipe, **call)
    with host.attach(pipe, tiny.prior()):
        ours = first_calls(pipe, **call)
        made = pipe(generator=torch.Generator().manual_seed(0), **call)[0]
    torch.testing.assert_close(ours[0][0], stock[0][0])
    pipe.scheduler = tiny.scheduler()
    kept = pipe(generator=torch.Generator().manual_seed(0), **call)[0]
    torch.testing.assert_close(made[..., :4], kept[..., :4])  # half a mask, half as many latents
    assert "starts from a picture" in heard.text


def test_a_chain_in_two_pipelines_is_an_ordinary_one(sdxl, folder, heard):
    """SDXL's base up to denoising_end and its refiner from denoising_start."""
    refiner = tiny.quiet(StableDiffusionXLImg2ImgPipeline(**{**sdxl.components, "scheduler": tiny.scheduler()}))
    whole = ordinary(sdxl, num_inference_steps=10, generator=torch.Generator().manual_seed(0), **TEXT)
    call = {"num_inference_steps": 10, **TEXT}
    with host.attach(sdxl, tiny.prior()), host.attach(refiner, tiny.prior()), Calls(sdxl.unet) as calls:
        half = sdxl(denoising_end=0.5, generator=torch.Generator().manual_seed(0), **call)[0]
        done = refiner(image=half, denoising_start=0.5, **call)[0]
    assert len(calls) == 10
    assert "denoising_end=0.5 stops the chain early" in heard.text and "starts from a picture" in heard.text
    # the solver's memory ends with the first pipeline: near the whole run, not equal to it
    assert (done - whole).norm() < 0.2 * whole.norm()


def test_another_resolution_finishes_the_picture_without_the_prior(sd, heard):
    call = {"num_inference_steps": 4, "height": 32, "width": 16, **TEXT}
    wanted = ordinary(sd, generator=torch.Generator().manual_seed(0), **call)
    with host.attach(sd, planned(tiny.prior())), Calls(sd.unet) as calls:
        made = sd(generator=torch.Generator().manual_seed(0), **call)[0]
    assert made.shape == (1, 4, 16, 8) and len(calls) == 4
    assert torch.equal(made, wanted)
    told = [record.getMessage() for record in heard.records if record.levelno == logging.WARNING]
    reason = "x has shape (4, 16, 8) and the prior was fitted for (4, 8, 8); ordinary solver, 4 calls"
    assert told == [f"tdpm: prior not used: {reason}"] and "prior used" not in heard.text


@pytest.mark.parametrize(
    ("sigmas", "reason"),
    [
        ([3.0, 1.0, 0.3, 0.0], "starts at sigma 3, below sigma_trunc 4"),
        ([14.6, 9.0, 6.0], "ends at sigma 6, not below sigma_trunc 4"),
        ([0.5, 2.0, 6.0], "do not fall strictly"),
    ],
)
def test_given_sigmas_that_do_not_suit_are_run_as_they_are(sigmas, reason, sd, heard):
    with host.attach(sd, tiny.prior()), Calls(sd.unet) as calls:
        made = sd(sigmas=sigmas, generator=torch.Generator().manual_seed(0), **TEXT)[0]
    assert [at_sigma(*seen)[1] for seen in calls.seen] == pytest.approx(sigmas[:-1], rel=1e-3)
    assert made.isfinite().all() and reason in heard.text


def test_given_sigmas_that_suit_are_a_budget(sd, heard):
    with host.attach(sd, tiny.prior()), Calls(sd.unet) as calls:
        sd(sigmas=[14.6, 6.0, 2.0, 0.5, 0.0], generator=torch.Generator().manual_seed(0), **TEXT)
    assert len(calls) == 4 and "prior used" in heard.text


def test_a_zero_in_the_middle_of_the_sigmas_is_an_error(sd):
    with host.attach(sd, tiny.prior()), pytest.raises(ValueError, match="sigma 0 stands before the end"):
        sd(sigmas=[14.6, 0.0, 0.0], **TEXT)


def test_init_never_is_the_ordinary_multistep_solver(sd):
    made = ordinary(sd, num_inference_steps=5, latents=seeded_noise(tiny.LATENTS, [0]), **TEXT)
    sd.scheduler.set_timesteps(5)
    x = seeded_noise(tiny.LATENTS, [0]) * sd.scheduler.init_noise_sigma
    denoiser = PipelineDenoiser(sd, prompt="a b", guidance_scale=3.0)
    torch.testing.assert_close(made, solve(denoiser, x, sd.scheduler.sigmas, disable=True), rtol=1e-4, atol=1e-4)


def test_a_saved_pipeline_loads_as_an_ordinary_one(sd, tmp_path, heard):
    with host.attach(sd, tiny.prior()):
        sd.scheduler.save_pretrained(tmp_path)
    from tdpm_ext.hosts.diffusers_scheduler import TDPMScheduler

    loaded = TDPMScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(4)
    assert "no prior is attached" in heard.text
    assert torch.equal(loaded.sigmas, tiny_sigmas(4))


def tiny_sigmas(steps):
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


# -- the pipeline is given back as it was ----------------------------------------------------------------------------


def test_undo_restores_the_scheduler_and_every_bit(sd):
    sd.scheduler = tiny.scheduler()
    before, config = sd.scheduler, dict(sd.config)
    call = {"num_inference_steps": 3, **TEXT}
    wanted = sd(generator=torch.Generator().manual_seed(0), **call)[0]
    handle = host.attach(sd, tiny.prior())
    assert sd.scheduler is not before and handle.active
    handle.undo()
    assert sd.scheduler is before and dict(sd.config) == config and not handle.active
    assert torch.equal(wanted, sd(generator=torch.Generator().manual_seed(0), **call)[0])
    handle.undo()


def test_attaching_twice_undoes_in_turn(sd):
    before = sd.scheduler
    with host.attach(sd, tiny.prior()):
        inside = sd.scheduler
        with host.attach(sd, tiny.prior(sigma_trunc=2.0)):
            assert sd.scheduler is not inside
        assert sd.scheduler is inside
    assert sd.scheduler is before


def test_a_scheduler_that_came_later_is_left_alone(sd, heard):
    before = sd.scheduler
    handle = host.attach(sd, tiny.prior())
    sd.scheduler = later = tiny.scheduler()
    handle.undo()
    assert sd.scheduler is later and "replaced after attach" in heard.text
    sd.scheduler = before


def test_the_global_generator_is_not_touched(sd):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    host.sample(sd, tiny.prior(), seeds=[0], num_inference_steps=2, **TEXT)
    assert torch.equal(state, torch.get_rng_state())


# -- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, "rectified-flow"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "rectified"),
        ("LCMScheduler", {}, "distilled for a few-step sampler"),
        ("EDMEulerScheduler", {}, "no table of betas"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "log sigma"),
    ],
)
def test_schedulers_that_do_not_suit_are_refused_with_the_reason(name, options, reason, sd):
    before = sd.scheduler
    sd.scheduler = getattr(diffusers, name)(**options)
    for use in (host.attach, host.sample, lambda pipe, _: host.fit(pipe)):
        with pytest.raises(ValueError, match=f"cannot run StableDiffusionPipeline with {name}: .*{reason}"):
            use(sd, tiny.prior())
    sd.scheduler = before


def test_a_prior_for_another_network_is_refused_unless_asked_for(sd):
    own, other = host.fingerprint(sd), "0123456789abcdef"
    with host.attach(sd, tiny.prior(checkpoint=own)):
        pass
    with pytest.raises(ValueError, match=f"fitted for network {other}, the pipeline's is {own}"):
        host.attach(sd, tiny.prior(checkpoint=other))
    with host.attach(sd, tiny.prior(checkpoint=other), any_model=True):
        pass


def test_the_fingerprint_is_of_the_weights_not_of_their_precision(folder, sd):
    half = tiny.sd(StableDiffusionPipeline, folder).to(torch.float16)
    assert host.fingerprint(half) == host.fingerprint(sd)
    half.unet.conv_in.weight.data[0, 0, 0, 0] += 0.1
    assert host.fingerprint(half) != host.fingerprint(sd)


def test_other_latents_and_damaged_or_missing_files_are_one_clear_error(sd, tmp_path):
    with pytest.raises(ValueError, match="makes 3 channels, the pipeline's latents have 4"):
        host.attach(sd, tiny.prior((3, 8, 8)))
    path = tdpm_ext.save_prior(tiny.prior(), tmp_path / "p.safetensors")
    with host.attach(sd, path):
        pass
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="p.safetensors: not a readable"):
        host.attach(sd, path)
    with pytest.raises(ValueError, match="nothing.safetensors: cannot be read"):
        host.sample(sd, str(tmp_path / "nothing.safetensors"))
    for option in ({"init": "always"}, {"schedule": "karras"}, {"objective": "beauty"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is .*choose one of"):
            host.attach(sd, tiny.prior(), **option)


def test_a_pipeline_that_hands_the_step_something_else_is_an_error(folder):
    """diffusers' class-conditional DiT steps from the scaled input, which no sigma scheduler can use."""
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = {"vae": tiny.vae(), "scheduler": diffusers.DDIMScheduler(**tiny.SD_TABLE)}
        pipe = tiny.quiet(diffusers.DiTPipeline(transformer=network, **parts))
        with pytest.raises(ValueError, match="changes x between network input and step"):
            host.sample(pipe, tiny.prior(), class_labels=[1], num_inference_steps=2)


# -- diffusers' own Euler scheduler, untouched -----------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
def test_latents_and_sigmas_for_the_plain_euler_scheduler(spacing, folder):
    pipe = tiny.sd(StableDiffusionPipeline, folder, scheduler=tiny.scheduler(timestep_spacing=spacing))
    before, prior = pipe.scheduler, planned(tiny.prior())
    inputs = host.euler_inputs(pipe, prior, 4, [0, 1])
    with Calls(pipe.unet) as calls:
        made = pipe(prompt=["a", "b"], **inputs, **LATENT)[0]
    assert pipe.scheduler is before and type(before) is EulerDiscreteScheduler
    x, _ = at_sigma(*calls.seen[0])
    torch.testing.assert_close(x[:2], prior.sample(seeded_noise(prior.shape, [0, 1]), 5.0), rtol=1e-4, atol=1e-4)
    assert len(calls) == len(inputs["sigmas"]) - 1 == 4 and made.isfinite().all()


def test_plain_inputs_are_for_the_euler_scheduler_only(sd):
    before = sd.scheduler
    sd.scheduler = DPMSolverMultistepScheduler.from_config(before.config)
    with pytest.raises(ValueError, match="suit EulerDiscreteScheduler, this pipeline has DPMSolverMultistep.*attach"):
        host.euler_inputs(sd, tiny.prior(), 4, [0])
    with host.attach(sd, tiny.prior()), Calls(sd.unet) as calls:  # where attach works
        sd(num_inference_steps=4, **TEXT)
    assert len(calls) == 4
    sd.scheduler = before
