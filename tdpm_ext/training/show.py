"""A run to look at: its picture grid and the curves of its log."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from torch import Tensor

from tdpm_ext.grid import picture_grid, save_png
from tdpm_ext.pictures import to_uint8

GRID = 10  # pictures in a row and in a column
MOST = GRID * GRID
log = logging.getLogger("tdpm_ext")


def save_grid(pictures: Tensor, path: Path) -> None:
    """The first pictures [N, C, H, W] in rows; seeds and classes stand at the same place at every check."""
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        return
    some = list(to_uint8(pictures[:MOST]).cpu())
    save_png(picture_grid([some[k : k + GRID] for k in range(0, len(some), GRID)]), path)


def read_log(path: Path) -> list[dict]:
    """Rows of a JSON-lines log; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def plot_log(source: Path, path: Path) -> None:
    """Losses, distance and coverage over steps as a PNG; without matplotlib there is none, and the log says so once."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        if not path.with_suffix(".txt").exists():
            path.with_suffix(".txt").write_text("pip install matplotlib for a plot of log.jsonl\n", encoding="utf-8")
        return
    rows = read_log(source)
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (("discriminator", "prior", "regression", "denoising"), ("distance",), ("coverage",))
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.set_xlabel("step")
        if axis.has_data():
            axis.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=90)
    os.replace(temporary, path)
