"""xformers: whether it can be used, asked of its operators, and attention through it.

That it is installed says nothing, nor that it imports: built for another torch it imports with a warning, and some of
its operators are torch's own under another name. So its operators are listed, and on a GPU one of them is called.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import torch

ALIGN = 8  # elements to which xformers wants the rows of an added mask aligned


def why_not() -> str:
    """Why xformers cannot be used here, in words; "" if it can."""
    # A broken installation raises anything, from ImportError to OSError; whatever it is, it is the reason.
    try:
        fmha = _fmha()
        built = [op.NAME for op in fmha.ALL_FW_OPS if op.is_available()]
        if not built:
            return "none of its attention operators was built for this torch; see python -m xformers.info"
        if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
            _call(fmha)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return ""


def _fmha() -> ModuleType:
    return importlib.import_module("xformers.ops.fmha")


def _call(fmha: ModuleType) -> None:
    one = torch.zeros(1, 1, 1, 64, dtype=torch.float16, device="cuda")
    fmha.memory_efficient_attention_forward(one, one, one)
    torch.cuda.synchronize()  # a kernel for another GPU fails only here


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``softmax(scale * q k^T + mask) v`` by xformers; arguments and result as of `reference.attention`.

    Raises:
        NotImplementedError: none of its operators can do the call; the message, xformers' own, has every reason.
    """
    bias = None if mask is None else _bias(mask, q, k.shape[2])
    # xformers has the heads after the sequence
    out = _fmha().memory_efficient_attention_forward(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_bias=bias, scale=scale
    )
    out = out.transpose(1, 2)
    if bias is not None:
        nothing = (bias == -math.inf).all(-1, keepdim=True)
        out = out.masked_fill(nothing, 0.0)
    return out


def _bias(mask: torch.Tensor, q: torch.Tensor, keys: int) -> torch.Tensor:
    """``mask`` as xformers takes it: added, in q's dtype, of full size, rows aligned."""
    storage = q.new_zeros(*q.shape[:3], -(-keys // ALIGN) * ALIGN)
    bias = storage[..., :keys]
    if mask.dtype == torch.bool:
        return bias.masked_fill_(~mask, -math.inf)
    return bias.copy_(mask)
