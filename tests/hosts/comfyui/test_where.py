"""Which ComfyUI the tests in this folder run; without one they are left out, and this is where that is said."""

import os
from pathlib import Path

import pytest


@pytest.mark.skipif("COMFYUI" not in os.environ, reason="ComfyUI's tests: `make test-hosts` fetches it and runs them")
def test_comfyui_is_where_it_is_said_to_be():
    folder = Path(os.environ["COMFYUI"])
    assert (folder / "main.py").is_file() and (folder / "comfy" / "samplers.py").is_file()
