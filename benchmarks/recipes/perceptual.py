"""How different two pictures look to EfficientNet-Lite0: a training loss for auto-encoders.

Squared distance of channel-normalised features after the stem and after blocks 2, 4 and 10, averaged over places
and layers (the form of LPIPS without its learned weights).

    python benchmarks/recipes/perceptual.py --out out/tldm/efflite.safetensors

writes the 1.5 MB of weights that this needs, for a machine to which the 18 MB package is not brought.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[2]))

LAYERS = (2, 4, 10)  # blocks whose output counts: strides 4, 8 and 16


class PerceptualLoss(nn.Module):
    """Distance of pictures [B, 3, H, W] in [-1, 1]; ``weights`` = a file of ``main``, None = the installed package."""

    def __init__(self, weights: Path | None = None):
        super().__init__()
        if weights is None:
            from benchmarks.features import EffLiteMid

            net = EffLiteMid().net
        else:
            from efficientnet_lite_pytorch import EfficientNet

            net = EfficientNet.from_name("efficientnet-lite0")
            missing, unexpected = net.load_state_dict(load_file(weights), strict=False)
            if unexpected or any(self.needed(name) and "num_batches" not in name for name in missing):
                raise ValueError(f"{weights} does not hold EfficientNet-Lite0's first blocks")
        self.stem, self.norm, self.act = net._conv_stem, net._bn0, net._swish
        self.blocks = net._blocks[: LAYERS[-1] + 1]
        self.eval().requires_grad_(False)

    @staticmethod
    def needed(name: str) -> bool:
        """Whether a tensor of the whole network is used here."""
        parts = name.split(".")
        return parts[0] in ("_conv_stem", "_bn0") or (parts[0] == "_blocks" and int(parts[1]) <= LAYERS[-1])

    def features(self, x: Tensor) -> list[Tensor]:
        x = self.act(self.norm(self.stem((x * 127.5 + 0.5) / 128)))  # trained on (byte - 127) / 128
        out = [x]
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in LAYERS:
                out.append(x)
        return [F.normalize(f.float(), dim=1, eps=1e-3) for f in out]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean over the batch; gradients flow to ``x`` only."""
        with torch.no_grad():
            target = self.features(y)
        return sum((a - b).square().sum(1).mean() for a, b in zip(self.features(x), target, strict=True)) / len(target)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write (half precision)")
    args = parser.parse_args(argv)
    from benchmarks.features import EffLiteMid

    tensors = {n: t.half() for n, t in EffLiteMid().net.state_dict().items() if PerceptualLoss.needed(n) and t.ndim}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out)
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
