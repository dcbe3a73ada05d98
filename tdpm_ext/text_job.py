"""Prompts on the command line: what ``tdpm fit``, ``calibrate`` and ``sample`` do for a checkpoint that takes text."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tdpm_ext.checkpoints import Checkpoint, fingerprint_tensors
from tdpm_ext.latent import LatentSpace
from tdpm_ext.pictures import load_pictures, to_unit
from tdpm_ext.text import MiniLM, Text, TextEncoder, phrases_of
from tdpm_ext.text_denoiser import TextDenoiser, text_args
from tdpm_ext.vae import PictureVAE, load_vae

MAX_PROMPTS = 10_000
MAX_FILE = 8 * 2**20  # bytes of a file of prompts
CAPTION_WIDTH = 22  # letters in a line beside a grid


@dataclass
class Prompted:
    """A checkpoint that takes text, with its encoded prompts (none: unconditional) and its auto-encoder."""

    model: TextDenoiser
    prompts: list[str]
    text: Text | None
    negative: Text | None
    space: LatentSpace

    def extra_args(self, rows: Sequence[int | None], cond_scale: float, device: torch.device) -> dict:
        """The model's arguments for pictures of the prompts with these numbers."""
        if self.text is None:
            return {}
        text = self.text.take(torch.tensor(rows)).to(device)
        negative = None if self.negative is None else self.negative.take(torch.zeros(len(rows), dtype=torch.long))
        args = text_args(text, None if negative is None else negative.to(device))
        return {**args, "cond_scale": cond_scale}

    def captions(self) -> list[str]:
        """The prompts in short lines, to stand beside rows of a grid."""
        return ["\n".join(textwrap.wrap(prompt, CAPTION_WIDTH)[:4]) for prompt in self.prompts]


