"""Write the README's result tables from the committed JSON, so that no figure is typed by hand.

python benchmarks/tables.py            # rewrite the part of README.md between the RESULTS marks
python benchmarks/tables.py --check    # exit 1 if it differs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import figures, frontier, records  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- RESULTS: python benchmarks/tables.py -->", "<!-- END RESULTS -->"
RUNS = {  # file: title
    "quality-fashion-mnist-checkpoint": "Shipped Fashion-MNIST checkpoint, class by class",
    "quality-emoji-checkpoint": "Shipped emoji checkpoint (RGB), class by class",
    "quality-fashion-mnist-ideal": "Ideal denoiser, Fashion-MNIST",
    "quality-digits-ideal": "Ideal denoiser, handwritten digits (nothing was tuned on them)",
    "quality-cifar10-jpeg-ideal": "Ideal denoiser, CIFAR-10 (JPEG 75, figures only)",
}
FRONTIERS = {
    "frontier-fashion-mnist-checkpoint": "Frontier, shipped Fashion-MNIST checkpoint",
    "frontier-emoji-checkpoint": "Frontier, shipped emoji checkpoint (RGB)",
    "frontier-cifar10-jpeg-ideal": "Frontier, ideal denoiser of CIFAR-10",
}


def table(result: dict, title: str) -> str:
    """One quality run as Markdown."""
    at = {(r["arm"], r["budget"]): r for r in result["rows"]}
    own, verdict = result["own60"], result["verdict"]
    lines = [
        f"**{title}.** {result['judge']}, N={result['samples']}; the denoiser's own 60-evaluation run has FD "
        f"{own['fd']:.2f}, real pictures against real pictures (the floor) {result['floor']:.2f}. "
        f"`{result['command']}`",
        "",
        "| evaluations | best k-diffusion sampler: FD | tdpm `quality`: FD | coverage, recall (own run = 1) | "
        "evaluations saved at equal FD | best k-diffusion sampler: rmse | tdpm `fidelity`: rmse |",
        "|---|---|---|---|---|---|---|",
    ]
    budgets = sorted({r["budget"] for r in result["rows"]})
    saved = frontier.saved(figures.as_frontier(result)["points"], budgets)
    for budget in budgets:
        by_fd, by_rmse = at["rival:fd", budget], at["rival:rmse", budget]
        key = str(budget)
        fds = lower_in_bold(by_fd["fd"], at["tdpm:quality", budget]["fd"], 2)
        errors = lower_in_bold(by_rmse["rmse"], at["tdpm:fidelity", budget]["rmse"], 3)
        lines.append(
            f"| {budget} | {fds[0]} ({by_fd['sampler']}) | {fds[1]} | "
            f"{verdict['coverage_over_own'][key]:.2f}, {verdict['recall_over_own'][key]:.2f} | "
            f"{'never as good' if saved[budget] is None else f'{saved[budget]:.1f}x'} | "
            f"{errors[0]} ({by_rmse['sampler']}) | {errors[1]} |"
        )
    if "copying" in result:
        lines += ["", f"Distance to the nearest fitted picture over that of held-out pictures: "
                      f"{result['copying']['ratio']:.2f} (1: no copying)."]  # fmt: skip
    return "\n".join(lines)


def lower_in_bold(rival: float, ours: float, digits: int) -> tuple[str, str]:
    """Both as text; bold is what is lower as printed, both where they are equal."""
    texts = f"{rival:.{digits}f}", f"{ours:.{digits}f}"
    lowest = min(texts, key=float)
    return tuple(f"**{text}**" if text == lowest else text for text in texts)


def frontier_table(record: dict, title: str) -> str:
    """One frontier as Markdown: tdpm's best arm within each budget against the best of all tuned rivals."""

    def fd(value: dict) -> str:
        return f"{value['mean']:.2f} ± {value['sd']:.2f}"

    said = {"ahead": "ahead", "tie": "tie (under the noise)", "behind": "behind"}
    tried = f"{len({r['sampler'] for r in record['search']['best']})} samplers, {record['search']['tried']} runs"
    lines = [
        f"**{title}.** {record['judge']}, {record['blocks']} blocks of {record['per_block']} seeds; the denoiser's own "
        f"60-evaluation run has {fd(record['reference']['measures']['fd'])}, real pictures (the floor) "
        f"{record['floor']['mean']:.2f}. Rivals: {tried} tried. {frontier.standing(record['verdict'])} Measured on one "
        f"{'thread of a CPU' if record['environment']['device'] == 'CPU' else record['environment']['name']}. "
        f"`{record['command']}`",
        "",
        "| evaluations | tdpm | best of all rivals | difference | evaluations saved at equal quality |",
        "|---|---|---|---|---|",
    ]
    for row in record["verdict"]:
        saved = "never as good" if row["saved"] is None else f"{row['saved']:.1f}x"
        better = row["ours_fd"]["mean"] <= row["rival_fd"]["mean"]
        cells = [str(row["budget"]), f"**{fd(row['ours_fd'])}**" if better else fd(row["ours_fd"])]
        cells += [f"{fd(row['rival_fd'])} ({row['rival'].rsplit(' for ', 1)[0]})", said[row["outcome"]], saved]
        lines.append(f"| {' | '.join(cells)} |")
    figure = f"benchmarks/results/frontier-{slug(record)}-evaluations.png"
    lines += ["", f"![{title}: distance against evaluations]({figure})"]
    return "\n".join(lines)


def slug(record: dict) -> str:
    return f"{record['name']}-{'ideal' if record['checkpoint'] == 'ideal' else 'checkpoint'}"


def render() -> str:
    """All tables whose JSON is there, with one paragraph on how to read them."""
    parts = [
        "CPU figures, where no GPU is named; bold: the lower one. "
        "FD: Frechet distance in the 128 features of a classifier (CIFAR-10: 112 "
        "of EfficientNet-Lite0) "
        "against pictures that neither prior nor calibration saw; not comparable with published FID. rmse: to the "
        "denoiser's own 60-evaluation picture from the same seed. The k-diffusion column is the best of euler, heun, "
        "dpm_2, lms and dpmpp_2m with sigma_max in {80, 40, 20, 10} and rho in {3, 7}, tuned for that very count and "
        "that very score. Evaluations saved: the rival's count over the count at which tdpm, interpolated between its "
        "own, has reached the rival's distance; a lower bound where tdpm's cheapest run is better already. Frontiers: "
        "mean and standard deviation over disjoint blocks of seeds; differences under two standard deviations are ties."
    ]
    for name, title in FRONTIERS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(frontier_table(records.read(path), title))
    for name, title in RUNS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(table(records.read(path), title))
    return "\n\n".join(parts)


def replaced(readme: str) -> str:
    """The README with its tables renewed."""
    head, _, rest = readme.partition(START)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise SystemExit(f"README.md lacks the marks {START} and {END}")
    return f"{head}{START}\n\n{render()}\n\n{END}{tail}"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the tables differ")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = replaced(old)
    if args.check:
        sys.exit(0 if new == old else "README.md's tables differ from the JSON: run python benchmarks/tables.py")
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
