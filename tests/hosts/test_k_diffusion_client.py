"""k-diffusion, an old fork of it and a program built on it, as callers of ``sample_tdpm``: same calls, same bits."""

import importlib
import importlib.util
import inspect
import json
import os
from pathlib import Path

os.environ.setdefault("K_DIFFUSION_USE_COMPILE", "0")  # k-diffusion's transformer compiles parts of itself otherwise

import pytest
import torch
from safetensors.torch import save_file

import tdpm_ext
from tdpm_ext.priors.closed_form import gaussian_tensors
from tdpm_ext.priors.registry import get_prior

K = pytest.importorskip("k_diffusion")


def has(name):
    return importlib.util.find_spec(name) is not None


FORKS = ["k_diffusion", pytest.param("k_samplers", marks=pytest.mark.skipif(not has("k_samplers"), reason="absent"))]


@pytest.fixture(params=FORKS)
def sampling(request):
    return importlib.import_module(f"{request.param}.sampling")


def prior_of(shape, sigma_trunc=2.0, sigma_max=10.0):
    size = torch.Size(shape).numel()
    tensors = gaussian_tensors(torch.zeros(size), torch.eye(size), torch.full((size,), 0.5))
    return get_prior("gaussian")(tensors, shape, residual=0.0, sigma_trunc=sigma_trunc, sigma_max=sigma_max)


class Denoiser:
    """The exact denoiser of pictures from a wavy Gaussian; counts its calls."""

    def __init__(self):
        self.sigmas = []

    def __call__(self, x, sigma, **extra):
        self.sigmas.append(float(sigma[0]))
        variance = sigma.view(-1, *[1] * (x.ndim - 1)) ** 2
        return x / (1 + variance) + 0.1 * torch.sin(x)


def noise(sampling, shape=(2, 1, 4, 4), n=5):
    sigmas = sampling.get_sigmas_karras(n, 0.02, 10.0)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * sigmas[0], sigmas


def test_the_first_arguments_are_those_of_every_sampler(sampling):
    ours = list(inspect.signature(tdpm_ext.sample_tdpm).parameters.values())
    theirs = list(inspect.signature(sampling.sample_euler).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[:6]] == [(p.name, p.default, p.kind) for p in theirs[:6]]


@pytest.mark.parametrize("options", [{"init": "never"}, {"prior": prior_of((1, 4, 4))}])
def test_callbacks_get_what_they_get_from_euler(sampling, options):
    x, sigmas = noise(sampling)
    seen = {"ours": [], "theirs": []}
    tdpm_ext.sample_tdpm(Denoiser(), x, sigmas, None, seen["ours"].append, True, **options)
    sampling.sample_euler(Denoiser(), x, sigmas, None, seen["theirs"].append, True)
    for ours, theirs in zip(seen["ours"], seen["theirs"], strict=True):
        assert set(ours) == set(theirs) and ours["i"] == theirs["i"]
        for name in ("x", "denoised", "sigma", "sigma_hat"):
            assert ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "lms", "dpmpp_2m", "euler_ancestral"])
def test_their_solver_without_the_prior_is_theirs_to_the_bit(sampling, name):
    solver = getattr(sampling, f"sample_{name}", None)
    if solver is None:
        pytest.skip(f"{sampling.__name__} has no {name}")
    x, sigmas = noise(sampling)
    made = []
    for run in (lambda *a: solver(*a, disable=True), lambda *a: ours(*a, solver)):
        torch.manual_seed(3)
        made.append(run(Denoiser(), x, sigmas))
    assert torch.equal(*made)


def ours(model, x, sigmas, solver):
    return tdpm_ext.sample_tdpm(model, x, sigmas, disable=True, init="never", solver=solver)


def test_without_a_solver_it_is_dpmpp_2m(sampling):
    x, sigmas = noise(sampling)
    theirs = K.sampling.sample_dpmpp_2m(Denoiser(), x, sigmas, disable=True)
    made = tdpm_ext.sample_tdpm(Denoiser(), x, sigmas, disable=True, init="never")
    torch.testing.assert_close(made, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", [None, "euler", "dpmpp_2m"])
def test_short_schedules_do_what_euler_does_with_them(sampling, solver):
    x, _ = noise(sampling)
    options = {"solver": None if solver is None else getattr(K.sampling, f"sample_{solver}")}
    for sigmas in ([10.0, 0.0], [10.0], []):
        model, sigmas = Denoiser(), torch.tensor(sigmas)
        wanted = sampling.sample_euler(model, x, sigmas, disable=True)
        for init in ({"init": "never"}, {"prior": prior_of((1, 4, 4))}):
            own = Denoiser()
            made = tdpm_ext.sample_tdpm(own, x, sigmas, disable=True, **init, **options)
            assert len(own.sigmas) == len(model.sigmas) and made.shape == x.shape
            if "prior" not in init or len(sigmas) < 2:
                torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)


def test_an_end_above_zero_and_rising_sigmas_are_ordinary_steps(sampling):
    x, _ = noise(sampling)
    for sigmas in ([10.0, 5.0, 3.0], [0.1, 1.0, 10.0]):
        made = tdpm_ext.sample_tdpm(Denoiser(), x, torch.tensor(sigmas), disable=True, prior=prior_of((1, 4, 4)))
        never = tdpm_ext.sample_tdpm(Denoiser(), x, torch.tensor(sigmas), disable=True, init="never")
        assert torch.equal(made, never)


