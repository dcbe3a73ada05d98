"""The figures of the toy study: samples side by side, distance against evaluations, and where the chain may be cut."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.figures import label_ends, plain, save, style
from benchmarks.toy_data import ToySet
from benchmarks.toy_sampling import TITLES

# colour, line, marker, width: no two lines look alike without colour
LOOKS = {
    "ancestral": ("#6b6b6b", "--", "v", 1.1),
    "ddim": ("#9a9a9a", "--", "^", 1.1),
    "dpmpp_2m": ("black", (0, (5, 1)), "P", 1.6),
    "gaussian": ("#38761d", "-", "s", 1.2),
    "mixture": ("#0b5394", "-", "o", 1.9),
    "generator": ("#a61c00", "-", "D", 1.9),
    "shared": ("#c27ba0", "-.", "h", 1.6),
    "raw": ("#b45f06", ":", "X", 1.4),
    "gan": ("black", "none", "*", 0),
}
SHORT = {
    "ancestral": "DDPM",
    "ddim": "DDPM's ODE",
    "dpmpp_2m": "2M, tuned",
    "gaussian": "TDPM gaussian",
    "mixture": "TDPM mixture",
    "generator": "TDPM generator",
    "shared": "TDPM shared",
    "raw": "TDPM raw",
    "gan": "GAN",
}
HEADS = {"ancestral": "DDPM", "dpmpp_2m": "DPM-Solver++\n(tuned)", "gan": "GAN"}
REACH = 2.4  # of the panels, in the data's std


def draw(record: dict, work: Path, stem: Path) -> list[Path]:
    """Write STEM-samples, STEM-evaluations and STEM-truncation as PNG and SVG; samples come from ``work``."""
    with style():
        figures = {"samples": _samples(record, work), "evaluations": _evaluations(record), "truncation": _cuts(record)}
        paths = []
        for name, figure in figures.items():
            paths += save(figure, stem.with_name(f"{stem.name}-{name}"))
            _pyplot().close(figure)
    return paths


def _samples(record: dict, work: Path):
    """One row per set: the data, then every arm's points of the first seed, with its scores over all seeds."""
    kept = {row["name"]: load_file(work / f"{row['name']}-0-shown.safetensors") for row in record["sets"]}
    columns = [key.rsplit("-", 1) for key in _in_order(next(iter(kept.values())))]
    rows, across = len(record["sets"]), len(columns) + 1
    figure, axes = _pyplot().subplots(rows, across, figsize=(1.35 * across, 1.62 * rows + 0.95), squeeze=False)
    for line, (row, own) in enumerate(zip(record["sets"], axes, strict=True)):
        points = ToySet.make(row["name"]).real[: record["size"]["shown"]]
        floor = row["floor"]["sw"]["mean"]
        _scatter(own[0], points, record["std"], f"{floor:.2f}\nfloor", "data" if line == 0 else None)
        own[0].set_ylabel(row["title"], fontsize=9)
        at = {(arm["arm"], arm["budget"]): arm for arm in row["arms"]}
        for axis, (arm, budget) in zip(own[1:], columns, strict=True):
            scores = at[arm, int(budget)]
            missing = 1 - scores["coverage"]["mean"]
            words = f"{scores['sw']['mean']:.2f}\n{100 * scores['stray']['mean']:.0f} % off"
            words += f", {100 * missing:.0f} % lost" if missing > 0.005 else ""
            head = f"{HEADS.get(arm, f'TDPM{chr(10)}{arm} prior')}\n{budget} evaluation{'s' * (budget != '1')}"
            _scatter(axis, kept[row["name"]][f"{arm}-{budget}"], record["std"], words, head if line == 0 else None)
    inch = 1 / figure.get_figheight()
    figure.subplots_adjust(left=0.03, right=0.995, top=1 - 0.62 * inch, bottom=0.55 * inch, hspace=0.27, wspace=0.06)
    told = "Below each: sliced Wasserstein distance over the data's std (first column: its floor), samples off the data"
    figure.text(0.03, 0.08 * inch, f"{told}, parts of the data that are lost", fontsize=8)
    return figure


def _in_order(kept: dict) -> list[str]:
    arms = list(TITLES)
    return sorted(kept, key=lambda key: arms.index(key.rsplit("-", 1)[0]))


def _scatter(axis, points: torch.Tensor, std: float, words: str, head: str | None) -> None:
    limit = REACH * std
    inside = points[(points.abs() < limit).all(1)]
    axis.plot(*inside.T.numpy(), ".", color="black", markersize=1.6, markeredgewidth=0, rasterized=True)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
    axis.spines[["top", "right"]].set_visible(True)
    for side in axis.spines.values():
        side.set_color("#bbbbbb")
    axis.set_xlabel(words, fontsize=7, labelpad=2)
    if head:
        axis.set_title(head, fontsize=8.5)


def _evaluations(record: dict):
    """Left: distance against evaluations, one row per set; right: samples off the data. Lines are labelled there."""
    rows = len(record["sets"])
    figure, axes = _pyplot().subplots(rows, 2, figsize=(9.6, 2.35 * rows + 0.6), squeeze=False)
    inch = 1 / figure.get_figheight()
    figure.subplots_adjust(left=0.065, right=0.855, top=1 - 0.3 * inch, bottom=0.5 * inch, hspace=0.27, wspace=0.17)
    for row, (left, right) in zip(record["sets"], axes, strict=True):
        _curves(row, left, "sw", 1.0)
        ends = _curves(row, right, "stray", 100.0)
        left.set_title(f"{row['title']}: sliced Wasserstein distance over the data's std", loc="left", fontsize=8.5)
        right.set_title("samples off the data, %", loc="left", fontsize=8.5)
        label_ends(figure, right, ends)
    figure.supxlabel("network evaluations per sample, the prior's own counted", fontsize=9)
    return figure


