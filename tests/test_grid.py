"""Picture grids: every picture is where it should be, labels never cover pictures, files are written whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdpm_ext import grid


def noise(count, channels=1, height=6, width=5, seed=0):
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    scale=st.integers(1, 4),
    labels=st.lists(st.text("abg WÅ\n", max_size=12), min_size=8, max_size=8),
)
def test_every_picture_is_in_its_cell_enlarged_and_uncovered(rows, columns, channels, height, width, scale, labels):
    pictures = noise(rows * columns, channels, height, width).reshape(rows, columns, channels, height, width)
    row_labels, column_labels = labels[:rows], labels[4 : 4 + columns]
    sheet = grid.picture_grid(pictures, row_labels, column_labels, scale=scale)
    place = grid._layout((channels, height, width), rows, columns, row_labels, column_labels, scale, grid._font())
    assert sheet.size == place.size
    for r in range(rows):
        for c in range(columns):
            x, y = place.corner(r, c)
            cell = np.asarray(sheet.crop((x, y, x + width * scale, y + height * scale)))
            wanted = pictures[r, c].permute(1, 2, 0).expand(-1, -1, 3).numpy().repeat(scale, 0).repeat(scale, 1)
            assert np.array_equal(wanted, cell)


def test_labels_are_drawn_beside_and_above():
    black = torch.zeros(2, 3, 1, 8, 8, dtype=torch.uint8)
    plain = grid.picture_grid(black)
    labelled = grid.picture_grid(black, ["first", "second"], ["a", "b", "c"])
    assert labelled.width > plain.width and labelled.height > plain.height
    pixels = np.asarray(labelled.convert("L"))
    left, top = labelled.width - plain.width, labelled.height - plain.height
    assert pixels[top:, :left].min() < 128 and pixels[:top, left:].min() < 128
    assert pixels[:top, :left].min() == 255


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    assert grid.picture_grid([noise(1, width=28, height=28)]).width == 2 * 28 + 2 * grid.GAP
    assert grid.picture_grid([noise(1, width=64, height=64)]).width == 64 + 2 * grid.GAP


def test_empty_cells_and_short_rows_stay_white():
    picture = torch.zeros(1, 8, 8, dtype=torch.uint8)
    sheet = grid.picture_grid([[picture, None], [picture]], scale=1)
    pixels = np.asarray(sheet.convert("L"))
    assert (pixels[:, 8 + 2 * grid.GAP :] == 255).all() and (pixels == 0).sum() == 2 * 64


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([], {}, "no pictures"),
        ([[None]], {}, "no pictures"),
        ([[noise(1)[0], noise(1, height=7)[0]]], {}, "different shapes"),
        ([noise(2)], {"column_labels": ["one"]}, "1 column labels for 2 columns"),
        ([noise(2)], {"row_labels": ["a", "b"]}, "2 row labels for 1 rows"),
        ([noise(1, channels=4)], {}, "1 or 3"),
        ([noise(1).float()], {}, "uint8"),
        ([noise(1)], {"scale": 10_000}, "too large"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_words(rows, options, says):
    with pytest.raises(ValueError, match=says):
        grid.picture_grid(rows, **options)


def test_png_round_trip_and_folder_is_made(tmp_path):
    for channels in (1, 3):
        picture = noise(1, channels)[0]
        path = tmp_path / "new" / f"{channels}.png"
        grid.save_png(grid.to_image(picture), path)
        back = np.asarray(Image.open(path))
        assert np.array_equal(picture.permute(1, 2, 0).squeeze(-1).numpy(), back)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["1.png", "3.png"]


def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "grid.png"
    grid.save_png(grid.to_image(noise(1)[0]), path)
    before = path.read_bytes()
    broken = Image.new("F", (4, 4))  # PNG has no float pixels, so Pillow fails while writing
    with pytest.raises(OSError):
        grid.save_png(broken, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
