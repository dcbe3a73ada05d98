"""A1111's web UI, Forge and reForge: ``tdpm`` in their lists of samplers, its settings, and what a picture records.

The three differ little here: each lists samplers in ``modules.sd_samplers`` and runs a k-diffusion function through
``KDiffusionSampler``. That hands arguments over by the names of the function's parameters, so none of ours may be
called ``n``, ``eta``, ``sigma_min`` or ``sigma_max``.
"""

from __future__ import annotations

import inspect
import logging

import torch

from tdpm_ext import route, sampler
from tdpm_ext.decide import decide
from tdpm_ext.hosts import Handle, a1111_fit, a1111_priors
from tdpm_ext.hosts.a1111_priors import AUTOMATIC, NONE
from tdpm_ext.schedule import check_sigmas
from tdpm_ext.solver import solve

log = logging.getLogger("tdpm_ext")
NAME = "tdpm"
SECTION = ("tdpm", "TDPM")
PRIOR, TRUNC, OBJECTIVE, SCHEDULE = "tdpm_prior", "tdpm_sigma_trunc", "tdpm_objective", "tdpm_schedule"
# setting: its default and its name in a picture's parameters, from which the UI sets it again
SETTINGS = {
    PRIOR: (AUTOMATIC, "TDPM prior"),
    TRUNC: (0.0, "TDPM sigma trunc"),
    OBJECTIVE: ("fidelity", "TDPM objective"),
    SCHEDULE: ("prior", "TDPM schedule"),
}
HASH = "TDPM prior hash"


def install() -> Handle:
    """Add the sampler and its settings; what is there already is left alone.

    Raises:
        ImportError: the web UI's modules cannot be imported here.
    """
    try:
        from modules import sd_samplers, sd_samplers_common, sd_samplers_kdiffusion, shared
    except ImportError as error:
        raise ImportError(
            f"this is not the web UI's Python process ({error}): tdpm install a1111 --path DIR"
        ) from error

    undos = []
    if all(data.name != NAME for data in sd_samplers.all_samplers):

        def constructor(model):
            return sd_samplers_kdiffusion.KDiffusionSampler(sample_tdpm, model)

        ours = sd_samplers_common.SamplerData(NAME, constructor, [f"k_{NAME}"], {"scheduler": "karras"})
        sd_samplers.all_samplers.append(ours)
        _relist(sd_samplers)

        def remove() -> None:
            if ours in sd_samplers.all_samplers:
                sd_samplers.all_samplers.remove(ours)
                _relist(sd_samplers)

        undos.append(remove)
    undos += [_add_setting(shared.opts, key, info) for key, info in _settings(shared).items()]
    if not log.handlers and not log.isEnabledFor(logging.INFO):  # the web UI logs warnings only unless told otherwise
        undos.append(_speak())
    undos = [undo for undo in undos if undo is not None]

    def undo_all() -> None:
        for undo in reversed(undos):
            undo()

    return Handle("a1111", undo_all if undos else None)


