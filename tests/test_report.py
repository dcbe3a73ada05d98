"""The report is one file that a browser shows whole: every figure drawn, nothing wider than the window."""

import html
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from benchmarks import frontier, records, report, tables  # noqa: E402
from benchmarks.drawing import Request  # noqa: E402
from benchmarks.judging import MEASURES  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = {"desktop": 1280, "phone": 390}


def point(arm, family, nfe, fd, **request):
    asked = Request(**{"sampler": "tdpm", "budget": nfe} | request).to_json()
    return {
        "arm": arm, "family": family, "target": "quality" if family == "tdpm" else "fd", "nfe": nfe, "request": asked,
        "measures": {m: {"mean": fd if m == "fd" else 0.5, "sd": 0.1} for m in MEASURES},
        "paired": {"rmse": 0.1, "psnr": 20.0, "features": 0.4}, "ms_per_picture": 3.0 * nfe,
    }  # fmt: skip


def frontier_record():
    """Invented numbers in every place a real record has one, with long names where names can be long."""
    points = [point(f"tdpm mixture quality {n}", "tdpm", n, 9 / n, prior="mixture") for n in (2, 4, 8)]
    points += [point(f"tdpm gaussian quality {n}", "tdpm", n, 12 / n, prior="gaussian") for n in (2, 4, 8)]
    for name in ("diffusers:unipc", "dpmpp_2s_ancestral", "<b>bold</b>"):
        points += [point(f"{name} {n} for fd", "diffusers", n, 30 / n, sampler=name) for n in (2, 4, 8)]
    asked = Request.rival("diffusers:unipc", 4, options={"solver_order": 3, "solver_type": "bh2"}).to_json()
    best = [{"sampler": "diffusers:unipc", "budget": 4, "target": "fd", "request": asked, "scores": {"fd": 7.5}}]
    verdict = frontier.verdict(points, (2, 4, 8))
    for row in verdict:
        row["second"] = {"ours_fd": row["ours_fd"], "rival_fd": row["rival_fd"], "outcome": "tie"}
    return {
        "schema": "tdpm-frontier/1", "name": "invented", "checkpoint": "abc", "judge": "FD-EffLite0-mid112",
        "blocks": 3, "per_block": 2000, "first_seed": 0, "floor": {"mean": 0.8, "sd": 0.05}, "points": points,
        "reference": point("own-60", "reference", 60, 1.0, sampler="dpmpp_2m"),
        "search": {"tried": 9, "samples": [64, 256], "budgets": [2, 4, 8], "best": best},
        "verdict": verdict, "priors": {}, "second": {"judge": "FD-other", "floor": {"mean": 1.0, "sd": 0.1}},
        "memorisation": {"samples": 1.0, "held_out": 1.0, "ratio": 1.0, "copies": 0.01},
        "command": "python benchmarks/pareto.py " + "--option value " * 30, "environment": records.environment(),
        "seconds": 60.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The committed results and an invented frontier with its grid."""
    folder = tmp_path_factory.mktemp("results")
    for path in records.RESULTS.iterdir():  # test_records.py says whether they are valid
        if path.suffix != ".json" or not records.problems(json.loads(path.read_text())):
            shutil.copy(path, folder)
    records.write(frontier_record(), folder / "frontier-invented-checkpoint.json")
    Image.new("RGB", (900, 300), "navy").save(folder / "frontier-invented-checkpoint-grid.png")
    out = folder.parent / "report.html"
    assert report.main(["--results", str(folder), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_the_page_holds_everything_and_asks_for_nothing(page):
    assert not re.search(r"<(script|link|iframe)", page)
    sources = re.findall(r'<img[^>]* src="([^"]{0,40})', page)
    assert len(sources) >= 3 and all(s.startswith("data:image/") for s in sources)
    for path in records.RESULTS.glob("quality-*.json"):
        assert f'id="{path.stem}"' in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "<b>bold</b>" not in page.replace("&lt;b&gt;bold", "")
    outside = [str(folder) for folder in (records.ROOT, records.ROOT.parent) if folder != folder.parent]
    assert not [folder for folder in outside if f"{folder}/" in page]  # paths are told from the repository's root
    assert "/tmp/" not in page.replace("/tmp/pytest", "")


def test_every_image_says_in_words_what_it_shows(page):
    texts = re.findall(r'<img[^>]* alt="([^"]*)"', page)
    assert len(texts) == page.count("<img") and all(len(t) > 10 for t in texts)


MEASURE = """
<script>
window.onload = () => setTimeout(() => {
  const d = document.querySelector("iframe").contentDocument, w = d.documentElement.clientWidth;
  const inside = e => { const b = e.closest(".scroll"); return (b || e).getBoundingClientRect(); };
  const images = [...d.images].map(i => ({drawn: i.complete && i.naturalWidth > 0, right: inside(i).right,
    width: i.getBoundingClientRect().width, height: i.getBoundingClientRect().height}));
  const wide = [...d.querySelectorAll("body *")].filter(e => !e.closest("svg") && inside(e).right > w + 1)
    .map(e => e.tagName + " " + e.textContent.slice(0, 40));
  const cut = [...d.querySelectorAll("p, h1, h2, h3, li, figcaption")].filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => e.textContent.slice(0, 40));
  document.body.dataset.found = JSON.stringify({client: w, scroll: d.documentElement.scrollWidth, images, wide, cut});
}, 500);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)")
@pytest.mark.parametrize("name", WIDTHS)
def test_a_browser_draws_every_figure_and_nothing_is_wider_than_the_window(page, name, tmp_path):
    width = WIDTHS[name]
    frame = f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(page)}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><meta charset=utf-8><body>{frame}{MEASURE}</body>")
    command = [CHROMIUM, "--headless", "--hide-scrollbars", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [
        "--virtual-time-budget=15000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,1000",
        f"file://{tmp_path}/frame.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    match = re.search(r'<body data-found="([^"]*)"', done.stdout)
    assert match, done.stderr[-500:]
    found = json.loads(html.unescape(match[1]))
    assert found["client"] == width and found["scroll"] <= width
    assert len(found["images"]) == page.count("<img")
    assert all(i["drawn"] and i["width"] > 200 and i["height"] > 50 and i["right"] <= width for i in found["images"])
    assert found["wide"] == [] and found["cut"] == []


def test_the_readme_table_of_a_frontier_says_who_is_ahead_and_what_is_saved():
    table = tables.frontier_table(frontier_record(), "Invented")
    rows = [line for line in table.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [r.split(" | ")[0] for r in rows] == ["| 2", "| 4", "| 8"]
    assert "**4.50 ± 0.10** | 15.00 ± 0.10 (diffusers:unipc 2) | ahead | 1.0x" in rows[0]
    assert "| ahead | 3.2x |" in rows[2]
    assert "frontier-invented-checkpoint-evaluations.png" in table


def test_a_folder_without_results_or_with_a_wrong_one_is_refused(tmp_path, capsys):
    out = tmp_path / "report.html"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 2
    assert "run a benchmark first" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{}")
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 2
    assert "bad.json" in capsys.readouterr().err and not out.exists()
