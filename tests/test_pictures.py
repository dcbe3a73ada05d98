"""Reading pictures: every source gives the same thing, and whatever is damaged is an error that names the file."""

import gzip
import hashlib
import io
import re
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.recipes import build_assets  # noqa: E402
from tdpm_ext.pictures import load_pictures, to_uint8, to_unit  # noqa: E402

ASSETS = ROOT / "assets"


def png(array, mode=None) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(np.asarray(array))
    (picture.convert(mode) if mode else picture).save(buffer, "PNG")
    return buffer.getvalue()


def grey(value, size=4):
    return np.full((size, size), value, np.uint8)


def write_folder(root: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_idx(path: Path, array, shape=None) -> Path:
    array = np.asarray(array, np.uint8)
    shape = array.shape if shape is None else shape
    raw = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


CLASSES = {"0/a.png": png(grey(10)), "0/b.png": png(grey(20)), "2/c.png": png(grey(30)), "10/d.png": png(grey(40))}


@pytest.mark.parametrize("kind", ["folder", "zip", "nested zip", "upper-case zip"])
def test_folder_and_zip_give_the_same_pictures_with_numeric_classes_in_numeric_order(tmp_path, kind):
    if kind == "folder":
        source = write_folder(tmp_path / "set", CLASSES)
    elif kind == "nested zip":
        source = write_zip(tmp_path / "set.zip", {f"some/where/{k}": v for k, v in CLASSES.items()})
    else:
        source = write_zip(tmp_path / ("SET.ZIP" if kind.startswith("upper") else "set.zip"), CLASSES)
    pictures = load_pictures(source)
    assert pictures.images.dtype == torch.uint8 and pictures.images.shape == (4, 1, 4, 4)
    assert pictures.classes == ["0", "2", "10"]
    by_value = dict(zip(pictures.images[:, 0, 0, 0].tolist(), pictures.labels.tolist(), strict=True))
    assert by_value == {10: 0, 20: 0, 30: 1, 40: 2}


def test_one_folder_without_classes_has_no_labels(tmp_path):
    pictures = load_pictures(write_folder(tmp_path, {"a.png": png(grey(1)), "b.png": png(grey(2))}))
    assert pictures.labels is None and pictures.classes == [] and len(pictures) == 2


def test_hidden_files_of_operating_systems_are_skipped(tmp_path):
    junk = {"__MACOSX/0/._a.png": b"junk", "0/.hidden.png": b"junk", "0/Thumbs.db": b"junk", "0/note.txt": b"junk"}
    assert len(load_pictures(write_zip(tmp_path / "set.zip", CLASSES | junk))) == 4
    assert len(load_pictures(write_folder(tmp_path / "set", CLASSES | junk))) == 4


def test_limit_spreads_over_the_sorted_list(tmp_path):
    source = write_folder(tmp_path, {f"{i // 5}/{i:02d}.png": png(grey(i)) for i in range(10)})
    assert load_pictures(source, limit=5).images[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8]
    assert len(load_pictures(source, limit=99)) == 10


def test_different_sizes_are_refused_until_a_size_is_given(tmp_path):
    source = write_folder(tmp_path, {"a.png": png(grey(8, 4)), "b.png": png(grey(8, 6))})
    with pytest.raises(ValueError, match="size="):
        load_pictures(source)
    assert load_pictures(source, size=2).images.tolist() == [[[[8, 8], [8, 8]]]] * 2


@pytest.mark.parametrize(
    "content, value, channels",
    [
        (png(np.full((4, 4), 65535, np.uint16)), 255, 1),  # 16 bits are scaled, not clipped
        (png(np.full((4, 4), 257 * 7, np.uint16)), 7, 1),
        (png(np.full((4, 4), True)), 255, 1),
        (png(grey(9), "LA"), 9, 1),
        (png(grey(9), "RGBA"), 9, 3),
        (png(grey(9), "P"), 9, 3),
    ],
)
def test_every_mode_becomes_grey_or_rgb_bytes(tmp_path, content, value, channels):
    images = load_pictures(write_folder(tmp_path, {"a.png": content})).images
    assert images.shape == (1, channels, 4, 4) and images.unique().tolist() == [value]


def test_grey_among_colour_becomes_rgb(tmp_path):
    pictures = load_pictures(write_folder(tmp_path, {"a.png": png(grey(5)), "b.png": png(grey(6), "RGB")}))
    assert pictures.images.shape == (2, 3, 4, 4) and pictures.images[0].unique().tolist() == [5]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_file_and_its_folder(tmp_path, ending):
    images = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
    file = write_idx(tmp_path / f"train-images-idx3-ubyte{ending}", images)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images[:1])
    assert load_pictures(file).labels is None
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", [3, 1, 0, 1, 2, 0])
    for source in (file, tmp_path):
        pictures = load_pictures(source)
        assert torch.equal(pictures.images[:, 0], torch.from_numpy(images))
        assert pictures.labels.tolist() == [3, 1, 0, 1, 2, 0] and pictures.classes == ["0", "1", "2", "3"]
    some = load_pictures(file, limit=3, size=2)
    assert some.labels.tolist() == [3, 0, 2] and some.images.shape == (3, 1, 2, 2)


