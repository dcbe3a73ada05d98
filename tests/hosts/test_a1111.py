"""The web UI's sampler, against a stand-in that keeps the contract of A1111, Forge and reForge (see webui_double).

The programs themselves are in no package index, so these tests show what the sampler does with what they hand over,
not that they hand it over.
"""

import functools
import importlib
import inspect
import logging
import runpy
from importlib import resources

import pytest
import torch

import tdpm_ext
from tdpm_ext.cli import main
from tdpm_ext.decide import seeded_noise
from tdpm_ext.plan import Plan
from tdpm_ext.priors.closed_form import gaussian_tensors
from tdpm_ext.priors.registry import get_prior
from tdpm_ext.schedule import karras
from tdpm_ext.solver import solve

pytest.importorskip("k_diffusion")

from tests.hosts.webui_double import Interrupted, Job, Network, WebUI  # noqa: E402

a1111 = importlib.import_module("tdpm_ext.hosts.a1111")
a1111_fit = importlib.import_module("tdpm_ext.hosts.a1111_fit")
SHAPE = (4, 8, 8)
PICTURE = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(9))


def prior(shape=SHAPE, sigma_trunc=3.0, checkpoint="abc123"):
    size = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(size, 5, generator=generator))[0]
    tensors = gaussian_tensors(torch.full((size,), 0.5), axes, torch.linspace(2, 0.5, 5))
    made = get_prior("lowrank")(tensors, shape, residual=0.4, sigma_trunc=sigma_trunc, sigma_max=14.6146)
    made.card = {"a1111": {"checkpoint": checkpoint}} if checkpoint else {}
    rows = ((1.4, -0.4), (1.3, -0.2, -0.1), (1.1, -0.1), (1.0,))
    made.plans = {"fidelity": {4: Plan((3.3, 1.7, 0.8, 0.2, 0.0), (3, 3, 2, 1), (5.0, 8.0), rows)}}
    return made


@pytest.fixture(params=["a1111", "forge", "reforge"])
def flavour(request):
    return request.param


@pytest.fixture
def ui(monkeypatch, tmp_path, caplog, flavour="a1111"):
    yield from start(monkeypatch, tmp_path, caplog, flavour)


@pytest.fixture
def each_ui(monkeypatch, tmp_path, caplog, flavour):
    yield from start(monkeypatch, tmp_path, caplog, flavour)


def start(monkeypatch, tmp_path, caplog, flavour):
    caplog.set_level(logging.INFO, logger="tdpm_ext")
    program = WebUI(monkeypatch, tmp_path, flavour)
    (tmp_path / "models" / "tdpm").mkdir(parents=True)
    tdpm_ext.save_prior(prior(), tmp_path / "models" / "tdpm" / "one.safetensors")
    with a1111.install():
        yield program


def ordinary(job, sigmas, x):
    """The built-in solver on the host's own sigmas, with the job's conditions."""
    model, network = job.sampler.model_wrap_cfg, Network()

    def denoise(x, sigma):
        if job.mask is not None:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(denoise.step))
            x = x * job.nmask + (model.init_latent + noise * sigma.view(-1, 1, 1, 1)) * job.mask
        without = network(x, sigma, job.uncond)
        denoised = without + job.cfg_scale * (network(x, sigma, job.cond) - without)
        denoise.step += 1
        return denoised if job.mask is None else denoised * job.nmask + model.init_latent * job.mask

    denoise.step = 0
    return solve(denoise, x, sigmas, disable=True)


# -- fresh noise -----------------------------------------------------------------------------------------------------


