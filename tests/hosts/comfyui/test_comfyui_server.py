"""The real server over its own interface: the nodes are offered, jobs complete, repeat and stop."""

import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tdpm_ext.hosts
from tdpm_ext.cli import main

NODE = Path(tdpm_ext.hosts.__file__).parent / "comfyui_node"


@pytest.fixture(scope="module")
def server(serving, tmp_path_factory):
    """The extension twice: installed by our command, and linked; both may be there."""
    base = tmp_path_factory.mktemp("base")
    (base / "custom_nodes").mkdir()
    assert main(["install", "comfyui", "--path", str(base)]) == 0
    (base / "custom_nodes" / "linked").symlink_to(NODE, target_is_directory=True)
    shutil.copy(Path(__file__).parent / "tiny_model.py", base / "custom_nodes" / "tiny_model.py")
    with serving.Server(Path(os.environ["COMFYUI"]), base) as server:
        yield server


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def job(prefix, steps=4, sampler="tdpm", seed=5):
    conds = {"positive": ["model", 1], "negative": ["model", 2]}
    options = {"seed": seed, "steps": steps, "cfg": 3.0, "sampler_name": sampler, "scheduler": "normal", "denoise": 1.0}
    return {
        "model": node("TinyModel", seed=0),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        "sampled": node("KSampler", model=["model", 0], latent_image=["latent", 0], **conds, **options),
        "saved": node("SaveLatent", samples=["sampled", 0], filename_prefix=prefix),
    }


def latents(server, prefix):
    (file,) = (server.base / "output").glob(f"{prefix}_*.latent")
    return load_file(file)["latent_tensor"]


def status(entry):
    return entry["status"]["status_str"]


def test_the_name_and_the_nodes_are_offered(server):
    names = server.get("/object_info/KSampler")["KSampler"]["input"]["required"]["sampler_name"][0]
    assert names.count("tdpm") == 1
    for kind, title in {"LoadTDPMPrior": "Load TDPM Prior", "TDPMScheduler": "TDPM Scheduler"}.items():
        info = server.get(f"/object_info/{kind}")[kind]
        assert info["display_name"] == title and info["description"]
        assert info["python_module"] in ("custom_nodes.comfyui-tdpm", "custom_nodes.linked")
    assert "IMPORT FAILED" not in "".join(line for line in server.log().splitlines() if "custom_nodes" in line)


def test_a_job_without_a_prior_completes_and_says_why(server):
    assert status(server.wait(server.queue(job("plain")))) == "success"
    assert "tdpm: prior not used: models/tdpm holds no prior for this model at 4x8x8" in server.log()
    assert bool(latents(server, "plain").isfinite().all())


def test_a_prior_is_fitted_found_and_used_and_a_repeat_is_the_same(server):
    conds = {"positive": ["model", 1], "negative": ["model", 2], "latent_image": ["latent", 0]}
    options = {"cfg": 3.0, "draws": 32, "calibrate_steps": "", "fit_seed": 0, "batch": 16, "name": "tiny"}
    fit = {name: job("x")[name] for name in ("model", "latent")}
    fit["fitted"] = node("FitTDPMPrior", model=["model", 0], **conds, **options, kind="gaussian")
    entry = server.wait(server.queue(fit))
    assert status(entry) == "success"
    assert entry["outputs"]["fitted"]["text"][0].startswith("tiny.safetensors: sigma_trunc")
    assert (server.base / "models" / "tdpm" / "tiny.safetensors").is_file()
    files = server.get("/object_info/LoadTDPMPrior")["LoadTDPMPrior"]["input"]["required"]["prior_name"][0]
    assert files == ["automatic", "tiny.safetensors"]
    for prefix in ("first", "second"):
        server.post("/free", {"unload_models": True, "free_memory": True})  # nothing is remembered
        time.sleep(1)
        assert status(server.wait(server.queue(job(prefix, seed=6)))) == "success"
    assert server.log().count("tdpm: prior used") == 2
    assert torch.equal(latents(server, "first"), latents(server, "second"))


def test_interruption_stops_a_job_and_the_next_one_runs(server):
    prompt_id = server.queue(job("long", steps=900, seed=7))
    until = time.monotonic() + 120
    while "/900" not in server.log():
        assert time.monotonic() < until, server.log()[-2000:]
        time.sleep(0.2)
    server.post("/interrupt", {})
    entry = server.wait(prompt_id)
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    assert not list((server.base / "output").glob("long_*"))
    assert status(server.wait(server.queue(job("after", seed=8)))) == "success"


def test_a_name_that_would_leave_the_folder_is_refused_in_words(server):
    conds = {"positive": ["model", 1], "negative": ["model", 2], "latent_image": ["latent", 0]}
    options = {"cfg": 3.0, "draws": 16, "calibrate_steps": "", "fit_seed": 0, "batch": 16, "name": "../../evil"}
    fit = {name: job("x")[name] for name in ("model", "latent")}
    fit["fitted"] = node("FitTDPMPrior", model=["model", 0], **conds, **options)
    entry = server.wait(server.queue(fit))
    assert status(entry) == "error" and "give a plain file name" in json.dumps(entry["status"])


def test_a_file_outside_of_the_list_is_refused(server):
    load = {"model": node("TinyModel", seed=0)}
    load["prior"] = node("LoadTDPMPrior", model=["model", 0], prior_name="../checkpoints/x.safetensors")
    load |= {name: job("no")[name] for name in ("latent", "sampled", "saved")}
    load["sampled"]["inputs"]["model"] = ["prior", 0]
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.queue(load)
    assert "not in list" in caught.value.read().decode()


def test_the_example_workflows_are_offered_and_know_every_node(server):
    offered = server.get("/api/workflow_templates")["comfyui-tdpm"]
    assert sorted(offered) == ["tdpm_fit_prior", "tdpm_txt2img"]
    known = server.get("/object_info")
    for name in offered:
        workflow = server.get(f"/api/workflow_templates/comfyui-tdpm/{urllib.parse.quote(name)}.json")
        for each in workflow["nodes"]:
            assert each["type"] in known or each["type"] == "MarkdownNote"
