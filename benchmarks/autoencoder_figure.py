"""The figures of autoencoder.py: error against sigma_trunc with example pictures, and interpolations."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.figures import label_ends, plain, save, style

LOOKS = {1: ("-", "o"), 2: ("--", "s"), 4: ("-.", "^"), 8: (":", "D")}
HEADS = {
    "pixels": "pictures mixed",
    "code 0.6": "codes at 0.6 mixed",
    "code 1.8": "codes at 1.8 mixed",
    "prior 1.8": "the prior's noises mixed",
}


def draw(record: dict, examples: dict[str, torch.Tensor], shown: tuple[float, ...], stem: Path) -> list[Path]:
    """Write STEM and STEM-interpolation as PNG and SVG; ``shown``: noise levels of the example codes."""
    from matplotlib import pyplot

    paths = []
    with style():
        for figure, path in (
            (_errors(record, examples, shown), stem),
            (_between(examples), stem.with_name(f"{stem.name}-interpolation")),
        ):
            paths += save(figure, path)
            pyplot.close(figure)
    return paths


def _errors(record: dict, examples: dict, shown: tuple[float, ...]):
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(10.5, 4.6))
    axis = figure.add_axes((0.06, 0.12, 0.3, 0.76))
    axis.set(xscale="log", yscale="log", xlabel="sigma_trunc, noise std in data units", ylabel="rms error per pixel")
    ends = []
    for steps, (dash, marker) in LOOKS.items():
        own = [p for p in record["points"] if p["steps"] == steps]
        x, y = [p["sigma_trunc"] for p in own], [p["rmse"]["mean"] for p in own]
        axis.plot(x, y, color="#0b5394", linestyle=dash, marker=marker, markersize=4, linewidth=1.5)
        ends.append((f"{steps} evaluation{'s' * (steps > 1)}", x[-1], y[-1], "#0b5394", True))
    x, y = zip(*((p["sigma_trunc"], p["rmse"]["mean"]) for p in record["closed_form"]), strict=True)
    axis.plot(x, y, color="#38761d", marker="x", markersize=5, linewidth=1)
    ends.append(("prior alone, no network", x[-1], y[-1], "#38761d", False))
    apart = record["apart"]["mean"]
    axis.axhline(apart, color="black", linewidth=0.8, linestyle="--")
    axis.text(0.02, apart, "two pictures of one class", transform=axis.get_yaxis_transform(), va="bottom", fontsize=7)
    limits = axis.get_ylim()
    axis.plot(x, x, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    middle = x[(len(x) - 1) // 3]
    axis.text(middle, middle, "the code itself  ", fontsize=7, ha="right", va="center")
    axis.set_ylim(limits[0], limits[1] * 1.3)
    axis.set_title(f"{record['name']}: what decoding leaves of held-out pictures", loc="left", fontsize=9)
    plain(axis, (0.03, 0.1, 0.3, 1, 3, 10))
    label_ends(figure, axis, ends)
    rows = [("picture", examples["originals"])]
    errors = {p["sigma_trunc"]: p["rmse"]["mean"] for p in record["points"] if p["steps"] == 8}
    for i, sigma in enumerate(shown):
        rows += [(f"code, {sigma:.2g}", examples["codes"][i])]
        known = f"\nerror {errors[sigma]:.2f}" if sigma in errors else ""
        rows += [(f"decoded{known}", examples["again"][i])]
    _grid(figure, rows, (0.62, 0.02, 0.37, 0.96))
    return figure


def _between(examples: dict):
    from matplotlib import pyplot

    rows = []
    for pair in range(len(examples["pixels"])):
        rows += [(words, examples[name][pair]) for name, words in HEADS.items()]
    figure = pyplot.figure(figsize=(7.2, 0.56 * len(rows) + 0.1))
    _grid(figure, rows, (0.27, 0.01, 0.72, 0.98), every=len(HEADS))
    return figure


def _grid(figure, rows: list[tuple[str, torch.Tensor]], box: tuple[float, float, float, float], every: int = 0) -> None:
    """Rows of grey pictures, each with its words to the left; a gap after ``every`` rows."""
    left, bottom, width, height = box
    gaps = (len(rows) - 1) // every if every else 0
    tall = height / (len(rows) + 0.25 * gaps)
    for r, (words, pictures) in enumerate(rows):
        low = bottom + height - tall * (r + 1 + 0.25 * (r // every if every else 0))
        wide = width / len(pictures)
        for c, x in enumerate(pictures):
            axis = figure.add_axes((left + c * wide, low, wide, tall * 0.96))
            axis.imshow(x[0].clamp(-1, 1).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set_axis_off()
        figure.text(left - 0.008, low + tall * 0.48, words, ha="right", va="center", fontsize=7.5)
