"""The reference's time beside torch's float64, one shape an op: `python -m tests.proof --speed`."""

from __future__ import annotations

import statistics
import time

import numpy as np
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.op import Case

from . import independent
from .adversarial import NEEDED
from .points import point

_ADAMW = dict(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
SHAPES = {
    "linear": dict(M=256, K=768, N=768),
    "embedding": dict(B=4, T=256, V=5000, P=256, C=768),
    "layer_norm": dict(M=1024, N=768),
    "residual_layer_norm": dict(M=1024, N=768),
    "attention": dict(B=1, H=12, Hkv=12, Tq=256, Tk=256, D=64),
    "paged_attention": dict(B=4, H=12, Hkv=12, Tq=1, D=64, P=64, page=16, pages=16),
    "ffn": dict(M=128, C=768, F=3072),
    "cross_entropy": dict(M=64, V=50257),
    "linear_cross_entropy": dict(M=64, C=256, V=10000),
    "dropout": dict(M=512, N=768, p=0.1, seed=1),
    "adamw": dict(M=1024, N=768, step=10, **_ADAMW),
    "adam": dict(M=1024, N=768, step=10, **_ADAMW),
    "sample": dict(M=8, V=50257, top_k=50, top_p=0.9),
    "additive_attention": dict(B=2, Tq=32, Tk=64, C=128, K=128, D=128, A=128),
}
_ROUNDS = 7


def ratio(op):
    """Reference over torch, forward and backward together, medians of turns taken in turn."""
    p = point(CATALOG[op], Case("speed", values=NEEDED.get(op), **SHAPES[op]))
    ours, theirs = [], []
    for _ in range(_ROUNDS):
        for times, call in ((ours, p.both), (theirs, lambda: independent.run_torch(p))):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    ours, theirs = (statistics.median(t[1:]) for t in (ours, theirs))
    return {"ms": 1e3 * ours, "torch_ms": 1e3 * theirs, "ratio": ours / theirs}


def shape_words(op):
    dims = {k: v for k, v in SHAPES[op].items() if isinstance(v, (int, np.integer)) and k.isalpha()}
    return " ".join(f"{k}={v}" for k, v in dims.items() if k not in ("step", "seed"))
