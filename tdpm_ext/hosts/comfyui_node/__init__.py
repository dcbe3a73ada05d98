"""TDPM for ComfyUI: this folder belongs into ``custom_nodes``; the work is done by the package ``tdpm_ext``.

`tdpm install comfyui --path DIR` copies it there, `tdpm uninstall comfyui --path DIR` takes it away.
"""

import sys

try:
    from tdpm_ext.hosts.comfyui import install
    from tdpm_ext.hosts.comfyui_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "tdpm_ext":
        raise
    reason = f"the Python that runs ComfyUI has no tdpm-ext: {sys.executable} -m pip install tdpm-ext"
    raise ImportError(reason) from error

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

install()
