"""One self-contained HTML page of everything that was measured, from the committed JSON and picture grids.

    python benchmarks/report.py                       # writes out/report.html
    python benchmarks/report.py --results DIR --out FILE

No script, no network: figures and pictures are inside the file. Every table stands with the command that made it.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import figures, frontier, records  # noqa: E402

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto; max-width: 70rem;
  padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 2px solid #111; padding-top: .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, li { overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; }
img.pixels { image-rendering: pixelated; }
figcaption, .note { color: #444; font-size: .85rem; }
.scroll { overflow-x: auto; }
img.lines { width: 38rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #ccc; white-space: nowrap; }
td.n, th.n { text-align: right; }
tr.behind td { font-style: italic; }
tr.ahead td { font-weight: 600; }
code { font-size: .8rem; background: #f2f2f2; padding: .1rem .25rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: .6rem; font-size: 15px; } table { font-size: .75rem; } }
"""
ORDER = ("tdpm-frontier/1", "tdpm-quality-1", "tdpm-samples/1", "tdpm-latency/1", "tdpm-fitting/1")


def text(value) -> str:
    return html.escape(str(value))


def number(value, digits: int = 2) -> str:
    if value is None:
        return "not measured"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def spread(estimate: dict, digits: int = 2) -> str:
    """Mean and standard deviation over blocks of seeds."""
    sd = "" if estimate["sd"] is None else f" &plusmn; {estimate['sd']:.{digits}f}"
    return f"{estimate['mean']:.{digits}f}{sd}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], classes: Iterable[str] | None = None) -> str:
    """A table in a box that scrolls by itself where the window is narrow; cells are HTML."""
    rows = [list(row) for row in rows]
    marks = list(classes) if classes is not None else [""] * len(rows)
    kinds = ["n" if rows and row_is_number(rows, i) else "" for i in range(len(rows[0]) if rows else 0)]
    top = "".join(f'<th class="{k}">{h}</th>' for h, k in zip(head, kinds or [""] * 99, strict=False))
    body = "".join(
        f'<tr class="{mark}">' + "".join(f'<td class="{k}">{c}</td>' for c, k in zip(row, kinds, strict=True)) + "</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def row_is_number(rows: list[list[str]], column: int) -> bool:
    return all(row[column][:1].isdigit() or row[column][:1] == "-" for row in rows)


def picture(path: Path, alt: str, caption: str, pixels: bool = False) -> str:
    kind = "image/svg+xml" if path.suffix == ".svg" else "image/png"
    data = base64.b64encode(path.read_bytes()).decode()
    shown = "pixels" if pixels else "lines"
    image = f'<img class="{shown}" src="data:{kind};base64,{data}" alt="{text(alt)}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def made_by(record: dict) -> str:
    """The command and the machine, below every table."""
    environment = record["environment"]
    command = record.get("command") or environment.get("command", "")
    where = [environment.get("device", ""), environment.get("name", ""), f"{environment.get('threads')} thread(s)"]
    where += [f"torch {environment.get('torch')}", f"commit {environment.get('commit')}"]
    took = f", {record['seconds'] / 60:.0f} minutes" if "seconds" in record else ""
    return f'<p class="note"><code>{text(command)}</code><br>{text("; ".join(w for w in where if w))}{took}</p>'


def frontier_part(record: dict, folder: Path, scratch: Path) -> str:
    reference, copies = record["reference"]["measures"], record["memorisation"]
    second = [record["second"]["judge"]] if record.get("second") else []
    verdict = table(
        ["evaluations", "tdpm", "arm", "best rival", "arm", "difference", "evaluations saved", *second],
        [
            [str(r["budget"]), spread(r["ours_fd"]), text(r["ours"]), spread(r["rival_fd"]), text(r["rival"]),
             {"ahead": "ahead", "tie": "tie, under the noise", "behind": "behind"}[r["outcome"]],
             "never as good" if r["saved"] is None else f"{r['saved']:.2f}x",
             *([opinion(r["second"])] if second else [])]
            for r in record["verdict"]
        ],
        [r["outcome"] for r in record["verdict"]],
    )  # fmt: skip
    drawn = [p for p in figures.draw(record, scratch / record["name"]) if p.suffix == ".svg"]
    axes = [p.stem.rsplit("-", 1)[1] for p in drawn]
    shown = "".join(
        picture(p, f"{record['judge']} against {x}", "Lower and further left is better.")
        for p, x in zip(drawn, axes, strict=True)
    )
    grid = folder / f"frontier-{record['slug']}-grid.png"
    if grid.exists():
        shown += picture(grid, "Pictures of the same seeds by every sampler", "The same seeds in every row.", True)
    points = table(
        ["arm", "evaluations", "FD", "KD", "coverage", "recall", "precision", "rmse", "PSNR", "ms per picture"],
        [
            [text(p["arm"]), str(p["nfe"]), spread(p["measures"]["fd"]), spread(p["measures"]["kd"], 4),
             *(spread(p["measures"][m]) for m in ("coverage", "recall", "precision")),
             number(p["paired"]["rmse"], 4), number(p["paired"]["psnr"], 1), number(p["ms_per_picture"], 1)]
            for p in record["points"]
        ],
    )  # fmt: skip
    ideal = " (the ideal denoiser returns fitted pictures by its nature)" if record["checkpoint"] == "ideal" else ""
    return f"""<p>{text(record["judge"])}, {record["blocks"]} disjoint blocks of {record["per_block"]} seeds. The
denoiser's own 60-evaluation run: {spread(reference["fd"])}; real against real pictures (floor):
{spread(record["floor"])}. Nearest fitted picture, samples over held-out pictures: {copies["ratio"]:.2f}
(1: no copying){ideal}. <strong>{text(frontier.standing(record["verdict"]))}</strong></p>{verdict}{shown}
<h3>All points</h3>{points}<h3>Settings found for each rival ({record["search"]["tried"]} runs tried)</h3>
{search_table(record)}{made_by(record)}"""


def opinion(second: dict) -> str:
    """What the second judge says of the same two arms."""
    return f"{spread(second['ours_fd'])} against {spread(second['rival_fd'])}: {second['outcome']}"


def search_table(record: dict) -> str:
    """Best settings per sampler and budget for the Frechet distance; scores are those of the search's few seeds."""
    rows = [r for r in record["search"]["best"] if r["target"] == "fd"]

    def setting(request: dict) -> str:
        levels = f"{request['grid']}, {request['sigma_max']:g} to {request['sigma_min']:g}"
        return text(", ".join([levels, *(f"{k} {v}" for k, v in request["options"].items())]))

    head = ["sampler", "evaluations", "FD in the search", "on so many seeds", "levels, options"]
    scores = [(number(r["scores"]["fd"]), text(r["scores"].get("seeds", ""))) for r in rows]
    cells = zip(rows, scores, strict=True)
    return table(head, [[text(r["sampler"]), str(r["budget"]), *s, setting(r["request"])] for r, s in cells])


def quality_part(record: dict, folder: Path, scratch: Path) -> str:
    at = {(r["arm"], r["budget"]): r for r in record["rows"]}
    budgets = sorted({r["budget"] for r in record["rows"]})
    rows = []
    for b in budgets:
        rival, ours = at["rival:fd", b], at["tdpm:quality", b]
        cells = [str(b), number(rival["fd"]), text(rival["sampler"]), number(ours["fd"])]
        cells += [number(ours["coverage"]), number(ours["recall"]), number(at["rival:rmse", b]["rmse"], 4)]
        rows.append([*cells, number(at["tdpm:fidelity", b]["rmse"], 4)])
    head = ["evaluations", "best k-diffusion FD", "sampler", "tdpm FD", "coverage", "recall", "best rmse", "tdpm rmse"]
    drawn = figures.draw(figures.as_frontier(record), scratch / f"quality-{record['name']}-{record['denoiser']}")
    shown = "".join(picture(p, f"{record['judge']} against evaluations", "") for p in drawn if p.suffix == ".svg")
    denoiser = "ideal denoiser" if record["denoiser"] == "ideal" else f"checkpoint {record['denoiser']}"
    return f"""<p>{text(denoiser)}, {text(record["judge"])}, {record["samples"]} pictures; own 60-evaluation run
{record["own60"]["fd"]:.2f}, floor {record["floor"]:.2f}.</p>{table(head, rows)}{shown}{made_by(record)}"""


def flat_part(record: dict, folder: Path, scratch: Path) -> str:
    """Records whose lists of rows speak for themselves: every list of flat objects becomes a table."""
    parts = [f"<p>{text(record['label'])}</p>"] if record.get("label") else []
    for name, rows in record.items():
        if name == "checks" or not (isinstance(rows, list) and rows and isinstance(rows[0], dict)):
            continue
        fields = [k for k, v in rows[0].items() if not isinstance(v, (dict, list))]
        cells = [[text(number(row.get(f), 3)) for f in fields] for row in rows]
        parts.append(f"<h3>{text(name.replace('_', ' '))}</h3>{table(map(text, fields), cells)}")
    return "".join(parts) + made_by(record)


PARTS = {"tdpm-frontier/1": frontier_part, "tdpm-quality-1": quality_part}


def title_of(record: dict, stem: str) -> str:
    if record["schema"] in PARTS:
        kind = "ideal denoiser" if "ideal" in stem else "checkpoint"
        what = "quality against evaluations, all samplers" if "frontier" in stem else "against k-diffusion's samplers"
        return f"{record['name']}, {kind}: {what}"
    return stem.replace("-", " ").replace("_", " ")


def render(folder: Path) -> str:
    """The page of all records in ``folder``. Raises ValueError for a record that breaks the schema."""
    found = [(path.stem, records.read(path)) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise ValueError(f"no results in {folder}: run a benchmark first")
    found.sort(key=lambda pair: ORDER.index(pair[1]["schema"]) if pair[1]["schema"] in ORDER else len(ORDER))
    body = []
    with tempfile.TemporaryDirectory() as scratch:
        for stem, record in found:
            record["slug"] = stem.removeprefix("frontier-")
            part = PARTS.get(record["schema"], flat_part)(record, folder, Path(scratch))
            body.append(f'<section id="{text(stem)}"><h2>{text(title_of(record, stem))}</h2>{part}</section>')
    links = "".join(f'<li><a href="#{text(stem)}">{text(title_of(record, stem))}</a></li>' for stem, record in found)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tdpm_ext: what was measured</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>tdpm_ext: what was measured</h1>
<p>FD: Frechet distance, KD: kernel distance, both in the features that their names state; they rank variants of one
model on one data set and are not comparable with published FID. rmse and PSNR: to the same denoiser's 60-evaluation
picture of the same seed. Differences under two standard deviations between blocks of seeds are called ties. Every
figure names the device that it was measured on.</p><ul>{links}</ul>{"".join(body)}</body></html>
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of records")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "report.html")
    args = parser.parse_args(argv)
    try:
        page = render(args.results)
    except (OSError, ValueError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8")
    print(f"wrote {records.shown(args.out.absolute())} ({len(page) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
