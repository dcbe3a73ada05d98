"""The figures of the kernel benchmark: counts, and on a GPU times."""

from __future__ import annotations

from pathlib import Path

from benchmarks.networks import NETWORKS

COLOURS = {"eager": "#8c8c8c", "inductor": "#d8a24a", "accelerate": "#2f6fb0"}
ORDER = tuple(COLOURS)


def draw_counts(report: dict, path: Path) -> None:
    """Launches, and bytes of the norms' chains, per network and arm."""
    plt = _pyplot()
    at = {(row["network"], row["arm"]): row for row in report["counts"]}
    names = list(dict.fromkeys(name for name, _ in at))
    figure, axes = plt.subplots(2, len(names), figsize=(3.1 * len(names), 5.2), squeeze=False)
    for column, name in enumerate(names):
        arms = [arm for arm in ORDER if (name, arm) in at]
        _bars(axes[0][column], arms, [at[name, arm]["launches"] for arm in arms], "{:.0f}")
        axes[0][column].set_title(NETWORKS[name].title, fontsize=9)
        arms = [arm for arm in arms if at[name, arm]["chain_passes"] is not None]
        _bars(axes[1][column], arms, [at[name, arm]["chain_passes"] / 1e6 for arm in arms], "{:.1f}")
        floor = at[name, arms[0]]["chain_floor"] / 1e6
        axes[1][column].axhline(floor, color="black", linewidth=0.8, linestyle=":")
        axes[1][column].annotate("floor", (0.5, floor), fontsize=7, ha="center", va="bottom")
    axes[0][0].set_ylabel("launches per call", fontsize=8)
    axes[1][0].set_ylabel("MB of the norms' chains, all passes", fontsize=8)
    figure.suptitle("Counted, not timed", fontsize=9, y=0.99)
    _save(figure, path)


def draw_times(record: dict, path: Path) -> None:
    """Operations as shares of what the card reaches; trajectories in milliseconds. Times are measured."""
    plt = _pyplot()
    rows = [row for row in record["operations"]["rows"] if row["share"] is not None]
    groups = list(dict.fromkeys((row["network"], row["batch"]) for row in record["trajectories"]))
    figure, axes = plt.subplots(
        1, 1 + len(groups), figsize=(6 + 2.6 * len(groups), 0.18 * len(rows) + 2), squeeze=False
    )
    axis = axes[0][0]
    axis.barh(range(len(rows)), [100 * row["share"] for row in rows], color=[_colour(row) for row in rows])
    axis.set_yticks(range(len(rows)), [f"{r['op']} {r['case']}, {r['backend']}" for r in rows], fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("% of this card's copy bandwidth (norms, steps) or matrix rate (attention)", fontsize=7)
    for axis, (network, batch) in zip(axes[0][1:], groups, strict=True):
        arms = [row for row in record["trajectories"] if (row["network"], row["batch"]) == (network, batch)]
        _bars(axis, [row["arm"] for row in arms], [row["p50_ms"] for row in arms], "{:.1f}")
        axis.tick_params(axis="x", rotation=60)
        axis.set_title(f"{network}, batch {batch}: ms, p50", fontsize=8)
    figure.suptitle(f"{record['device']['name']}: measured", fontsize=9)
    _save(figure, path)


def _colour(row: dict) -> str:
    return COLOURS["accelerate"] if row["backend"] == "triton" else COLOURS["eager"]


def _bars(axis, arms: list[str], values: list[float], text: str) -> None:
    drawn = axis.bar(
        range(len(arms)), values, color=[COLOURS.get(arm, COLOURS["inductor"]) for arm in arms], width=0.65
    )
    axis.bar_label(drawn, [text.format(value) for value in values], fontsize=8)
    axis.set_xticks(range(len(arms)), arms, fontsize=8)
    axis.tick_params(axis="y", labelsize=7)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.tight_layout()
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)
    _pyplot().close(figure)
