"""Kernels that make the few remaining steps cheap, installed as ``tdpm_ext.kernels``.

The folder is named ``kernels`` in the source tree, but it is never installed as a top-level package of that name:
another package has that import name. Nothing here may import the rest of ``tdpm_ext``.
"""

__all__: list[str] = []
