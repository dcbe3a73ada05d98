"""Train a k-diffusion denoiser on a picture folder, resumable at any moment.

    python benchmarks/recipes/train_denoiser.py --data DIR --config benchmarks/recipes/fashion_mnist.json \
        --out out/denoiser --minutes 120

DIR is anything `tdpm_ext.pictures.load_pictures` reads: a folder or zip with one folder per class, or the
idx files of Debian's `dataset-fashion-mnist` (/usr/share/datasets/fashion-mnist). Run the same command again
to go on from the last save; Ctrl-C saves first. OUT holds `state.safetensors` (weights, EMA, optimizer),
`log.jsonl`, and `denoiser.safetensors`: the EMA weights in half precision with the config in the metadata,
the file that k-diffusion calls an inference checkpoint.

On a GPU, fast (the pictures lie there, and nothing waits for the device between two log lines):

    python benchmarks/recipes/train_denoiser.py --data assets/emoji/fit.zip --config benchmarks/recipes/emoji.json \
        --out out/emoji --minutes 3 --batch 512 --precision bf16 --decay 0.5

Every batch is a function of (seed, step) and of the kind of device, so an interrupted run and an uninterrupted one
see the same data, noise and noise levels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch.nn import functional as F
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.recipes.augment import augment  # noqa: E402
from tdpm_ext.pictures import load_pictures, to_unit  # noqa: E402

ON_DEVICE = 4 * 2**30  # bytes of pictures that move to the device as a whole; more are fetched batch by batch


def ema_decay(step: int, power: float, max_value: float) -> float:
    """Inverse-power warm-up, as k-diffusion's EMAWarmup: 1 - (1 + step)^-power, capped."""
    return min(max_value, 1 - (1 + step) ** -power)


@lru_cache(maxsize=1)
def epoch_order(epoch: int, seed: int, count: int, device: torch.device) -> torch.Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order.to(device)


def batch_for(step: int, batch: int, seed: int, count: int, device: torch.device) -> torch.Tensor:
    """Indices of batch `step` (a fresh permutation per epoch); seeds the global generators for its noise."""
    epoch, k = divmod(step, count // batch)
    torch.manual_seed(seed * 1_000_000_007 + step)
    return epoch_order(epoch, seed, count, device)[k * batch : (k + 1) * batch]


def rate_factor(step: int, warmup: int, done: float, decay: float) -> float:
    """Share of the learning rate: linear warm-up, then constant, then half a cosine to zero.

    Args:
        done: share of the run that is over, 0 to 1.
        decay: share of the run, at its end, in which the rate falls; 0 for none.
    """
    factor = min(1.0, (step + 1) / max(1, warmup))
    if decay > 0 and done > 1 - decay:
        factor *= 0.5 + 0.5 * math.cos(math.pi * min(1.0, (done - 1 + decay) / decay))
    return factor


def save_atomically(tensors: dict, path: Path, metadata: dict) -> None:
    temporary = path.with_suffix(".tmp")
    content = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata=metadata)
    temporary.write_bytes(content)
    os.replace(temporary, path)