def test_a_chain_that_ends_above_zero_below_the_cut_gets_its_end(sampling):
    x, model = noise(sampling)[0], Denoiser()
    sigmas = torch.tensor([10.0, 4.0, 1.0, 0.3])
    seen = []
    tdpm_ext.sample_tdpm(model, x, sigmas, None, seen.append, True, prior=prior_of((1, 4, 4)))
    assert model.sigmas[0] == pytest.approx(2.0) and len(model.sigmas) == 3 and seen[-1]["i"] == 2


def test_installing_leaves_the_other_samplers_their_bits(sampling):
    x, sigmas = noise(sampling)

    def made():
        torch.manual_seed(0)
        return sampling.sample_euler(Denoiser(), x, sigmas, disable=True)

    before = made()
    with tdpm_ext.install("k_diffusion"):
        assert torch.equal(before, made())
    assert torch.equal(before, made())


# -- stable-audio-tools: latents of three dimensions, samplers named in an if-chain -----------------------------------


@pytest.mark.skipif(not has("stable_audio_tools"), reason="stable-audio-tools is not installed")
def test_stable_audio_tools_samples_its_latents_in_the_place_of_one_of_its_own_samplers(monkeypatch):
    folder = Path(importlib.util.find_spec("stable_audio_tools").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("stable_audio_sampling", folder / "inference" / "sampling.py")
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)  # the file alone: the package imports a whole training stack
    calls = []

    def v_model(x, t, **_):
        calls.append(float(t[0]))
        return 0.3 * x

    z = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    run = {"steps": 6, "sampler_type": "dpmpp-2m", "device": "cpu"}
    theirs = client.sample_k(v_model, z, **run)
    assert len(calls) == 6
    monkeypatch.setattr(client.K.sampling, "sample_dpmpp_2m", tdpm_ext.sample_tdpm)
    torch.testing.assert_close(client.sample_k(v_model, z, **run), theirs, atol=1e-4, rtol=1e-4)  # no prior: the same
    calls.clear()
    with tdpm_ext.use_prior(prior_of((8, 16), sigma_trunc=3.0, sigma_max=100.0)):
        made = client.sample_k(v_model, z, **run)
    assert made.shape == z.shape and made.isfinite().all() and len(calls) == 6
    assert calls[0] == pytest.approx(2 * torch.tensor(3.0).atan().item() / torch.pi, abs=1e-4)


# -- the command line in the place of k-diffusion's sample.py ---------------------------------------------------------

TRANSFORMER = {
    "type": "image_transformer_v1",
    "input_channels": 1,
    "input_size": [8, 8],
    "patch_size": [2, 2],
    "depth": 1,
    "width": 64,
    "sigma_data": 0.6,
    "sigma_min": 0.01,
    "sigma_max": 80,
}
UNET = {
    "type": "image_v1",
    "input_channels": 1,
    "input_size": [8, 8],
    "patch_size": 1,
    "mapping_out": 16,
    "mapping_cond_dim": 3,
    "depths": [1, 1],
    "channels": [8, 16],
    "self_attn_depths": [False, False],
    "augment_wrapper": False,
    "dropout_rate": 0.0,
    "sigma_data": 0.6,
    "sigma_min": 0.01,
    "sigma_max": 80,
}


def checkpoint(folder, model):
    """A class-conditional checkpoint with random weights: inference file, training file, state file."""
    (folder / "config.json").write_text(json.dumps({"model": model, "dataset": {"num_classes": 3}}))
    config = K.config.load_config(folder / "config.json")
    torch.manual_seed(0)
    inner = K.config.make_model(config)
    for p in inner.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    weights = {name: tensor.contiguous() for name, tensor in inner.state_dict().items()}
    save_file(weights, folder / "net.safetensors", metadata={"config": json.dumps(config)})
    torch.save({"config": config, "model_ema": weights, "step": 3}, folder / "net_00000003.pth")
    (folder / "net_state.json").write_text(json.dumps({"latest_checkpoint": "net_00000003.pth"}))
    return folder / "net.safetensors"


@pytest.mark.parametrize("model", [UNET, TRANSFORMER], ids=["image_v1", "image_transformer_v1"])
def test_the_command_line_fits_calibrates_and_samples_every_kind_of_file(tmp_path, model, capsys):
    from tdpm_ext.cli import main

    file, prior = checkpoint(tmp_path, model), tmp_path / "prior.safetensors"
    common = ["--device", "cpu", "--cond-scale", "2"]
    assert main(["fit", str(file), "--kind", "gaussian", "-o", str(prior), *common]) == 0
    if model is UNET:  # once is enough for a step that takes ten seconds
        options = ["--budgets", "2", "--samples", "4", *common]
        assert main(["calibrate", str(prior), "--checkpoint", str(file), *options]) == 0
    sheets = []
    for source in (file, tmp_path / "net_00000003.pth", tmp_path / "net_state.json"):
        out = tmp_path / f"{source.stem}-{source.suffix[1:]}.png"
        seeds = ["--class", "0-2", "--seeds", "0-1", "--steps", "2", "--out", str(out)]
        assert main(["sample", str(source), "--prior", str(prior), *seeds, *common]) == 0
        sheets.append(out.read_bytes())
    assert sheets[0] == sheets[1] == sheets[2]
    assert capsys.readouterr().out.count("6 pictures, tdpm, 2 evaluations") == 3
