"""k-diffusion's image transformers, version 1 and 2: norms in one pass, their projections of the noise level kept."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from tdpm_ext.kernels.caches import Projections, projected
from tdpm_ext.kernels.family import Family, Rule, may_run, network, ordinary


def ada_rms_norm(self, x, cond):
    """``AdaRMSNorm``: scale looked up, root mean square taken by torch's fused operation."""
    if x.dtype.itemsize < 4 or not may_run(x):
        return ordinary(self, x, cond)
    scale = projected(self, "linear", cond, _project)
    y = F.rms_norm(x, x.shape[-1:], None, self.eps)
    return y * (scale + 1).view(len(scale), *[1] * (x.ndim - 2), -1)


def _project(norm: nn.Module, cond: Tensor) -> Tensor:
    return norm.linear(cond).flatten(1)


def prepare(root: nn.Module, replace: Callable) -> None:
    """One table for the scales of all norms."""
    patched = [m for m in root.modules() if "forward" in vars(m) and m is not root]
    norms = [m for m in patched if isinstance(m.linear, nn.Linear)]
    root._tdpm_caches = (Projections(norms, "linear", _project),)


def _family(version: int) -> Family:
    root = f"ImageTransformerDenoiserModelV{version}"
    rules = (
        Rule("AdaRMSNorm", ("x", "cond"), ada_rms_norm, "norm in one pass, scale remembered"),
        Rule(root, None, network, "projections of sigma and class remembered"),
    )
    title = f"k-diffusion image_transformer_v{version}"
    return Family(title, root, rules, prepare, body=lambda root: root, narrow=lambda root: [])


FAMILIES = (_family(1), _family(2))
