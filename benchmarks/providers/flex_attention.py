"""torch's FlexAttention, compiled, with a block mask that skips what no query sees."""

from __future__ import annotations

import functools

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from . import Provider, everything
from ._compile import compiled, expect_compiler
from ._limits import forward_only

NAMES = ("flex_attention",)


def load(device):
    expect_compiler(device)
    flex = compiled(flex_attention)

    def attention(
        q, k, v, *, causal=False, align="bottom_right", window=None, cu_seqlens=None,
        scale=None, return_lse=False,
    ):  # fmt: skip
        if not torch.is_grad_enabled():
            # on a CPU it refuses what requires a gradient, whether one is wanted or not
            q, k, v = q.detach(), k.detach(), v.detach()
        Tq, Tk = q.shape[2], k.shape[2]
        shift = Tk - Tq if align == "bottom_right" else 0
        version = None if cu_seqlens is None else cu_seqlens._version
        found = flex(
            q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
            block_mask=_block_mask(Tq, Tk, causal, shift, window, cu_seqlens, version, q.device),
            return_aux=AuxRequest(lse=True) if return_lse else None,
        )  # fmt: skip
        return (found[0], found[1].lse) if return_lse else found

    limits = _cpu_limits if device == "cpu" else everything
    note = "compiled for each shape; the block mask is built beforehand and is not timed"
    return [
        Provider(
            "flex_attention", torch.__version__, {"attention": attention}, limits, note,
            slow_start=device == "cpu",
        )
    ]  # fmt: skip


def _cpu_limits(op, case, dtype, direction):
    if op.options(case).get("return_lse"):
        return "has no lse on a CPU"
    return forward_only(direction)


# by the tensor itself and the number of writes to it: to look at its values would wait for them
@functools.lru_cache(maxsize=64)
def _block_mask(Tq, Tk, causal, shift, window, cu_seqlens, version, device):
    """The mask of a shape, None where every query sees every key."""
    if not causal and window is None and cu_seqlens is None:
        return None
    if cu_seqlens is not None:
        tokens = torch.arange(Tk, device=device)
        document = torch.searchsorted(cu_seqlens.long(), tokens, right=True)

    def visible(b, h, i, j):
        seen = j <= i + shift if causal else j >= 0
        if window is not None:
            seen = seen & (j > i + shift - window) & (j < i + shift + window)
        if cu_seqlens is not None:
            seen = seen & (document[i] == document[j])
        return seen

    return create_block_mask(visible, None, None, Tq, Tk, device=device)
