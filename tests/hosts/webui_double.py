"""A stand-in for A1111's web UI, Forge and reForge, which no package index carries.

It was written from reading those programs and keeps their contract with a sampler: how samplers are listed and made,
which arguments are handed over by a function's parameter names, what hangs on the denoiser, how noise is drawn per
picture, how img2img cuts its sigmas, when interruption raises, and how a picture's parameters set settings again.
Nothing of theirs is copied. ``flavour``: "a1111", "forge" or "reforge".
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections import namedtuple
from types import ModuleType, SimpleNamespace

import torch

from tdpm_ext.schedule import karras, sd_sigmas


class Interrupted(BaseException):
    """The programs' own interruption is a BaseException, too."""


class OptionInfo:
    def __init__(
        self, default=None, label="", component=None, component_args=None, section=None, refresh=None, infotext=None
    ):
        self.default, self.label, self.component, self.section = default, label, component, section
        self.component_args, self.refresh, self.infotext = component_args, refresh, infotext


class OldOptionInfo(OptionInfo):
    """Before settings could name their place in a picture's parameters."""

    def __init__(self, default=None, label="", component=None, component_args=None, section=None, refresh=None):
        super().__init__(default, label, component, component_args, section, refresh)


class Options:
    """Settings as attributes; only known ones can be read."""

    def __init__(self, **values):
        self.__dict__["data_labels"], self.__dict__["data"] = {}, values

    def __getattr__(self, name):
        if name in self.data:
            return self.data[name]
        if name in self.data_labels:
            return self.data_labels[name].default
        raise AttributeError(name)

    def __setattr__(self, name, value):
        self.data[name] = value

    def add_option(self, key, info):
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)


class Rng:
    """Noise for a batch, one generator a picture."""

    def __init__(self, shape, seeds):
        self.shape, self.generators = shape, [torch.Generator().manual_seed(seed) for seed in seeds]

    def next(self):
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])


class Network:
    """The loaded checkpoint: the exact denoiser of a Gaussian; ``cond`` moves its mean."""

    is_sdxl = False

    def __init__(self, kind="epsilon"):
        self.calls: list[tuple[torch.Tensor, float]] = []
        self.sd_checkpoint_info = SimpleNamespace(shorthash="abc123", name="double.safetensors")
        predictor = SimpleNamespace(prediction_type=kind)
        self.forge_objects = SimpleNamespace(unet=SimpleNamespace(model=SimpleNamespace(predictor=predictor)))

    def __call__(self, x, sigma, cond):
        variance = sigma.view(-1, 1, 1, 1) ** 2
        mean = cond.view(-1, 1, 1, 1)
        return mean + (x - mean) * 0.5 / (0.5 + variance) + 0.05 * torch.sin(3 * x)


class CFGDenoiser(torch.nn.Module):
    """What a sampler is given as its model."""

    def __init__(self, sampler, ui):
        super().__init__()
        self.sampler, self.ui = sampler, ui
        self.mask = self.nmask = self.init_latent = self.p = None
        self.step, self.total_steps = 0, None
        self.inner_model = SimpleNamespace(sigmas=sd_sigmas().float(), inner_model=ui.shared.sd_model)
        if ui.flavour == "reforge":  # has ComfyUI's names as well, and leaves them empty
            self.noise = self.latent_image = None

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        if self.ui.shared.state.interrupted:
            raise Interrupted
        if len(x) != len(cond):
            raise RuntimeError(f"{len(x)} rows for {len(cond)} prompts")
        network = self.ui.shared.sd_model
        network.calls.append((x.clone(), float(sigma[0])))
        if self.mask is not None:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(self.step))
            x = x * self.nmask + (self.init_latent + noise * sigma.view(-1, 1, 1, 1)) * self.mask
        without = network(x, sigma, uncond)
        denoised = without + cond_scale * (network(x, sigma, cond) - without)
        if self.mask is not None:
            denoised = denoised * self.nmask + self.init_latent * self.mask
        self.sampler.last_latent = denoised
        self.step += 1
        return denoised


class KDiffusionSampler:
    """Calls a function with the arguments that its parameters name."""

    def __init__(self, function, model, ui):
        self.func, self.ui, self.config, self.last_latent, self.steps_seen = function, ui, None, None, []
        self.model_wrap_cfg = CFGDenoiser(self, ui)

    def sigmas(self, p, steps):
        if p.sampler_noise_scheduler_override is not None:
            return p.sampler_noise_scheduler_override(steps)
        return karras(steps, 14.6146, 0.0292).float()

    def sample(self, p, noise):
        sigmas = self.sigmas(p, p.steps)
        wide = self.ui.shared.opts.sgm_noise_multiplier
        x = noise * ((1 + sigmas[0] ** 2) ** 0.5 if wide else sigmas[0])
        named = {"n": p.steps, "sigmas": sigmas}
        if "sigma_min" in inspect.signature(self.func).parameters:
            named |= {"sigma_min": 0.0292, "sigma_max": 14.6146}
        return self.launch(p, x, named, p.steps)

    def sample_img2img(self, p, latent, noise):
        steps = p.steps
        t_enc = int(min(p.denoising_strength, 0.999) * steps)
        sigmas = self.sigmas(p, steps)[steps - t_enc - 1 :]
        self.model_wrap_cfg.init_latent = latent
        named = {"n": len(sigmas) - 1, "sigma_sched": sigmas, "sigmas": sigmas}
        return self.launch(p, latent + noise * sigmas[0], named, t_enc + 1)

    def launch(self, p, x, named, steps):
        model, parameters = self.model_wrap_cfg, inspect.signature(self.func).parameters
        model.p, model.mask, model.nmask = p, p.mask, p.nmask
        model.step, model.total_steps, self.last_latent = 0, steps, x
        given = {name: value for name, value in {**named, "eta": 1.0}.items() if name in parameters}
        extra_args = {
            "cond": p.cond,
            "image_cond": None,
            "uncond": p.uncond,
            "cond_scale": p.cfg_scale,
            "s_min_uncond": 0.0,
        }

        def seen(info):
            self.steps_seen.append(info["i"])
            if p.stop_at is not None and info["i"] > p.stop_at:
                raise Interrupted

        try:
            return self.func(model, x, extra_args=extra_args, disable=False, callback=seen, **given)
        except Interrupted:
            return self.last_latent


