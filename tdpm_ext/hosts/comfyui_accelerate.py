"""``accelerate`` on a ComfyUI MODEL: while that MODEL runs, and not a moment longer.

All clones of a MODEL share one network, and a user may sample with an accelerated and a plain one in one workflow. So
the network is changed when a run begins and changed back when it ends; other MODELs give the bits they always gave.
CUDA graphs stay off: ComfyUI hands the network options (ids, functions) that a graph cannot be keyed by.
"""

from __future__ import annotations

import logging

log = logging.getLogger("tdpm_ext")
KEY = "tdpm_accelerate"


class Acceleration:
    """What ComfyUI calls before and after every run of the MODEL it is attached to."""

    def __init__(self, precision: str):
        self.precision, self.handle, self.told = precision, None, False

    def begin(self, patcher) -> None:
        """Weights are loaded and LoRAs merged by now."""
        from tdpm_ext.kernels import accelerate

        level = log.level
        try:
            log.setLevel(max(log.getEffectiveLevel(), logging.WARNING) if self.told else level)  # one report is enough
            self.handle = accelerate(patcher.model, graphs="off", precision=self.precision)
        finally:
            log.setLevel(level)
        self.told = True

    def end(self, patcher) -> None:
        """Also called after an error or an interruption."""
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.undo()


def accelerated(model, precision: str):
    """A clone of the MODEL that runs accelerated; the original stays as it is."""
    from comfy.patcher_extension import CallbacksMP

    model, hook = model.clone(), Acceleration(precision)
    for kind in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP):
        model.remove_callbacks_with_key(kind, KEY)  # accelerating twice is accelerating once, with the later options
    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, hook.begin)
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, hook.end)
    return model