def test_idx_that_does_not_hold_what_it_says_is_refused(tmp_path):
    file = tmp_path / "x-images-idx3-ubyte"
    write_idx(file, grey(0), shape=(9, 4, 4))
    with pytest.raises(ValueError, match="truncated"):
        load_pictures(file)
    write_idx(file, grey(0), shape=(2**31, 2**31, 2**31))
    with pytest.raises(ValueError, match="truncated"):
        load_pictures(file)
    file.write_bytes(b"\0\0\x0d\x03" + bytes(12))
    with pytest.raises(ValueError, match="unsigned bytes"):
        load_pictures(file)
    write_idx(file, np.zeros((0, 4, 4)))
    with pytest.raises(ValueError, match="no pictures"):
        load_pictures(file)
    write_idx(file, np.zeros((2, 4, 4)))
    write_idx(tmp_path / "x-labels-idx1-ubyte", [1])
    with pytest.raises(ValueError, match="2 pictures.*1 labels"):
        load_pictures(file)
    packed = tmp_path / "y-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(bytes(100))[:-12])
    with pytest.raises(ValueError, match="y-images"):
        load_pictures(packed)


def test_damaged_pictures_are_named(tmp_path):
    broken = {"0/good.png": png(grey(1)), "0/truncated.png": png(grey(3, 64))[:60]}
    with pytest.raises(ValueError, match="truncated.png is not a readable picture"):
        load_pictures(write_folder(tmp_path / "a", broken))
    archive = write_zip(tmp_path / "a.zip", {"0/x.png": png(grey(1))})
    raw = bytearray(archive.read_bytes())
    raw[40] ^= 255  # inside the stored picture: the checksum no longer fits
    archive.write_bytes(raw)
    with pytest.raises(ValueError, match="x.png is not a readable picture"):
        load_pictures(archive)


def test_nothing_to_read_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a folder"):
        load_pictures(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no pictures.*\.png"):
        load_pictures(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="neither a folder, a zip"):
        load_pictures(tmp_path / "x.zip")
    for wrong in ({"limit": 0}, {"size": -1}):
        with pytest.raises(ValueError, match="at least 1"):
            load_pictures(tmp_path, **wrong)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200), keep=st.integers(0, 90))
def test_any_bytes_are_read_or_refused_with_a_value_error(tmp_path_factory, content, keep):
    file = tmp_path_factory.mktemp("fuzz") / "a.png"
    file.write_bytes(png(grey(3))[:keep] + content)
    try:
        images = load_pictures(file.parent).images
    except ValueError as error:
        assert "a.png" in str(error)
    else:
        assert images.dtype == torch.uint8 and len(images) == 1


def test_units_round_trip_every_byte_and_leave_their_input_alone():
    bytes_ = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    unit = to_unit(bytes_)
    assert (unit.min().item(), unit.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(unit), bytes_)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    floats = torch.full((1, 1, 2, 2), 255.0)
    assert to_unit(floats).eq(1).all() and floats.eq(255).all()


@pytest.mark.parametrize("name, count", [("fashion-mnist", 5000), ("digits", 2500)])
def test_shipped_halves_are_balanced_and_share_no_picture(name, count):
    fit, judge = (load_pictures(ASSETS / name / f"{half}.zip") for half in ("fit", "eval"))
    for half in (fit, judge):
        assert half.images.shape == (count, 1, 28, 28)
        assert half.classes == [str(i) for i in range(10)]
        assert half.labels.bincount().tolist() == [count // 10] * 10
    contents = [{picture.numpy().tobytes() for picture in half.images} for half in (fit, judge)]
    assert len(contents[0]) == len(contents[1]) == count and not contents[0] & contents[1]


@pytest.mark.parametrize("name", ["fashion-mnist", "digits"])
def test_the_card_of_a_shipped_set_holds_the_hashes_of_its_files(name):
    card = (ASSETS / name / "README.md").read_text()
    listed = dict(re.findall(r"^\| `(\S+)` \| `([0-9a-f]{64})` \|", card, re.MULTILINE))
    assert {"fit.zip", "eval.zip", "features.safetensors"} <= set(listed)
    for file, digest in listed.items():
        assert hashlib.sha256((ASSETS / name / file).read_bytes()).hexdigest() == digest, file
    assert sum(p.stat().st_size for p in (ASSETS / name).glob("*.zip")) <= build_assets.LIMIT
    assert (ASSETS / name / "LICENSE").read_text() == build_assets.LICENCES[name]


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_the_split_divides_every_class_evenly_and_loses_nothing(counts, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    first, second = build_assets.split(labels, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        assert [(labels[half] == label).sum() for half in (first, second)] == [(count + 1) // 2, count // 2]


def test_a_set_is_built_from_idx_files_twice_with_the_same_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", [0, 1, 2] * 4)
    for out in ("a", "b"):
        assert build_assets.main(["fashion-mnist", "--source", str(tmp_path), "--out", str(tmp_path / out)]) == 0
    files = [sorted((tmp_path / out / "fashion-mnist").iterdir()) for out in ("a", "b")]
    assert [f.name for f in files[0]] == ["LICENSE", "eval.zip", "fit.zip"]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    fit = load_pictures(files[0][2])
    assert len(fit) == 6 and fit.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert build_assets.main(["digits", "--source", str(tmp_path / "absent"), "--out", str(tmp_path)]) == 2
