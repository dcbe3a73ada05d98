"""Read pictures from what people have: a folder, a zip, or MNIST-style idx files.

Everything comes back as ``uint8`` ``[N, C, H, W]`` with integer labels (the position of the class folder among
the sorted folder names, or the idx labels). ``to_unit`` turns it into the float range [-1, 1] that k-diffusion's
models are trained in.
"""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# what Pillow and zipfile raise for damaged, encrypted or absurdly large members (OSError holds Pillow's own)
UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile
)  # fmt: skip


@dataclass
class Pictures:
    """``images`` uint8 [N, C, H, W]; ``labels`` int64 [N] or None; ``classes`` their names, in label order."""

    images: torch.Tensor
    labels: torch.Tensor | None
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index) -> Pictures:
        labels = None if self.labels is None else self.labels[index]
        return Pictures(self.images[index], labels, self.classes)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, C, H, W] -> float32 in [-1, 1]."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1.0)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Float pictures in [-1, 1] -> uint8, rounded and clamped."""
    return x.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def load_pictures(path: str | Path, *, size: int | None = None, limit: int | None = None) -> Pictures:
    """Read every picture under ``path``.

    Args:
        path: a folder or ``.zip`` of pictures (the folder a picture lies in is its class), a folder with
            ``*-images-idx3-ubyte[.gz]`` files (the training ones, if there are several), or one such file.
        size: resize to ``size`` x ``size`` (box filter); needed when the pictures differ in size.
        limit: read at most this many, spread evenly over the sorted list.

    Grey pictures come back with one channel, everything else as RGB; grey ones among colour ones become RGB.

    Raises:
        FileNotFoundError: nothing is there. ValueError: no pictures, damaged ones, or different sizes.
    """
    path = Path(path)
    for name, value in (("size", size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not path.exists():
        raise FileNotFoundError(f"no pictures at {path}: give a folder, a .zip, or an idx file")
    if path.is_file() and "idx3" in path.name:
        return _load_idx(path, size, limit)
    if path.is_dir() and (idx := sorted(path.glob("*images*idx3*"))):
        return _load_idx(next((f for f in idx if f.name.startswith("train")), idx[0]), size, limit)
    names, read = _zip_members(path) if path.is_file() else _folder_members(path)
    if not names:
        raise ValueError(f"no pictures in {path}: looked for {', '.join(SUFFIXES)}")
    return _decode(path, [names[i] for i in spread_over(len(names), limit)], read, size)


def spread_over(count: int, limit: int | None) -> list[int]:
    """Indices of at most ``limit`` of ``count``, evenly over all: folders and sets are often sorted by class."""
    limit = count if limit is None else min(limit, count)
    return [i * count // limit for i in range(limit)]


def class_sequence(labels: torch.Tensor | None, classes: int, count: int) -> torch.Tensor:
    """Classes [count] of samples, in the proportions of ``labels``, every prefix as near to them as can be.

    Equal proportions (or no labels) give 0, 1, .. classes - 1, 0, 1, ..; sample i has the same class at any count.
    """
    if labels is None:
        return torch.arange(count) % classes
    shares = np.bincount(labels.numpy(), minlength=classes)[:classes] / len(labels)
    given, out = np.zeros(classes), np.empty(count, np.int64)
    for i in range(count):
        out[i] = np.argmax(shares * (i + 1) - given)  # the class that is owed most, the first of several
        given[out[i]] += 1
    return torch.from_numpy(out)


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"reading pictures needs Pillow: pip install pillow ({error})") from error
    return Image


def _to_array(picture, size: int | None) -> np.ndarray:
    """A Pillow picture -> uint8 [C, H, W], one channel for grey and three for anything else."""
    Image = _pillow()
    if picture.mode.startswith("I"):  # 16 bits per pixel; Pillow's own conversion would clip, not scale
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    picture = picture.convert("L" if picture.mode in ("L", "1", "LA") else "RGB")
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BOX)
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _decode(path: Path, names: list[str], read: Callable[[str], bytes], size: int | None) -> Pictures:
    Image = _pillow()
    arrays, folders = [], []
    for name in names:
        try:
            arrays.append(_to_array(Image.open(io.BytesIO(read(name))), size))
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: {name} is not a readable picture ({error})") from error
        folders.append(PurePosixPath(name).parent.name)
    if len({a.shape[0] for a in arrays}) > 1:
        arrays = [np.broadcast_to(a, (3, *a.shape[1:])) for a in arrays]
    shapes = {a.shape for a in arrays}
    if len(shapes) > 1:
        raise ValueError(f"{path}: pictures of different shapes {sorted(shapes)[:4]}: pass size= to resize them")
    classes = sorted(set(folders))
    if all(c.isdecimal() for c in classes):
        classes.sort(key=int)  # 0, 1, .. 9, 10 and not 0, 1, 10, 2
    order = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([order[f] for f in folders]) if len(classes) > 1 else None
    return Pictures(torch.from_numpy(np.stack(arrays)), labels, [] if labels is None else classes)


def _wanted(name: str) -> bool:
    """Pictures, but not the hidden files and folders that operating systems put beside them."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return name.lower().endswith(SUFFIXES) and not hidden


def _folder_members(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    return [n for n in names if _wanted(n)], lambda name: (path / name).read_bytes()


def _zip_members(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is neither a folder, a zip nor an idx file ({error})") from error
    return sorted(n for n in archive.namelist() if _wanted(n)), archive.read


def _read_idx(file: Path, dims: int) -> np.ndarray:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is not a readable gzip file ({error})") from error
    start = 4 + 4 * dims
    if len(raw) < start or raw[:4] != bytes((0, 0, 8, dims)):
        raise ValueError(f"{file} is not an idx file of unsigned bytes with {dims} dimensions")
    shape = struct.unpack(f">{dims}I", raw[4:start])
    if len(raw) - start != int(np.prod(shape, dtype=object)):
        raise ValueError(f"{file} holds {len(raw) - start} bytes of data, its header says {shape}: truncated?")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _load_idx(path: Path, size: int | None, limit: int | None) -> Pictures:
    arrays = _read_idx(path, 3)
    if not arrays.size:
        raise ValueError(f"no pictures in {path}: its header says {arrays.shape}")
    label_name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    files = [path.with_name(label_name + ending) for ending in ("", ".gz")]
    labels = next((torch.from_numpy(_read_idx(f, 1).astype(np.int64)) for f in files if f.exists()), None)
    if labels is not None and len(labels) != len(arrays):
        raise ValueError(f"{path} has {len(arrays)} pictures, its label file {len(labels)} labels")
    index = spread_over(len(arrays), limit)
    if size is None or arrays.shape[1:] == (size, size):
        images = torch.from_numpy(arrays[index])[:, None]
    else:
        Image = _pillow()
        images = torch.from_numpy(np.stack([_to_array(Image.fromarray(arrays[i]), size) for i in index]))
    classes = [] if labels is None else [str(i) for i in range(int(labels.max()) + 1)]
    return Pictures(images, None if labels is None else labels[index], classes)
