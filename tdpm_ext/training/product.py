"""What a run makes: a new prior to train, the finished one in half precision, and a jointly trained denoiser."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from tdpm_ext.plan import Plan
from tdpm_ext.priors.generator import GeneratorPrior
from tdpm_ext.priors.learned import NETWORK, LearnedPrior
from tdpm_ext.priors.networks import Generator
from tdpm_ext.priors.raw import RawPrior
from tdpm_ext.priors.registry import get_prior
from tdpm_ext.priors.shared import SharedPrior
from tdpm_ext.training.conditions import Classes
from tdpm_ext.training.options import Options
from tdpm_ext.training.state import write_atomically


def new_prior(options: Options, checkpoint, base, conditions: Classes) -> LearnedPrior:
    """An untrained prior of ``options.kind`` whose network is on the checkpoint's device."""
    o, shape = options, tuple(checkpoint.shape)
    device = next(checkpoint.model.parameters()).device
    coupled = bool(o.regression) and o.noise == "kept"
    settings = {"base": base, "noise": o.noise, "coupled": coupled, "sigma_max": checkpoint.sigma_max}
    if base is not None and not o.sigma_init < base.sigma_max:
        raise ValueError(f"sigma_init {o.sigma_init:g}: the base begins at {base.sigma_max:g}, let it be lower")
    if o.kind.endswith("generator"):
        sigma_data = float(checkpoint.config["model"].get("sigma_data", 1.0))
        known = {"cond_width": conditions.width} if conditions.width else {"num_classes": conditions.count}
        network = Generator(shape, **known, sigma_data=sigma_data, width=o.width, depth=o.depth).to(device)
        settings["cond_name"] = conditions.argument
        prior: LearnedPrior = GeneratorPrior(network, shape, o.sigma_trunc, o.sigma_init, **settings)
    elif o.denoising:
        if o.rank:
            raise ValueError("joint training changes the denoiser itself: leave out rank")
        prior = SharedPrior.joint(checkpoint.model, shape, o.sigma_trunc, o.sigma_init, **settings)
    else:
        more = {"rank": o.rank, "seed": o.seed}
        prior = SharedPrior.create(checkpoint.model, shape, o.sigma_trunc, o.sigma_init, **more, **settings)
    return RawPrior(prior) if o.kind.startswith("raw") else prior


def finished(prior: LearnedPrior, options: Options, checkpoint: str | None, about: dict) -> LearnedPrior:
    """The prior as it will be loaded: its network's weights rounded to half precision, its card filled in."""
    tensors, config = prior.state()
    half = {name: value.detach().half() if _rounds(name, value) else value for name, value in tensors.items()}
    config = {**json.loads(json.dumps(config)), "shape": list(prior.shape), "sigma_trunc": prior.sigma_trunc}
    done = get_prior(prior.kind).from_state({name: value.cpu() for name, value in half.items()}, config)
    added = 0 if prior_adds_nothing(options) else sum(value.numel() for value in prior.parameters())
    done.card = {
        "source": "checkpoint" if not about["pictures"] or not options.adversarial else "pictures",
        "checkpoint": checkpoint,
        "cond_scale": options.cond_scale,
        "added_parameters": added,
        "training": asdict(options) | {"finish": list(options.finish)},
        **about,
        "created_by": f"tdpm_ext {_version()}",
    }
    if options.finish:  # the way that was trained; `calibrate` adds those for other budgets
        plan = Plan((*options.finish, 0.0), (2,) * len(options.finish))
        aims = {"quality": options.adversarial, "fidelity": options.regression}
        done.plans = {aim: {plan.steps: plan} for aim, weight in aims.items() if weight}
    elif options.adversarial and options.noise == "fresh" and options.levels[0] < options.sigma_trunc:
        # pictures were compared from sigma_low up: a cut below it would be a level that no loss has looked at
        ways = [(options.sigma_low, 0.0), (options.sigma_trunc, options.sigma_low, 0.0)]
        done.plans = {"quality": {len(way) - 1: Plan(way, (2,) * (len(way) - 1)) for way in ways}}
    return done


def prior_adds_nothing(options: Options) -> bool:
    """Whether prior and denoiser are one network, or one network with other values."""
    return options.kind.endswith("shared") and not options.rank


def save_denoiser(checkpoint, path: Path) -> str:
    """A jointly trained denoiser as a k-diffusion inference file; returns its fingerprint."""
    from tdpm_ext.checkpoints import fingerprint_tensors

    model = getattr(checkpoint.model, "model", checkpoint.model)  # one that takes text is wrapped
    inner = model.inner_model.inner_model
    half = {name: value.detach().half().cpu().contiguous() for name, value in inner.state_dict().items()}
    write_atomically(path, save(half, {"config": json.dumps(checkpoint.config)}))
    return fingerprint_tensors(half)[:16]


def _rounds(name: str, value: Tensor) -> bool:
    return name.startswith(NETWORK) and value.dtype == torch.float32


def _version() -> str:
    try:
        return version("tdpm-ext")
    except PackageNotFoundError:
        return "unknown"
