"""What a code at each noise level keeps of a picture: reconstruction error against sigma_trunc, and interpolations.

    python benchmarks/autoencoder.py                      # shipped checkpoint and prior, pictures held out of both
    python benchmarks/autoencoder.py --figures            # draw the record and its examples again

Held-out pictures are encoded (noised to sigma_trunc) and decoded in 1 to 8 evaluations of the checkpoint. Errors are
rms differences per pixel, pictures being in [-1, 1] and their class known to the decoder. Beside them: the prior's own
closed-form decoder (no network call), and how far two pictures of one class are apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import tdpm_ext as tdpm  # noqa: E402
from benchmarks import judging, metrics, records  # noqa: E402
from tdpm_ext.autoencoder import AutoEncoder  # noqa: E402
from tdpm_ext.kernels import accelerate  # noqa: E402
from tdpm_ext.pictures import load_pictures, to_unit  # noqa: E402

SCHEMA = "tdpm-autoencoder/1"
STEPS = (1, 2, 4, 8)
SIGMAS = (0.02645, 0.08, 0.17277, 0.33883, 0.6, 1.0, 1.8, 3.2, 6.0, 12.0)
SHOWN = (0.17277, 0.6, 1.8, 6.0)  # levels of the example pictures
EXAMPLES = (1, 5, 7, 8)  # classes of the pictures that are shown: trouser, sandal, sneaker, bag
PAIRS = (0, 8, 9)  # classes of the interpolations: T-shirt, bag, boot
LINES = {"pixels": ("pixels", None), "code 0.6": ("code", 0.6), "code 1.8": ("code", 1.8), "prior 1.8": ("prior", 1.8)}
BETWEEN, SEED = 9, 2  # pictures from end to end; of the noise that they share


@dataclass
class Bench:
    """The auto-encoder, the pictures it is tried on [N, C, H, W] with their classes, and of each class ten to show
    [classes, 10, C, H, W]."""

    auto: AutoEncoder
    pictures: torch.Tensor
    labels: torch.Tensor
    typical: torch.Tensor
    args: argparse.Namespace

    def error(self, again: torch.Tensor) -> dict:
        """The rms error over disjoint blocks, as an estimate."""
        parts = zip(again.cpu().split(self.args.samples), self.pictures.cpu().split(self.args.samples), strict=True)
        return records.estimate(metrics.over_blocks(metrics.paired_rmse(x, y) for x, y in parts))

    def apart(self) -> dict:
        """Between each picture and the next of its class."""
        other = torch.empty(len(self.labels), dtype=torch.long)
        for c in self.labels.unique():
            own = (self.labels == c).nonzero()[:, 0].cpu()
            if len(own) < 2:
                raise ValueError(f"one picture of class {int(c)} among {len(other)}: give more --samples or --blocks")
            other[own] = own.roll(1)
        return self.error(self.pictures[other])

    def points(self) -> list[dict]:
        runs = [(sigma, steps) for sigma in self.args.sigmas for steps in STEPS]
        out = []
        for sigma, steps in tqdm(runs, desc="reconstructions", unit="point"):
            parts = zip(self.pictures.split(self.args.batch), self.labels.split(self.args.batch), strict=True)
            again = [
                self.auto.reconstruct(x, steps, sigma, seed=i * self.args.batch, class_cond=y)
                for i, (x, y) in enumerate(parts)
            ]
            out.append({"sigma_trunc": sigma, "steps": steps, "rmse": self.error(torch.cat(again))})
        return out

    def closed_form(self) -> list[dict]:
        """The prior's own E[x_0 | code]: what is to be had without the network."""
        out = []
        for sigma in self.args.sigmas:
            code = self.auto.encode(self.pictures, sigma)
            again = self.auto.prior.denoise(code, sigma, class_cond=self.labels)
            out.append({"sigma_trunc": sigma, "rmse": self.error(again)})
        return out

    def examples(self) -> dict[str, torch.Tensor]:
        """For the figure: originals, codes and reconstructions [levels, n, ...], interpolations [pairs, n, ...]."""
        x, y = self.typical[list(EXAMPLES), 0], torch.tensor(EXAMPLES, device=self.typical.device)
        out = {
            "originals": x,
            "codes": torch.stack([self.auto.encode(x, sigma) for sigma in SHOWN]),
            "again": torch.stack([self.auto.reconstruct(x, 8, sigma, class_cond=y) for sigma in SHOWN]),
        }
        share = torch.linspace(0, 1, BETWEEN, device=x.device).reshape(-1, 1, 1, 1)
        rows: dict[str, list] = {name: [] for name in LINES}
        for c in PAIRS:
            a, b = farthest(self.typical[c])
            known = {"class_cond": torch.full((BETWEEN,), c, device=x.device)}
            for name, (through, sigma) in LINES.items():
                line = torch.lerp(a[None], b[None], share)
                if through != "pixels":
                    how = {"through": through, "sigma_trunc": sigma, "seed": SEED}
                    line = self.auto.interpolate(a, b, BETWEEN, **how, **known)
                rows[name].append(line)
        return out | {name: torch.stack(lines) for name, lines in rows.items()}


