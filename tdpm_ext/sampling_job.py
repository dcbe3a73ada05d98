"""``tdpm sample``: pictures from a checkpoint with ``tdpm`` or any of k-diffusion's samplers, seed by seed."""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tdpm_ext.checkpoints import Checkpoint
from tdpm_ext.commands import accelerated, open_for, start_sigma
from tdpm_ext.grid import picture_grid, save_png, to_image
from tdpm_ext.optional import import_k_diffusion
from tdpm_ext.pictures import to_uint8
from tdpm_ext.schedule import karras
from tdpm_ext.text_job import Prompted, open_prompted

GRID_PICTURES = 1000  # a larger grid would be no picture any more; the single files are all written
GRID_COLUMNS = 10
TWO_STEP_SAMPLERS = ("dpmpp_2m_sde", "dpmpp_3m_sde")  # k-diffusion's raise UnboundLocalError on one step to 0


@dataclass(frozen=True)
class Job:
    """One picture: its seed and its label, a class or the number of a prompt (None = unconditional)."""

    seed: int
    label: int | None
    kind: str = "class"

    @property
    def name(self) -> str:
        label = "" if self.label is None else f"{self.kind}_{self.label}_"
        return f"{label}seed_{self.seed:05d}.png"


def run(args: argparse.Namespace) -> None:
    """Sample every seed (for every label), write the pictures as they come, then the grid."""
    folder, grid_file = _outputs(args.out)
    if args.sampler == "tdpm" and args.prior is None:
        raise ValueError(
            "--sampler tdpm starts from a prior: give --prior PRIOR (tdpm fit makes one), or --sampler euler"
        )
    checkpoint = open_for(args)
    prompted = open_prompted(args, checkpoint)
    if prompted is None and checkpoint.shape[0] not in (1, 3):
        raise ValueError(f"{args.checkpoint} makes {checkpoint.shape[0]}-channel arrays, which no PNG can show")
    jobs = _jobs(args, checkpoint, prompted)
    device = next(checkpoint.model.parameters()).device
    sigmas = _sigmas(args, checkpoint)
    model = checkpoint.model if prompted is None else prompted.model
    sampler = _sampler(args, checkpoint, model, device)
    hidden = _hidden_calls(sampler, model)
    handle = accelerated(args, checkpoint)
    done: list[Tensor] = []
    seconds = 0.0
    with _CallCounter(checkpoint.model, args.sampler, -(-len(jobs) // args.batch), args.steps) as counter:
        for first in range(0, len(jobs), args.batch):
            batch = jobs[first : first + args.batch]
            started = time.perf_counter()
            pictures = _pictures(batch, args, checkpoint, prompted, sampler, sigmas.to(device))
            seconds += time.perf_counter() - started
            counter.batch_done()
            for job, picture in zip(batch, pictures, strict=True):
                done.append(picture)
                if folder is not None:
                    save_png(to_image(picture), folder / job.name)
    save_png(_grid(jobs, done, _row_labels(args, prompted)), grid_file)
    spent = f"{counter.calls + hidden} evaluations and {1000 * seconds / len(done):.1f} ms each on {device}"
    for note in handle.notes if handle else ():
        print(note, file=sys.stderr)
    print(f"{len(done)} picture{'s' * (len(done) != 1)}, {args.sampler}, {spent}")
    print(grid_file if folder is None else f"{folder}: one PNG a picture; {grid_file} shows them")


def _hidden_calls(sampler, model: torch.nn.Module) -> int:
    """Network calls per picture that a counter on the checkpoint's model does not see: the prior's own network's."""
    prior = getattr(sampler, "keywords", {}).get("prior")
    called = (getattr(prior, name, None) for name in ("network", "source"))
    return 0 if prior is None or any(one is model for one in called) else prior.prior_nfe


class _CallCounter:
    """Counts network evaluations per batch, and shows them as a progress bar."""

    def __init__(self, model: torch.nn.Module, name: str, batches: int, steps: int):
        self.calls, self._now, self._batches = 0, 0, batches
        self._bar = tqdm(total=batches * steps, desc=name, unit="call", disable=None, leave=False)
        self._hook = model.register_forward_hook(self._called)

    def _called(self, *_) -> None:
        self._now += 1
        self._bar.update()

    def batch_done(self) -> None:
        """The batch at hand is finished: now it is known how many calls each takes."""
        self.calls, self._now = self._now, 0
        self._bar.total = self.calls * self._batches

    def __enter__(self) -> _CallCounter:
        return self

    def __exit__(self, *exception) -> None:
        self._hook.remove()
        self._bar.close()


def _outputs(out: Path) -> tuple[Path | None, Path]:
    """The folder for single pictures (None: they are not written) and the file of the grid."""
    if out.suffix.lower() == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        return None, out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder, or a .png file for the grid alone")
    out.mkdir(parents=True, exist_ok=True)
    return out, out / "grid.png"


def _seeds(args: argparse.Namespace) -> list[int]:
    if args.seed is None and args.count is None:
        return list(range(16)) if args.seeds is None else args.seeds
    if args.seeds is not None:
        raise ValueError("give either --seeds, or --seed and -n")
    first = args.seed or 0
    return list(range(first, first + (16 if args.count is None else args.count)))


def _jobs(args: argparse.Namespace, checkpoint: Checkpoint, prompted: Prompted | None) -> list[Job]:
    count, seeds = checkpoint.num_classes, _seeds(args)
    if prompted is not None and args.classes is None:
        numbers = range(len(prompted.prompts)) if prompted.prompts else [None]
        return [Job(seed, number, "prompt") for number in numbers for seed in seeds]
    if args.classes is None:
        if args.cond_scale != 1.0:
            advice = f"give --class 0 to {count - 1}" if count else "this checkpoint takes no labels"
            raise ValueError(f"--cond-scale {args.cond_scale:g} guides towards a class: {advice}")
        return [Job(seed, None) for seed in seeds]
    wrong = [label for label in args.classes if label >= count]
    if wrong:
        known = f"its labels are 0 to {count - 1}" if count else "it takes no labels"
        raise ValueError(f"--class {wrong[0]} is not in this checkpoint: {known}")
    return [Job(seed, label) for label in args.classes for seed in seeds]


def _sigmas(args: argparse.Namespace, checkpoint: Checkpoint) -> Tensor:
    low = checkpoint.sigma_min if args.sigma_min is None else args.sigma_min
    high = start_sigma(args, checkpoint)
    if not low < high:
        raise ValueError(f"--sigma-min {low:g} must be below --sigma-max {high:g}")
    return karras(args.steps, high, low, args.rho).float()


def _sampler(
    args: argparse.Namespace, checkpoint: Checkpoint, model: torch.nn.Module, device: torch.device
) -> Callable[..., Tensor]:
    """The sampler function, its prior bound to it when it is ours."""
    name = args.sampler
    if name == "tdpm":
        from tdpm_ext.priors.io import load_prior
        from tdpm_ext.sampler import sample_tdpm

        expected = {"expect_shape": checkpoint.shape, "expect_checkpoint": checkpoint.fingerprint}
        prior = load_prior(args.prior, device=device, **expected)
        if not prior.ready:
            prior.bind(model, checkpoint.fingerprint)
        return functools.partial(sample_tdpm, prior=prior, objective=_objective(args, prior), init="always")
    samplers = k_diffusion_samplers()
    if name in ("dpm_fast", "dpm_adaptive"):
        raise ValueError(f"--sampler {name} chooses its own noise levels; give tdpm, {', '.join(samplers)}")
    if name not in samplers:
        raise ValueError(f"unknown sampler {name!r}; known are tdpm, {', '.join(samplers)}")
    if name in TWO_STEP_SAMPLERS and args.steps < 2:
        raise ValueError(f"--sampler {name} needs --steps 2 or more")
    return samplers[name]


def _objective(args: argparse.Namespace, prior) -> str:
    """The calibration table to use; says on stderr when it was not made for what is asked."""
    calibrated = [name for name in ("fidelity", "quality") if prior.plans.get(name)]
    objective = args.objective or (calibrated or ["fidelity"])[0]
    if objective not in calibrated:
        print(f"{args.prior} is not calibrated for {objective}: a plain schedule is used", file=sys.stderr)
    elif prior.card.get("calibrated_cond_scale", args.cond_scale) != args.cond_scale:
        scale = prior.card["calibrated_cond_scale"]
        print(f"{args.prior} is calibrated for guidance {scale:g}, not {args.cond_scale:g}", file=sys.stderr)
    return objective


def k_diffusion_samplers() -> dict[str, Callable[..., Tensor]]:
    """k-diffusion's samplers by short name: those that run on noise levels given to them."""
    found = {}
    for name, function in sorted(vars(import_k_diffusion().sampling).items()):
        if name.startswith("sample_") and name != "sample_tdpm" and callable(function):
            parameters = list(inspect.signature(function).parameters)
            if parameters[2:3] == ["sigmas"]:
                found[name.removeprefix("sample_")] = function
    return found


def _pictures(
    batch: list[Job], args, checkpoint: Checkpoint, prompted: Prompted | None, sampler, sigmas: Tensor
) -> Tensor:
    """uint8 [B, C, H, W]. All randomness of a picture comes from its own seed, so its batch does not matter."""
    generators = [torch.Generator().manual_seed(job.seed) for job in batch]
    noise = torch.stack([torch.randn(checkpoint.shape, generator=g) for g in generators])
    x = noise.to(sigmas.device) * sigmas[0]
    model, extra_args = checkpoint.model, {}
    if prompted is not None:
        model = prompted.model
        extra_args = prompted.extra_args([job.label for job in batch], args.cond_scale, x.device)
    elif args.classes is not None:
        labels = torch.tensor([job.label for job in batch], device=x.device)
        extra_args = {"class_cond": labels, "cond_scale": args.cond_scale}
    options = _noise_options(args.sampler, sampler, x, sigmas, generators, [job.seed for job in batch])
    with torch.no_grad():
        x = sampler(model, x, sigmas, extra_args=extra_args, disable=True, **options)
    if not torch.isfinite(x).all():
        raise ValueError(f"the pictures are not finite numbers: {args.sampler} diverged at {args.steps} steps")
    return to_uint8(x if prompted is None else prompted.space.decode(x)).cpu()


def _noise_options(name: str, sampler, x: Tensor, sigmas: Tensor, generators: list, seeds: list[int]) -> dict:
    """Fresh noise for the samplers that add some on the way, from each picture's own seed."""
    if name == "tdpm" or "noise_sampler" not in inspect.signature(sampler).parameters:
        return {}
    if "sde" in name:  # these ask for overlapping intervals of one Brownian path
        tree = import_k_diffusion().sampling.BrownianTreeNoiseSampler
        low, high = sigmas[sigmas > 0].min() * 0.999, sigmas.max() * 1.001  # they round on their way through log sigma
        return {"noise_sampler": tree(x, low, high, seed=seeds)}

    def draw(sigma, sigma_next) -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)

    return {"noise_sampler": draw}


def _row_labels(args: argparse.Namespace, prompted: Prompted | None) -> list[str] | None:
    """What stands beside the rows of the grid: prompts or classes; None where there is neither."""
    if prompted is not None and prompted.prompts:
        return prompted.captions()
    return None if args.classes is None else [f"class {label}" for label in args.classes]


def _grid(jobs: list[Job], pictures: list[Tensor], labels: list[str] | None):
    """A row a label and a column a seed; without labels, or with one label and many seeds, rows of ten seeds."""
    if labels is not None and (len(labels) > 1 or len(jobs) <= GRID_COLUMNS):
        seeds = [job.seed for job in jobs[: len(jobs) // len(labels)]]
        shown = max(1, GRID_PICTURES // len(labels))
        rows = [pictures[r * len(seeds) :][: len(seeds)][:shown] for r in range(len(labels))][:GRID_PICTURES]
        return picture_grid(rows, labels[: len(rows)], [f"seed {seed}" for seed in seeds[:shown]])
    pictures, seeds = pictures[:GRID_PICTURES], [job.seed for job in jobs[:GRID_PICTURES]]
    if len(pictures) <= GRID_COLUMNS:
        return picture_grid([pictures], None, [f"seed {seed}" for seed in seeds])
    starts = range(0, len(pictures), GRID_COLUMNS)
    spans = [seeds[i : i + GRID_COLUMNS] for i in starts]
    names = [f"seed {span[0]}" if len(span) == 1 else f"seeds {span[0]}-{span[-1]}" for span in spans]
    names[0] = names[0] if labels is None else f"{labels[0]}\n{names[0]}"
    return picture_grid([pictures[i : i + GRID_COLUMNS] for i in starts], names)
