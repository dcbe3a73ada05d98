"""Import optional packages with an error that says what to install."""

from __future__ import annotations

import warnings
from importlib import import_module, metadata
from types import ModuleType


def import_k_diffusion() -> ModuleType:
    """Return the ``k_diffusion`` package.

    Raises:
        ImportError: k-diffusion is missing, or is installed and cannot be imported; the message says how to mend it.
    """
    try:
        with warnings.catch_warnings():  # of its dependency clip, and nothing a user could act on
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
            return import_module("k_diffusion")
    except ImportError as error:
        raise ImportError(k_diffusion_advice(error)) from error


def k_diffusion_advice(error: ImportError) -> str:
    """Say in words why ``import k_diffusion`` raised ``error`` and what to do."""
    if error.name == "k_diffusion":
        return "k-diffusion is not installed: pip install 'tdpm-ext[kdiffusion]'"
    if "pkg_resources" in f"{error.name} {error}":
        try:
            version = metadata.version("setuptools")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        return (
            "k-diffusion is installed, but its dependency clip needs pkg_resources, which setuptools "
            f"{version} does not provide: pip install 'setuptools>=77.0.3,<82' (tdpm-ext[kdiffusion] pins it)"
        )
    return (
        f"k-diffusion is installed, but cannot be imported ({type(error).__name__}: {error}): "
        "pip install 'tdpm-ext[kdiffusion]' brings the versions it works with"
    )
