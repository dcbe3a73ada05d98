"""Wrong use in ComfyUI: one clear line in the log, and a finished picture where one is possible."""

import os

import pytest
import torch
from safetensors.torch import save_file

from tdpm_ext.priors.io import save_prior


@pytest.fixture(scope="module")
def n(comfy):
    from tdpm_ext.hosts import comfyui_nodes

    return comfyui_nodes


def finished(run, reason):
    """The picture is there, made in the ordinary way, and exactly one line says why."""
    assert bool(run.samples.isfinite().all()) and len(run.sigmas) == 4 and run.bar[-1] == (4, 4)
    assert len(run.log) == 1 and run.log[0].startswith("tdpm: prior not used: "), run.log
    assert reason in run.log[0] and run.log[0].endswith("; ordinary solver, 4 calls"), run.log


def test_no_prior(comfy, tiny, folder):
    reason = "models/tdpm holds no prior for this model at 4x8x8: Fit TDPM Prior makes one"
    finished(comfy.ksampler(tiny.bare), reason)


def test_two_priors(comfy, tiny, folder):
    for name in ("a", "b"):
        save_prior(tiny.prior, folder / f"{name}.safetensors")
    reason = "2 priors fit this model at 4x8x8 (a.safetensors, b.safetensors): choose one with Load TDPM Prior"
    finished(comfy.ksampler(tiny.bare), reason)


def test_a_prior_for_another_checkpoint(comfy, tiny, n):
    other = comfy.tiny.tiny_model(seed=1)
    made = tiny.prior.card["checkpoint"]
    run = comfy.ksampler(n.with_prior(other, tiny.pick))
    finished(run, f"tiny.safetensors was fitted for checkpoint {made}, and this one is comfyui-")
    assert torch.equal(run.samples, comfy.ksampler(n.with_prior(other, tiny.pick)).samples)


@pytest.mark.parametrize(
    ("family", "prediction", "said"),
    [
        ("SDXL", "eps", "was fitted for a model of type SD15, and this one is SDXL"),
        ("SD15", "v", "was fitted for prediction type EPS, and this one is V_PREDICTION"),
    ],
)
def test_a_prior_for_another_kind_of_model(comfy, tiny, n, family, prediction, said):
    import comfy.supported_models as families

    class Narrow(getattr(families, family)):
        def __init__(self, config):
            super().__init__(config)
            self.unet_config |= {"num_heads": 8, "num_head_channels": -1}

    Narrow.__name__ = family
    other = comfy.tiny.tiny_model(prediction=prediction, family=Narrow)
    finished(comfy.ksampler(n.with_prior(other, tiny.pick)), said)


def test_a_prior_for_another_size(comfy, tiny, n, folder):
    run = comfy.ksampler(tiny.model, comfy.latent(size=(4, 12, 8)))
    finished(run, "tiny.safetensors was fitted for latents of 4x8x8, and these are 4x12x8")
    save_prior(tiny.prior, folder / "one.safetensors")
    run = comfy.ksampler(tiny.bare, comfy.latent(size=(4, 12, 8)))
    finished(run, "models/tdpm holds no prior for this model at 4x12x8")


@pytest.mark.parametrize("damage", ["cut short", "empty", "noise", "a checkpoint"])
def test_a_corrupt_file(comfy, tiny, n, folder, damage):
    path = folder / "bad.safetensors"
    whole = save_prior(tiny.prior, path).read_bytes()
    if damage == "a checkpoint":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        path.write_bytes({"cut short": whole[: len(whole) // 2], "empty": b"", "noise": b"\x7f" * 500}[damage])
    model, pick = n.LoadTDPMPrior().load(tiny.bare, "bad.safetensors")
    assert pick.prior is None and "bad.safetensors" in pick.reason and "\n" not in pick.reason
    finished(comfy.ksampler(model), pick.reason)
    finished(comfy.ksampler(tiny.bare), "(not readable: bad.safetensors)")  # found on the way, too


def test_a_file_that_has_gone(comfy, tiny, n, folder):
    model, pick = n.LoadTDPMPrior().load(tiny.bare, "gone.safetensors")
    finished(comfy.ksampler(model), "models/tdpm has no file gone.safetensors")


def test_a_header_that_lies_is_skipped(comfy, tiny, folder):
    lies = ['{"shape": 3}', "[]", '{"shape": ["a"], "card": {}}', "nonsense", '{"shape": [4], "card": 1}']
    for k, header in enumerate(lies):
        save_file({"x": torch.zeros(1)}, folder / f"{k}.safetensors", {"tdpm_prior": header})
    finished(comfy.ksampler(tiny.bare), "models/tdpm holds no prior for this model")


def fit(comfy, n, model, **changed):
    conds = (comfy.tiny.conditioning(1), comfy.tiny.conditioning(2))
    options = {"cfg": 1.0, "draws": 16, "calibrate_steps": "", "fit_seed": 0, "batch": 16, "name": "new"}
    return n.FitTDPMPrior().fit(model, *conds, comfy.latent(), **{**options, **changed})["result"]


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "seteuid"), reason="folders are made read-only the Unix way")
def test_a_read_only_folder_costs_the_file_and_not_the_work(comfy, tiny, n, folder, caplog):
    root = os.geteuid() == 0
    folder.chmod(0o555)
    for parent in folder.parents:  # pytest's folders are private; an ordinary user must be able to walk in
        if root and parent != parent.parent and parent.stat().st_uid == 0:
            parent.chmod(parent.stat().st_mode | 0o055)
    try:
        if root:
            os.seteuid(65534)  # root may write anywhere
        with caplog.at_level("INFO", logger="tdpm_ext"):
            model, pick = fit(comfy, n, tiny.bare)
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "tdpm_ext"]
    assert line == f"tdpm: {folder} cannot be written to: the fitted prior is used in this session and not saved"
    assert list(folder.iterdir()) == [] and comfy.ksampler(model).used_prior


def test_a_save_that_fails_costs_the_file_and_not_the_work(comfy, tiny, n, folder, caplog):
    (folder / "new.safetensors").mkdir()  # the rename at the end fails
    try:
        with caplog.at_level("INFO", logger="tdpm_ext"):
            model, pick = fit(comfy, n, tiny.bare)
    finally:
        (folder / "new.safetensors").rmdir()
    assert "the fitted prior is used in this session and not saved" in caplog.text
    assert list(folder.iterdir()) == [] and comfy.ksampler(model).used_prior


def test_a_rectified_flow_model_cannot_be_fitted(comfy, tiny, n, folder):
    with pytest.raises(ValueError, match="SD15 is a rectified-flow model, .*no prior can be fitted"):
        fit(comfy, n, comfy.tiny.tiny_model(prediction="flow"))
