"""JAX: what XLA makes of its functions, compiled for each shape."""

from __future__ import annotations

import functools
import inspect

import torch

from . import Provider, Unavailable, library
from ._limits import forward_only, top_left

NAMES = ("jax",)
_NOTE = (
    "tensors cross by DLPack, and each call waits for its result, both counted; XLA takes threads "
    "of its own; attention in JAX's layout (B, T, H, D), transposed inside the compiled function"
)


def load(device):
    if device == "cuda":
        # asking it would also make it reserve most of the GPU's memory
        raise Unavailable("launches on a stream of its own, which events and graphs do not see")
    jax, version = library("jax", "jax")
    ops = {fn.__name__: _crossing(jax, fn) for fn in _functions(jax)}
    return [Provider("jax", version, ops, _limits, _NOTE)]


def _limits(op, case, dtype, direction):
    return forward_only(direction) or (top_left(op, case) if op.name == "attention" else None)


def _functions(jax):
    jnp = jax.numpy

    def layer_norm(x, w, b, eps=1e-5):
        # statistics in float32, as flax has them
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        r = jax.lax.rsqrt(jnp.square(x32 - mean).mean(-1, keepdims=True) + eps)
        return ((x32 - mean) * r * w + b).astype(x.dtype)

    def ffn(x, w1, b1, w2, b2, activation="gelu_tanh"):
        z = x @ w1 + b1
        a = jax.nn.relu(z) if activation == "relu" else jax.nn.gelu(z, activation == "gelu_tanh")
        return a @ w2 + b2

    def attention(q, k, v, *, causal=False, align="bottom_right", window=None, scale=None):
        near = None if window is None else (window - 1, 0 if causal else window - 1)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        o = jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, local_window_size=near, scale=scale
        )  # fmt: skip
        return o.swapaxes(1, 2)

    return layer_norm, ffn, attention


def _crossing(jax, fn):
    """fn, compiled, from torch tensors to torch tensors."""
    options = [
        p.name for p in inspect.signature(fn).parameters.values() if p.default is not p.empty
    ]
    jitted = jax.jit(fn, static_argnames=options)

    @functools.wraps(fn)
    def call(*tensors, **options):
        arrays = (jax.dlpack.from_dlpack(t.detach().contiguous()) for t in tensors)
        return torch.from_dlpack(jax.block_until_ready(jitted(*arrays, **options)))

    return call
