"""``tdpm train``: a learned prior for a checkpoint, or prior and denoiser together, from the command line."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import MISSING, fields, replace
from pathlib import Path

import torch

from tdpm_ext.checkpoints import Checkpoint, open_checkpoint, untrained
from tdpm_ext.commands import read_pictures
from tdpm_ext.priors.learned import NOISES
from tdpm_ext.text_denoiser import text_args
from tdpm_ext.text_job import check_captions, encoded, in_turn, latents, open_space, takes_text
from tdpm_ext.training.conditions import Classes
from tdpm_ext.training.losses import LOSSES
from tdpm_ext.training.options import CRITICS, KINDS, Options
from tdpm_ext.training.teacher import trajectories

CLOCKS = {"wall": time.monotonic, "process": time.process_time}
HELP = {
    "kind": f"of prior: {', '.join(KINDS)}; raw ones emit x at sigma_trunc itself",
    "rank": "of a LoRA of the denoiser, for shared kinds; 0: all weights",
    "width": "channels of a generator",
    "depth": "blocks of a generator",
    "adversarial": "weight of the adversarial loss; 0: none",
    "loss": f"adversarial loss: {', '.join(LOSSES)}",
    "gamma": "weight of the gradient penalties",
    "every": "steps between two penalties of non_saturating",
    "regression": "weight of the distance to the checkpoint's own trajectories (needs --teacher)",
    "huber": "above 0: pseudo-Huber distance in place of the mean square",
    "denoising": "weight of the denoising loss: above 0 trains the denoiser too",
    "sigma_init": "noise level of the prior's call",
    "sigma_trunc": "noise level where the chain is cut",
    "sigma_low": "least noise at which pictures are compared",
    "sigma_high": "most noise at which pictures are compared",
    "noise": f"on the way down: {', '.join(NOISES)}",
    "finish": "noise levels of denoiser steps that the losses look through, the first sigma_trunc, as 0.9,0.2",
    "batch": "pictures a step, over all processes",
    "lr": "learning rate of the prior",
    "disc_lr": "learning rate of the discriminator",
    "warmup": "steps in which the prior's learning rate rises to --lr",
    "ema": "largest decay of the running mean of the weights",
    "critic": f"what the discriminator sees: {', '.join(CRITICS)} (activations of the frozen denoiser, or the picture)",
    "disc_width": "channels of the discriminator",
    "label_dropout": "share of pictures without their label, for guidance",
    "cond_scale": "guidance of the frozen denoiser, and of trajectories",
    "teacher": "trajectories of the checkpoint to draw and keep on disk",
    "teacher_steps": "evaluations in each",
    "seed": "everything random follows from it",
}


def add_options(parser: argparse.ArgumentParser, positive, positive_float) -> None:
    """All flags of ``tdpm train``; those of `Options` are made from its fields."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT",
        help="k-diffusion .safetensors or .pth; with --denoising, also a config .json: training from scratch",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, help="folder, .zip or idx files of pictures; without it: data-free")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="for a checkpoint of text, one a line: the caption of each picture, or prompts for trajectories",
    )  # fmt: skip
    parser.add_argument("--vae", type=Path, help="auto-encoder of a latent checkpoint (default: beside it)")
    parser.add_argument("--size", type=positive, help="resize pictures to SIZE x SIZE")
    parser.add_argument("--limit", type=positive, help="read at most this many pictures, spread evenly")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the run; continued if it is there"
    )
    parser.add_argument("--start", type=Path, metavar="DIR", help="go on from this run's state, with other options")
    parser.add_argument(
        "--base", default="mixture", help="closed-form prior file to start from, a kind to fit, or none"
    )
    parser.add_argument(
        "--teacher-folder", type=Path, metavar="DIR", help="where trajectories lie (default DIR/teacher)"
    )
    for field in fields(Options):
        default = field.default if field.default is not MISSING else None
        kind = _levels if field.name == "finish" else type(default)
        shown = ",".join(map(str, default)) or "none" if field.name == "finish" else default
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=default, help=f"{HELP[field.name]} (default {shown})")
    parser.add_argument("--steps", type=positive, default=10**9, help="stop and save at this step")
    parser.add_argument("--minutes", type=positive_float, default=float("inf"), help="stop and save after so long")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall",
        help="of --minutes; process: this process's own time on CPUs, for comparisons on a busy machine (default wall)",
    )  # fmt: skip
    parser.add_argument("--save-minutes", type=positive_float, default=3.0, help="between two saves (default 3)")
    parser.add_argument(
        "--check-every", type=int, default=200, help="steps between two looks at pictures (default 200)"
    )
    parser.add_argument("--check-samples", type=positive, default=512, help="pictures looked at (default 512)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--precision", choices=("no", "tf32", "bf16"), default="no", help="on a GPU (default no: float32)"
    )
    parser.add_argument("--config", type=Path, help="k-diffusion config JSON, if the checkpoint has none or another")


