"""Make the ``tdpm`` sampler visible in somebody else's program, and take it away again.

One file per host; a host's own modules are imported only when it is installed into. Everything done is undone by
the handle that ``install`` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

_HOSTS = {  # name: the module with an ``install()``
    "a1111": "tdpm_ext.hosts.a1111",
    "comfyui": "tdpm_ext.hosts.comfyui",
    "k_diffusion": "tdpm_ext.hosts.k_diffusion",
}


class Handle:
    """What ``install`` did to one host. ``undo()`` takes it back, once; also usable as a context manager."""

    def __init__(self, host: str, undo: Callable[[], None] | None = None):
        self.host = host
        self._undo = undo

    @property
    def active(self) -> bool:
        """True while this handle has something to take back."""
        return self._undo is not None

    def undo(self) -> None:
        """Put the host back as it was before the ``install`` that returned this handle. More calls do nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Handle({self.host!r}, active={self.active})"


def list_hosts() -> list[str]:
    """Names that ``install`` takes."""
    return sorted(_HOSTS)


def install(host: str) -> Handle:
    """Add the ``tdpm`` sampler to a host; ``install("k_diffusion")`` gives ``k_diffusion.sampling.sample_tdpm``.

    Installing twice is harmless: the second handle has nothing to undo, the first one undoes all.

    Raises:
        ValueError: unknown host. ImportError: the host is missing or cannot be imported; the message says what to do.
    """
    if host not in _HOSTS:
        raise ValueError(f"unknown host {host!r}: known hosts are {', '.join(list_hosts())}")
    return import_module(_HOSTS[host]).install()