def takes_text(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's network attends to token states."""
    return bool(checkpoint.config["model"].get("cross_cond_dim"))


def open_prompted(args: argparse.Namespace, checkpoint: Checkpoint, encoder: TextEncoder | None = None):
    """`Prompted` for the command line, or None where neither it nor the checkpoint speaks of text."""
    prompts = read_prompts(args.prompt, args.prompts)
    if not takes_text(checkpoint):
        if prompts or args.negative_prompt:
            raise ValueError(f"{args.checkpoint} takes no prompts: its network has no cross-attention to text")
        return None
    if args.cond_scale != 1.0 and not prompts:
        raise ValueError(f"--cond-scale {args.cond_scale:g} guides towards a prompt: give --prompt or --prompts")
    if args.negative_prompt is not None and args.cond_scale == 1.0:
        raise ValueError("--negative-prompt acts through guidance: give --cond-scale above 1")
    about = checkpoint.config.get("text") or {}
    check_styles([*prompts, args.negative_prompt or ""], about.get("styles"))
    space = open_space(args.vae, Path(args.checkpoint), about, next(checkpoint.model.parameters()).device)
    text = negative = None
    if prompts:
        encoder = encoder or MiniLM()
        text = encoder.encode(prompts)
        negative = None if args.negative_prompt is None else encoder.encode([args.negative_prompt])
    return Prompted(TextDenoiser(checkpoint), prompts, text, negative, space)


def read_prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """--prompt and the lines of --prompts, checked one by one.

    Raises:
        ValueError: a prompt that cannot be read (which one is said), a file without prompts or not of text.
    """
    prompts = list(given or ())
    where = [f"--prompt {i + 1}" if len(prompts) > 1 else "--prompt" for i in range(len(prompts))]
    if file is not None:
        if file.stat().st_size > MAX_FILE:
            raise ValueError(f"{file} is larger than {MAX_FILE >> 20} MB: give one prompt a line")
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not text in UTF-8: give one prompt a line") from error
        kept = [(i + 1, line.strip()) for i, line in enumerate(lines) if line.strip()]
        if not kept:
            raise ValueError(f"{file} holds no prompts: give one a line")
        prompts += [line for _, line in kept]
        where += [f"{file}, line {i}" for i, _ in kept]
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{len(prompts):,} prompts: give at most {MAX_PROMPTS:,}")
    for place, prompt in zip(where, prompts, strict=True):
        try:
            phrases_of(prompt)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return prompts


def check_styles(prompts: Sequence[str], styles: Sequence[str] | None) -> None:
    """ValueError for a phrase that ends in "style" and is none of the checkpoint's styles."""
    if not styles:
        return
    for prompt in filter(str.strip, prompts):
        for phrase in phrases_of(prompt):
            if phrase.split()[-1] == "style" and phrase not in styles:
                raise ValueError(f"unknown style {phrase!r}: this checkpoint knows {', '.join(styles)}")


def open_space(vae: Path | None, checkpoint: Path, about: dict, device: torch.device) -> LatentSpace:
    """The auto-encoder (by default vae.safetensors beside the checkpoint), which must be the one trained with."""
    path = checkpoint.with_name("vae.safetensors") if vae is None else vae
    if not path.exists():
        raise FileNotFoundError(f"no auto-encoder at {path}: name the one that belongs to {checkpoint} with --vae")
    found = load_vae(path, device)
    check_space(found, about, path, checkpoint)
    return LatentSpace(found)


def check_space(vae: PictureVAE, about: dict, path: Path, checkpoint: Path) -> None:
    """ValueError unless ``vae`` is the auto-encoder that a checkpoint's config tells of in ``text``."""
    wanted = about.get("scaling_factor")
    if isinstance(wanted, int | float) and abs(vae.scaling_factor / wanted - 1) > 1e-3:
        raise ValueError(
            f"{path} scales latents by {vae.scaling_factor:.4g}, {checkpoint} was trained with {wanted:.4g}: "
            "it is another auto-encoder"
        )
    if about.get("vae") not in (None, vae_fingerprint(vae)):
        raise ValueError(
            f"{path} has fingerprint {vae_fingerprint(vae)}, {checkpoint} was trained with {about['vae']}: "
            "it is another auto-encoder"
        )


def vae_fingerprint(vae: PictureVAE) -> str:
    """16 hex digits that name an auto-encoder's weights as stored."""
    return fingerprint_tensors({name: value.half() for name, value in vae.state_dict().items()})[:16]


def in_turn(text: Text, count: int) -> Text:
    """``count`` rows, the prompts one after the other and again from the first."""
    return text.take(torch.arange(count) % len(text))


def fit(args: argparse.Namespace, checkpoint: Checkpoint | None):
    """``tdpm fit --prompts``: a prior fitted from the checkpoint under prompts and their guidance, or from the pictures
    of --data, whose captions the prompts are."""
    from tdpm_ext.fit import DRAWS, fit_prior
    from tdpm_ext.fit_text import KINDS, fit_text_prior

    if checkpoint is None:
        raise ValueError("--prompts are for checkpoints of text: give a CHECKPOINT")
    model, text = encoded(args, checkpoint)
    if args.data is not None:
        return _fit_to_pictures(args, checkpoint, text)
    text = text.to(next(model.parameters()).device)
    options = {k: getattr(args, k) for k in ("components", "rank") if getattr(args, k) is not None}
    options |= {
        "denoiser": model,
        "shape": checkpoint.shape,
        "sigma_max": checkpoint.sigma_max if args.sigma_max is None else args.sigma_max,
        "cond_scale": args.cond_scale,
        "checkpoint": checkpoint.fingerprint,
        "seed": args.seed,
        "progress": sys.stderr.isatty(),
    }
    if args.kind in KINDS:
        return fit_text_prior(args.kind, text=text_args(text), **options)
    return fit_prior(args.kind, extra_args=text_args(in_turn(text, DRAWS)), **options)


def _fit_to_pictures(args: argparse.Namespace, checkpoint: Checkpoint, text: Text):
    from tdpm_ext.fit_text import fit_text_prior

    data, _ = latents(args, checkpoint)
    check_captions(data, text)
    options = {k: getattr(args, k) for k in ("components", "rank") if getattr(args, k) is not None}
    options |= {"sigma_max": checkpoint.sigma_max if args.sigma_max is None else args.sigma_max}
    options |= {"cond_scale": args.cond_scale, "checkpoint": checkpoint.fingerprint, "seed": args.seed}
    return fit_text_prior(args.kind, data, text.pooled, progress=sys.stderr.isatty(), **options)


def check_captions(pictures: Tensor, captions: Text) -> None:
    """ValueError unless there is one caption per picture."""
    if len(pictures) != len(captions):
        raise ValueError(
            f"{len(captions)} lines of --prompts for {len(pictures)} pictures of --data: give the caption of each "
            "picture, in the order of their file names"
        )


def calibration(
    args: argparse.Namespace, checkpoint: Checkpoint, samples: int
) -> tuple[TextDenoiser, dict[str, Tensor]]:
    """The model and, for ``samples`` pictures, the arguments that ``calibrate`` runs it with."""
    model, text = encoded(args, checkpoint)
    return model, text_args(in_turn(text, samples).to(next(model.parameters()).device))


def latents(args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[Tensor, LatentSpace]:
    """--data as the checkpoint sees it, float32 [N, *shape] on the CPU, and the space that decodes it (--vae)."""
    device = next(checkpoint.model.parameters()).device
    space = open_space(args.vae, Path(args.checkpoint), checkpoint.config.get("text") or {}, device)
    pictures = load_pictures(args.data, size=args.size, limit=args.limit).images
    found = space.encode(to_unit(pictures), progress=sys.stderr.isatty())
    if found.shape[1:] != checkpoint.shape:
        raise ValueError(
            f"{args.data} has pictures {list(pictures.shape[1:])}, which become latents {list(found.shape[1:])}; the "
            f"checkpoint takes {list(checkpoint.shape)}: --size resizes pictures"
        )
    return found, space


def encoded(args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[TextDenoiser, Text]:
    """The checkpoint as it is called with text, and the lines of --prompts.

    Raises:
        ValueError: no prompts, one that cannot be read, a checkpoint that takes none.
    """
    model = TextDenoiser(checkpoint)
    prompts = read_prompts(None, args.prompts)
    if not prompts:
        raise ValueError("give --prompts FILE, one prompt a line, such as will be sampled later")
    check_styles(prompts, (checkpoint.config.get("text") or {}).get("styles"))
    return model, MiniLM().encode(prompts)
