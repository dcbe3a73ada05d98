"""The emoji set: rendered as drawn, divided by concept, complete with its card and licences."""

import hashlib
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.recipes import build_emoji
from tdpm_ext.pictures import load_pictures

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "emoji"
HALVES = ("fit.zip", "eval.zip")


@pytest.fixture(scope="module")
def halves():
    return {name: load_pictures(ASSETS / name) for name in HALVES}


def names(half: str) -> list[str]:
    with zipfile.ZipFile(ASSETS / half) as archive:
        return archive.namelist()


def slug(member: str) -> str:
    """``food/noto-v1-red-apple.png`` -> ``red-apple``."""
    stem = member.split("/")[1].removesuffix(".png")
    style = max((s.name for s in build_emoji.STYLES if stem.startswith(s.name + "-")), key=len)
    return stem.removeprefix(style + "-")


def test_both_halves_hold_rgb_pictures_of_the_same_eight_classes(halves):
    for pictures in halves.values():
        assert tuple(pictures.images.shape[1:]) == (3, 32, 32)
        assert pictures.classes == sorted(set(build_emoji.CLASSES.values()))
        assert pictures.labels.bincount().min() >= 100
    assert len(halves["fit.zip"]) > 5000 and len(halves["eval.zip"]) > 2500


def test_no_picture_occurs_twice_in_or_across_the_halves(halves):
    digests = [hashlib.sha256(x.numpy().tobytes()).digest() for p in halves.values() for x in p.images]
    assert len(set(digests)) == len(digests)


def test_no_name_occurs_in_both_halves():
    fit, judge = ({slug(n) for n in names(half)} for half in HALVES)
    assert not fit & judge


def test_no_skin_tone_is_left():
    for half in HALVES:
        assert not [n for n in names(half) if "skin-tone" in n or re.search(r"-(medium|medium-light)\.png$", n)]


@given(st.lists(st.sampled_from(["1f52c", "2764", "1f680", "1f9b0"]), min_size=1, max_size=3))
def test_a_concept_is_the_same_for_every_gender_and_presentation(codes):
    person, man, woman = ("-200d-".join([head, *codes]) for head in ("1f9d1", "1f468", "1f469"))
    signed = f"{person}-200d-2640-fe0f"
    assert len({build_emoji.concept_of(c) for c in (person, man, woman, signed, person.upper())}) == 1


@given(st.integers(0, 9))
def test_about_two_thirds_of_the_concepts_are_for_fitting(seed):
    share = np.mean([build_emoji.in_fit(f"{i:x}", seed) for i in range(2000)])
    assert 0.62 < share < 0.71


def test_an_icon_is_drawn_in_its_own_box_centred_on_white():
    pytest.importorskip("resvg_py")
    icons = {"width": 100, "height": 100}
    icon = {"body": '<path fill="#f00" d="M10 20h16v8H10z"/>', "left": 10, "top": 20, "width": 16, "height": 8}
    pixels = build_emoji.render(build_emoji.svg_of(icon, icons))
    assert pixels.shape == (32, 32, 3)
    assert (pixels[8:24] == (255, 0, 0)).all()  # the 16 x 8 box fills the width and the middle half of the height
    assert (pixels[:8] == 255).all() and (pixels[24:] == 255).all()


@pytest.mark.parametrize("colours", [3, 1024])
def test_both_kinds_of_png_keep_every_value(tmp_path, colours):
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (colours, 3), dtype=np.uint8)
    pixels = palette[rng.integers(0, colours, (32, 32))]
    (tmp_path / "x.png").write_bytes(build_emoji.png(pixels))
    assert (load_pictures(tmp_path).images[0].numpy().transpose(1, 2, 0) == pixels).all()


def test_the_card_states_the_hashes_and_the_licence_names_every_style():
    card, licence = (ASSETS / "README.md").read_text(), (ASSETS / "LICENSE").read_text()
    for file, digest in re.findall(r"\| `([\w.]+)` \| `([0-9a-f]{64})` \|", card):
        assert hashlib.sha256((ASSETS / file).read_bytes()).hexdigest() == digest, file
    assert all(half in card for half in HALVES)
    for style in build_emoji.STYLES:
        assert f"{style.name}-*" in licence and style.version in card
    assert sum((ASSETS / half).stat().st_size for half in HALVES) <= build_emoji.LIMIT


def test_a_wrong_tarball_is_refused(tmp_path):
    style = build_emoji.STYLES[0]
    (tmp_path / style.tarball).write_bytes(b"not it")
    with pytest.raises(SystemExit, match="SHA-256"):
        build_emoji.fetched(style, tmp_path)
