"""Train the auto-encoder of the text-to-picture model; half an hour on a CPU core.

    python benchmarks/recipes/train_vae.py --data out/tldm/train.zip --eval out/tldm/eval.zip \
        --out out/tldm/vae --minutes 30

Loss: absolute error + 0.3 x perceptual distance (EfficientNet-Lite0, see ``perceptual.py``) + 1e-3 x KL per latent
value. Pictures are mirrored, and their colour channels exchanged, at random: the auto-encoder is to know shapes and
colours, not emoji. For the first 60 % of the budget it sees random quarters of pictures, four times as many, then
whole ones. Run the same command again to go on after an interruption; Ctrl-C saves. OUT holds
``state.safetensors``, ``log.jsonl`` and ``vae.safetensors``: moving average of the weights, half precision, with the
scaling factor that gives latents of the training pictures a standard deviation of 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.recipes.perceptual import PerceptualLoss  # noqa: E402
from benchmarks.recipes.timed import Budget, TimedRun  # noqa: E402
from tdpm_ext.pictures import load_pictures, to_uint8, to_unit  # noqa: E402
from tdpm_ext.vae import PictureVAE, load_vae, save_vae  # noqa: E402

PERCEPTUAL, KL = 0.3, 1e-3


def draw(images: Tensor, batch: int, crop: bool = False) -> Tensor:
    """A random batch of uint8 [N, 3, H, W] as floats in [-1, 1], mirrored and recoloured, on the images' device.

    With ``crop``, 4 x ``batch`` pieces of half the height and width, all from the same place, which is random too.
    """
    if crop:
        height, width = images.shape[2] // 2, images.shape[3] // 2
        top, left = (int(torch.randint(size + 1, ())) for size in (height, width))
        images, batch = images[:, :, top : top + height, left : left + width], 4 * batch
    x = images[torch.randint(len(images), (batch,), device=images.device)].float() / 127.5 - 1
    keep = torch.rand(2, batch, 1, 1, 1, device=x.device)
    x = torch.where(keep[0] < 0.5, x.flip(3), x)
    x = torch.where(keep[1] < 0.25, x.flip(2), x)
    order = torch.rand(batch, 3, device=x.device)
    order[: batch // 2] = torch.arange(3.0, device=x.device)  # half keep their colours
    return x.gather(1, order.argsort(1)[:, :, None, None].expand_as(x))


def vae_loss(vae: PictureVAE, perceptual: PerceptualLoss, x: Tensor, amp: bool) -> Tensor:
    """Loss of a batch of pictures in [-1, 1]."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        mean, log_variance = vae.moments(x)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        y = vae.decoder(z)
        seen = perceptual(y, x)
    mean, log_variance, y = mean.float(), log_variance.float(), y.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (y - x).abs().mean() + PERCEPTUAL * seen.float() + KL * kl


@torch.no_grad()
def in_batches(function, images: Tensor, device: torch.device, batch: int = 256) -> Tensor:
    """``function`` of uint8 pictures [N, C, H, W] as floats in [-1, 1], on the CPU."""
    return torch.cat([function(to_unit(part).to(device)).float().cpu() for part in images.split(batch)])


def finish(vae: PictureVAE, train: Tensor, held_out: Tensor, path: Path, device: torch.device, notes: dict) -> str:
    """Set the scaling factor, write the file, and judge what was written; returns a line about it."""
    vae.eval()
    vae.scaling_factor = 1 / in_batches(vae.encode, train, device).std().item()
    vae.notes = notes
    save_vae(vae, path)
    vae = load_vae(path, device)
    copy = to_uint8(in_batches(lambda x: vae.decode(vae.encode(x)), held_out, device))
    error = (copy.float() - held_out.float()).square().mean((1, 2, 3)) / 255**2
    psnr = (-10 * error.clamp_min(1e-10).log10()).mean().item()
    vae.notes = notes | {"held_out_psnr": round(psnr, 2)}
    save_vae(vae, path)
    return f"PSNR {psnr:.2f} dB on {len(held_out)} held-out pictures, scaling factor {vae.scaling_factor:.4f}: {path}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="training pictures, RGB")
    parser.add_argument("--eval", type=Path, required=True, help="held-out pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for state, log and vae.safetensors")
    parser.add_argument("--minutes", type=float, default=30, help="of training in all (default 30)")
    parser.add_argument("--steps", type=int, default=60000, help="at most this many (default 60000)")
    parser.add_argument("--batch", type=int, default=8, help="whole pictures in a step (default 8)")
    parser.add_argument("--width", type=int, default=32, help="channels at half the picture's size (default 32)")
    parser.add_argument("--blocks", type=int, default=2, help="residual blocks per size (default 2)")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate (default 1e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--efflite", type=Path, help="weights from perceptual.py, instead of the package")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        train, held_out = load_pictures(args.data).images, load_pictures(args.eval).images
        perceptual = PerceptualLoss(args.efflite)
    except (OSError, ValueError, ImportError) as error:
        print(f"train_vae: {error}", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    amp = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    vae = PictureVAE(width=args.width, blocks=args.blocks).to(memory_format=torch.channels_last)
    run = TimedRun(vae, args.out, device, Budget(args.minutes, args.steps, args.rate), seed=args.seed)
    perceptual = perceptual.to(device, memory_format=torch.channels_last)
    images, judged = train.to(device), held_out[:256].to(device)

    def judge() -> float:
        with torch.no_grad():
            return vae_loss(vae, perceptual, judged.float() / 127.5 - 1, amp).item()

    def loss() -> Tensor:
        crop = run.budget.used(run.step, run.seconds) < 0.6
        x = draw(images, args.batch, crop).contiguous(memory_format=torch.channels_last)
        return vae_loss(vae, perceptual, x, amp)

    run.train(loss, judge=judge)
    if not math.isfinite(run.seconds) or run.step == 0:
        return 1
    run.load_ema()
    notes = {
        "recipe": "benchmarks/recipes/train_vae.py", "pictures": len(train), "steps": run.step, "batch": args.batch,
        "rate": args.rate, "seed": args.seed, "seconds": round(run.seconds), "torch": torch.__version__,
    }  # fmt: skip
    print(finish(vae, train, held_out, args.out / "vae.safetensors", device, notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
