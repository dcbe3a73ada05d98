"""What the subcommands ``fit``, ``calibrate`` and ``inspect`` of ``tdpm`` do; ``sample`` is in ``sampling_job``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch

from tdpm_ext.checkpoints import Checkpoint, open_checkpoint
from tdpm_ext.pictures import Pictures, load_pictures

DEFAULT_SIGMA_MAX = 80.0


def fit(args: argparse.Namespace) -> None:
    """``tdpm fit``: write a prior fitted from pictures, or from the checkpoint itself."""
    from tdpm_ext.fit import fit_prior

    if args.checkpoint is None and args.data is None:
        raise ValueError("nothing to fit from: give a CHECKPOINT, or --data PICTURES, or both")
    if args.no_data and (args.data is not None or args.checkpoint is None):
        raise ValueError("--no-data fits from the checkpoint itself: give a CHECKPOINT and no --data")
    check_output(args.output)
    checkpoint = None if args.checkpoint is None else open_for(args)
    if args.prompts is not None:
        from tdpm_ext.text_job import fit as fit_to_prompts

        return _keep(fit_to_prompts(args, checkpoint), args.output)
    options = {k: getattr(args, k) for k in ("components", "rank") if getattr(args, k) is not None}
    options |= {"sigma_max": start_sigma(args, checkpoint), "cond_scale": args.cond_scale, "seed": args.seed}
    options["checkpoint"] = None if checkpoint is None else checkpoint.fingerprint
    if args.data is None:
        source = {"denoiser": checkpoint.model, "shape": checkpoint.shape}
        options["num_classes"] = 0 if args.unlabelled else checkpoint.num_classes
    else:
        source = {"data": read_pictures(args, None if checkpoint is None else checkpoint.shape)}
        if args.unlabelled:
            source["data"].labels = None
        _check_classes(args, source["data"], checkpoint)
    _keep(fit_prior(args.kind, **source, **options, progress=sys.stderr.isatty()), args.output)


def _keep(prior, path: Path) -> None:
    from tdpm_ext.priors.io import save_prior

    save_prior(prior, path)
    print(f"{prior.kind} prior for {_shape(prior.shape)}, sigma_trunc {prior.sigma_trunc:.4g}: {path}")


def calibrate(args: argparse.Namespace) -> None:
    """``tdpm calibrate``: fill a prior's table of plans for one objective."""
    from tdpm_ext.calibrate import SAMPLES
    from tdpm_ext.calibrate import calibrate as run
    from tdpm_ext.priors.io import load_prior, save_prior

    if args.objective == "quality" and args.data is None:
        raise ValueError("--objective quality compares with pictures: give --data PICTURES (not the fitted ones)")
    if args.objective == "fidelity" and args.data is not None:
        raise ValueError("--objective fidelity uses no pictures: leave out --data, or give --objective quality")
    output = args.output or args.prior
    check_output(output)
    checkpoint = open_for(args)
    prior = load_prior(args.prior, expect_shape=checkpoint.shape, expect_checkpoint=checkpoint.fingerprint)
    options = {"seed": args.seed, "sigma_min": checkpoint.sigma_min, "progress": sys.stderr.isatty()}
    options["num_classes"] = 0 if args.unlabelled else checkpoint.num_classes
    if args.samples is not None:
        options["samples"] = args.samples
    model, options["extra_args"] = checkpoint.model, {}
    if args.prompts is not None:
        from tdpm_ext.text_job import calibration, latents

        options.setdefault("samples", SAMPLES[args.objective])
        model, options["extra_args"] = calibration(args, checkpoint, options["samples"])
        options |= {} if args.data is None else {"data": latents(args, checkpoint)[0]}
    elif args.data is not None:
        options["data"] = read_pictures(args, checkpoint.shape)
    if not prior.ready:
        prior.bind(model, checkpoint.fingerprint)
    handle = accelerated(args, checkpoint)
    if args.cond_scale != 1.0:
        options["extra_args"]["cond_scale"] = args.cond_scale
    prior = run(prior, model, tuple(args.budgets), objective=args.objective, **options)
    save_prior(prior, output)
    for note in handle.notes if handle else ():
        print(note, file=sys.stderr)
    print("\n".join(plan_lines(args.objective, prior.plans[args.objective])))
    print(f"calibrated for {args.objective}: {output}")


def inspect(args: argparse.Namespace) -> None:
    """``tdpm inspect``: print what a prior file holds."""
    from tdpm_ext.priors.io import load_prior

    prior = load_prior(args.prior)
    tensors, config = prior.state()
    facts = {
        "file": str(args.prior),
        "bytes": args.prior.stat().st_size,
        "kind": prior.kind,
        "shape": list(prior.shape),
        "sigma_trunc": prior.sigma_trunc,
        "coupled": prior.coupled,
        "prior_nfe": prior.prior_nfe,
        "numbers": sum(tensor.numel() for tensor in tensors.values()),
        "config": config,
        "card": prior.card,
    }
    plans = prior.plans
    if args.json:
        table = {name: {str(n): plan.to_json() for n, plan in sorted(rows.items())} for name, rows in plans.items()}
        print(json.dumps(facts | {"plans": table}, indent=2, default=str))
        return
    print("\n".join(card_lines(facts)))
    for name, rows in sorted(plans.items()):
        print("\n" + "\n".join(plan_lines(name, rows)))
    if not any(plans.values()):
        print("\nnot calibrated: tdpm calibrate chooses its noise levels for a checkpoint")


