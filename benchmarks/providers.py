"""Who is timed: for each op, the implementations that can run on a device.

A provider is a function with the op's public signature. "reference" is NumPy and is timed on a CPU
only; "gaugeblock" is the Triton kernel and needs a GPU.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from gaugeblock.reference.catalog import CATALOG

from gaugeblock import kernels, reference


def _attention(q, k, v, *, causal=False, scale=None):
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError("torch_sdpa: causal must have Tq = Tk; it aligns top-left")
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def _ffn(x, w1, b1, w2, b2, activation="gelu_tanh"):
    z = F.linear(x, w1.t(), b1)
    a = F.relu(z) if activation == "relu" else F.gelu(z, approximate=activation[5:] or "none")
    return F.linear(a, w2.t(), b2)


# what a user of plain torch would call
_TORCH = {
    "embedding": ("torch", lambda t, wte, wpe: F.embedding(t, wte) + wpe[: t.shape[1]]),
    "linear": ("torch", lambda x, w, b: F.linear(x, w.t(), b)),
    "layer_norm": ("torch", lambda x, w, b, eps=1e-5: F.layer_norm(x, x.shape[-1:], w, b, eps)),
    "attention": ("torch_sdpa", _attention),
    "ffn": ("torch", _ffn),
    "cross_entropy": ("torch", F.cross_entropy),
}


def providers(op, device):
    """{name: function} of the op's implementations on "cpu" or "cuda"."""
    found = dict([_TORCH[op]]) if op in _TORCH else {}
    if CATALOG[op].kernel is None:
        kernel = getattr(kernels, op)
        found["eager"] = functools.partial(kernel, impl="eager")
        if device == "cuda":
            found["gaugeblock"] = functools.partial(kernel, impl="triton")
    if device == "cpu":
        found["reference"] = getattr(reference, op)
    return found


def bench_cases(op, device):
    """The cases that are timed on a device."""
    wanted = {"bench", "cpu"} if device == "cpu" else {"bench"}
    return [
        case
        for case in CATALOG[op].cases
        if wanted <= case.tags and ("cpu" in case.tags) == (device == "cpu")
    ]


def torch_inputs(op, case, dtype, device):
    """Inputs of a case as leaf tensors."""
    row = CATALOG[op]
    drawn = row.draw(case, np.random.default_rng(0))
    tensors = []
    for name, x in drawn.items():
        if x is None:
            tensors.append(None)
            continue
        t = torch.from_numpy(x).to(device)
        t = t.to(dtype) if name in row.floating() else t
        tensors.append(t.requires_grad_(name in row.differentiable()))
    return tensors
