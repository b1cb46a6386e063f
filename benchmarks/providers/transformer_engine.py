"""NVIDIA's Transformer Engine, without its eight-bit recipes."""

from __future__ import annotations

import functools

import torch

from . import Provider, Unavailable, library
from ._limits import bottom_right, sixteen_bits

NAMES = ("transformer_engine",)


def load(device):
    if device != "cuda":
        raise Unavailable("needs CUDA: transformer-engine is CUDA code")
    te, version = library("transformer_engine.pytorch", "transformer-engine")
    # modules hold weights of their own: one for each setting, and the op's tensors in their place
    norm_of = functools.cache(te.LayerNorm)
    attention_of = functools.cache(te.DotProductAttention)

    def layer_norm(x, w, b, eps=1e-5):
        norm = norm_of(x.shape[-1], eps=eps, dtype=x.dtype)
        return torch.func.functional_call(norm, {"weight": w, "bias": b}, (x,))

    def attention(q, k, v, *, causal=False, align="bottom_right", window=None, scale=None):
        _, H, _, D = q.shape
        module = attention_of(
            H, D, num_gqa_groups=k.shape[1], attention_dropout=0.0, qkv_format="bshd",
            attn_mask_type="causal_bottom_right" if causal else "no_mask", softmax_scale=scale,
            window_size=None if window is None else (window - 1, 0 if causal else window - 1),
        )  # fmt: skip
        # (B, T, H, D), as views; its heads come back joined
        o = module(*(x.transpose(1, 2) for x in (q, k, v)))
        return o.unflatten(-1, (H, D)).transpose(1, 2)

    ops = {"layer_norm": layer_norm, "attention": attention}
    note = "in its layout (B, T, H, D), as transposed views; the backend of attention is its choice"
    return [Provider("transformer_engine", version, ops, _limits, note)]


def _limits(op, case, dtype, direction):
    if op.name != "attention":
        return None
    return sixteen_bits(dtype) or bottom_right(op, case)
