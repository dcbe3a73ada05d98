"""TDPM for A1111's web UI, Forge and reForge: this folder belongs into ``extensions``.

The work is done by the package ``tdpm_ext``. `tdpm install a1111 --path DIR` copies the folder there,
`tdpm uninstall a1111 --path DIR` takes it away.
"""

import sys

import gradio as gr
from modules import script_callbacks, scripts
from modules.processing import process_images

try:
    from tdpm_ext.hosts import a1111, a1111_fit
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "tdpm_ext":
        raise
    reason = f"the Python that runs the web UI has no tdpm-ext: {sys.executable} -m pip install tdpm-ext"
    raise ImportError(reason) from error

handle = a1111.install()
script_callbacks.on_script_unloaded(handle.undo)


class Script(scripts.Script):
    """Below the picture's settings, under Script: fit a prior with the prompt, guidance and size that are set."""

    def title(self):
        return "Fit TDPM prior"

    def show(self, is_img2img):
        return not is_img2img

    def ui(self, is_img2img):
        name = gr.Textbox(label="Name of the prior, in models/tdpm", value="prior")
        draws = gr.Slider(label="Pictures to draw", minimum=64, maximum=4096, step=64, value=1024)
        return [name, draws]

    def run(self, p, name, draws):
        setattr(p, a1111_fit.REQUEST, a1111_fit.request(name, draws))
        p.sampler_name, p.n_iter = a1111.NAME, 1
        return process_images(p)
