"""Grids of pictures with labelled rows and columns, and PNG files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL import Image

GAP = 2  # pixels between pictures
FONT_SIZE = 12
MAX_SIDE = 30_000  # pixels; larger pictures are refused before their memory is taken
INK, PAPER = (20, 20, 20), (255, 255, 255)


@dataclass(frozen=True)
class Layout:
    """Where things go, in pixels: the corner of the first cell, the step from cell to cell, the whole."""

    left: int
    top: int
    step_x: int
    step_y: int
    inset: int  # from a cell's left edge to its picture
    scale: int
    size: tuple[int, int]

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Top left pixel of the picture at (row, column)."""
        return self.left + column * self.step_x + self.inset, self.top + row * self.step_y


def to_image(picture: torch.Tensor) -> Image.Image:
    """One picture, uint8 [C, H, W] with C = 1 (grey) or 3 (RGB), as a Pillow image.

    Raises:
        ValueError: another dtype, rank or number of channels.
    """
    from PIL import Image

    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"a picture is uint8 [1 or 3, H, W], not {picture.dtype} {list(picture.shape)}")
    array = picture.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if picture.shape[0] == 1 else array)


def picture_grid(
    rows: Sequence[Sequence[torch.Tensor | None]],
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    *,
    scale: int | None = None,
) -> Image.Image:
    """Lay pictures out in rows and columns, with labels left of the rows and above the columns.

    Args:
        rows: per row its pictures, uint8 [C, H, W], all of one shape; None leaves a cell empty. Rows may be short.
        row_labels, column_labels: one text each; "\\n" breaks a line.
        scale: whole-number enlargement, no smoothing; None makes pictures at least 56 pixels wide.

    Raises:
        ValueError: no pictures, different shapes, a wrong number of labels, or a grid too large for one file.
    """
    from PIL import Image, ImageDraw

    rows = [list(row) for row in rows]
    shape = _common_shape(rows)
    columns = max(map(len, rows))
    for name, labels, count in (("row", row_labels, len(rows)), ("column", column_labels, columns)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} {name} labels for {count} {name}s: give one each")
    font = _font()
    place = _layout(shape, len(rows), columns, row_labels, column_labels, scale, font)
    if max(place.size) > MAX_SIDE:
        raise ValueError(f"a grid of {place.size[0]}x{place.size[1]} pixels is too large: make it of fewer pictures")
    sheet = Image.new("RGB", place.size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            if picture is not None:
                image = to_image(picture).convert("RGB")
                size = (image.width * place.scale, image.height * place.scale)
                sheet.paste(image.resize(size, Image.Resampling.NEAREST), place.corner(r, c))
    for r, text in enumerate(row_labels or ()):
        middle = place.corner(r, 0)[1] + (place.step_y - GAP - _text_size(text, font)[1]) // 2
        draw.text((GAP, middle), text, fill=INK, font=font)
    for c, text in enumerate(column_labels or ()):
        width, height = _text_size(text, font)
        x = place.left + c * place.step_x + (place.step_x - GAP - width) // 2
        draw.text((x, place.top - GAP - height), text, fill=INK, font=font, align="center")
    return sheet


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG through a temporary file in the same folder, so that no half-written file is ever seen."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _common_shape(rows: list[list[torch.Tensor | None]]) -> tuple[int, int, int]:
    shapes = {tuple(picture.shape) for row in rows for picture in row if picture is not None}
    if len(shapes) != 1:
        given = f"pictures of different shapes {sorted(shapes)[:4]}" if shapes else "no pictures"
        raise ValueError(f"a grid needs pictures of one shape, and was given {given}")
    return shapes.pop()


def _layout(shape, rows, columns, row_labels, column_labels, scale, font) -> Layout:
    _, height, width = shape
    scale = max(1, -(-56 // width)) if scale is None else scale
    heads = [_text_size(text, font) for text in column_labels or ()]
    sides = [_text_size(text, font) for text in row_labels or ()]
    wide = max([width * scale, *(w for w, _ in heads)])
    tall = max([height * scale, *(h for _, h in sides)])
    left = GAP + (max(w for w, _ in sides) + 2 * GAP if sides else 0)
    top = GAP + (max(h for _, h in heads) + GAP if heads else 0)
    step_x, step_y = wide + GAP, tall + GAP
    size = (left + columns * step_x, top + rows * step_y)
    return Layout(left, top, step_x, step_y, (wide - width * scale) // 2, scale, size)


def _font():
    from PIL import ImageFont, features

    return ImageFont.load_default(FONT_SIZE) if features.check("freetype2") else ImageFont.load_default()


def _text_size(text: str, font) -> tuple[int, int]:
    """Width and height of a label in pixels, line gaps included."""
    from PIL import Image, ImageDraw

    _, _, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=font)
    return int(-(-right // 1)), int(-(-bottom // 1)) + 2
