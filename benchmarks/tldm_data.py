"""The text-picture pairs as tensors: pictures, the phrases of their captions, and batches of both on one device."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.recipes.embed_captions import MIRRORED, STYLE_WORDS, cleaned
from tdpm_ext.pictures import load_pictures

NAME_SLOTS, TAG_SLOTS, MOST_TAGS = 2, 2, 16
STATES = 8  # of one phrase in training; one phrase in a hundred has more
CAPTION_STATES = 16  # of one caption in training: attention costs by the longest


@dataclass(frozen=True)
class Pairs:
    """``images`` uint8 [N, 3, 64, 64]; ``codes`` and ``styles``: the code points and the icon set of each picture."""

    images: Tensor
    codes: list[str]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.images)


def load_pairs(path: str | Path) -> Pairs:
    """Read a zip of ``recipes/build_tldm.py``, whose pictures are named ``<style>/<code points>.png``."""
    images = load_pictures(path).images
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
    split = [name.removesuffix(".png").split("/") for name in names]
    unknown = sorted({style for style, _ in split} - set(STYLE_WORDS))
    if unknown or len(names) != len(images):
        raise ValueError(f"{path} was not made by benchmarks/recipes/build_tldm.py (styles {unknown[:3]})")
    return Pairs(images, [codes for _, codes in split], [style for style, _ in split])


def load_captions(path: str | Path) -> dict[str, dict]:
    """Code points -> ``{"name": ..., "tags": [...]}``."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def prompt_of(captions: dict[str, dict], codes: str, style: str) -> str:
    """The caption that a picture is judged by: its name and its style, such as ``red apple, flat style``."""
    return f"{captions[codes]['name']}, {STYLE_WORDS[style]}"


@dataclass(frozen=True)
class Phrases:
    """Phrases as one table, its last row the empty phrase: ``states`` [P+1, STATES, D], ``padding`` [P+1, STATES]."""

    states: Tensor
    padding: Tensor
    index: dict[str, int]

    @classmethod
    def build(cls, known: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Phrases:
        rows = [states[:STATES] for states in known.values()]
        states = torch.zeros(len(rows) + 1, STATES, rows[0].shape[1])
        padding = torch.ones(len(rows) + 1, STATES)
        padded = pad_sequence(rows, batch_first=True)
        states[:-1, : padded.shape[1]] = padded
        for i, row in enumerate(rows):
            padding[i, : len(row)] = 0
        return cls(states.to(device, dtype), padding.to(device, dtype), {p: i for i, p in enumerate(known)})

    @property
    def empty(self) -> int:
        return len(self.states) - 1

    def find(self, phrases: list[str], slots: int) -> list[int]:
        """Rows of the phrases that are known, filled up to ``slots`` with the empty phrase."""
        rows = [self.index[phrase] for phrase in phrases if phrase in self.index][:slots]
        return rows + [self.empty] * (slots - len(rows))

    def text(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows int64 [B, slots] -> what the denoiser takes: cross_cond, cross_cond_padding, mapping_cond."""
        states, padding = self.states[rows].flatten(1, 2), self.padding[rows].flatten(1)
        order = padding.float().argsort(dim=1, stable=True)[:, :CAPTION_STATES]  # what is there first, in its order
        padding = padding.gather(1, order)
        states = states.gather(1, order[:, :, None].expand(-1, -1, states.shape[2]))
        present = (rows != self.empty).to(states.dtype)
        pooled = (self.states[rows][:, :, 0] * present[:, :, None]).sum(1) / present.sum(1, keepdim=True).clamp_min(1)
        # without a single phrase, the first (zero) state stands for "no prompt"
        first = torch.where(present.any(1), padding[:, 0], torch.zeros_like(padding[:, 0]))
        padding = torch.cat([first[:, None], padding[:, 1:]], 1)
        return {"cross_cond": states, "cross_cond_padding": padding, "mapping_cond": pooled}


class CaptionSampler:
    """Captions of training pictures, drawn anew for every batch: name and style, some tags, sometimes nothing.

    A caption is left out whole with probability ``dropped``; the name stays with .9, each of two random tags comes
    with .25, the style stays with .9.
    """

    def __init__(self, pairs: Pairs, captions: dict[str, dict], phrases: Phrases, device: torch.device, dropped: float):
        self.phrases, self.dropped, self.device = phrases, dropped, device
        names, tags, styles = [], [], []
        for codes, style in zip(pairs.codes, pairs.styles, strict=True):
            entry = captions[codes]
            names.append(phrases.find(cleaned(entry["name"]), NAME_SLOTS))
            tags.append(phrases.find([p for tag in entry["tags"] for p in cleaned(tag)], MOST_TAGS))
            styles.append(phrases.find([STYLE_WORDS[style]], 1))
        self.names, self.tags, self.styles = (torch.tensor(rows, device=device) for rows in (names, tags, styles))
        self.counts = (self.tags != phrases.empty).sum(1)
        self.mirrored = phrases.index[MIRRORED]

    def rows(self, index: Tensor, mirrored: Tensor) -> Tensor:
        """Phrases [B, slots] of random captions for the pictures ``index`` [B], some ``mirrored`` (bool [B])."""
        count, device = len(index), self.device
        keep = torch.rand(4, count, 1, device=device)
        place = (torch.rand(count, TAG_SLOTS, device=device) * self.counts[index][:, None]).long()
        tags = self.tags[index].gather(1, place)
        tags = torch.where(torch.rand(count, TAG_SLOTS, device=device) < 0.25, tags, self.phrases.empty)
        parts = [
            torch.where(keep[0] < 0.9, self.names[index], self.phrases.empty),
            tags,
            torch.where(keep[1] < 0.9, self.styles[index], self.phrases.empty),
            torch.where(mirrored[:, None], self.mirrored, self.phrases.empty),
        ]
        return torch.where(keep[2] < self.dropped, self.phrases.empty, torch.cat(parts, 1))

    def full_rows(self, index: Tensor) -> Tensor:
        """Name and style of the pictures ``index``, nothing left out: what held-out pictures are judged with."""
        nothing = torch.full((len(index), TAG_SLOTS), self.phrases.empty, device=self.device)
        last = torch.full((len(index), 1), self.phrases.empty, device=self.device)
        return torch.cat([self.names[index], nothing, self.styles[index], last], 1)
