"""A small variational auto-encoder for pictures, and its one file.

    vae = load_vae("vae.safetensors")
    latents = LatentSpace(vae).encode(pictures)     # [B, 3, 64, 64] in [-1, 1] -> [B, 4, 16, 16], standard deviation 1

Four times smaller in both directions. The first and last halving are pixel (un)shuffles, so that every convolution
but the last two runs at half the picture's size or less.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

FORMAT = "tdpm-vae-1"
LIMITS = {"channels": 4, "latent_channels": 64, "width": 512, "blocks": 16}


class _ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(width // 16, width), nn.GroupNorm(width // 16, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def _blocks(width: int, count: int) -> list[nn.Module]:
    return [_ResBlock(width) for _ in range(count)]


class PictureVAE(nn.Module):
    """Convolutional encoder and decoder with a diagonal Gaussian between them.

    Args:
        channels: of the pictures. latent_channels: of the latents. width: at half the picture's size; twice that at
        a quarter, half of it in the last block. blocks: residual blocks per size.

    ``scaling_factor`` (1 until it is set from data) is what latents are multiplied with to have a standard deviation
    of 1; as in diffusers it is applied outside, by `tdpm_ext.latent.LatentSpace`.
    """

    def __init__(self, channels: int = 3, latent_channels: int = 4, width: int = 64, blocks: int = 2):
        super().__init__()
        config = {"channels": channels, "latent_channels": latent_channels, "width": width, "blocks": blocks}
        for name, value in config.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LIMITS[name]:
                raise ValueError(f"{name} must be an integer from 1 to {LIMITS[name]}, not {value!r}")
        if width % 32:
            raise ValueError(f"width must be a multiple of 32, not {width}")
        self.config, self.scaling_factor, self.notes = config, 1.0, {}
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * channels, width, 3, padding=1),
            *_blocks(width, blocks),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            *_blocks(2 * width, blocks),
            nn.GroupNorm(width // 8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, 2 * width, 3, padding=1),
            *_blocks(2 * width, blocks + 1),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),
            *_blocks(width, blocks),
            nn.Conv2d(width, 2 * width, 1),
            nn.PixelShuffle(2),
            *_blocks(width // 2, 1),
            nn.GroupNorm(width // 32, width // 2),
            nn.SiLU(),
            nn.Conv2d(width // 2, channels, 3, padding=1),
        )

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, latent_channels, H/4, W/4] of the latents; pictures in [-1, 1]."""
        channels = self.config["channels"]
        if pictures.ndim != 4 or pictures.shape[1] != channels or pictures.shape[2] % 4 or pictures.shape[3] % 4:
            raise ValueError(
                f"the auto-encoder takes pictures [B, {channels}, H, W], H and W multiples of 4, "
                f"not {list(pictures.shape)}"
            )
        mean, log_variance = self.encoder(pictures).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents [B, latent_channels, H/4, W/4]: the mean, nothing is drawn. Pictures in [-1, 1]."""
        return self.moments(pictures)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, channels, 4H, 4W] clamped to [-1, 1] from latents."""
        expected = self.config["latent_channels"]
        if latents.ndim != 4 or latents.shape[1] != expected:
            raise ValueError(f"the auto-encoder takes latents [B, {expected}, H, W], not {list(latents.shape)}")
        return self.decoder(latents).clamp(-1, 1)


def save_vae(vae: PictureVAE, path: str | Path) -> None:
    """Write weights in half precision, architecture, scaling factor and ``vae.notes`` as one file, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "config": vae.config, "scaling_factor": vae.scaling_factor, "notes": vae.notes}
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in vae.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(save(tensors, metadata={"vae": json.dumps(header, sort_keys=True)}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_vae(path: str | Path, device: str | torch.device = "cpu") -> PictureVAE:
    """Open a file of :func:`save_vae`; the weights come back in float32, without gradients.

    Raises:
        FileNotFoundError: nothing is there. ValueError: the file is not such an auto-encoder, or is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no auto-encoder at {path}: give the file that was trained with the denoiser")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("vae", "{}"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
        vae = PictureVAE(**header["config"])
        vae.load_state_dict(tensors)
        vae.scaling_factor = float(header["scaling_factor"])
        if not 0 < vae.scaling_factor < float("inf"):
            raise ValueError(f"its scaling factor is {vae.scaling_factor}; it must be positive and finite")
        vae.notes = dict(header["notes"])
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} is not an auto-encoder of this project: {error}") from error
    return vae.to(device).eval().requires_grad_(False)
