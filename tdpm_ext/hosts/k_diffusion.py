"""k-diffusion itself: ``k_diffusion.sampling.sample_tdpm``, found by name as its own samplers are.

The sampler function itself is put there, not a wrapper, so that programs which read its signature see every option.
"""

from __future__ import annotations

import logging

from tdpm_ext.hosts import Handle
from tdpm_ext.optional import import_k_diffusion

log = logging.getLogger(__name__)
NAME = "sample_tdpm"


def install() -> Handle:
    """Set ``k_diffusion.sampling.sample_tdpm``. What had that name before comes back on ``undo``."""
    from tdpm_ext.sampler import sample_tdpm

    module = import_k_diffusion().sampling
    absent = object()
    before = vars(module).get(NAME, absent)
    if before is sample_tdpm:
        return Handle("k_diffusion")

    def undo() -> None:
        if vars(module).get(NAME, absent) is not sample_tdpm:
            log.warning("k_diffusion.sampling.%s was replaced after install; it is left as it is", NAME)
        elif before is absent:
            delattr(module, NAME)
        else:
            setattr(module, NAME, before)

    setattr(module, NAME, sample_tdpm)
    return Handle("k_diffusion", undo)