def test_text_to_image_starts_from_the_priors_draw_of_the_seeds(each_ui, caplog):
    job = Job(each_ui, seeds=(5, 6))
    made, calls = job.run(), each_ui.shared.sd_model.calls
    wanted = prior().start(seeded_noise(SHAPE, [5, 6]), 3.3, (5.0, 8.0))[0]
    torch.testing.assert_close(calls[0][0], wanted, rtol=1e-4, atol=1e-4)
    assert [sigma for _, sigma in calls] == pytest.approx([3.3, 1.7, 0.8, 0.2])
    assert job.sampler.steps_seen == [0, 1, 2, 3] and made.isfinite().all()
    assert job.comments == {} and "prior used, sigma_trunc=3.3, 4 calls" in caplog.text


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_the_network_is_called_as_often_as_steps_were_asked_for(ui, steps):
    for schedule in ("prior", "respace", "cut"):
        ui.shared.opts.tdpm_schedule = schedule
        ui.shared.sd_model.calls.clear()
        job = Job(ui, steps=steps)
        job.run()
        count = len(ui.shared.sd_model.calls)
        assert count == steps or (schedule == "cut" and count < steps)
        assert job.sampler.steps_seen[-1] == steps - 1, "the bar fills"


def test_the_wider_noise_of_sgm_models_gives_the_same_picture(ui):
    plain = Job(ui, seeds=(1,)).run()
    ui.shared.opts.sgm_noise_multiplier = True
    torch.testing.assert_close(Job(ui, seeds=(1,)).run(), plain, rtol=0.01, atol=0.02)


