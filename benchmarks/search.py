"""The search for each rival's best settings at each count: which noise levels, which options of its own.

For every sampler, option and budget, first sigma_max on Karras levels, then every grid at the two best of those and
the levels chosen by GITS; all on a few seeds, for two targets at once: the Frechet distance to real pictures, and the
rmse to the denoiser's own 60-evaluation pictures of the same seeds. The leaders for the distance are scored again on
more seeds. Every score is kept in a file, so that a search goes on after an interruption.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import samplers
from benchmarks.drawing import Drawer, Request
from benchmarks.rivals import noise_for
from benchmarks.samplers import SAMPLERS

TARGETS = ("fd", "rmse")
LEADERS = 2  # settings of one sampler at one budget that are scored again on more seeds
COARSE = ("karras-7", 0.02)


@dataclass
class Search:
    """Scores of requests on a drawer, kept in ``path``.

    Attributes:
        drawer: what draws. score: pictures [N, C, H, W] of ``seeds`` -> {"fd": .., "rmse": ..}; lower is better.
        few, more: how many of ``seeds`` the first and the second round use.
        path: one JSON line per score.
    """

    drawer: Drawer
    score: Callable[[torch.Tensor], dict[str, float]]
    seeds: range
    few: int
    more: int
    path: Path
    batch: int = 64
    known: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that an interruption cut short
                self.known[row["key"]] = row["scores"]

    def scores(self, request: Request, count: int) -> dict[str, float]:
        """Scores on the first ``count`` seeds; {} if the pictures are not finite."""
        rounded = [float(f"{s:.6g}") for s in request.sigmas]
        key = json.dumps([request.sampler, request.options, rounded, request.cond_scale, count], sort_keys=True)
        if key not in self.known:
            x = self.drawer.draw(request, self.seeds[:count], self.batch).x
            found = self.score(x) if bool(torch.isfinite(x).all()) else {}
            self.known[key] = {k: float(v) for k, v in found.items() if math.isfinite(v)}
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "scores": self.known[key]}) + "\n")
        return self.known[key]

    def best_of(self, sampler: str, options: dict, budget: int, chosen: dict, **common) -> list[tuple[Request, dict]]:
        """Every setting that was tried of one sampler with one option at one budget: [(request, scores)]."""
        steps = SAMPLERS[sampler].steps_within(budget)
        tried: list[tuple[Request, dict]] = []

        def attempt(grid: str, sigma_max: float, low: float) -> dict:
            request = Request.rival(sampler, budget, grid, sigma_max, low, options, **common)
            tried.append((request, self.scores(request, self.few)))
            return tried[-1][1]

        first = {m: attempt(COARSE[0], m, COARSE[1]) for m in samplers.SIGMA_MAXES}
        kept = set()
        for target in TARGETS:
            ranked = sorted((m for m in first if target in first[m]), key=lambda m: first[m][target])
            kept |= set(ranked[:2])
        for sigma_max in sorted(kept, reverse=True):
            for grid, low in samplers.grids(sigma_max):
                attempt(grid, sigma_max, low)
            sigmas = chosen.get((sigma_max, steps))
            if sigmas is not None:
                request = Request(sampler, budget, None, None, tuple(sigmas.tolist()), options, "gits", sigma_max,
                                  float(sigmas[-2]), **common)  # fmt: skip
                tried.append((request, self.scores(request, self.few)))
        return tried

    def run(self, names: Iterable[str], budgets: Iterable[int], chosen: dict | None = None, **common) -> list[dict]:
        """The best request of every sampler at every budget and target, with its scores: rows for a record.

        Args:
            chosen: {(sigma_max, steps): sigmas} as ``gits_for`` gives them. common: of every request.
        """
        jobs = [(n, b) for b in budgets for n in names if SAMPLERS[n].steps_within(b)]
        rows, chosen = [], chosen or {}
        for name, budget in tqdm(jobs, desc="search", unit="sampler", mininterval=5):
            tried = [t for o in SAMPLERS[name].options for t in self.best_of(name, o, budget, chosen, **common)]
            for target in TARGETS:
                ranked = sorted((t for t in tried if target in t[1]), key=lambda t: t[1][target])
                if not ranked:
                    continue
                leaders = ranked[: LEADERS if target == "fd" else 1]
                again = [(r, self.scores(r, self.more)) for r in unique(leaders)]
                found = [t for t in again if target in t[1]] or ranked[:1]
                best, scores = min(found, key=lambda t: t[1][target])
                row = {"sampler": name, "budget": budget, "target": target, "request": best.to_json()}
                rows.append({**row, "scores": scores})
        return rows

    @property
    def tried(self) -> int:
        """Different settings that were run."""
        return len(self.known)


def unique(leaders: list[tuple[Request, dict]]) -> list[Request]:
    """The requests without those that draw the same levels (rho does not matter below three steps)."""
    seen = {}
    for request, _ in leaders:
        seen.setdefault(json.dumps([request.options, [f"{s:.6g}" for s in request.sigmas]], sort_keys=True), request)
    return list(seen.values())


def gits_for(drawer: Drawer, seeds: Iterable[int], steps: Iterable[int], sigma_maxes=samplers.SIGMA_MAXES) -> dict:
    """Levels chosen on this denoiser's own trajectories: {(sigma_max, steps): sigmas}."""
    seeds, steps = list(seeds), sorted(set(steps))
    z = noise_for(seeds, drawer.shape).to(drawer.device)
    args = drawer.arguments(Request("euler", 1), seeds)
    with torch.no_grad():
        found = {m: samplers.gits(drawer.model, z, m, steps, args) for m in sigma_maxes}
    return {(m, n): sigmas for m, tables in found.items() for n, sigmas in tables.items()}
