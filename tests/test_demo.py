"""The demo, with fewer seeds: everything it promises is there afterwards."""

import json

from PIL import Image

import tdpm_ext as tdpm
from benchmarks import demo


def test_the_demo_leaves_a_grid_a_table_and_a_prior(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SEEDS", {"fidelity": 6, "quality": 80})
    demo.main(["--pictures", "20", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "table.json").read_text())
    rows = {r["arm"]: r for r in report["rows"]}
    assert [r["nfe"] for r in report["rows"]] == [50, 8, 4, 4, 4]
    assert rows["dpmpp_2m, 50"]["rmse_to_50"] == 0
    assert 0 < report["floor"] < min(r["fd"] for r in report["rows"])
    assert all(r["ms_per_picture"] > 0 for r in report["rows"])
    prior = tdpm.load_prior(tmp_path / "prior.safetensors")
    assert {o: list(t) for o, t in prior.plans.items()} == {"fidelity": [4], "quality": [4]}
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 20 * 28 and grid.height > 5 * 28
    assert capsys.readouterr().out.splitlines()[-1].startswith("pictures: ")