@torch.no_grad()
def sample_tdpm(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """``tdpm_ext.sample_tdpm`` as the web UI calls it: options come from its settings, and the picture records them.

    Why the prior was not used is written below the picture and into the log.
    """
    extra_args = {} if extra_args is None else extra_args
    job, shared = getattr(model, "p", None), (model, x, sigmas, extra_args, callback, disable)
    levels = check_sigmas(sigmas)
    if len(levels) < 2:
        return x
    second = bool(getattr(job, "is_hr_pass", False))
    wanted = getattr(job, a1111_fit.REQUEST, None)
    if wanted is not None and not second:
        pick = a1111_fit.fit(wanted, model, x, levels, extra_args)
    else:
        pick = a1111_priors.find(_option(PRIOR), tuple(x.shape[1:]))
    options = {"sigma_trunc": _option(TRUNC) or None, "objective": _option(OBJECTIVE)}
    cut, reason = None, pick.reason
    if pick.prior is not None:
        plan = route.plan_for(pick.prior, len(levels) - 1, options["objective"], options["sigma_trunc"], None, levels)
        facts = {"prior": pick.prior, "sigma_trunc": plan.sigma_trunc, "budget": len(levels) - 1}
        verdict = decide(model, x, levels, **facts, extra_args=extra_args)
        cut, reason = (plan.sigma_trunc if verdict.use_prior else None), verdict.reason
    if not second:  # the second pass of a picture runs without the prior, and the first one's facts stay
        _record(job, pick, cut, reason)
    if pick.prior is None:
        log.warning("tdpm: prior not used: %s; ordinary solver, %d calls", reason, len(levels) - 1)
        return solve(model, x, levels, extra_args, callback, disable)
    with sampler.use_prior(pick.prior):
        return sampler.sample_tdpm(*shared, schedule=_option(SCHEDULE), **options)


def _record(job, pick, cut: float | None, reason: str) -> None:
    """Write into the picture's parameters what makes it again, and below it why the prior stayed out."""
    parameters = getattr(job, "extra_generation_params", None)
    if cut is None and pick.name != NONE and hasattr(job, "comment"):
        job.comment(f"tdpm: prior not used: {reason}")
    if not isinstance(parameters, dict):
        return
    facts = {SETTINGS[PRIOR][1]: NONE}
    if cut is not None:
        # Every digit: the calibrated table is used only when sigma_trunc is exactly its own.
        facts = {SETTINGS[PRIOR][1]: pick.name, HASH: pick.digest, SETTINGS[TRUNC][1]: repr(cut)}
        for key in (OBJECTIVE, SCHEDULE):
            if _option(key) != SETTINGS[key][0]:
                facts[SETTINGS[key][1]] = _option(key)
    parameters.update(facts)


def _option(key: str):
    """The setting's value; its default where the UI never made settings."""
    from modules import shared

    return getattr(shared.opts, key, SETTINGS[key][0])


def _settings(shared) -> dict:
    """The settings' descriptions for the UI."""
    import gradio

    def described(key, label, component, **options):
        default, name = SETTINGS[key]
        if "infotext" in inspect.signature(shared.OptionInfo.__init__).parameters:
            options["infotext"] = name
        return shared.OptionInfo(default, label, component, section=SECTION, **options)

    def files() -> dict:
        return {"choices": [AUTOMATIC, NONE, *a1111_priors.list_files()]}

    def choices(names) -> dict:
        return {"component_args": {"choices": list(names)}}

    prior = {"component_args": files, "refresh": a1111_priors.list_files}
    labels = {
        PRIOR: ("TDPM prior, from models/tdpm", gradio.Dropdown, prior),
        TRUNC: ("TDPM sigma_trunc (0: as calibrated)", gradio.Number, {}),
        OBJECTIVE: ("TDPM plans: near a long run, or near the data", gradio.Radio, choices(sampler.OBJECTIVES)),
        SCHEDULE: ("TDPM noise levels: the prior's, or those chosen", gradio.Radio, choices(sampler.SCHEDULES)),
    }
    return {key: described(key, label, component, **more) for key, (label, component, more) in labels.items()}


def _add_setting(opts, key: str, info):
    """Make a setting known; returns the undo, or None when it was known already."""
    if key in opts.data_labels:
        return None
    kept = key in opts.data  # the user's value, read from the UI's file
    opts.add_option(key, info)

    def undo() -> None:
        opts.data_labels.pop(key, None)
        if not kept:
            opts.data.pop(key, None)

    return undo


def _relist(sd_samplers) -> None:
    """Rebuild what the UI derives from its list of samplers."""
    sd_samplers.all_samplers_map = {data.name: data for data in sd_samplers.all_samplers}
    sd_samplers.set_samplers()
    cached = getattr(sd_samplers, "get_sampler_and_scheduler", None)
    if hasattr(cached, "cache_clear"):  # remembers names that were unknown
        cached.cache_clear()


def _speak():
    """Print our log lines to the console; returns the undo."""
    handler, level = logging.StreamHandler(), log.level
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    def undo() -> None:
        log.removeHandler(handler)
        log.setLevel(level)

    return undo
