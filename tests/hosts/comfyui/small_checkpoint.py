"""A checkpoint file that ComfyUI's own loader takes for SD 1.5: random weights, and a UNet of two narrow levels.

The text encoder has its full size, because ComfyUI allows no other; of the VAE only the decoder is there.
"""

import comfy.ldm.models.autoencoder
import comfy.ldm.modules.diffusionmodules.openaimodel as unet
import comfy.ops
import comfy.sd1_clip
import torch
from safetensors.torch import save_file

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "num_head_channels": -1,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}
DECODER = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
DECODER |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
OPERATIONS = comfy.ops.disable_weight_init


def write(path) -> None:
    """About 400 MB of half-precision weights."""
    clip = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32)
    parts = {
        "model.diffusion_model.": unet.UNetModel(**UNET, operations=OPERATIONS),
        "first_stage_model.": comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=DECODER, embed_dim=4),
        "cond_stage_model.transformer.": clip.transformer,
    }
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for prefix, part in parts.items():
        for name, value in part.state_dict().items():
            if name.startswith(("encoder.", "quant_conv.", "text_projection")) or not value.is_floating_point():
                continue
            ones = value.ndim == 1 and name.endswith("weight")  # of norms
            width = value[0].numel() ** 0.5 if value.ndim > 1 else 50.0
            drawn = torch.randn(value.shape, generator=generator) / width + ones
            tensors[prefix + name] = drawn.half()
    save_file(tensors, path)