def run(args: argparse.Namespace) -> int:
    """Train until a limit or Ctrl-C; 1 when the run failed (the last good state stands)."""
    from accelerate import Accelerator

    from tdpm_ext.training.trainer import Limits, Run, TrainingFailed

    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.precision != "no":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if args.precision == "bf16" else "no")
    checkpoint = _opened(args, options)
    text = takes_text(checkpoint)
    if args.prompts is not None and not text:
        raise ValueError(f"{args.checkpoint} takes no prompts: its network has no cross-attention to text")
    if args.start is not None and not (args.start / "state.safetensors").exists():
        raise ValueError(f"--start {args.start} holds no run: give the --out of an earlier one")
    if text:
        checkpoint, parts = _with_text(args, checkpoint)
        pictures = parts["images"]
    else:
        pictures = None if args.data is None else read_pictures(args, tuple(checkpoint.shape))
        parts = {} if pictures is None else {"images": pictures.images, "labels": pictures.labels}
    with accelerator.main_process_first():
        base = _base(args, options, checkpoint, pictures, parts.get("captions"), accelerator.device)
    parts |= {"teacher": args.teacher_folder, "base": base, "start": args.start, "accelerate": args.accelerate}
    clock = CLOCKS[args.clock]
    limits = Limits(args.steps, args.minutes, args.save_minutes, check_every=args.check_every, clock=clock)
    try:
        training = Run(options, checkpoint, args.out, accelerator, check_samples=args.check_samples, **parts)
        path = training.train(limits)
    except TrainingFailed as error:
        print(f"tdpm train: {error}", file=sys.stderr)
        return 1
    if accelerator.is_main_process:
        print(f"step {training.step}: {path}; log.jsonl, log.png and grid.png beside it")
    return 0


def _levels(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of noise levels such as 0.9,0.2") from None


def _opened(args: argparse.Namespace, options: Options) -> Checkpoint:
    if args.checkpoint.suffix != ".json" or args.checkpoint.name.endswith("_state.json"):
        return open_checkpoint(args.checkpoint, config=args.config)
    if not options.denoising:
        raise ValueError(f"{args.checkpoint} is a config: from scratch, the denoiser is trained too (--denoising 1)")
    return untrained(args.checkpoint, options.seed)


def _with_text(args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[Checkpoint, dict]:
    """The checkpoint as it is called with text; latents of --data, their captions, and what shows latents."""
    if args.prompts is None:
        raise ValueError(
            f"{args.checkpoint} takes text: give --prompts FILE, one a line, the caption of each picture of --data or, "
            "without --data, prompts to draw trajectories for"
        )
    model, captions = encoded(args, checkpoint)
    about = checkpoint.config.get("text") or {}
    if args.data is None:
        found, space = None, open_space(args.vae, args.checkpoint, about, torch.device("cpu"))
    else:
        found, space = latents(args, checkpoint)
        check_captions(found, captions)
    return replace(checkpoint, model=model), {"images": found, "captions": captions, "show": space.decode}


def _base(args: argparse.Namespace, options: Options, checkpoint: Checkpoint, pictures, captions, device):
    """The closed-form prior to start from: a file, the one that an earlier call fitted here, or a new fit."""
    from tdpm_ext.fit import fit_prior
    from tdpm_ext.priors.io import load_prior, save_prior

    if args.base == "none":
        return None
    kept = args.out / "base.safetensors"
    if Path(args.base).suffix == ".safetensors" or kept.exists():
        path = kept if kept.exists() else Path(args.base)
        return load_prior(path, expect_shape=tuple(checkpoint.shape))
    settings = {"sigma_max": checkpoint.sigma_max, "seed": options.seed, "progress": sys.stderr.isatty()}
    if captions is not None:
        base = _text_base(args.base, options, checkpoint, pictures, captions, settings)
    elif pictures is not None:
        base = fit_prior(args.base, pictures, **settings)
    elif options.teacher:  # drawn anyway, and many finished runs say more of the checkpoint than a few short ones
        folder, conditions = args.teacher_folder or args.out / "teacher", Classes(checkpoint.num_classes)
        teacher = trajectories(options, checkpoint, folder, conditions, device, accelerate=args.accelerate)
        base = fit_prior(args.base, teacher.final, labels=teacher.labels, **settings)
        base.card |= {"source": "denoiser", "checkpoint": checkpoint.fingerprint, "cond_scale": options.cond_scale}
    else:
        about = {"denoiser": checkpoint.model, "shape": checkpoint.shape, "num_classes": checkpoint.num_classes}
        base = fit_prior(args.base, **about, cond_scale=options.cond_scale, **settings)
    args.out.mkdir(parents=True, exist_ok=True)
    save_prior(base, kept)
    return base


def _text_base(kind: str, options: Options, checkpoint: Checkpoint, pictures, captions, settings: dict):
    """A closed-form prior under captions: from pictures where guidance does not move them, else from the checkpoint."""
    from tdpm_ext.fit import DRAWS, fit_prior
    from tdpm_ext.fit_text import KINDS, fit_text_prior

    text = kind in KINDS
    if pictures is not None and options.cond_scale == 1.0:
        given = (pictures, captions.pooled) if text else (pictures,)
        return (fit_text_prior if text else fit_prior)(kind, *given, **settings)
    settings |= {"denoiser": checkpoint.model, "shape": checkpoint.shape, "cond_scale": options.cond_scale}
    if text:
        return fit_text_prior(kind, text=text_args(captions), **settings)
    return fit_prior(kind, extra_args=text_args(in_turn(captions, DRAWS)), **settings)