class Run:
    """Model, EMA, optimizer and step: everything that a resumed run needs."""

    def __init__(self, config: dict, out: Path, device: torch.device, seed: int, precision: str = "fp32"):
        import k_diffusion as K

        self.config, self.out, self.device, self.seed, self.precision = config, out, device, seed, precision
        torch.manual_seed(seed)
        self.denoiser = K.config.make_denoiser_wrapper(config)(K.config.make_model(config)).to(device)
        self.inner = self.denoiser.inner_model
        self.density = K.config.make_sample_density(config["model"])
        self.names = [n for n, _ in self.inner.named_parameters()]
        self.params = [p for _, p in self.inner.named_parameters()]
        opt = config["optimizer"]
        self.lr, self.warmup = opt["lr"], config["lr_sched"]["warmup"]
        self.opt = torch.optim.AdamW(
            self.params,
            lr=self.lr,
            betas=tuple(opt["betas"]),
            eps=opt["eps"],
            weight_decay=opt["weight_decay"],
            fused=True if device.type == "cuda" else None,
        )
        self.ema = {k: v.clone() for k, v in self.inner.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self.state_path = out / "state.safetensors"
        if self.state_path.exists():
            self.resume()
        self.weights = list(self.inner.state_dict().values())  # in the order of the EMA; they share its memory

    def resume(self) -> None:
        with safe_open(self.state_path, "pt") as f:
            meta = f.metadata()
            get = f.get_tensor
            self.inner.load_state_dict({k: get(f"model.{k}") for k in self.ema})
            self.ema = {k: get(f"ema.{k}").to(self.device) for k in self.ema}
            for name, p in zip(self.names, self.params, strict=True):
                self.opt.state[p] = {
                    # the fused optimizer counts where the weights are
                    "step": torch.tensor(float(meta["step"]), device=self.device),
                    "exp_avg": get(f"m.{name}").to(self.device),
                    "exp_avg_sq": get(f"v.{name}").to(self.device),
                }
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        print(f"resumed {self.state_path} at step {self.step} after {self.seconds / 60:.0f} min")

    def save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.inner.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, p in zip(self.names, self.params, strict=True):
            if p in self.opt.state:
                tensors[f"m.{name}"] = self.opt.state[p]["exp_avg"]
                tensors[f"v.{name}"] = self.opt.state[p]["exp_avg_sq"]
        save_atomically(tensors, self.state_path, {"step": str(self.step), "seconds": f"{self.seconds:.1f}"})
        half = {k: v.half() for k, v in self.ema.items()}
        meta = {"config": json.dumps(self.config), "step": str(self.step), "seconds": f"{self.seconds:.0f}"}
        save_atomically(half, self.out / "denoiser.safetensors", meta)

    def loss(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Mean EDM loss of one batch; labels are dropped with the config's probability (the zero vector)."""
        b, dataset, model = len(x), self.config["dataset"], self.config["model"]
        sigma = self.density([b], device=self.device)
        noise = torch.randn(x.shape, device=self.device)
        keep = torch.rand(b, device=self.device) >= dataset["cond_dropout_rate"]
        extra = {}
        if model.get("augment_wrapper") and model["augment_prob"]:
            x, extra["aug_cond"] = augment(x, model["augment_prob"])
        if labels is not None and dataset["num_classes"]:
            if model["type"] == "image_v1":
                extra["mapping_cond"] = F.one_hot(labels, dataset["num_classes"]).float() * keep[:, None]
            else:
                extra["class_cond"] = torch.where(keep, labels, dataset["num_classes"])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.denoiser.loss(x, noise, sigma, **extra).mean()

    def update(self, images: torch.Tensor, labels: torch.Tensor | None, batch: int, rate: float) -> torch.Tensor:
        """One step at learning rate `rate`; the loss stays on the device, where nobody waits for it."""
        index = batch_for(self.step, batch, self.seed, len(images), images.device)
        x = to_unit(images[index].to(self.device))
        for group in self.opt.param_groups:
            group["lr"] = rate
        self.opt.zero_grad(set_to_none=True)
        loss = self.loss(x, None if labels is None else labels[index].to(self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.opt.step()
        self.step += 1
        decay = ema_decay(self.step, self.config["ema_sched"]["power"], self.config["ema_sched"]["max_value"])
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), self.weights, 1 - decay)
        return loss.detach()


def prepare(device: torch.device, precision: str) -> None:
    if precision != "fp32":
        torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        # k-diffusion draws noise levels through a distribution, whose check of its values waits for the device
        torch.distributions.Distribution.set_default_validate_args(False)


def train(run: Run, images: torch.Tensor, labels: torch.Tensor | None, args: argparse.Namespace) -> None:
    log = (run.out / "log.jsonl").open("a")
    start, saved, window = time.time(), time.time(), []
    base, first = run.seconds, run.step
    bar = tqdm(total=args.steps, initial=run.step, desc="train", mininterval=5)
    try:
        while run.step < args.steps and time.time() - start < args.minutes * 60:
            done = max(run.step / args.steps, (time.time() - start) / (args.minutes * 60))
            rate = run.lr * rate_factor(run.step, run.warmup, done, args.decay)
            window.append(run.update(images, labels, args.batch, rate))
            run.seconds = base + time.time() - start
            bar.update()
            if run.step % 100 == 0:
                loss = sum(torch.stack(window).tolist()) / len(window)
                speed = (run.step - first) * args.batch / (time.time() - start)
                if loss != loss:
                    raise SystemExit(f"the loss is NaN at step {run.step}; the last good state is {run.state_path}")
                log.write(
                    json.dumps({"step": run.step, "loss": loss, "images_per_s": speed, "seconds": run.seconds}) + "\n"
                )
                log.flush()
                bar.set_postfix(loss=f"{loss:.4f}", rate=f"{speed:.0f}/s")
                window = []
            if time.time() - saved > args.save_every * 60:
                run.save()
                saved = time.time()
    except KeyboardInterrupt:
        print("interrupted: saving")
    run.save()
    print(f"step {run.step}: {run.out / 'denoiser.safetensors'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder, zip or idx files of pictures")
    parser.add_argument("--config", required=True, help="k-diffusion config JSON")
    parser.add_argument("--out", type=Path, required=True, help="folder for state, log and the checkpoint")
    parser.add_argument("--minutes", type=float, default=120, help="stop and save after this long (default 120)")
    parser.add_argument("--steps", type=int, default=10**9, help="stop and save at this step")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="resize pictures to SIZE x SIZE")
    parser.add_argument("--save-every", type=float, default=3, help="minutes between saves (default 3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the inner model (about 1.2x on a CPU)")
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="of products; weights stay fp32"
    )
    parser.add_argument(
        "--decay",
        type=float,
        default=0,
        metavar="SHARE",
        help="the learning rate falls to zero along half a cosine over the last SHARE of --steps or --minutes",
    )
    args = parser.parse_args()

    import k_diffusion as K

    config = K.config.load_config(args.config)
    pictures = load_pictures(args.data, size=args.size)
    want = (config["model"]["input_channels"], *config["model"]["input_size"])
    if tuple(pictures.images.shape[1:]) != want:
        raise SystemExit(f"{args.data} has pictures {tuple(pictures.images.shape[1:])}, the config wants {want}")
    if len(pictures) < args.batch:
        raise SystemExit(f"{args.data} has {len(pictures)} pictures, fewer than one batch of {args.batch}")
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    prepare(device, args.precision)
    run = Run(config, args.out, device, args.seed, args.precision)
    if args.compile:
        run.inner.compile()
    images, labels = pictures.images, pictures.labels
    if images.nbytes <= ON_DEVICE:
        images, labels = images.to(device), None if labels is None else labels.to(device)
    train(run, images, labels, args)


if __name__ == "__main__":
    main()
