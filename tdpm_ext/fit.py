"""Fit a prior: from pictures, or from the checkpoint itself when there are none."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from tqdm.auto import tqdm

from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.priors.moments import Batches, Moments
from tdpm_ext.priors.registry import get_prior
from tdpm_ext.schedule import karras
from tdpm_ext.solver import device_of, rows_of, solve

DRAWS = 1024
DRAW_STEPS = 7
DRAW_RHO = 10.0  # the steps err least in the variances they leave behind when spread almost evenly in log sigma
STOP = 0.35  # data are read off as denoised estimates at this multiple of their std


@torch.no_grad()
def draw_from_denoiser(
    denoiser: Callable[..., torch.Tensor],
    shape: tuple[int, ...],
    *,
    sigma_max: float = 80.0,
    count: int = DRAWS,
    steps: int = DRAW_STEPS,
    num_classes: int = 0,
    extra_args: dict | None = None,
    seed: int = 0,
    batch: int = 64,
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Denoised estimates from short runs of the checkpoint, to take moments of.

    The runs stop at a moderate sigma and return D(x, sigma) there: the moments of a posterior mean are known
    functions of the data's, so the fine steps below need not be paid for. Tensors in ``extra_args`` with one entry per
    draw (the prompts' embeddings, for example) are sliced with the draws.

    Returns:
        (denoised [count, *shape], labels int64 [count] or None, the sigma they were read at).
    """
    if count < 2 or num_classes < 0:
        raise ValueError(
            f"draws {count}, num_classes {num_classes}: give 2 draws or more, and 0 classes (no labels) or more"
        )
    generator, device = torch.Generator().manual_seed(seed), device_of(denoiser)
    labels = torch.arange(count) % num_classes if num_classes else None
    spread = (
        torch.arange(8) * count // 8
    )  # the eight pictures of the probe, for conditions that each draw has its own of
    few = rows_of(extra_args or {}, spread, count)
    stop = STOP * _probe_std(denoiser, shape, sigma_max, labels, few, generator)
    sigmas = karras(steps, sigma_max, stop, DRAW_RHO)[:-1]
    out = []
    for k in tqdm(range(0, count, batch), desc="drawing from the checkpoint", disable=not progress):
        rows = min(batch, count - k)
        x = (torch.randn(rows, *shape, generator=generator) * sigma_max).to(device)
        extra = rows_of(extra_args or {}, slice(k, k + rows), count)
        if labels is not None:
            extra["class_cond"] = labels[k : k + rows].to(device)
        x = solve(denoiser, x, sigmas, extra, disable=True)
        out.append(denoiser(x, x.new_full([rows], float(sigmas[-1])), **extra).cpu())
    data = torch.cat(out)
    if not bool(data.isfinite().all()):
        raise ValueError("the denoiser gave NaN or infinity: check the checkpoint, its units and sigma_max")
    return data, labels, stop


def _probe_std(denoiser, shape, sigma_max, labels, extra_args, generator) -> float:
    """The data's std per entry, from eight very short runs."""
    x = (torch.randn(8, *shape, generator=generator) * sigma_max).to(device_of(denoiser))
    extra = dict(extra_args)
    if labels is not None:
        extra["class_cond"] = (labels[:8] if len(labels) >= 8 else labels.repeat(8)[:8]).to(x.device)
    x = solve(denoiser, x, karras(5, sigma_max, sigma_max / 200, 5.0), extra, disable=True)
    std = float((x - x.mean(0)).std())
    if not 0 < std < float("inf"):
        raise ValueError(f"a short run of the denoiser gave pictures of std {std}: check the checkpoint and its units")
    return std


