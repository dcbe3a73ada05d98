"""The search for each rival's best settings at each count: which noise levels, which options of its own.

For every sampler, option and budget, first sigma_max on Karras levels, then, for those within reach of the best,
every grid at the two best of those and the levels chosen by GITS; all on a few seeds, for two targets at once: the
Frechet distance to real pictures, and the rmse to the denoiser's own 60-evaluation pictures of the same seeds. The
leaders for the distance are scored again on more seeds. Every score is kept in a file, so that a search goes on after
an interruption.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import samplers
from benchmarks.drawing import Drawer, Request
from benchmarks.samplers import SAMPLERS

TARGETS = ("fd", "rmse")
LEADERS = 2  # settings of one sampler at one budget that are scored again on more seeds
COARSE = ("karras-7", 0.02)
HOPELESS = 2.5  # times the best score of all samplers: who is beyond it on the coarse grid is not refined


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

    def coarse(self, sampler: str, options: dict, budget: int, **common) -> list[tuple[Request, dict]]:
        """Every sigma_max on the coarse grid: [(request, scores)]."""
        asked = [
            Request.rival(sampler, budget, COARSE[0], m, COARSE[1], options, **common) for m in samplers.SIGMA_MAXES
        ]
        return [(request, self.scores(request, self.few)) for request in asked]

    def refined(self, tried: list[tuple[Request, dict]], chosen: dict, **common) -> list[tuple[Request, dict]]:
        """Every grid at the two best sigma_max of either target, and the levels that GITS chose there."""
        first, kept = tried[0][0], set()
        for target in TARGETS:
            ranked = sorted((t for t in tried if target in t[1]), key=lambda t: t[1][target])
            kept |= {request.sigma_max for request, _ in ranked[:2]}
        asked = []
        for sigma_max in sorted(kept, reverse=True):
            for grid, low in samplers.grids(sigma_max):
                asked.append(Request.rival(first.sampler, first.budget, grid, sigma_max, low, first.options, **common))
            sigmas = chosen.get((sigma_max, len(first.sigmas) - 1))
            if sigmas is not None:
                levels = {"sigmas": tuple(sigmas.tolist()), "grid": "gits", "sigma_max": sigma_max}
                asked.append(replace(first, **levels, sigma_min=float(sigmas[-2])))
        return [(request, self.scores(request, self.few)) for request in asked]

    def at_budget(self, names: list[str], budget: int, chosen: dict, **common) -> dict[str, tuple[list, bool]]:
        """Everything tried at one budget: sampler -> ([(request, scores)], whether it was within reach and refined)."""
        arms = [(n, o) for n in names for o in SAMPLERS[n].options]
        first = [self.coarse(n, o, budget, **common) for n, o in arms]
        lowest = {t: min((s[t] for tried in first for _, s in tried if t in s), default=math.inf) for t in TARGETS}
        out: dict[str, tuple[list, bool]] = {}
        for (name, _), tried in zip(arms, first, strict=True):
            near = any(s[t] <= HOPELESS * lowest[t] for _, s in tried for t in TARGETS if t in s)
            before, reach = out.get(name, ([], False))
            out[name] = before + tried + (self.refined(tried, chosen, **common) if near else []), reach or near
        return out

    def run(self, names: Iterable[str], budgets: Iterable[int], chosen: dict | None = None, **common) -> list[dict]:
        """The best request of every sampler at every budget and target, with its scores: rows for a record.

        Args:
            chosen: {(sigma_max, steps): sigmas} as ``gits_for`` gives them. common: of every request.
        """
        names, rows = list(names), []
        for budget in tqdm(list(budgets), desc="search", unit="budget"):
            able = [n for n in names if SAMPLERS[n].steps_within(budget)]
            for name, (tried, near) in self.at_budget(able, budget, chosen or {}, **common).items():
                count = self.more if near else self.few
                rows += [row for target in TARGETS if (row := self.best(name, budget, target, tried, count))]
        return rows

    def best(self, name: str, budget: int, target: str, tried: list[tuple[Request, dict]], count: int) -> dict | None:
        """The winner among ``tried``, after the leaders were scored again on ``count`` seeds; None if nothing ran."""
        ranked = sorted((t for t in tried if target in t[1]), key=lambda t: t[1][target])
        if not ranked:
            return None
        leaders = unique(ranked)[: LEADERS if target == "fd" else 1]
        again = [(request, self.scores(request, count)) for request in leaders]
        found = [t for t in again if target in t[1]] or ranked[:1]
        request, scores = min(found, key=lambda t: t[1][target])
        row = {"sampler": name, "budget": budget, "target": target, "request": request.to_json()}
        return {**row, "scores": {**scores, "seeds": count}}

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
    z = drawer.noise(seeds)
    args = drawer.arguments(Request("euler", 1), seeds)
    with torch.no_grad():
        found = {m: samplers.gits(drawer.model, z, m, steps, args) for m in sigma_maxes}
    return {(m, n): sigmas for m, tables in found.items() for n, sigmas in tables.items()}
