"""Frontier figures of a record of ``pareto.py``, as PNG and SVG: direct labels, error bars, legible without colour.

Line style and marker say what colour says too: tdpm is solid with filled markers, the best of all rivals a heavy
dashed line, single rivals thin with open markers, the floor dotted.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import frontier

OURS = {"mixture": ("#0b5394", "o"), "gaussian": ("#38761d", "s"), "lowrank": ("#7f3f98", "D")}
THIN = ["v", "^", "<", ">", "p", "h", "X", "P", "d", "*"]
COLUMNS = {"evaluations": "nfe", "milliseconds": "ms_per_picture"}
AXES = {"evaluations": "network evaluations per picture", "milliseconds": "milliseconds per picture"}


def series(record: dict, column: str) -> list[dict]:
    """Lines of the figure: label, style, and (x, mean, sd) by rising x. Points without an x are left out."""
    points = [p for p in record["points"] if p[column] is not None and p["target"] in ("fd", "quality", None)]
    groups: dict[str, dict] = {}
    for point in points:
        request = point["request"]
        if point["family"] == frontier.OURS:
            label, style = f"tdpm, {request['prior']} prior", "ours"
        elif point["family"] == "straw man":
            continue  # hundreds of evaluations: in the tables only
        else:
            label, style = request["sampler"], "rival"
        group = groups.setdefault(label, {"label": label, "style": style, "prior": request["prior"], "points": []})
        fd = point["measures"]["fd"]
        group["points"].append((point[column], fd["mean"], fd["sd"] or 0.0))
    rivals = [p for p in record["points"] if p["family"] in frontier.RIVALS and p[column] is not None]
    out = [{**g, "points": sorted(set(g["points"]))} for g in groups.values()]
    if len({p["request"]["sampler"] for p in rivals}) > 1:
        envelope = lower_envelope([(p[column], p["measures"]["fd"]["mean"], 0.0) for p in rivals])
        out.append({"label": "best of all rivals", "style": "envelope", "prior": None, "points": envelope})
    return out


def lower_envelope(points: list[tuple]) -> list[tuple]:
    """The points that are better than everything cheaper, carried on to the dearest of all."""
    out: list[tuple] = []
    for point in sorted(points):
        if not out or point[1] < out[-1][1]:
            out.append(point)
    last = max(point[0] for point in points)
    return out if out[-1][0] == last else [*out, (last, *out[-1][1:])]


def draw(record: dict, stem: Path) -> list[Path]:
    """Write STEM-evaluations and STEM-milliseconds as PNG and SVG; the latter pair only where times were taken."""
    paths = []
    with style():
        for name, column in COLUMNS.items():
            lines = series(record, column)
            if lines:
                paths += _figure(record, lines, name, stem)
    return paths


def as_frontier(record: dict) -> dict:
    """A record of ``quality.py`` in the form that ``draw`` takes: one block of seeds, so no error bars."""

    def estimate(value: float) -> dict:
        return {"mean": value, "sd": None}

    points = []
    for row in record["rows"]:
        if row["arm"] in ("tdpm:quality", "rival:fd"):
            ours = row["arm"].startswith("tdpm")
            points.append({
                "arm": row["arm"], "family": frontier.OURS if ours else "k-diffusion", "target": "fd",
                "nfe": row["budget"], "ms_per_picture": None, "measures": {"fd": estimate(row["fd"])},
                "request": {"sampler": "best k-diffusion sampler", "prior": record["prior"]["kind"] if ours else None},
            })  # fmt: skip
    return {
        "name": record["name"], "judge": record["judge"], "blocks": 1, "per_block": record["samples"],
        "floor": estimate(record["floor"]), "reference": {"measures": {"fd": estimate(record["own60"]["fd"])}},
        "points": points, "environment": record["environment"],
    }  # fmt: skip


def _figure(record: dict, lines: list[dict], name: str, stem: Path) -> list[Path]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 4.3))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    thin = 0
    ends = []
    for line in lines:
        x, y, sd = zip(*line["points"], strict=True)
        style = _style(line, thin)
        thin += line["style"] == "rival"
        bars = None if line["style"] == "envelope" or not any(sd) else sd
        axes.errorbar(x, y, yerr=bars, capsize=2, elinewidth=0.8, **style)
        ends.append((line["label"], x[-1], y[-1], style["color"], line["style"] in ("ours", "envelope")))
    reference = record["reference"]["measures"]["fd"]["mean"]
    for level, text, dash in ((record["floor"]["mean"], "floor: real pictures", ":"),
                              (reference, "own 60-evaluation run", (0, (1, 3)))):  # fmt: skip
        axes.axhline(level, color="black", linestyle=dash, linewidth=1)
        axes.annotate(text, (0, level), xycoords=("axes fraction", "data"), xytext=(3, 2), textcoords="offset points",
                      fontsize=8)  # fmt: skip
    axes.set_xlabel(AXES[name] + (f" ({record['environment']['device']})" if name == "milliseconds" else ""))
    axes.set_ylabel(f"{record['judge']}, lower is better")
    blocks = f"{record['blocks']} blocks of {record['per_block']} seeds, mean and deviation"
    told = blocks if record["blocks"] > 1 else f"{record['per_block']} seeds"
    axes.set_title(f"{record['name']}: {told}", loc="left", fontsize=9)
    counts = sorted({int(p[0]) for line in lines for p in line["points"]})
    plain(axes, counts if name == "evaluations" else axes.get_xticks())
    figure.subplots_adjust(left=0.11, right=0.68, top=0.92, bottom=0.12)
    label_ends(figure, axes, ends)
    paths = save(figure, stem.with_name(f"{stem.name}-{name}"))
    plt.close(figure)
    return paths


def save(figure, stem: Path) -> list[Path]:
    """Write ``figure`` as STEM.png and STEM.svg, byte for byte the same at every call."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        path = stem.with_name(f"{stem.name}.{suffix}")
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary, dpi=150, metadata=metadata, format=suffix)
        temporary.replace(path)
        paths.append(path)
    return paths