def farthest(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two of pictures [N, ...] that differ most."""
    flat = pictures.flatten(1)
    at = int(torch.cdist(flat, flat).argmax())
    return pictures[at // len(pictures)], pictures[at % len(pictures)]


def build(args: argparse.Namespace) -> Bench:
    folder = ROOT / "assets" / args.name
    opened = tdpm.open_checkpoint(folder / "denoiser.safetensors", args.device)
    prior = tdpm.load_prior(folder / "prior.safetensors", expect_checkpoint=opened.fingerprint)
    accelerate(opened.model)  # equal to rounding
    everything = load_pictures(folder / "eval.zip")
    shown = torch.cat([(everything.labels == c).nonzero()[:10, 0] for c in range(opened.num_classes)])
    typical = to_unit(everything.images[shown]).unflatten(0, (opened.num_classes, 10)).to(args.device)
    held = everything.take(judging.spread(len(everything), args.blocks * args.samples))
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))  # blocks of all classes
    pictures, labels = to_unit(held.images)[order].to(args.device), held.labels[order].to(args.device)
    return Bench(AutoEncoder(opened.model, prior, 1.0), pictures, labels, typical, args)


def run(bench: Bench, argv: list[str] | None) -> dict:
    args, start = bench.args, time.time()
    return {
        "schema": SCHEMA, "name": args.name, "checkpoint": bench.auto.prior.card["checkpoint"], "blocks": args.blocks,
        "per_block": args.samples, "class_conditional": True,
        "apart": bench.apart(), "points": bench.points(),
        "closed_form": bench.closed_form(), "command": records.command("autoencoder.py", argv),
        "environment": records.environment(args.device), "seconds": time.time() - start,
    }  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", default="fashion-mnist", help="a folder of assets/ with a checkpoint and a prior")
    p.add_argument("--sigmas", type=float, nargs="+", default=list(SIGMAS))
    p.add_argument("--samples", type=int, default=50, help="pictures per block (default 50)")
    p.add_argument("--blocks", type=int, default=3)
    p.add_argument("--batch", type=int, default=50)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--work", type=Path, default=ROOT / "out" / "autoencoder", help="kept example pictures")
    p.add_argument("--out", type=Path, default=records.RESULTS / "autoencoder.json")
    p.add_argument("--figures", action="store_true", help="only draw the record and its kept examples again")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    examples = args.work / "examples.safetensors"
    if not args.figures:
        bench = build(args)
        save_file({key: x.float().cpu().contiguous() for key, x in bench.examples().items()}, examples)
        records.write(run(bench, argv), args.out)
    from benchmarks import autoencoder_figure

    shown = load_file(examples)
    for path in autoencoder_figure.draw(records.read(args.out), shown, SHOWN, args.out.with_suffix("")):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
