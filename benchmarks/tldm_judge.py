"""What is said of pictures of held-out captions: distance, coverage, alignment, and how a record of it is shown."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks import metrics
from benchmarks.alignment import Alignment, EffLiteBoth
from benchmarks.features import EffLiteMid, cached_features, extract
from benchmarks.judging import CACHE, spread
from tdpm_ext.grid import picture_grid, save_png
from tdpm_ext.pictures import to_uint8

if TYPE_CHECKING:
    from benchmarks.tldm import Bench


@dataclass
class Judging:
    """What is measured of the pictures of an arm, and the real pictures that it is measured against."""

    bench: Bench
    net: EffLiteBoth

    def __post_init__(self):
        real = cached_features(self.net, self.bench.held_out.images, CACHE)
        train = cached_features(self.net, self.bench.train.images, CACHE)
        self.real, self.fit = real[:, : EffLiteMid.dim], train[:, : EffLiteMid.dim]
        names = [self.bench.captions[c]["name"] for c in self.bench.train.codes]
        known = {name: i for i, name in enumerate(dict.fromkeys(names))}
        groups = np.array([known[name] for name in names])
        self.alignment = Alignment.fit(train, self.embeddings(list(known))[groups], groups)
        held = [self.bench.captions[c]["name"] for c in self.bench.held_out.codes]
        self.names = list(dict.fromkeys(held))
        self.candidates = self.embeddings(self.names)
        self.truth = np.array([self.names.index(name) for name in held])
        self.real_alignment = self.alignment.measure(real, self.truth, self.candidates)

    def embeddings(self, names: list[str]) -> np.ndarray:
        return self.bench.table.encode(names).pooled.numpy()

    @property
    def floor(self) -> metrics.Estimate:
        """FD of as many training pictures as there are samples, at most half of them so that there is a deviation."""
        reals, fits = metrics.standardise(self.real, self.fit)
        return metrics.floor(reals, fits, min(self.bench.args.samples, len(fits) // 2))

    def measure(self, pictures: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        both = extract(self.net, pictures)
        reals, fakes = metrics.standardise(self.real, both[:, : EffLiteMid.dim])
        near = metrics.manifold(reals[spread(len(reals), len(fakes))], fakes)
        return {
            "fd": metrics.frechet_distance(fakes, reals),
            "coverage": near.coverage,
            "recall": near.recall,
            "rmse": metrics.paired_rmse(pictures, reference),
            **self.alignment.measure(both, self.truth[self.bench.judged_rows], self.candidates),
        }


def show(result: dict) -> str:
    """The record as a table."""
    chance, floor = result["chance"], result["floor"]["mean"]
    lines = [
        f"{result['denoiser']}, guidance {result['cond_scale']:g}, N={result['samples']} held-out captions of "
        f"{result['held_out_names']} names; FD floor {floor:.2f}; R@1, R@10 by chance {chance['r1']:.3f}, "
        f"{chance['r10']:.3f}, of real pictures {result['real']['r1']:.3f}, {result['real']['r10']:.3f}",
        f"{'arm':34s} nfe passes      FD  coverage  recall    R@1   R@10   rmse",
    ]
    for row in result["rows"]:
        name = " ".join(str(row[k]) for k in ("arm", "prior", "sampler", "objective") if row.get(k))
        lines.append(
            f"{name:34s} {row['nfe']:3d} {row['nfe'] * result['passes_per_evaluation']:6d} {row['fd']:7.2f} "
            f"{row['coverage']:9.3f} {row['recall']:7.3f} {row['r1']:6.3f} {row['r10']:6.3f} {row['rmse']:6.3f}"
        )
    if result["latency"]:
        ms = result["latency"]["ms_per_picture"]
        lines.append(", ".join(f"{name} {value:.2f} ms" for name, value in ms.items()) + " per picture")
    lines += [
        json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in v.items()}) for v in result["verdicts"]
    ]
    return "\n".join(lines)


def table(result: dict) -> str:
    """The record as Markdown: at each count the tuned solver, and of each prior the plan, of least distance."""
    least: dict[tuple, dict] = {}
    for row in result["rows"]:
        at = (row["arm"], row.get("prior"), row["budget"])
        if at not in least or row["fd"] < least[at]["fd"]:
            least[at] = row
    lines = ["| | evaluations | FD | coverage, recall | R@1, R@10 | rmse |", "|---|---|---|---|---|---|"]
    for row in least.values():
        name = {
            "own": "own run (dpmpp_2m)",
            "ddim": "DDIM, 250 steps",
            "rival": f"best tuned: {row.get('sampler')}",
            "tdpm": f"tdpm, `{row.get('prior')}`, {row.get('objective')}",
        }[row["arm"]]
        lines.append(
            f"| {name} | {row['nfe']} | {row['fd']:.2f} | {row['coverage']:.2f}, {row['recall']:.2f} | "
            f"{row['r1']:.3f}, {row['r10']:.3f} | {row['rmse']:.3f} |"
        )
    return "\n".join(lines)


def figure(bench: Bench, rows: list[dict], pictures: list[torch.Tensor], path: Path) -> None:
    """Prompts down, samplers across; a star marks names that training never saw."""
    titles = [_title(row) for row in rows]
    known = {bench.captions[codes]["name"] for codes in bench.train.codes}
    captions = []
    for prompt in bench.args.prompts:
        star = "" if prompt.rpartition(",")[0] in known else "*"
        captions.append("\n".join(textwrap.wrap(prompt + star, 24)))
    cells = [[to_uint8(arm[k]) for arm in pictures] for k in range(len(captions))]
    save_png(picture_grid(cells, captions, titles), path)


def _title(row: dict) -> str:
    if row["arm"] == "own":
        return f"own run\n{row['nfe']}"
    return f"{row['sampler'] if row['arm'] == 'rival' else 'tdpm'}\n{row['nfe']}"