def _curves(row: dict, axis, measure: str, scale: float) -> list[tuple]:
    """Every arm's line in one panel; the ends of the lines, for their labels."""
    axis.set(xscale="log", yscale="log")
    ends = []
    for arm, (color, dash, marker, width) in LOOKS.items():
        own = sorted((a for a in row["arms"] if a["arm"] == arm), key=lambda a: a["evaluations"])
        x, y = [a["evaluations"] for a in own], [scale * max(a[measure]["mean"], 5e-4) for a in own]
        sd = [scale * (a[measure]["sd"] or 0.0) for a in own]
        look = {"color": color, "linestyle": dash, "marker": marker, "linewidth": width, "elinewidth": 0.6}
        fill = "white" if dash == "--" else color
        axis.errorbar(x, y, sd, **look, markersize=9 if arm == "gan" else 4, markerfacecolor=fill)
        if arm == "gan":  # a point: its label stands beside it
            axis.annotate("GAN", (x[-1], y[-1]), xytext=(0, -14), textcoords="offset points", fontsize=8, ha="center")
        else:
            ends.append((SHORT[arm], x[-1], y[-1], color, arm in ("mixture", "generator", "dpmpp_2m")))
    floor = scale * row["floor"][measure]["mean"]
    axis.axhline(floor, color="black", linestyle=":", linewidth=1)
    axis.text(0.99, floor, "floor: real points", transform=axis.get_yaxis_transform(), ha="right", va="bottom",
              fontsize=7)  # fmt: skip
    plain(axis, (1, 2, 3, 5, 10, 20, 50, 100, 250, 1000))
    return ends


def _cuts(record: dict):
    """Left: distance against sigma_trunc at three evaluations. Right: what becomes of a part that the prior lost."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(10, 4.2))
    figure.subplots_adjust(left=0.065, right=0.895, top=0.83, bottom=0.13, wspace=0.55)
    _truncation(record, left, figure)
    _lost(record, right, figure)
    return figure


def _truncation(record: dict, axis, figure) -> None:
    std = record["std"]
    budget = min({c["budget"] for row in record["sets"] for c in row["cuts"]}, key=lambda b: abs(b - 3))
    axis.set(xscale="log", yscale="log")
    ends = []
    for arm in ("gaussian", "mixture", "generator", "shared", "raw"):
        own = [[c for c in row["cuts"] if (c["arm"], c["budget"]) == (arm, budget)] for row in record["sets"]]
        x = [c["at"] / std for c in own[0]]
        y = [math.exp(sum(math.log(c["sw"]["mean"]) for c in at) / len(at)) for at in zip(*own, strict=True)]
        color, dash, marker, width = LOOKS[arm]
        axis.plot(x, y, color=color, linestyle=dash, marker=marker, linewidth=width, markersize=5)
        ends.append((SHORT[arm], x[-1], y[-1], color, arm in ("mixture", "generator")))
    for cut in record["cuts"]:
        axis.axvline(cut["sigma"] / std, color="#cccccc", linewidth=0.7, zorder=0)
        where = {"transform": axis.get_xaxis_transform(), "ha": "center", "fontsize": 7}
        axis.text(cut["sigma"] / std, 1.01, str(cut["step"]), **where)
    axis.set_xlabel("sigma_trunc over the data's std")
    axis.set_ylabel("sliced Wasserstein over std, geometric mean")
    axis.set_title(f"Where to cut, at {budget} evaluations\nstep of the linear 1000-step table:", loc="left",
                   fontsize=9, pad=14)  # fmt: skip
    plain(axis, (0.1, 0.3, 1, 3, 10))
    label_ends(figure, axis, ends)


def _lost(record: dict, axis, figure) -> None:
    marks, ends = "osD^vP", []
    axis.set_xscale("log")
    for row, mark in zip(record["sets"], marks, strict=False):
        x = [r["sigma_trunc"] / record["std"] for r in row["lost"]]
        y = [100 * r["share"]["mean"] / r["exact"]["mean"] for r in row["lost"]]
        axis.plot(x, y, color="black", marker=mark, markerfacecolor="white", linewidth=1, markersize=5)
        ends.append((row["title"], x[-1], y[-1], "black", False))
    axis.axvline(3, color="black", linestyle=":", linewidth=1)
    axis.axhline(100, color="#cccccc", linewidth=0.7, zorder=0)
    axis.text(3.15, 0, "3 x std", fontsize=8)
    axis.set_xlabel("sigma_trunc over the data's std")
    axis.set_ylabel("the part's share of its due, %")
    axis.set_title("A prior that never draws one part of the data:\nwhat denoising brings back", loc="left", fontsize=9,
                   pad=14)  # fmt: skip
    plain(axis, (0.1, 0.3, 1, 3, 10))
    label_ends(figure, axis, ends)


def _pyplot():
    from matplotlib import pyplot

    return pyplot
