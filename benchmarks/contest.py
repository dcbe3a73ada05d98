"""What one comparison on one denoiser holds and keeps: priors, pictures, levels, measured points.

Everything is kept in a work folder as soon as it is finished, in files that several processes may share: each adds what
is missing, and none waits for another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

import tdpm_ext as tdpm
from benchmarks import judging, records
from benchmarks.chunks import Store, chunks_of, gather
from benchmarks.drawing import TDPM, Drawer, Request
from benchmarks.search import gits_for

ROOT = Path(__file__).resolve().parents[1]
CALIBRATED = (1, 2, 3, 4, 5, 6, 8)  # evaluations that priors are calibrated for; others are interpolated
WAIT = 1800  # seconds
JUDGED_SEED, SEARCH_SEED = 1_000_000, 2_000_000  # calibration draws from small seeds


class Lines:
    """Values by key in a file of JSON lines; every new one is appended at once, a line cut short is ignored."""

    def __init__(self, path: Path):
        self.path, self.known = path, {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                self.known.update([json.loads(line)])
            except (ValueError, TypeError):
                continue

    def get(self, key: str, make) -> dict:
        if key not in self.known:
            self.known[key] = json.loads(json.dumps(make()))
            with self.path.open("a") as file:
                file.write(json.dumps([key, self.known[key]]) + "\n")
        return self.known[key]


@dataclass
class Contest:
    """What one run compares."""

    name: str
    judge: judging.Judge
    drawer: Drawer
    fingerprint: str
    args: argparse.Namespace
    work: Path

    @property
    def seeds(self) -> range:
        return range(JUDGED_SEED, JUDGED_SEED + self.args.blocks * self.args.samples)

    @cached_property
    def prior_files(self) -> dict[str, Path]:
        """Kind -> file of the fitted and calibrated prior; made where it is not there."""
        out = {}
        for kind in self.args.priors:
            path = self.work / f"prior-{kind}.safetensors"
            shipped = ROOT / "assets" / self.name / "prior.safetensors"
            if not path.exists() and kind == "mixture" and shipped.exists() and not self.args.ideal:
                path = shipped
            if not path.exists():
                self._wait(path) if self.args.wait else self._fit(kind, path)
            out[kind] = path
        return out

    @cached_property
    def priors(self) -> dict:
        return {kind: tdpm.load_prior(path) for kind, path in self.prior_files.items()}

    @cached_property
    def digests(self) -> dict[str, str]:
        return {kind: hashlib.sha256(path.read_bytes()).hexdigest() for kind, path in self.prior_files.items()}

    def _wait(self, path: Path) -> None:
        """For a prior that another process is about to finish."""
        start = time.time()
        while not path.exists():
            if time.time() - start > WAIT:
                raise FileNotFoundError(f"no {path} after {WAIT} s: start one process with --until priors")
            time.sleep(1)

    def _fit(self, kind: str, path: Path) -> None:
        print(f"{self.name}: fitting and calibrating the {kind} prior", flush=True)
        rank = {"rank": self.args.rank} if self.args.rank and kind != "gaussian" else {}
        prior = tdpm.fit_prior(kind, self.judge.fit, checkpoint=self.fingerprint, **rank)
        for objective in ("fidelity", "quality") if kind == self.args.priors[0] else ("quality",):
            start, samples = time.time(), self.args.calibration_samples
            tdpm.calibrate(
                prior, self.drawer.model, [b for b in CALIBRATED if b <= max(self.args.budgets)], objective=objective,
                data=self.judge.fit, samples=samples and samples[objective == "quality"],
                num_classes=self.drawer.num_classes, batch=self.args.batch,
            )  # fmt: skip
            prior.card[f"{objective}_seconds"] = round(time.time() - start, 1)
        tdpm.save_prior(prior, path)

    def drawer_for(self, request: Request) -> Drawer:
        return replace(self.drawer, prior=self.priors[request.prior] if request.sampler == TDPM else None)

    def identity(self, request: Request) -> dict:
        """What decides a request's pictures."""
        prior = {"prior": self.digests[request.prior]} if request.sampler == TDPM else {}
        return {"checkpoint": self.fingerprint, "request": request.to_json(), **prior}

    def pictures(self, request: Request, name: str, seeds: range | None = None) -> tuple[torch.Tensor, int]:
        """Pictures [N, C, H, W] of the seeds (default: all judged ones), drawn once and kept; and evaluations."""
        store, parts = Store(self.work / name, self.identity(request)), chunks_of(seeds or self.seeds, self.args.batch)
        drawer, start = self.drawer_for(request), time.time()
        shift = os.getpid() % len(parts)  # processes that draw the same arm begin at different places
        for part in parts[shift:] + parts[:shift]:
            if store.read(part) is None:
                x, nfe = drawer.draw(request, part)
                store.write(part, {"x": x, "nfe": torch.tensor(nfe)})
        if time.time() - start > 5:
            print(f"{self.name}: {name} took {time.time() - start:.0f} s", flush=True)
        return gather(store, parts, "x"), max(int(store.read(part)["nfe"]) for part in parts)

    @cached_property
    def own(self) -> torch.Tensor:
        """The denoiser's own 60-evaluation pictures."""
        return self.pictures(Request.rival("dpmpp_2m", 60), "own-60")[0]

    @cached_property
    def _points(self) -> Lines:
        return Lines(self.work / "points.jsonl")

    def point(self, arm: str, family: str, target: str | None, request: Request) -> dict:
        """One measured point of the record, kept."""
        size = [self.judge.name, self.args.blocks, self.args.samples]
        key = json.dumps([arm, family, target, size, self.identity(request)], sort_keys=True)
        return dict(self._points.get(key, lambda: self._measure(arm, family, target, request)))

    def _measure(self, arm: str, family: str, target: str | None, request: Request) -> dict:
        x, nfe = self.pictures(request, kept_as(arm))
        rows = self.judge.over_blocks(self.judge.features(x), self.args.blocks)
        paired = self.judge.paired(x, x if arm == "own-60" else self.own)
        return {
            "arm": arm, "family": family, "target": target, "nfe": nfe, "request": request.to_json(),
            "measures": {k: records.estimate(v) for k, v in rows.items()}, "paired": paired._asdict(),
            "ms_per_picture": None,
        }  # fmt: skip

    def levels(self, seeds: Iterable[int], steps: Iterable[int]) -> dict:
        """Levels chosen on the denoiser's own trajectories (``search.gits_for``), kept."""
        seeds, steps, lines = list(seeds), sorted(set(steps)), Lines(self.work / "gits.jsonl")
        key = json.dumps([self.fingerprint, seeds, steps])
        found = lines.get(key, lambda: [[*k, v.tolist()] for k, v in gits_for(self.drawer, seeds, steps).items()])
        return {(high, n): torch.tensor(levels, dtype=torch.float64) for high, n, levels in found}


def kept_as(arm: str) -> str:
    """The folder of an arm's pictures."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in arm)