def test_a_seed_is_a_picture_alone_and_in_a_batch_and_again(each_ui):
    together = Job(each_ui, seeds=(1, 2, 3, 4)).run()
    alone = torch.cat([Job(each_ui, seeds=(seed,)).run() for seed in (1, 2, 3, 4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(together, Job(each_ui, seeds=(1, 2, 3, 4)).run())


# -- when the prior stays out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.25, 0.75, 1.0])
def test_image_to_image_is_ordinary_on_the_hosts_sigmas(each_ui, strength):
    job = Job(each_ui, seeds=(1, 2), picture=PICTURE, denoising_strength=strength, steps=8)
    made = job.run()
    count = int(min(strength, 0.999) * 8) + 1
    sigmas = karras(8, 14.6146, 0.0292).float()[-count - 1 :]
    assert [sigma for _, sigma in each_ui.shared.sd_model.calls] == pytest.approx(sigmas[:-1].tolist())
    wanted = ordinary(job, sigmas, PICTURE + seeded_noise(SHAPE, [1, 2]) * sigmas[0])
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    below = "below sigma_trunc" if sigmas[0] < 3 else "image to image"
    assert below in next(iter(job.comments)) and job.extra_generation_params["TDPM prior"] == "none"


def test_what_a_mask_keeps_is_kept(each_ui):
    mask = (torch.arange(8) > 3).float().expand(1, 1, 8, 8)
    job = Job(each_ui, picture=PICTURE, mask=mask, denoising_strength=1.0)
    made, sigmas = job.run(), karras(4, 14.6146, 0.0292).float()
    wanted = ordinary(job, sigmas, PICTURE + seeded_noise(SHAPE, [0]) * sigmas[0])
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    assert (made - PICTURE)[..., 4:].abs().max() < 1e-5
    assert "tdpm: prior not used: a mask keeps part of the picture" in job.comments


def test_the_second_pass_keeps_the_first_ones_picture_and_parameters(each_ui):
    first = Job(each_ui).run()
    each_ui.shared.sd_model.calls.clear()
    job = Job(each_ui, enable_hr=True, denoising_strength=0.999, steps=4)
    job.run()
    x, sigma = each_ui.shared.sd_model.calls[4]
    assert sigma == pytest.approx(14.6146, rel=1e-4), "the whole chain, above sigma_trunc"
    assert ((x - first) / sigma).std() == pytest.approx(1, abs=0.1)
    assert job.extra_generation_params["TDPM prior"] == "one.safetensors" and job.comments == {}
    assert len(each_ui.shared.sd_model.calls) == 8


@pytest.mark.parametrize(
    ("sigmas", "reason"),
    [
        ([2.0, 0.5, 0.0], "starts at sigma 2, below sigma_trunc"),
        ([14.6, 9.0, 6.0], "ends at sigma 6, not below sigma_trunc"),
        ([0.1, 1.0, 14.6], "do not fall strictly"),
    ],
)
def test_other_schedules_run_as_they_are(ui, sigmas, reason):
    job = Job(ui, sampler_noise_scheduler_override=lambda steps: torch.tensor(sigmas))
    made = job.run()
    assert [sigma for _, sigma in ui.shared.sd_model.calls] == pytest.approx(sigmas[:-1])
    wanted = ordinary(job, torch.tensor(sigmas), seeded_noise(SHAPE, [0]) * sigmas[0])
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    assert reason in next(iter(job.comments))


def test_a_flow_model_is_left_to_the_ordinary_solver(ui):
    ui.shared.sd_model = Network("const")
    job = Job(ui)
    assert job.run().isfinite().all() and "rectified-flow" in next(iter(job.comments))


def test_interruption_escapes_and_the_last_picture_remains(each_ui):
    job = Job(each_ui, stop_at=1)
    made = job.run()
    assert len(each_ui.shared.sd_model.calls) == 3 and torch.equal(made, job.sampler.last_latent)
    each_ui.shared.state.interrupted = True
    with pytest.raises(Interrupted):
        a1111.sample_tdpm(job.sampler.model_wrap_cfg, made, torch.tensor([14.6, 1.0, 0.0]), {
            "cond": job.cond, "uncond": job.uncond, "cond_scale": 2.0, "s_min_uncond": 0.0, "image_cond": None,
        })  # fmt: skip


# -- settings and what a picture records ------------------------------------------------------------------------------


def test_a_picture_is_made_again_from_its_parameters(ui):
    ui.shared.opts.tdpm_prior, ui.shared.opts.tdpm_objective = "one.safetensors", "quality"
    for trunc in (0.0, 2.5):
        ui.shared.opts.tdpm_sigma_trunc = trunc
        job = Job(ui)
        made, told = job.run(), job.extra_generation_params
        assert told["TDPM prior"] == "one.safetensors" and len(told["TDPM prior hash"]) == 10
        assert float(told["TDPM sigma trunc"]) == (trunc or 3.0) and told["TDPM objective"] == "quality"
        ui.shared.opts.tdpm_prior, ui.shared.opts.tdpm_objective, ui.shared.opts.tdpm_sigma_trunc = (
            "none",
            "fidelity",
            9,
        )
        assert not torch.equal(made, Job(ui).run())
        ui.paste(told)
        assert torch.equal(made, Job(ui).run())


def test_the_calibrated_plan_is_made_again_although_sigma_trunc_is_recorded(ui):
    job = Job(ui)
    made = job.run()
    ui.paste(job.extra_generation_params)
    assert ui.shared.opts.tdpm_sigma_trunc == 3.3 and torch.equal(made, Job(ui).run())


def folder(ui):
    return ui.folder / "models" / "tdpm"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("gone.safetensors", "models/tdpm has no file gone.safetensors"),
        ("../one.safetensors", "models/tdpm has no file ../one.safetensors"),
        ("broken.safetensors", "broken.safetensors: not a readable"),
        ("other.safetensors", "was fitted for checkpoint 999999, and abc123 is loaded"),
        ("large.safetensors", r"x has shape (4, 8, 8) and the prior was fitted for (4, 16, 16)"),
    ],
)
def test_a_prior_that_cannot_be_used_is_said_below_a_finished_picture(ui, setting, reason, caplog):
    (folder(ui) / "broken.safetensors").write_bytes((folder(ui) / "one.safetensors").read_bytes()[:300])
    tdpm_ext.save_prior(prior(checkpoint="999999"), folder(ui) / "other.safetensors")
    tdpm_ext.save_prior(prior((4, 16, 16)), folder(ui) / "large.safetensors")
    ui.shared.opts.tdpm_prior = setting
    job = Job(ui)
    made, sigmas = job.run(), karras(4, 14.6146, 0.0292).float()
    torch.testing.assert_close(made, ordinary(job, sigmas, seeded_noise(SHAPE, [0]) * sigmas[0]), rtol=1e-5, atol=1e-5)
    assert len(job.comments) == 1 and reason in next(iter(job.comments))
    assert caplog.text.count("prior not used") == 1 and reason in caplog.text
    assert job.extra_generation_params["TDPM prior"] == "none"


def test_automatic_takes_the_only_prior_made_for_the_checkpoint(ui):
    tdpm_ext.save_prior(prior(checkpoint="999999"), folder(ui) / "other.safetensors")
    tdpm_ext.save_prior(prior(checkpoint=None), folder(ui) / "elsewhere.safetensors")
    tdpm_ext.save_prior(prior((4, 16, 16)), folder(ui) / "large.safetensors")
    job = Job(ui)
    job.run()
    assert job.extra_generation_params["TDPM prior"] == "one.safetensors"
    tdpm_ext.save_prior(prior(), folder(ui) / "two.safetensors")
    job = Job(ui)
    job.run()
    assert "2 priors fit this checkpoint at 4x8x8 (one.safetensors, two.safetensors)" in next(iter(job.comments))
    ui.shared.opts.tdpm_prior = "elsewhere.safetensors"  # made in another program: taken when it is named
    job = Job(ui)
    job.run()
    assert job.extra_generation_params["TDPM prior"] == "elsewhere.safetensors"


def test_none_is_the_ordinary_solver_without_a_word(ui):
    ui.shared.opts.tdpm_prior = "none"
    job = Job(ui)
    made, sigmas = job.run(), karras(4, 14.6146, 0.0292).float()
    torch.testing.assert_close(made, ordinary(job, sigmas, seeded_noise(SHAPE, [0]) * sigmas[0]), rtol=1e-5, atol=1e-5)
    assert job.comments == {} and job.extra_generation_params == {"TDPM prior": "none"}


def test_the_settings_list_the_files(ui):
    info = ui.shared.opts.data_labels["tdpm_prior"]
    assert info.component_args()["choices"] == ["automatic", "none", "one.safetensors"]
    assert info.section == ("tdpm", "TDPM") and info.infotext == "TDPM prior"


def test_an_old_web_ui_without_settings_in_parameters_works(monkeypatch, tmp_path):
    ui = WebUI(monkeypatch, tmp_path, old_settings=True)
    with a1111.install():
        assert Job(ui).run().isfinite().all() and ui.shared.opts.data_labels["tdpm_prior"].infotext is None


# -- listed, and taken away ------------------------------------------------------------------------------------------


def state(ui):
    samplers = ui.sd_samplers
    lists = (list(samplers.all_samplers), dict(samplers.all_samplers_map), dict(samplers.samplers_map))
    return (*lists, ui.names(), dict(ui.shared.opts.data), dict(ui.shared.opts.data_labels))


def test_undo_restores_every_list_and_setting(monkeypatch, tmp_path):
    ui = WebUI(monkeypatch, tmp_path)
    handlers = list(a1111.log.handlers)
    before, unknown = state(ui), ui.sd_samplers.get_sampler_and_scheduler("tdpm", "Karras")
    assert unknown[0] == "Euler"
    handle = a1111.install()
    assert ui.names() == ["Euler", "DPM fast", "tdpm"] and ui.sd_samplers.samplers_map["k_tdpm"] == "tdpm"
    assert ui.sd_samplers.get_sampler_and_scheduler("tdpm", "Karras")[0] == "tdpm", "no memory of the unknown name"
    handle.undo()
    assert state(ui) == before and a1111.log.handlers == handlers
    handle.undo()


def test_a_setting_that_the_user_had_saved_stays(monkeypatch, tmp_path):
    ui = WebUI(monkeypatch, tmp_path)
    ui.shared.opts.data["tdpm_prior"] = "mine.safetensors"
    with a1111.install():
        assert ui.shared.opts.tdpm_prior == "mine.safetensors"
    assert ui.shared.opts.data["tdpm_prior"] == "mine.safetensors"


def test_installing_twice_and_reloading_are_harmless(ui):
    assert not a1111.install().active
    importlib.reload(a1111)
    assert not a1111.install().active and ui.names().count("tdpm") == 1
    assert Job(ui).run().isfinite().all()


def test_other_samplers_keep_their_bits(monkeypatch, tmp_path):
    ui = WebUI(monkeypatch, tmp_path)

    def made():
        torch.manual_seed(0)
        return [Job(ui, sampler_name=name).run() for name in ("Euler", "DPM fast")]

    before = made()
    with a1111.install():
        during = made()
    assert all(torch.equal(*pair) for pair in zip(before, during, strict=True))


def test_no_parameter_has_a_name_that_the_host_fills(ui):
    names = set(inspect.signature(a1111.sample_tdpm).parameters)
    assert "sigmas" in names and not names & {"n", "eta", "sigma_min", "sigma_max", "sigma_sched", "s_noise"}


def test_outside_of_the_program_it_says_what_to_do():
    with pytest.raises(ImportError, match="not the web UI's Python process.*tdpm install a1111 --path DIR"):
        a1111.install()


# -- the extension's folder ------------------------------------------------------------------------------------------


def test_the_folder_is_copied_run_unloaded_and_removed(monkeypatch, tmp_path, capsys):
    ui = WebUI(monkeypatch, tmp_path)
    (tmp_path / "extensions").mkdir()
    assert main(["install", "a1111", "--path", str(tmp_path)]) == 0
    script = tmp_path / "extensions" / "tdpm" / "scripts" / "tdpm.py"
    assert folder(ui).is_dir()
    runpy.run_path(str(script))
    assert "tdpm" in ui.names()
    for undo in ui.unloaded:
        undo()
    assert "tdpm" not in ui.names()
    assert main(["uninstall", "a1111", "--path", str(tmp_path)]) == 0
    assert not script.exists() and not (tmp_path / "extensions" / "tdpm").exists()
    assert main(["install", "a1111", "--path", str(tmp_path / "models")]) == 1
    assert "has no folder extensions" in capsys.readouterr().err


def test_the_script_fits_a_prior_under_the_jobs_prompt_and_uses_it(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tdpm_ext")
    ui = WebUI(monkeypatch, tmp_path)
    source = resources.files("tdpm_ext.hosts") / "a1111_extension" / "scripts" / "tdpm.py"
    script = runpy.run_path(str(source))["Script"]()
    assert script.title() == "Fit TDPM prior" and script.show(is_img2img=False) and not script.show(is_img2img=True)
    assert len(script.ui(is_img2img=False)) == 2
    quick = functools.partial(a1111_fit.request, budgets=(4,), samples=4)
    monkeypatch.setattr(a1111_fit, "request", quick)
    job = Job(ui, seeds=(0, 1, 2), sampler_name="Euler", n_iter=5)
    made = script.run(job, "cats", 33)  # not a multiple of the batch
    fitted = tdpm_ext.load_prior(folder(ui) / "cats.safetensors")
    assert fitted.shape == SHAPE and fitted.card["cond_scale"] == 2.0
    assert fitted.card["a1111"] == {"checkpoint": "abc123"}
    assert job.extra_generation_params["TDPM prior"] == "cats.safetensors"
    assert fitted.tensors["mean"].mean() == pytest.approx(1.0, abs=0.25), "guided beyond the prompt's mean of 0.4"
    assert torch.equal(made, Job(ui, seeds=(0, 1, 2)).run()), "found by itself from now on"
    for name in ("", "a/b", "automatic"):
        with pytest.raises(ValueError, match="cannot be the name of a prior"):
            script.run(job, name, 64)
    for undo in ui.unloaded:
        undo()
