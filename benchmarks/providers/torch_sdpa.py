"""scaled_dot_product_attention with each of its backends pinned.

Left to itself torch chooses by version, shape and device.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import Provider
from ._limits import sixteen_bits, top_left

_BACKENDS = {
    "torch_sdpa_math": SDPBackend.MATH,
    "torch_sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "torch_sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch_sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
_ON_A_CPU = ("torch_sdpa_math", "torch_sdpa_flash")
_NARROW_ON_CUDA = ("torch_sdpa_flash", "torch_sdpa_cudnn")
NAMES = tuple(_BACKENDS)


def load(device):
    return [_provider(name, device) for name in (NAMES if device == "cuda" else _ON_A_CPU)]


def _provider(name, device):
    narrow = device == "cuda" and name in _NARROW_ON_CUDA

    def limits(op, case, dtype, direction):
        return (sixteen_bits(dtype) if narrow else None) or top_left(op, case)

    note = f"cuDNN {torch.backends.cudnn.version()}" if name == "torch_sdpa_cudnn" else ""
    ops = {"attention": _pinned(_BACKENDS[name])}
    return Provider(name, torch.__version__, ops, limits, note)


def _pinned(backend):
    @functools.wraps(_attention)
    def attention(*tensors, **options):
        with sdpa_kernel(backend):
            return _attention(*tensors, **options)

    return attention


def _attention(q, k, v, *, causal=False, align="bottom_right", scale=None):
    # top-left, or of equal lengths: `top_left` leaves out the rest
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
