"""A tiny model as ComfyUI's own classes build it: a two-level SD 1.5 UNet, and around it the answer for a Gaussian.

Also a custom node for the real server: copied into ``custom_nodes``, it adds "Tiny Model", which gives a MODEL and two
CONDITIONINGs without any file.
"""

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

DATA_STD = 0.6  # of the pictures that the model was, so to speak, trained on
CONTEXT = (1, 77, 16)


class TinyUNet(UNetModel):
    """A random UNet's output, small, added to what is exact for Gaussian latents of std ``DATA_STD``."""

    def __init__(self, *args, sigmas=None, prediction="eps", **kwargs):
        super().__init__(*args, **kwargs)
        self.table, self.prediction = sigmas, prediction

    def _forward(self, x, timesteps=None, *args, **kwargs):
        rough = 0.05 * super()._forward(x, timesteps, *args, **kwargs)
        if self.prediction == "flow":
            return rough - x
        sigma = self.table[timesteps.long()].view(-1, 1, 1, 1)
        width = (sigma**2 + 1).sqrt()
        denoised = x * width * DATA_STD**2 / (DATA_STD**2 + sigma**2)
        if self.prediction == "v":
            return rough + (x / width - denoised) * width / sigma
        return rough + (x * width - denoised) / sigma


def unet_config():
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "context_dim": CONTEXT[2],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }


def tiny_model(seed=0, prediction="eps", family=None):
    """A ``ModelPatcher`` around a random two-level UNet; ``prediction`` is eps, v or flow."""
    config = (family or comfy.supported_models.SD15)(unet_config())
    config.set_inference_dtype(torch.float32, None)
    kind = {"eps": "EPS", "v": "V_PREDICTION", "flow": "FLOW"}[prediction]
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    sigmas = ((1 - alphas) / alphas).sqrt().float()

    def unet(**options):
        return TinyUNet(sigmas=sigmas, prediction=prediction, **options)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType[kind], device="cpu", unet_model=unet)
        for parameter in model.diffusion_model.parameters():  # no layer of ComfyUI starts with values
            scale = 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
            torch.nn.init.normal_(parameter, 0.0, scale)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def conditioning(seed=0):
    """One prompt, as a text encoder would give it."""
    return [[torch.randn(CONTEXT, generator=torch.Generator().manual_seed(seed)), {}]]


class TinyModel:
    CATEGORY = "testing"
    FUNCTION = "make"
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("model", "positive", "negative")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0, "min": 0, "max": 2**32})}}

    def make(self, seed):
        return tiny_model(seed), conditioning(1), conditioning(2)


NODE_CLASS_MAPPINGS = {"TinyModel": TinyModel}
NODE_DISPLAY_NAME_MAPPINGS = {"TinyModel": "Tiny Model"}
