"""ComfyUI's own page in headless Chromium: the example workflows load, are run with the Run button, and complete.

The checkpoint is a file of the shape ComfyUI's loader wants, with random weights. TDPM_SCREENSHOTS=FOLDER keeps the
picture that the README shows.
"""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from tdpm_ext.cli import main

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"  # the name in the example workflows
READY = "window.app?.graph && document.querySelector('[data-testid=queue-button]') && LiteGraph.registered_node_types"
RUN = "[...document.querySelectorAll('button')].find(e => e.ariaLabel === 'Run').click()"


@pytest.fixture(scope="module")
def server(comfy, serving, module_here, tmp_path_factory):
    if serving.CHROMIUM is None:
        pytest.skip("THE PAGE WAS NOT TESTED: it needs Chromium (Debian: apt-get install chromium)")
    base = tmp_path_factory.mktemp("base")
    for name in ("custom_nodes", "models/checkpoints", "user/default"):
        (base / name).mkdir(parents=True)
    module_here("small_checkpoint").write(base / "models" / "checkpoints" / CHECKPOINT)
    settings = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
    (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(settings))
    assert main(["install", "comfyui", "--path", str(base)]) == 0
    with serving.Server(Path(os.environ["COMFYUI"]), base) as server:
        yield server
    (base / "models" / "checkpoints" / CHECKPOINT).unlink()  # pytest keeps its folders, and this is 400 MB


async def load(page, name, widgets):
    """Open an example workflow as the templates browser does, and set widgets as a user would."""
    url = f"/api/workflow_templates/comfyui-tdpm/{name}.json"
    await page.run(f"fetch('{url}').then(r => r.json()).then(g => app.loadGraphData(g)).then(() => null)")
    unknown = "app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
    assert await page.run(f"{unknown}.filter(t => t !== 'MarkdownNote')") == []
    for kind, values in widgets.items():
        for widget, value in values.items():
            found = f"app.graph._nodes.find(n => n.type === '{kind}').widgets.find(w => w.name === '{widget}')"
            await page.run(f"{found}.value = {json.dumps(value)}")
    shown = await page.run("document.body.innerText")
    assert "Missing" not in shown and "missing" not in shown, shown


async def run_it(page, server, jobs):
    """Press Run; the history entry of the job once it is over."""
    await page.run(RUN)
    until = time.monotonic() + 300
    while len(history := server.get("/history")) < jobs:
        assert time.monotonic() < until, server.log()[-3000:]
        await asyncio.sleep(0.5)
    entry = list(history.values())[-1]
    assert entry["status"]["status_str"] == "success", entry["status"]
    return entry


def test_the_example_workflows_run_from_the_page(server, serving, tmp_path):
    small = {"EmptyLatentImage": {"width": 64, "height": 64}}

    async def visit():
        async with serving.Browser(tmp_path / "profile", 1600, 1000) as page:
            await page.open(server.url)
            await page.until(READY)
            names = "LiteGraph.createNode('KSampler').widgets.find(w => w.name === 'sampler_name').options.values"
            assert "tdpm" in await page.run(names)
            quick = {"FitTDPMPrior": {"draws": 16, "calibrate_steps": "", "kind": "gaussian", "name": "sd15-64"}}
            await load(page, "tdpm_fit_prior", small | quick)
            await run_it(page, server, 1)
            await load(page, "tdpm_txt2img", small)
            entry = await run_it(page, server, 2)
            (image,) = next(output["images"] for output in entry["outputs"].values() if "images" in output)
            drawn = "app.graph._nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.complete"
            assert await page.until(drawn)
            await page.run("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
            await asyncio.sleep(3)
            await page.picture(tmp_path / "comfyui.png")
            assert page.errors == []
            return image

    image = asyncio.run(visit())
    assert (server.base / "output" / image["filename"]).is_file()
    assert (server.base / "models" / "tdpm" / "sd15-64.safetensors").is_file()
    assert "tdpm: sd15-64.safetensors is the only prior for this model at 4x8x8" in server.log()
    assert "tdpm: prior used" in server.log()
    picture = (tmp_path / "comfyui.png").read_bytes()
    assert len(picture) > 20_000
    if "TDPM_SCREENSHOTS" in os.environ:
        Path(os.environ["TDPM_SCREENSHOTS"], "comfyui.png").write_bytes(picture)