def sample(args: argparse.Namespace) -> None:
    """``tdpm sample``: see ``sampling_job``."""
    from tdpm_ext.sampling_job import run

    run(args)


def card_lines(facts: dict) -> list[str]:
    """A prior's facts as aligned lines of text."""
    card = facts["card"]
    data = card.get("data_sha256")
    origin = f"{card.get('pictures')} pictures" if card.get("source") == "pictures" else "the checkpoint's own outputs"
    rows = {
        "file": f"{facts['file']} ({facts['bytes'] / 1e6:.2f} MB, {facts['numbers']:,} numbers)",
        "kind": facts["kind"],
        "shape": _shape(facts["shape"]),
        "sigma trunc": f"{facts['sigma_trunc']:.4g}",
        "coupled": "yes: a seed keeps its picture" if facts["coupled"] else "no: a seed gives another picture",
        "network calls": f"{facts['prior_nfe']} inside the prior",
        "fitted on": origin + (f" (sha256 {str(data)[:16]})" if data else ""),
        "checkpoint": card.get("checkpoint") or "any",
    }
    shown = {"source", "pictures", "data_sha256", "checkpoint"}
    more = {key.replace("_", " "): value for key, value in {**facts["config"], **card}.items() if key not in shown}
    rows |= {key: _short(value) for key, value in more.items() if key not in rows}
    width = max(map(len, rows)) + 2
    return [f"{key:<{width}}{value}" for key, value in rows.items()]


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:100]


def plan_lines(objective: str, rows: dict) -> list[str]:
    """One calibration table as aligned lines of text: evaluations, error, orders, history, noise levels."""
    lines = [objective, f"  {'nfe':>3}  {'error':>8}  {'orders':<10}{'history':<14}sigmas"]
    for budget, plan in sorted(rows.items()):
        error = f"{plan.error:.4g}" if math.isfinite(plan.error) else "-"
        history = " ".join(f"{s:.3g}" for s in plan.history) or "-"
        orders = "".join(map(str, plan.orders))
        levels = " ".join(f"{s:.3g}" for s in plan.sigmas)
        lines.append(f"  {budget:>3}  {error:>8}  {orders:<10}{history:<14}{levels}")
    return lines


def open_for(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint named on the command line, on the device named there."""
    return open_checkpoint(args.checkpoint, device=pick_device(args.device), config=args.config)


def accelerated(args: argparse.Namespace, checkpoint: Checkpoint):
    """The handle of what --accelerate did to the network, or None."""
    if args.accelerate == "off":
        return None
    from tdpm_ext.kernels import accelerate

    return accelerate(checkpoint.model, precision=args.accelerate)


def pick_device(name: str | None) -> torch.device:
    """The named device, or a GPU if there is one. ValueError when it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); tdpm doctor says what can") from error
    return device


def start_sigma(args: argparse.Namespace, checkpoint: Checkpoint | None) -> float:
    """Where the untruncated chain starts: --sigma-max, else the checkpoint's own."""
    if args.sigma_max is not None:
        return args.sigma_max
    return DEFAULT_SIGMA_MAX if checkpoint is None else checkpoint.sigma_max


def read_pictures(args: argparse.Namespace, shape: tuple[int, ...] | None) -> Pictures:
    """--data, checked against the shape that a checkpoint makes."""
    pictures = load_pictures(args.data, size=args.size, limit=args.limit)
    found = tuple(pictures.images.shape[1:])
    if shape is not None and found != shape:
        advice = f"; --size {shape[1]} resizes them" if found[0] == shape[0] and shape[1] == shape[2] else ""
        raise ValueError(f"{args.data} has pictures {_shape(found)}, the checkpoint makes {_shape(shape)}{advice}")
    return pictures


def check_output(path: Path) -> None:
    """Refuse, before any work is done, a file that cannot be written."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} cannot be written to: name another place with -o")


def _check_classes(args: argparse.Namespace, pictures: Pictures, checkpoint: Checkpoint | None) -> None:
    count = 0 if pictures.labels is None else len(pictures.classes)
    if checkpoint is not None and count and checkpoint.num_classes != count:
        raise ValueError(
            f"{args.data} has {count} classes, the checkpoint takes {checkpoint.num_classes or 'no'} labels: "
            "--unlabelled ignores the classes of the pictures"
        )


def _shape(shape) -> str:
    return "x".join(map(str, shape))
