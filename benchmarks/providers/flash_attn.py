"""FlashAttention, of the package flash-attn."""

from __future__ import annotations

from . import Provider, Unavailable, library
from ._limits import bottom_right, sixteen_bits

NAMES = ("flash_attn",)


def load(device):
    if device != "cuda":
        raise Unavailable("needs CUDA: flash-attn is CUDA code")
    flash, version = library("flash_attn", "flash-attn")

    def attention(q, k, v, *, causal=False, align="bottom_right", window=None, scale=None):
        near = (-1, -1) if window is None else (window - 1, 0 if causal else window - 1)
        # (B, T, H, D), as views
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = flash.flash_attn_func(
            q, k, v, softmax_scale=scale, causal=causal, window_size=near
        )  # fmt: skip
        return o.transpose(1, 2)

    note = "its layout is (B, T, H, D): it is given and gives transposed views"
    return [Provider("flash_attn", version, {"attention": attention}, _limits, note)]


def _limits(op, case, dtype, direction):
    return sixteen_bits(dtype) or bottom_right(op, case)
