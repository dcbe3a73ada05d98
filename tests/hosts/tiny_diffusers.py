"""Tiny diffusers pipelines, built here with random weights: real classes, small numbers."""

from __future__ import annotations

import json

import torch
from diffusers import AutoencoderKL, ConfigMixin, EulerDiscreteScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tdpm_ext.ideal import IdealDenoiser
from tdpm_ext.priors.closed_form import ClosedFormPrior, gaussian_tensors
from tdpm_ext.priors.registry import get_prior
from tdpm_ext.schedule import index_to_sigma, sd_sigmas

LATENTS = (4, 8, 8)
SD_TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(folder) -> CLIPTokenizer:
    """A tokenizer that knows single letters."""
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def scheduler(prediction: str = "epsilon", **options) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**{**SD_TABLE, "steps_offset": 1, "prediction_type": prediction, **options})


def unet(width: int = 16, **options) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


class ExactUNet(ModelMixin, ConfigMixin):
    """The exact denoiser of a few made-up latents, behind a U-Net's call: what a perfectly trained one would answer.

    Embeddings filled with k ask for class k of three; any other number is no condition.
    """

    @register_to_config
    def __init__(
        self, prediction: str = "epsilon", in_channels: int = 4, sample_size: int = 8, time_cond_proj_dim=None
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        coarse = torch.randn(600, in_channels, 2, 2, generator=generator)
        latents = torch.nn.functional.interpolate(coarse, size=sample_size, mode="bilinear")
        self.ideal = IdealDenoiser(latents, torch.arange(600) % 3)
        self.register_buffer("table", sd_sigmas())

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **_):
        sigma = index_to_sigma(float(timestep.flatten()[0]), self.table)
        x = sample.float() * (sigma**2 + 1) ** 0.5
        denoised = self.ideal(x, torch.tensor(sigma), encoder_hidden_states.flatten(1)[:, 0].round().long())
        out = {
            "epsilon": (x - denoised) / sigma,
            "v_prediction": (x / (sigma**2 + 1) - denoised) * (sigma**2 + 1) ** 0.5 / sigma,
            "sample": denoised,
        }[self.config.prediction]
        return (out.to(sample.dtype),)


def asking(label: int, rows: int = 1, width: int = 16) -> dict:
    """Arguments that ask ``ExactUNet`` for one class."""
    filled = [torch.full((rows, 4, width), float(value)) for value in (label, 9)]
    return {"prompt_embeds": filled[0], "negative_prompt_embeds": filled[1]}


def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def text_encoder(width: int = 16, cls=CLIPTextModel):
    torch.manual_seed(2)
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPTextConfig(vocab_size=54, max_position_embeddings=16, projection_dim=width, **sizes, **ends)
    return cls(config).eval()


def sd(cls, folder, prediction: str = "epsilon", **replaced):
    """A pipeline with the parts of Stable Diffusion 1 and 2."""
    parts = {
        "unet": unet(),
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(folder),
        "scheduler": scheduler(prediction),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return quiet(cls(**{**parts, **replaced}))


def sdxl(cls, folder, prediction: str = "epsilon", **replaced):
    """A pipeline with the parts of SDXL."""
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    words = tokenizer(folder)
    parts = {
        "unet": unet(32, **extra, projection_class_embeddings_input_dim=6 * 4 + 16),
        "vae": vae(),
        "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(cls=CLIPTextModelWithProjection),
        "tokenizer": words,
        "tokenizer_2": words,
        "scheduler": scheduler(prediction),
    }
    return quiet(cls(**{**parts, **replaced}))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prior(shape=LATENTS, sigma_trunc: float = 4.0, seed: int = 0, checkpoint: str | None = None) -> ClosedFormPrior:
    """A Gaussian prior of the given shape, made up."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    mean = torch.randn(size, generator=generator) * 0.3
    axes = torch.linalg.qr(torch.randn(size, 6, generator=generator))[0]
    tensors = gaussian_tensors(mean, axes, torch.linspace(3, 0.5, 6))
    made = get_prior("lowrank")(tensors, shape, residual=0.4, sigma_trunc=sigma_trunc, sigma_max=14.6146)
    made.card = {"source": "pictures", "checkpoint": checkpoint}
    return made


class Calls:
    """Counts the network's calls and keeps their inputs: (input, timestep)."""

    def __init__(self, network: torch.nn.Module):
        self.seen: list[tuple[torch.Tensor, float]] = []
        self._hook = network.register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(self, module, args, kwargs) -> None:
        self.seen.append((args[0].clone(), float(torch.as_tensor(args[1]).flatten()[0])))

    def __len__(self) -> int:
        return len(self.seen)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self._hook.remove()