def fit_prior(
    kind: str,
    data=None,
    *,
    denoiser: Callable[..., torch.Tensor] | None = None,
    shape: tuple[int, ...] | None = None,
    sigma_max: float = 80.0,
    labels: torch.Tensor | None = None,
    components: int | None = None,
    rank: int | None = None,
    cond_scale: float = 1.0,
    num_classes: int = 0,
    extra_args: dict | None = None,
    draws: int = DRAWS,
    checkpoint: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ImplicitPrior:
    """Fit a closed-form prior.

    Args:
        kind: ``gaussian``, ``lowrank``, ``mixture``, or another registered kind with a ``fit`` method.
        data: tensor [N, C, H, W] in the denoiser's units (uint8 is taken to [-1, 1]), a folder or zip of pictures,
            `Pictures`, or a DataLoader of batches; None to fit from ``denoiser``.
        denoiser: ``model(x, sigma, **extra_args) -> denoised``. Needs ``shape``, the shape of one picture.
        sigma_max: where the host's untruncated chain starts; fixes which picture belongs to which seed.
        labels: int64 [N]; a mixture then has components per class. Taken from the data when it has them.
        components, rank: of the mixture and of the low-rank part; None chooses.
        cond_scale: guidance that will be used; with ``denoiser`` and != 1 it is passed on as an argument.
        num_classes: draw class-conditionally from ``denoiser``, all classes alike.
        checkpoint: fingerprint to record, so that the prior refuses other checkpoints.

    Raises:
        ValueError: no data and no denoiser, both, NaN, an unknown kind, an option the kind or the source does not
            have, pictures of another shape than ``shape``.
    """
    if (data is None) == (denoiser is None):
        raise ValueError("give either data (pictures) or denoiser (the checkpoint itself), one of the two")
    if denoiser is None and num_classes:
        raise ValueError(f"num_classes={num_classes} is for fitting from a denoiser; with data give labels=")
    if denoiser is not None and labels is not None:
        raise ValueError("labels= go with data; with a denoiser say num_classes=, and classes are drawn alike")
    options = {"components": components, "rank": rank}
    accepted = {"gaussian": (), "lowrank": ("rank",), "mixture": ("components", "rank")}
    cls = get_prior(kind)
    if kind.startswith("text_"):
        raise ValueError(f"a {kind!r} prior is fitted with prompts: give --prompts, or call tdpm_ext.fit_text")
    if not hasattr(cls, "fit"):
        raise ValueError(f"a {kind!r} prior is not fitted: tdpm train makes one")
    for name, value in options.items():
        if value is not None and name not in accepted.get(kind, tuple(options)):
            raise ValueError(f"{name}={value} has no meaning for kind {kind!r}; it takes {accepted[kind] or 'neither'}")
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: give 1 or more")
    options = {name: value for name, value in options.items() if value is not None}
    stop = 0.0
    if denoiser is not None:
        if shape is None:
            raise ValueError("fitting from a denoiser needs shape=, the shape of one picture, such as (1, 28, 28)")
        extra = dict(extra_args or {})
        if cond_scale != 1.0:
            extra["cond_scale"] = cond_scale
        settings = {"sigma_max": sigma_max, "count": draws, "num_classes": num_classes, "seed": seed}
        data, labels, stop = draw_from_denoiser(denoiser, tuple(shape), **settings, extra_args=extra, progress=progress)
    batches = Batches(data, labels, progress)
    prior, moments = cls.fit(batches, sigma_max=sigma_max, denoised_at=stop, seed=seed, **options)
    if shape is not None and tuple(shape) != prior.shape:
        raise ValueError(f"the pictures have shape {prior.shape}, but shape={tuple(shape)} was asked for")
    prior.card = provenance(moments, denoiser is not None, checkpoint, cond_scale, stop, seed)
    prior.card |= {"num_classes": getattr(prior, "num_classes", 0), "components": getattr(prior, "components", 0)}
    return prior


def provenance(
    moments: Moments, drawn: bool, checkpoint: str | None, cond_scale: float, stop: float, seed: int
) -> dict:
    """What a prior's card says of its origin; ``drawn``: from the checkpoint itself, not from pictures."""
    return {
        "source": "denoiser" if drawn else "pictures",
        "pictures": moments.count,
        "data_sha256": moments.sha256,
        "data_mean": float(moments.mean.mean()),
        "data_std": moments.std,
        "checkpoint": checkpoint,
        "cond_scale": cond_scale,
        "denoised_at": stop,
        "seed": seed,
        "created_by": f"tdpm_ext {_version()}",
    }


def _version() -> str:
    try:
        return version("tdpm-ext")
    except PackageNotFoundError:
        return "unknown"