class Job:
    """A processing job: text to image, or image to image when it has a picture; hires adds a second pass."""

    def __init__(self, ui, seeds=(0,), **settings):
        self.ui, self.all_seeds = ui, list(seeds)
        self.sampler_name, self.steps, self.cfg_scale, self.denoising_strength = "tdpm", 4, 2.0, 0.75
        self.picture = self.mask = self.nmask = self.stop_at = self.sampler_noise_scheduler_override = None
        self.enable_hr = self.is_hr_pass = False
        self.extra_generation_params, self.comments = {}, {}
        self.shape = (4, 8, 8)
        self.__dict__.update(settings)
        self.cond, self.uncond = torch.full((len(seeds),), 0.4), torch.full((len(seeds),), -0.2)
        if self.mask is not None:
            self.nmask = 1 - self.mask

    @property
    def sd_model(self):
        return self.ui.shared.sd_model

    def comment(self, text):
        self.comments[text] = 1

    def run(self):
        """The latents [B, ...]."""
        rng = Rng(self.shape, self.all_seeds)
        self.sampler = self.ui.sd_samplers.create_sampler(self.sampler_name, self.ui.shared.sd_model)
        if self.picture is not None:
            return self.sampler.sample_img2img(self, self.picture.expand(len(self.all_seeds), -1, -1, -1), rng.next())
        x = self.sampler.sample(self, rng.next())
        if self.enable_hr:
            self.is_hr_pass = True
            self.sampler = self.ui.sd_samplers.create_sampler(self.sampler_name, self.ui.shared.sd_model)
            x = self.sampler.sample_img2img(self, x, rng.next())
        return x


class WebUI:
    """The program: ``modules`` as it is imported, settings, and settings from a picture's parameters."""

    def __init__(self, monkeypatch, folder, flavour="a1111", old_settings=False):
        self.flavour, self.folder, self.unloaded = flavour, folder, []
        names = ("shared", "paths", "scripts", "script_callbacks", "processing")
        names += ("sd_samplers", "sd_samplers_common", "sd_samplers_kdiffusion")
        root = ModuleType("modules")
        root.__path__ = []
        monkeypatch.setitem(sys.modules, "modules", root)
        for name in names:
            module = ModuleType(f"modules.{name}")
            setattr(root, name, module)
            setattr(self, name, module)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        gradio = ModuleType("gradio")
        for name in ("Dropdown", "Number", "Radio", "Textbox", "Slider"):
            setattr(gradio, name, functools.partial(SimpleNamespace, widget=name))
        monkeypatch.setitem(sys.modules, "gradio", gradio)
        self._fill(old_settings)

    def _fill(self, old_settings):
        self.paths.models_path = str(self.folder / "models")
        self.shared.opts = Options(sgm_noise_multiplier=False, hide_samplers=[])
        self.shared.OptionInfo = OldOptionInfo if old_settings else OptionInfo
        self.shared.state = SimpleNamespace(interrupted=False)
        self.shared.sd_model = Network()
        self.scripts.Script = type("Script", (), {})
        self.script_callbacks.on_script_unloaded = self.unloaded.append
        self.processing.process_images = lambda job: job.run()

        class SamplerData(namedtuple("SamplerData", "name constructor aliases options")):
            pass

        self.sd_samplers_common.SamplerData = SamplerData
        self.sd_samplers_kdiffusion.KDiffusionSampler = lambda function, model: KDiffusionSampler(function, model, self)
        sampling = importlib.import_module("k_diffusion.sampling")
        builtin = [
            SamplerData(label, lambda model, f=function: KDiffusionSampler(f, model, self), [alias], {})
            for label, function, alias in (
                ("Euler", sampling.sample_euler, "k_euler"),
                ("DPM fast", sampling.sample_dpm_fast, "k_dpm_fast"),
            )
        ]
        ui = self.sd_samplers
        ui.all_samplers, ui.samplers_map = builtin, {}
        ui.all_samplers_map = {data.name: data for data in builtin}

        def set_samplers():
            ui.samplers = ui.samplers_for_img2img = ui.all_samplers
            ui.samplers_map.clear()
            for data in ui.all_samplers:
                for name in (data.name, *data.aliases):
                    ui.samplers_map[name.lower()] = data.name

        def create_sampler(name, model):
            config = ui.all_samplers_map.get(name)
            assert config is not None, f"bad sampler name: {name}"
            sampler = config.constructor(model)
            sampler.config = config
            return sampler

        @functools.cache
        def get_sampler_and_scheduler(sampler_name, scheduler_name):
            return ui.all_samplers_map.get(sampler_name, ui.samplers[0]).name, scheduler_name

        ui.set_samplers, ui.create_sampler = set_samplers, create_sampler
        ui.get_sampler_and_scheduler = get_sampler_and_scheduler
        set_samplers()

    def names(self):
        return [data.name for data in self.sd_samplers.samplers]

    def paste(self, parameters):
        """Set what a picture's parameters say, as text, where a setting names its place in them."""
        for key, info in self.shared.opts.data_labels.items():
            text = parameters.get(info.infotext) if info.infotext else None
            if text is not None:
                setattr(self.shared.opts, key, type(info.default)(text))
