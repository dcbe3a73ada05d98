"""Train the latent text-to-picture denoiser: k-diffusion's U-Net with cross-attention, on latents of emoji.

    python benchmarks/recipes/build_tldm.py && python benchmarks/recipes/embed_captions.py
    python benchmarks/recipes/train_tldm.py --vae out/tldm/vae/vae.safetensors --out out/tldm/denoiser --minutes 60

Reads pictures, captions and encoded phrases from --data (out/tldm). Captions are drawn anew for every batch and
dropped in one of ten; pictures are mirrored half the time, and their captions say so. Latents are drawn from the
auto-encoder's posterior. Run the same command again to go on after an interruption; Ctrl-C saves. OUT holds
``denoiser.safetensors``: moving average, half precision, an inference checkpoint as k-diffusion writes them whose
config says in ``text`` which encoder, styles and auto-encoder belong to it. ``--export FILE`` writes that of a run as
it stands, and leaves the run alone: it may be going on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.recipes.embed_captions import STYLE_WORDS  # noqa: E402
from benchmarks.recipes.timed import Budget, TimedRun  # noqa: E402
from benchmarks.recipes.train_denoiser import save_atomically  # noqa: E402
from benchmarks.tldm_data import CaptionSampler, Phrases, load_captions, load_pairs  # noqa: E402
from tdpm_ext.pictures import to_unit  # noqa: E402
from tdpm_ext.text import load_phrases  # noqa: E402
from tdpm_ext.text_job import vae_fingerprint  # noqa: E402
from tdpm_ext.vae import PictureVAE, load_vae  # noqa: E402

JUDGED = 1024  # held-out pictures in the loss that is logged


@torch.no_grad()
def encode_all(vae: PictureVAE, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scaled latents of uint8 pictures, mean and standard deviation [N, 4, 16, 16], on ``device``."""
    means, deviations = [], []
    for part in images.split(256):
        mean, log_variance = vae.moments(to_unit(part).to(device))
        means.append(mean * vae.scaling_factor)
        deviations.append((0.5 * log_variance).exp() * vae.scaling_factor)
    return torch.cat(means), torch.cat(deviations)


class Loss:
    """The denoiser's loss on random and on held-out batches, everything on one device."""

    def __init__(self, denoiser, density, latents, held_out, captions, judged, batch: int, amp: bool):
        self.denoiser, self.density, self.batch, self.amp = denoiser, density, batch, amp
        self.mean, self.deviation = latents  # the second half of the rows: mirrored
        self.held_out, self.captions, self.judged = held_out, captions, judged
        self.pictures = len(self.mean) // 2

    def __call__(self) -> Tensor:
        device = self.mean.device
        row = torch.randint(len(self.mean), (self.batch,), device=device)
        x = self.mean[row] + self.deviation[row] * torch.randn_like(self.mean[row])
        phrases = self.captions.rows(row % self.pictures, row >= self.pictures)
        return self._loss(x, phrases, self.density([self.batch], device=device), torch.randn_like(x)).mean()

    @torch.no_grad()
    def judge(self) -> float:
        """The loss of held-out pictures with their full captions; the same noise each time."""
        count = min(JUDGED, len(self.held_out))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(count, *self.held_out.shape[1:], generator=generator).to(self.held_out.device)
        sigma = torch.linspace(-3, 3, count, device=noise.device).exp()
        every = torch.randperm(len(self.held_out), generator=generator)[:count].to(noise.device)
        rows = self.judged.full_rows(every)
        parts = [
            self._loss(self.held_out[every[k : k + 256]], rows[k : k + 256], sigma[k : k + 256], noise[k : k + 256])
            for k in range(0, count, 256)
        ]
        return torch.cat(parts).mean().item()

    def _loss(self, x: Tensor, rows: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            return self.denoiser.loss(x, noise, sigma, **self.captions.phrases.text(rows)).float()


def load_all(args: argparse.Namespace, config: dict, device: torch.device, dtype: torch.dtype):
    """Latents of training pictures and their mirror images, of held-out ones, and both sets' captions."""
    vae = load_vae(args.vae, device)
    train, held_out = load_pairs(args.data / "train.zip"), load_pairs(args.data / "eval.zip")
    captions = load_captions(args.data / "captions.json")
    phrases = Phrases.build(load_phrases(args.data / "phrases.safetensors"), device, dtype)
    latents = encode_all(vae, torch.cat([train.images, train.images.flip(3)]), device)
    dropped = config["dataset"]["cond_dropout_rate"]
    samplers = [CaptionSampler(pairs, captions, phrases, device, dropped) for pairs in (train, held_out)]
    return vae, latents, encode_all(vae, held_out.images, device)[0], samplers


def write(run: TimedRun, config: dict, vae: PictureVAE, path: Path) -> None:
    """The moving average in half precision, as an inference checkpoint that knows its text encoder and latents."""
    run.load_ema()
    text = {
        "encoder": "all-MiniLM-L6-v2",
        "styles": list(STYLE_WORDS.values()),
        "vae": vae_fingerprint(vae),
        "scaling_factor": vae.scaling_factor,
    }
    meta = {"config": json.dumps(config | {"text": text}), "step": str(run.step), "seconds": f"{run.seconds:.0f}"}
    save_atomically({name: value.half() for name, value in run.net.state_dict().items()}, path, meta)


def export(args: argparse.Namespace, config: dict, begun: Callable[[], TimedRun]) -> int:
    """--export: a run's present moving average as a checkpoint."""
    if not (args.out / "state.safetensors").exists():
        print(f"train_tldm: {args.out} holds no run: give the --out of one that was begun", file=sys.stderr)
        return 2
    run = begun()
    write(run, config, load_vae(args.vae), args.export)
    print(f"step {run.step}, {run.seconds:.0f} s: {args.export}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("out/tldm"), help="zips, captions, phrases (out/tldm)")
    parser.add_argument("--vae", type=Path, required=True, help="auto-encoder of train_vae.py")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("tldm.json"))
    parser.add_argument("--out", type=Path, required=True, help="folder for state, log and denoiser.safetensors")
    parser.add_argument("--minutes", type=float, default=60, help="of training in all (default 60)")
    parser.add_argument("--steps", type=int, default=60000, help="at most this many (default 60000)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate (default 1e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the state of --out as a checkpoint and stop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    import k_diffusion as K

    device = torch.device(args.device)
    amp = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    config = K.config.load_config(json.loads(args.config.read_text()))
    budget = Budget(args.minutes, args.steps, args.rate)

    def begun() -> TimedRun:
        torch.manual_seed(args.seed)
        inner = K.config.make_model(config).to(memory_format=torch.channels_last)
        return TimedRun(inner, args.out, device, budget, seed=args.seed, ema=0.9995)

    if args.export is not None:
        return export(args, config, begun)
    try:
        vae, latents, held_out, (captions, judged) = load_all(
            args, config, device, torch.bfloat16 if amp else torch.float32
        )
    except (OSError, ValueError) as error:
        print(f"train_tldm: {error}", file=sys.stderr)
        return 2
    run = begun()
    denoiser = K.config.make_denoiser_wrapper(config)(run.net)
    density = K.config.make_sample_density(config["model"])
    loss = Loss(denoiser, density, latents, held_out, captions, judged, args.batch, amp)
    run.train(loss, judge=loss.judge)
    write(run, config, vae, args.out / "denoiser.safetensors")
    print(
        f"step {run.step}, {run.seconds:.0f} s, held-out loss {loss.judge():.4f}: {args.out / 'denoiser.safetensors'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
