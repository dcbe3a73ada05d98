"""What one run of ``tldm.py`` holds and keeps: denoiser, captions, pictures, fitted priors, tuned rivals.

Everything is kept in a work folder as soon as it is finished. The folder belongs to one denoiser and one set of
settings, which are written into it; another command that names it is refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import tdpm_ext as tdpm
from benchmarks import metrics, rivals
from benchmarks.text_ideal import TextIdealDenoiser
from benchmarks.tldm_data import Pairs, load_captions, load_pairs, prompt_of
from tdpm_ext.distance import AsSeenBy
from tdpm_ext.fit_text import fit_text_prior
from tdpm_ext.kernels import accelerate
from tdpm_ext.latent import LatentSpace
from tdpm_ext.pictures import to_unit
from tdpm_ext.text import PhraseTable, Text, load_phrases
from tdpm_ext.text_denoiser import TextDenoiser, text_args
from tdpm_ext.text_job import check_space
from tdpm_ext.vae import load_vae

FIRST = 1_000_000  # seed of the first judged picture; those of tuning and calibration lie elsewhere
FIT_PROMPTS = 1024
MADE_BY = dict.fromkeys(("train.zip", "eval.zip", "captions.json"), "build_tldm")
MADE_BY |= {"phrases.safetensors": "embed_captions"}
LEADERS = 4  # settings of a count that are scored again on more seeds
WITH_DATA = "@data"  # a kind fitted to pictures instead of to the denoiser's own, as in text_lowrank@data


@dataclass
class Bench:
    """The denoiser, the captions it is run with, and the pictures it is judged by."""

    args: argparse.Namespace
    model: torch.nn.Module
    space: LatentSpace
    train: Pairs
    held_out: Pairs
    captions: dict[str, dict]
    table: PhraseTable
    latents: torch.Tensor
    checkpoint: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.latents.shape[1:])

    def text(self, pairs: Pairs, rows) -> Text:
        """The captions of some pictures, encoded."""
        return self.table.encode([prompt_of(self.captions, pairs.codes[i], pairs.styles[i]) for i in rows])

    def extra(self, text: Text) -> dict:
        """The model's arguments, guidance included."""
        given = text_args(text)
        given = {"text_pooled": given["text_pooled"]} if self.args.ideal else given
        return {**given, "cond_scale": self.args.cond_scale}

    @cached_property
    def judged_rows(self) -> np.ndarray:
        order = np.random.default_rng(0).permutation(len(self.held_out))
        return order[: self.args.samples]

    @cached_property
    def train_rows(self) -> np.ndarray:
        return np.random.default_rng(1).permutation(len(self.train))[:FIT_PROMPTS]

    def trained(self, count: int) -> dict:
        """The model's arguments for ``count`` training captions: what priors and rivals are chosen by."""
        return self.extra(self.text(self.train, np.resize(self.train_rows, count)))

    def kept(self, name: str, make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The latents of arm ``name`` for all judged captions: what is there, and ``make(first)``, the rest, kept too.

        Captions and seeds of fewer samples are the first ones of more.
        """
        path, wanted = self.args.work / f"{name}.safetensors", len(self.judged_rows)
        x = load_file(path)["x"] if path.exists() else torch.empty(0, *self.shape)
        if len(x) >= wanted:
            return x[:wanted]
        x = torch.cat([x, make(len(x)).cpu()]).contiguous()
        temporary = path.with_suffix(".tmp")
        save_file({"x": x}, temporary)
        temporary.replace(path)
        print(f"{name}: done", flush=True)
        return x


def build(args: argparse.Namespace) -> Bench:
    """Read and encode everything.

    Raises:
        FileNotFoundError: data that a recipe makes are not there. ValueError: parts do not belong together.
    """
    for name, recipe in MADE_BY.items():
        if not (args.data / name).exists():
            raise FileNotFoundError(f"no {args.data / name}: python benchmarks/recipes/{recipe}.py makes it")
    train, held_out = load_pairs(args.data / "train.zip"), load_pairs(args.data / "eval.zip")
    captions = load_captions(args.data / "captions.json")
    table = PhraseTable(load_phrases(args.data / "phrases.safetensors"))
    vae = load_vae(args.vae)
    checkpoint = None if args.ideal else tdpm.open_checkpoint(args.checkpoint)
    if checkpoint is not None:
        check_space(vae, checkpoint.config.get("text") or {}, args.vae, args.checkpoint)
    _settle(args, "ideal" if checkpoint is None else checkpoint.fingerprint)
    space = LatentSpace(vae.to(memory_format=torch.channels_last))
    path = args.work / "latents.safetensors"
    if not path.exists():
        save_file({"x": space.encode(to_unit(train.images), progress=True).contiguous()}, path)
    latents = load_file(path)["x"]
    bench = Bench(args, None, space, train, held_out, captions, table, latents, None)
    if checkpoint is None:
        bench.model = TextIdealDenoiser(latents, bench.text(train, range(len(train))).pooled).eval()
        return bench
    if args.accelerate != "off":
        accelerate(checkpoint.model, precision=args.accelerate)  # equal to rounding, and the same for every sampler
    bench.model, bench.checkpoint = TextDenoiser(checkpoint).eval(), checkpoint.fingerprint
    return bench


def _settle(args: argparse.Namespace, denoiser: str) -> None:
    """The work folder must have been made for this denoiser and these settings."""
    names = ("cond_scale", "tune_samples", "calibration_samples")
    here = json.loads(json.dumps({"denoiser": denoiser} | {name: getattr(args, name) for name in names}))
    path = args.work / "settings.json"
    args.work.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(here, indent=1))
    there = json.loads(path.read_text())
    if differing := [f"{k}: {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v]:
        raise ValueError(f"{args.work} holds other work ({'; '.join(differing)}): name another folder with --work")


def priors(bench: Bench) -> dict:
    """Name -> prior, calibrated under training captions and the guidance in use."""
    found = {}
    for kind in bench.args.kinds:
        found[kind] = fitted(bench, kind)
    for path in bench.args.prior or ():
        prior = tdpm.load_prior(path, expect_shape=bench.shape, expect_checkpoint=bench.checkpoint)
        if not prior.ready:
            prior.bind(bench.model, bench.checkpoint)
        name = prior.kind if prior.kind not in found else path.stem
        found[name] = _planned(bench, prior, bench.args.work / f"prior-{name}.safetensors")
    return found


def fitted(bench: Bench, kind: str):
    """A closed-form prior of this kind, fitted and calibrated; kept."""
    path = bench.args.work / f"prior-{kind}.safetensors"
    if path.exists():
        return _planned(bench, tdpm.load_prior(path), path)
    name, with_data = kind.removesuffix(WITH_DATA), kind.endswith(WITH_DATA)
    shared = {"checkpoint": bench.checkpoint}
    if with_data and name.startswith("text_"):
        # Guidance moves the marginal, and pictures do not show how: this is the prior of the unguided chain.
        prior = fit_text_prior(name, bench.latents, bench.text(bench.train, range(len(bench.train))).pooled, **shared)
    elif with_data:
        prior = tdpm.fit_prior(name, bench.latents, **shared)
    else:
        text = bench.trained(len(bench.train_rows))
        shared |= {"shape": bench.shape, "cond_scale": text.pop("cond_scale"), "denoiser": bench.model}
        if name.startswith("text_"):
            prior = fit_text_prior(name, text=text, draws=FIT_PROMPTS, **shared)
        else:
            prior = tdpm.fit_prior(name, extra_args=text, draws=len(bench.train_rows), **shared)
    tdpm.save_prior(prior, path)
    return _planned(bench, prior, path)


def _planned(bench: Bench, prior, path: Path):
    """Calibrated for what it has no plans for yet; every addition is kept in ``path``."""
    budgets = [b for b in bench.args.budgets if b > prior.prior_nfe]
    for objective, samples in zip(("fidelity", "quality"), bench.args.calibration_samples, strict=True):
        missing = [b for b in budgets if b - prior.prior_nfe not in prior.plans.get(objective, {})]
        if not missing or (objective == "fidelity" and not prior.coupled):
            continue
        options = {"data": bench.latents} if objective == "quality" else {}
        extra = bench.trained(samples)
        tdpm.calibrate(prior, bench.model, missing, objective=objective, extra_args=extra, samples=samples, **options)
        tdpm.save_prior(prior, path)
    return prior


def tuned(bench: Bench) -> dict:
    """Best solver settings per count, by rmse and by the distance that calibration looks at.

    Every setting on a few seeds; the leaders by distance again on more.
    """
    few, more = bench.args.tune_samples
    path = bench.args.work / "tuning.json"
    known = json.loads(path.read_text()) if path.exists() else {"tried": 0, "best": {"rmse": {}, "distance": {}}}
    missing = [b for b in bench.args.rival_budgets if str(b) not in known["best"]["distance"]]
    if not missing:
        return known
    z, extra = rivals.noise_for(range(more), bench.shape), bench.trained(more)
    first = {k: v[:few] if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
    reference = rivals.reference_run(bench.model, z[:few], extra_args=first, batch=bench.args.batch)
    one = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
    distance = AsSeenBy(bench.model, bench.latents, one)  # what `tdpm_ext.calibrate` judges quality by

    def score(x: torch.Tensor) -> dict[str, float]:
        return {"rmse": metrics.paired_rmse(x, reference), "distance": distance(x)}

    for budget in missing:
        found = rivals.tune(bench.model, [budget], z[:few], score, extra_args=first, batch=bench.args.batch)
        rows = [row for row in found.rows if row["scores"]]
        leaders = sorted(rows, key=lambda row: row["scores"]["distance"])[:LEADERS]
        again = [(distance(run_tuned(bench, row, z, extra)), row) for row in leaders]
        known["tried"] += len(found.rows)
        known["best"]["rmse"][str(budget)] = min(rows, key=lambda row: row["scores"]["rmse"])
        known["best"]["distance"][str(budget)] = min(again, key=lambda pair: pair[0])[1]
        path.write_text(json.dumps(known))
    return known


def run_tuned(bench: Bench, s: dict, z: torch.Tensor, extra: dict) -> torch.Tensor:
    """A solver with the settings of a row of tuning: latents [N, ...]."""
    way = (s["sampler"], s["budget"], s["sigma_max"], s["rho"])
    return rivals.run_rival(bench.model, *way, z, extra_args=extra, batch=bench.args.batch).x
