"""Train the small classifier whose 128 features judge pictures; about five minutes on one core.

    python benchmarks/recipes/train_features.py --data /usr/share/datasets/fashion-mnist \
        --test assets/fashion-mnist --out assets/fashion-mnist/features.safetensors
    python benchmarks/recipes/train_features.py --data assets/digits/fit.zip --test assets/digits/eval.zip \
        --epochs 40 --shift 2 --out assets/digits/features.safetensors

DATA and TEST are anything ``tdpm_ext.pictures.load_pictures`` reads, with class labels; TEST may also be a
folder with ``fit.zip`` and ``eval.zip`` (both are tested on). The weights are a function of data, options,
seed, torch version and number of threads; the recipe and the accuracy on TEST go into the file's header.
Set OMP_NUM_THREADS=1 to reproduce the shipped files.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.features import FeatureNet, accuracy, extract, load_features, save_features  # noqa: E402
from tdpm_ext.pictures import Pictures, load_pictures, to_unit  # noqa: E402


def shift_randomly(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Move each picture [B, C, H, W] by up to ``most`` pixels in both directions, repeating its border."""
    if most == 0:
        return images
    count, _, height, width = images.shape
    padded = F.pad(images, (most,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * most + 1, (2, count), generator=generator)
    rows = (dy[:, None] + torch.arange(height))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(images.shape[1])[:, None, None], rows, columns]


def train(pictures: Pictures, epochs: int, batch: int, rate: float, shift: int, seed: int) -> FeatureNet:
    """One-cycle AdamW on cross-entropy; every epoch is a fresh permutation."""
    if pictures.labels is None:
        raise ValueError("the pictures have no labels: give one folder per class, or idx files with their labels")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    _, channels, height, _ = pictures.images.shape
    net = FeatureNet(channels, height, len(pictures.classes)).to(memory_format=torch.channels_last)
    per_epoch = len(pictures) // batch
    if per_epoch == 0:
        raise ValueError(f"{len(pictures)} pictures do not fill one batch of {batch}: give more, or a smaller --batch")
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * per_epoch, pct_start=0.15)
    bar = tqdm(total=epochs * per_epoch, desc="train features", unit="batch")
    for _ in range(epochs):
        order = torch.randperm(len(pictures), generator=generator)
        for step in range(per_epoch):
            index = order[step * batch : (step + 1) * batch]
            images = shift_randomly(to_unit(pictures.images[index]), shift, generator)
            loss = F.cross_entropy(net.classify(net(images)), pictures.labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    return net.eval()


def load_test(path: Path) -> Pictures:
    halves = [path / "fit.zip", path / "eval.zip"]
    if not all(half.exists() for half in halves):
        return load_pictures(path)
    first, second = (load_pictures(half) for half in halves)
    return Pictures(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]), first.classes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="labelled training pictures")
    parser.add_argument("--test", type=Path, required=True, help="labelled pictures to report the accuracy on")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (default 2e-3)")
    parser.add_argument("--shift", type=int, default=0, help="move pictures by up to this many pixels (default 0)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    begin = time.monotonic()
    try:
        data, test = load_pictures(args.data), load_test(args.test)
        net = train(data, args.epochs, args.batch, args.rate, args.shift, args.seed)
    except (OSError, ValueError) as error:
        print(f"train_features: {error}", file=sys.stderr)
        return 2
    minutes = (time.monotonic() - begin) / 60
    recipe = {
        "recipe": "benchmarks/recipes/train_features.py", "pictures": len(data), "epochs": args.epochs,
        "batch": args.batch, "rate": args.rate, "shift": args.shift, "seed": args.seed,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    save_features(net, args.out, recipe)
    # judged as it will be used: after rounding to half precision and a round trip through the file
    net = load_features(args.out)
    right = accuracy(net, extract(net, to_unit(test.images), progress="test"), test.labels)
    save_features(net, args.out, recipe | {"test_pictures": len(test), "test_accuracy": round(right, 4)})
    digest = hashlib.sha256(args.out.read_bytes()).hexdigest()
    print(f"accuracy {right:.4f} on {len(test)} pictures, {minutes:.1f} minutes\n{digest}  {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
