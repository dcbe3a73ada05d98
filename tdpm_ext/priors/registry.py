"""Names of prior kinds. A kind registers its class; files and the command line find it by name."""

from __future__ import annotations

import re
from collections.abc import Callable

_KINDS: dict[str, type] = {}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def register_prior(name: str) -> Callable[[type], type]:
    """Class decorator: make a prior kind known as ``name`` and set its ``kind``.

    Args:
        name: lower-case letters, digits and underscores, starting with a letter, at most 64.

    Raises:
        ValueError: the name is malformed or another class holds it.
        TypeError: what is decorated is not a class.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"prior name {name!r}: use lower-case letters, digits and underscores, a letter first")

    def register(cls: type) -> type:
        if not isinstance(cls, type):
            raise TypeError(f"@register_prior({name!r}) decorates a class, not {cls!r}")
        if name in _KINDS:
            raise ValueError(f"prior name {name!r} is taken by {_KINDS[name].__qualname__}: choose another")
        cls.kind = name
        _KINDS[name] = cls
        return cls

    return register


def unregister_prior(name: str) -> type:
    """Forget a kind and return its class. Raises ``ValueError`` when no such kind is registered."""
    cls = get_prior(name)
    del _KINDS[name]
    return cls


def get_prior(name: str) -> type:
    """The class registered as ``name``. Raises ``ValueError`` listing the known names."""
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(f"no prior kind {name!r}: known are {', '.join(list_priors()) or '(none)'}")
    return _KINDS[name]


def list_priors() -> list[str]:
    """Registered names, sorted."""
    return sorted(_KINDS)
