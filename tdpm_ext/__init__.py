"""Truncated diffusion for k-diffusion and its hosts: a prior, a few steps, the same checkpoint."""

from tdpm_ext.calibrate import calibrate
from tdpm_ext.checkpoints import open_checkpoint
from tdpm_ext.fit import fit_prior
from tdpm_ext.ideal import IdealDenoiser
from tdpm_ext.plan import Plan
from tdpm_ext.priors import ImplicitPrior, get_prior, list_priors, load_prior, register_prior, save_prior
from tdpm_ext.sampler import sample, sample_tdpm, use_prior
from tdpm_ext.trajectory import Trajectory

__version__ = "0.1.0"

__all__ = [
    "IdealDenoiser",
    "ImplicitPrior",
    "Plan",
    "Trajectory",
    "__version__",
    "calibrate",
    "fit_prior",
    "get_prior",
    "install",
    "list_priors",
    "load_prior",
    "open_checkpoint",
    "register_prior",
    "sample",
    "sample_tdpm",
    "save_prior",
    "use_prior",
]


def install(host: str):
    """Make ``tdpm`` a sampler of ``host`` (such as "k_diffusion"); returns a handle whose ``undo()`` takes it back."""
    from tdpm_ext.hosts import install as install_host

    return install_host(host)


def __getattr__(name: str):
    if name == "kernels":  # on first use: most users need neither its import nor what it looks for
        from importlib import import_module

        return import_module("tdpm_ext.kernels")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