def style():
    """A context of Matplotlib in which all figures are drawn."""
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib.rc_context(
        {"svg.hashsalt": "tdpm", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )


def _style(line: dict, thin: int) -> dict:
    if line["style"] == "ours":
        color, marker = OURS.get(line["prior"], ("#a61c00", "o"))
        return {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.8, "zorder": 4}
    if line["style"] == "envelope":
        return {"color": "black", "linestyle": "--", "linewidth": 2, "zorder": 3}
    open_marker = {"marker": THIN[thin % len(THIN)], "markersize": 4.5, "markerfacecolor": "white"}
    return {"color": "#8a8a8a", "linewidth": 0.9, "zorder": 2, **open_marker}


def label_ends(figure, axes, ends: list[tuple]) -> None:
    """Labels to the right of the axes in the order of the lines' ends, moved apart, each with a leader to its end.

    Args:
        ends: (label, x, y, colour, whether it is bold) per line.
    """
    figure.canvas.draw()
    height = axes.get_window_extent().height
    gap = 11 / height * figure.dpi / 72  # one line of text, in fractions of the axes
    placed = sorted(ends, key=lambda e: axes.transData.transform((e[1], e[2]))[1])
    wanted = [axes.transAxes.inverted().transform(axes.transData.transform((e[1], e[2])))[1] for e in placed]
    heights: list[float] = []
    for y in wanted:
        heights.append(max(y, heights[-1] + gap) if heights else max(y, 0.02))
    overflow = max(0.0, heights[-1] - 0.99) if heights else 0.0
    heights = [y - overflow for y in heights]
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for (label, x, y, color, bold), at in zip(placed, heights, strict=True):
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            label, (x, y), xytext=(1.03, at), textcoords="axes fraction", va="center", fontsize=8, color=color,
            fontweight="bold" if bold else "normal", annotation_clip=False, arrowprops=leader,
        )  # fmt: skip


def plain(axis, ticks) -> None:
    """Plain numbers on logarithmic axes; along x at those of ``ticks`` that are in sight."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for one in (axis.xaxis, axis.yaxis):
        if one.get_scale() == "log":
            one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            one.set_minor_formatter(NullFormatter())
    low, high = axis.get_xlim()
    axis.set_xticks([tick for tick in ticks if low <= tick <= high])
    if axis.get_yscale() == "log":
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.tick_params(labelsize=8)
