"""The figure of truncation.py: distance and coverage against sigma_trunc, for a fixed budget and for a cut schedule."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures import label_ends, plain, save, style

LOOKS = {  # by name, else by kind: colour, line, marker
    "regression": ("#e69138", "--", "v"),
    "gaussian": ("#38761d", "-", "s"),
    "lowrank": ("#7f3f98", "-", "^"),
    "mixture": ("#0b5394", "-", "o"),
    "generator": ("#a61c00", "-", "D"),
    "shared": ("#c27ba0", "-.", "h"),
    "raw": ("#b45f06", ":", "X"),
    "source": ("#444444", "--", "P"),
}
TITLES = {"budget": "{n} evaluations in all, prior counted", "cut": "levels of one long schedule below the cut"}
ROWS = {"fd": "{judge}, lower is better", "coverage": "coverage, higher is better"}


def draw(record: dict, stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg."""
    from matplotlib import pyplot

    with style():
        figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.4), sharex=True)
        figure.subplots_adjust(left=0.07, right=0.885, top=0.885, bottom=0.07, hspace=0.1, wspace=0.5)
        budget = min(p["nfe"] for p in record["points"] if p["schedule"] == "budget")
        for row, measure in enumerate(ROWS):
            for column, schedule in enumerate(TITLES):
                axis = axes[row][column]
                axis.set_xscale("log")
                axis.set_ylabel(ROWS[measure].format(judge=record["judge"]))
                _lines(record, axis, figure, schedule, measure)
                _marks(record, axis, words=row == 0)
                if row == 0:
                    blocks = f"{record['blocks']} x {record['per_block']} pictures"
                    title = f"{record['name']}, {blocks}:\n{TITLES[schedule].format(n=budget)}"
                    axis.set_title(title, loc="left", fontsize=9, pad=36 if schedule == "cut" else 22)
                else:
                    axis.set_xlabel("sigma_trunc, noise std in data units")
        _costs(record, axes[0][1])
        paths = save(figure, stem)
        pyplot.close(figure)
    return paths


def _lines(record: dict, axis, figure, schedule: str, measure: str) -> None:
    if measure == "fd":
        axis.set_yscale("log")
    ends = []
    for name in record["priors"]:
        own = sorted((p for p in record["points"] if (p["prior"], p["schedule"]) == (name, schedule)),
                     key=lambda p: p["sigma_trunc"])  # fmt: skip
        if own:
            color, dash, marker = LOOKS.get(name) or LOOKS.get(own[0]["kind"], ("black", "-", "*"))
            x, y = [p["sigma_trunc"] for p in own], [p["measures"][measure]["mean"] for p in own]
            sd = [p["measures"][measure]["sd"] or 0.0 for p in own]
            axis.errorbar(x, y, sd, color=color, linestyle=dash, marker=marker, markersize=4.5, elinewidth=0.7)
            ends.append((name, x[-1], y[-1], color, True))
    lines = [(record["reference"][measure]["mean"], "own 60 evaluations", (0, (5, 2)))]
    lines += [(record["floor"]["mean"], "floor: real pictures", ":")] if measure == "fd" else []
    for level, words, dash in lines:
        axis.axhline(level, color="black", linestyle=dash, linewidth=1, zorder=1)
        axis.text(0.01, level, words, transform=axis.get_yaxis_transform(), va="bottom", fontsize=7)
    plain(axis, (0.03, 0.1, 0.3, 1, 3, 10, 30))
    label_ends(figure, axis, ends)


def _marks(record: dict, axis, words: bool) -> None:
    sides = ("center", "right", "left")  # the second and the third stand near each other
    for mark, side in zip(record["marks"], sides, strict=False):
        axis.axvline(mark["sigma"], color="#bbbbbb", linewidth=0.8, zorder=0)
        if words:
            axis.text(mark["sigma"], 1.01, f"T = {mark['step']}", transform=axis.get_xaxis_transform(), ha=side,
                      fontsize=7)  # fmt: skip


def _costs(record: dict, axis) -> None:
    """Evaluations of the denoiser that the cut leaves, above the panel."""
    costs = {p["sigma_trunc"]: p["nfe"] - p["prior_nfe"] for p in record["points"] if p["schedule"] == "cut"}
    for sigma, nfe in costs.items():
        axis.text(sigma, 1.055, str(nfe), transform=axis.get_xaxis_transform(), ha="center", fontsize=7)
    axis.text(0, 1.1, "evaluations of the denoiser that are left, by level:", transform=axis.transAxes, fontsize=7)
