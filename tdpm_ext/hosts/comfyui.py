"""ComfyUI: ``tdpm`` in every list of samplers, a folder ``models/tdpm`` for priors, and the sampler behind the name.

A name in a list takes no options. So the prior comes from the MODEL (the node Load TDPM Prior puts it there), and
without one from the folder, when exactly one file there was fitted for this checkpoint and size. Few of ComfyUI's
names are touched, since none is promised to stay: the list of samplers, the module the functions are looked up in,
and the table of model folders.
"""

from __future__ import annotations

import logging

import torch

from tdpm_ext import inner_solver, route, sampler
from tdpm_ext.decide import decide
from tdpm_ext.hosts import Handle, comfyui_model, comfyui_priors
from tdpm_ext.hosts.comfyui_priors import FOLDER, OPTION, Pick
from tdpm_ext.schedule import check_sigmas
from tdpm_ext.solver import solve

log = logging.getLogger("tdpm_ext")
NAME = "tdpm"
ATTRIBUTE = f"sample_{NAME}"


def install() -> Handle:
    """Add the sampler to ComfyUI's lists and the folder to its models; what is there already is left alone.

    Raises:
        ImportError: ComfyUI's modules cannot be imported here.
    """
    try:
        import comfy.k_diffusion.sampling
        import comfy.samplers
        import folder_paths
    except ImportError as error:
        raise ImportError(f"this is not ComfyUI's Python process ({error}): tdpm install comfyui --path DIR") from error

    undos = []
    if (undo := _set_function(comfy.k_diffusion.sampling)) is not None:
        undos.append(undo)
    lists = [comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSampler.SAMPLERS]
    for names in lists[: 1 if lists[0] is lists[1] else 2]:
        if NAME not in names:  # in place: nodes hold this very list
            names.append(NAME)
            undos.append(lambda names=names: names.remove(NAME) if NAME in names else None)
    if (undo := _add_folder(folder_paths)) is not None:
        undos.append(undo)

    def undo_all() -> None:
        for undo in reversed(undos):
            undo()

    return Handle("comfyui", undo_all if undos else None)


@torch.no_grad()
def sample_tdpm(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    *,
    prior=None,
    sigma_trunc=None,
    schedule="prior",
    solver=None,
    init="auto",
    objective="fidelity",
    noise_sampler=None,
):
    """``tdpm_ext.sample_tdpm`` as ComfyUI calls it; finds the prior and says in one line what was done.

    Args:
        prior: an ``ImplicitPrior`` or a node's `Pick`; by default the MODEL's, else the only one in the folder.

    The other arguments are those of ``tdpm_ext.sampler.sample_tdpm``.
    """
    extra_args = {} if extra_args is None else extra_args
    options = {"sigma_trunc": sigma_trunc, "schedule": schedule, "solver": solver, "init": init}
    options |= {"objective": objective, "noise_sampler": noise_sampler}
    shared = (model, x, sigmas, extra_args, callback, disable)
    if init == "never" or len(sigmas) < 2:
        return sampler.sample_tdpm(*shared, **options)
    facts = comfyui_model.facts_behind(model)
    on_model = (extra_args.get("model_options") or {}).get(OPTION)
    pick = comfyui_priors.find(facts, tuple(x.shape[1:]), prior, on_model, sampler.active_prior())
    if pick.prior is None:
        if init == "always":
            raise ValueError(f"init='always' cannot be met: {pick.reason}")
        return _ordinary(pick.reason, shared, solver)
    _tell_conditions(pick, model)
    _warn_of_ranges(pick, model, x, sigmas, extra_args, options)
    with sampler.use_prior(pick.prior):
        return sampler.sample_tdpm(*shared, prior=None if prior is None else pick.prior, **options)


def _ordinary(reason: str, shared: tuple, solver) -> torch.Tensor:
    """The host's sigmas with the solver that was asked for, and the reason in the log."""
    model, x, sigmas, extra_args, callback, disable = shared
    inner = None if solver is None else inner_solver.resolve(solver)
    way = route.ordinary(check_sigmas(sigmas), None, inner)
    log.warning("tdpm: prior not used: %s; ordinary solver, %d calls%s", reason, way.calls, way.note)
    if way.solver is None:
        return solve(model, x, way.sigmas, extra_args, callback, disable)
    return inner_solver.run(way.solver, model, x, way.sigmas, extra_args, callback, disable)


def _tell_conditions(pick: Pick, model) -> None:
    """Say when the prior was fitted under another guidance or prompt: it still applies, less exactly."""
    guider, card = comfyui_model.guider_behind(model), pick.prior.card
    made = card.get("comfyui")
    if guider is None or not isinstance(made, dict):
        return
    other = []
    if card.get("cond_scale") not in (None, guider.cfg):
        other.append(f"cfg {card['cond_scale']:g} (now {guider.cfg:g})")
    if made.get("prompt") not in (None, comfyui_model.prompt_hash(guider.original_conds.get("positive", ()))):
        other.append("another prompt")
    if other:
        log.info("tdpm: %s was fitted under %s; fit again for the closest match", pick.name, " and ".join(other))


def _warn_of_ranges(pick: Pick, model, x, sigmas, extra_args, options) -> None:
    """A ControlNet or conditioning whose range ends above sigma_trunc never acts: say so."""
    ends = comfyui_model.range_ends(model)
    if not ends:
        return
    levels = check_sigmas(sigmas)
    solver = None if options["solver"] is None else inner_solver.resolve(options["solver"])
    budget = len(levels) - 1
    plan = route.plan_for(pick.prior, budget, options["objective"], options["sigma_trunc"], solver, levels)
    cut = plan.sigma_trunc
    lost = [(what, end) for what, end in ends if end > cut]
    if not lost:
        return
    facts = {"prior": pick.prior, "sigma_trunc": cut, "budget": budget, "init": options["init"]}
    if decide(model, x, levels, **facts, extra_args=extra_args).use_prior:
        for what, end in lost:
            text = "tdpm: a %s range ends at sigma %.4g, above sigma_trunc %.4g, and never acts: let it end later"
            log.warning(text, what, end, cut)


def _set_function(module):
    """Put the sampler where ComfyUI looks it up; returns the undo, or None when it was there already."""
    ours, absent = sample_tdpm, object()
    before = vars(module).get(ATTRIBUTE, absent)
    if before is ours:
        return None

    def undo() -> None:
        if vars(module).get(ATTRIBUTE) is not ours:
            log.warning("%s.%s was replaced after install; it is left as it is", module.__name__, ATTRIBUTE)
        elif before is absent:
            delattr(module, ATTRIBUTE)
        else:
            setattr(module, ATTRIBUTE, before)

    setattr(module, ATTRIBUTE, ours)
    return undo


def _add_folder(folder_paths):
    """Make ``models/tdpm`` known; returns the undo, or None when it was known already."""
    table, path = folder_paths.folder_names_and_paths, f"{folder_paths.models_dir}/{FOLDER}"
    before = table.get(FOLDER)
    if before is not None and path in before[0]:
        return None
    folders = [path] if before is None else [*before[0], path]
    table[FOLDER] = (folders, {".safetensors"})

    def undo() -> None:
        if before is None:
            table.pop(FOLDER, None)
        else:
            table[FOLDER] = before

    return undo
