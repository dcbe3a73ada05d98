"""The real ComfyUI in this process: its folder is named by COMFYUI, and `make test-hosts` says where one is."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).parent
collect_ignore_glob = [] if os.environ.get("COMFYUI") else ["test_comfyui_*.py"]
SIZE = (4, 8, 8)


@dataclass
class Run:
    """One job: what came out, at which sigmas the model was called, what the progress bar and the log showed."""

    samples: torch.Tensor
    sigmas: list[float] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    told: list[torch.Tensor] = field(default_factory=list)
    bar: list[tuple[int, int]] = field(default_factory=list)
    previews: int = 0
    log: list[str] = field(default_factory=list)

    @property
    def used_prior(self) -> bool:
        return any("prior used" in line for line in self.log)


class Lines(logging.Handler):
    """Keeps the lines of our log."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class ComfyUI:
    """Jobs as its own nodes run them."""

    def __init__(self):
        import comfy.k_diffusion.sampling
        import comfy.model_management
        import comfy.samplers
        import comfy.utils
        import folder_paths
        import nodes

        self.samplers, self.sampling, self.utils = comfy.samplers, comfy.k_diffusion.sampling, comfy.utils
        self.nodes, self.folder_paths, self.management = nodes, folder_paths, comfy.model_management
        self.tiny = load("tiny_model")

    def latent(self, batch=1, size=SIZE, picture=None, mask=None, **more):
        """A LATENT as nodes pass it, in the VAE's units."""
        samples = torch.zeros(batch, *size) if picture is None else picture
        return {"samples": samples, **({} if mask is None else {"noise_mask": mask}), **more}

    def picture(self, batch=1, size=SIZE):
        """A LATENT's samples that hold a picture."""
        noise = torch.randn(batch, *size, generator=torch.Generator().manual_seed(99))
        return noise * self.tiny.DATA_STD / 0.18215

    def controlled(self, conditioning, end: float):
        """The prompt with a ControlNet on it, as ControlNetApplyAdvanced puts it there."""
        import comfy.cldm.cldm
        import comfy.controlnet
        import comfy.ops

        config = dict(self.tiny.tiny_model().model.model_config.unet_config)
        for name in ("out_channels", "transformer_depth_output", "dtype"):
            del config[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = comfy.cldm.cldm.ControlNet(
                hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config
            )
            for parameter in model.parameters():
                scale = 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
                torch.nn.init.normal_(parameter, 0.0, scale)
        control = comfy.controlnet.ControlNet(model.eval(), load_device=torch.device("cpu"))
        apply = self.nodes.ControlNetApplyAdvanced()
        hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
        return apply.apply_controlnet(conditioning, self.tiny.conditioning(2), control, hint, 3.0, 0.0, end)[0]

    def with_lora(self, model):
        """The MODEL with a LoRA on one attention layer, loaded as ComfyUI loads LoRA files."""
        import comfy.sd

        name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0"
        generator = torch.Generator().manual_seed(3)
        weights = {
            f"{name}.lora_up.weight": 10 * torch.randn(64, 4, generator=generator),
            f"{name}.lora_down.weight": torch.randn(4, 64, generator=generator),
        }
        patched, _ = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0.0)
        assert patched.patches
        return patched

    def watched(self, model, run: Run):
        """A clone of the MODEL that notes every call of the network."""

        def note(apply_model, call):
            run.sigmas.append(float(call["timestep"][0]))
            run.inputs.append(call["input"].clone())
            run.told.append(call["c"]["transformer_options"]["sample_sigmas"])
            return apply_model(call["input"], call["timestep"], **call["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(note)
        return model

    def job(self, work, run: Run | None = None):
        """``work()`` with the progress bar and the log noted."""
        run = Run(None) if run is None else run

        def hook(value, total, preview, node_id=None):
            run.bar.append((value, total))
            run.previews += preview is not None

        lines, logger = Lines(), logging.getLogger("tdpm_ext")
        level = logger.level
        logger.addHandler(lines)
        logger.setLevel(logging.INFO)
        self.utils.set_progress_bar_global_hook(hook)
        try:
            with torch.inference_mode():  # as ComfyUI runs its nodes
                run.samples = work()
        finally:
            self.utils.set_progress_bar_global_hook(None)
            logger.removeHandler(lines)
            logger.setLevel(level)
            run.log = lines.lines
        return run

    def ksampler(self, model, latent=None, *, sampler="tdpm", scheduler="normal", steps=4, cfg=1.0, seed=5, **more):
        """The nodes KSampler and KSampler (Advanced)."""
        run = Run(None)
        positive, negative = more.pop("positive", self.tiny.conditioning(1)), self.tiny.conditioning(2)
        given = (seed, steps, cfg, sampler, scheduler, positive, negative, latent or self.latent())
        return self.job(lambda: self.nodes.common_ksampler(self.watched(model, run), *given, **more)[0]["samples"], run)

    def custom(self, model, sampler, sigmas, latent=None, *, cfg=1.0, seed=5, add_noise=True):
        """The node SamplerCustom."""
        from comfy_extras.nodes_custom_sampler import SamplerCustom

        run = Run(None)
        conds = (self.tiny.conditioning(1), self.tiny.conditioning(2))

        def work():
            given = (add_noise, seed, cfg, *conds, sampler, sigmas, latent or self.latent())
            output = SamplerCustom.execute(self.watched(model, run), *given)
            return output.args[0]["samples"]

        return self.job(work, run)


def load(name: str):
    """A module of this folder. ComfyUI has a package ``tests`` of its own, so it is not imported by that name."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def module_here():
    """``module_here("server")``: a module of this folder."""
    return load


@pytest.fixture(scope="session")
def serving():
    """The real server and a real browser."""
    return load("server")


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    """ComfyUI on the CPU, with an empty base folder of its own and the sampler installed."""
    sys.path.append(str(Path(os.environ["COMFYUI"]).resolve()))
    from comfy.cli_args import args

    args.cpu, args.base_directory = True, str(tmp_path_factory.mktemp("comfyui"))
    import folder_paths

    for name in ("input", "models", "output", "user"):
        Path(folder_paths.base_path, name).mkdir(exist_ok=True)
    world = ComfyUI()
    from tdpm_ext.hosts import install

    world.handle = install("comfyui")
    yield world
    world.handle.undo()


@pytest.fixture(scope="session")
def tiny(comfy):
    """A MODEL and a prior that fits it, by hand: the tiny model's pictures are Gaussian."""
    from tdpm_ext.fit import fit_prior
    from tdpm_ext.hosts.comfyui_model import facts_of
    from tdpm_ext.hosts.comfyui_nodes import with_prior
    from tdpm_ext.hosts.comfyui_priors import Pick

    model = comfy.tiny.tiny_model()
    data = torch.randn(600, *SIZE, generator=torch.Generator().manual_seed(0)) * comfy.tiny.DATA_STD
    prior = fit_prior("gaussian", data, sigma_max=14.6146, progress=False)
    facts = facts_of(model)
    prior.card |= {"checkpoint": facts.checkpoint}
    prior.card["comfyui"] = {name: getattr(facts, name) for name in ("family", "latent", "prediction")}
    pick = Pick("tiny.safetensors", prior)
    return SimpleNamespace(bare=model, prior=prior, pick=pick, model=with_prior(model, pick))


@pytest.fixture
def folder(comfy):
    """``models/tdpm``, empty before and after."""
    path = Path(comfy.folder_paths.get_folder_paths("tdpm")[0])
    path.mkdir(parents=True, exist_ok=True)
    yield path
    for file in path.iterdir():
        file.unlink()
