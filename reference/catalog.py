"""The op catalog, one row an op: parity, error tests, compilation and benchmarks follow from it.

Adding an op is a reference module, a kernel module and a row here: CONTRIBUTING.md.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np

from ._attention import _visible_keys
from .oracle.op import Case, Index, Input, Op, Wrong


def _row(name, inputs, cases, **rest):
    """The op whose formula and gradient are `NAME` and `NAME_backward` in `_NAME.py`."""
    module = import_module(f"._{name}", __package__)
    forward, backward = getattr(module, name), getattr(module, f"{name}_backward")
    return Op(
        name,
        lambda *arrays, **options: forward(*arrays, **options)[0],
        inputs,
        cases,
        backward=lambda dy, *arrays, **options: backward(dy, forward(*arrays, **options)[1]),
        **rest,
    )


def _offset_64(x, dims, rng):
    """A residual stream far from zero, where a one-pass variance loses its digits."""
    return x + 64


def _outlier_row(x, dims, rng):
    """One row a thousand times the others."""
    x[-1] *= 1000
    return x


def _constant_rows(x, dims, rng):
    return np.broadcast_to(x[..., :1], x.shape).copy()


def _spread_by_100(x, dims, rng):
    """Values so far apart that exp overflows unless the maximum is subtracted."""
    return x * 100


def _some_ignored(targets, dims, rng):
    targets[::3] = -100
    return targets


def _all_ignored(targets, dims, rng):
    return np.full_like(targets, -100)


def _nan_past_queries(x, dims, rng):
    """NaN in the keys or values that causal top-left masking hides from every query."""
    x[..., dims["Tq"] :, :] = np.nan
    return x


def _repeated_tokens(tokens, dims, rng):
    return tokens % 2


LINEAR = _row(
    "linear",
    {"x": "M K", "w": Input("K N", fan_in="K"), "b": "N"},
    [
        Case("odd", M=5, K=33, N=17),
        Case("one_row", M=1, K=64, N=48),
        Case("cpu_bench", M=512, K=768, N=768, tags=("bench", "cpu")),
    ],
    outputs={"y": "M N"},
    flops=lambda c, direction: 2 * c.M * c.K * c.N * (1 if direction == "fwd" else 2),
    errors=(
        Wrong("w_rows", "w must have shape", shapes={"w": (32, 17)}),
        Wrong("b_length", "b must have shape", shapes={"b": (16,)}),
    ),
    kernel="plain products belong to cuBLAS",
)

EMBEDDING = _row(
    "embedding",
    {"tokens": Index("B T", below="V"), "wte": "V C", "wpe": "P C"},
    [
        Case("odd", B=2, T=7, V=19, P=9, C=13),
        Case("repeated_tokens", B=2, T=11, V=5, P=11, C=8, values={"tokens": _repeated_tokens}),
        Case("cpu_bench", B=8, T=512, V=5003, P=512, C=256, tags=("bench", "cpu")),
    ],
    outputs={"y": "B T C"},
    flops=lambda c, direction: c.B * c.T * c.C * (1 if direction == "fwd" else 2),
    errors=(
        Wrong("id_too_large", "tokens must lie in", values={"tokens": lambda t: t + 19}),
        Wrong("id_negative", "tokens must lie in", values={"tokens": lambda t: t - 19}),
        Wrong("wpe_width", "wpe must have shape", shapes={"wpe": (9, 12)}),
        Wrong(
            "tokens_float",
            "tokens must be integers",
            values={"tokens": lambda t: t / 2},
            raises=TypeError,
        ),
    ),
    kernel="not yet: torch's embedding serves the model",
)

LAYER_NORM = _row(
    "layer_norm",
    {"x": "M N", "w": "N", "b": "N"},
    [
        Case("odd_row", M=5, N=77),
        Case("one_row", M=1, N=64),
        Case("one_column", M=3, N=1, tags=("degenerate",)),
        Case("many_rows", M=67, N=33),
        # more rows than the backward has programs
        Case("rows_over_programs", M=300, N=20),
        Case("one_column_over_a_tile", M=3, N=257),
        Case("offset_64", M=7, N=96, values={"x": _offset_64}),
        Case("outlier_row", M=7, N=40, values={"x": _outlier_row}),
        Case("constant_rows", M=3, N=48, values={"x": _constant_rows}, tags=("degenerate",)),
        Case("eps", M=4, N=20, eps=0.5),
        Case("gpt2_width", M=4096, N=768, tags=("aot", "bench")),
        Case("gpt2_xl_width", M=4096, N=1600, tags=("aot", "bench")),
        Case("cpu_bench", M=1024, N=768, tags=("bench", "cpu")),
    ],
    outputs={"y": "M N"},
    flops=lambda c, direction: c.M * c.N * (8 if direction == "fwd" else 14),
    errors=(
        Wrong("w_length", "w must have shape", shapes={"w": (76,)}),
        Wrong("b_length", "b must have shape", shapes={"b": (78,)}),
    ),
)


def _visible_share(c):
    """The share of the (Tq, Tk) scores that the mask lets through."""
    return _visible_keys(
        c.Tq, c.Tk, getattr(c, "causal", False), getattr(c, "align", "bottom_right")
    ).mean()


def _attention_flops(c, direction):
    # forward q kᵀ and p v; backward those scores again and dv, dp, dq, dk
    products = 2 if direction == "fwd" else 5
    return products * 2 * c.B * c.H * c.Tq * c.Tk * c.D * _visible_share(c)


ATTENTION = _row(
    "attention",
    {"q": "B H Tq D", "k": "B H Tk D", "v": "B H Tk D"},
    [
        Case("full", B=2, H=2, Tq=33, Tk=33, D=16),
        Case("causal", B=2, H=2, Tq=33, Tk=33, D=16, causal=True),
        Case("odd_head_dim", B=1, H=2, Tq=17, Tk=23, D=5),
        Case("head_dim_over_a_tile", B=1, H=1, Tq=20, Tk=20, D=65, causal=True),
        Case("one_query", B=2, H=2, Tq=1, Tk=37, D=8, causal=True),
        Case("one_key", B=1, H=2, Tq=5, Tk=1, D=8),
        Case("longer_cache", B=1, H=2, Tq=13, Tk=70, D=12, causal=True),
        Case("unseeing_queries", B=1, H=2, Tq=40, Tk=21, D=12, causal=True),
        Case("top_left", B=1, H=2, Tq=40, Tk=21, D=12, causal=True, align="top_left"),
        Case(
            "top_left_hidden_nan",
            B=1,
            H=2,
            Tq=21,
            Tk=40,
            D=12,
            causal=True,
            align="top_left",
            values={"k": _nan_past_queries, "v": _nan_past_queries},
        ),
        Case("one_over_a_tile", B=1, H=1, Tq=65, Tk=65, D=8, causal=True),
        Case("several_tiles", B=1, H=1, Tq=200, Tk=200, D=16),
        Case("several_tiles_causal", B=1, H=1, Tq=200, Tk=200, D=16, causal=True),
        Case("scale_negative", B=1, H=1, Tq=19, Tk=19, D=8, causal=True, scale=-0.7),
        Case("scale_zero", B=1, H=1, Tq=9, Tk=18, D=8, scale=0.0),
        Case("scores_spread_by_100", B=1, H=1, Tq=18, Tk=34, D=8, values={"q": _spread_by_100}),
        Case("lse", B=1, H=2, Tq=18, Tk=20, D=8, causal=True, return_lse=True),
        Case("lse_unseeing_queries", B=1, H=1, Tq=20, Tk=18, D=8, causal=True, return_lse=True),
        Case(
            "gpt2_causal_1k", B=8, H=12, Tq=1024, Tk=1024, D=64, causal=True, tags=("aot", "bench")
        ),
        Case("full_1k_d128", B=4, H=16, Tq=1024, Tk=1024, D=128, tags=("aot", "bench")),
        Case("cpu_bench", B=1, H=4, Tq=256, Tk=256, D=64, causal=True, tags=("bench", "cpu")),
    ],
    outputs={"o": "B H Tq D", "lse": "B H Tq"},
    flops=_attention_flops,
    errors=(
        Wrong("k_head_dim", "k must have shape", shapes={"k": (2, 2, 33, 15)}),
        Wrong("v_length", "v must have shape", shapes={"v": (2, 2, 32, 16)}),
        Wrong("q_rank", "q must have shape", shapes={"q": (2, 33, 16)}),
        Wrong("no_keys", "Tk must be at least 1", shapes={"k": (2, 2, 0, 16), "v": (2, 2, 0, 16)}),
        Wrong("unknown_align", "align must be one of", options={"align": "middle"}),
    ),
)


def _ffn_flops(c, direction):
    return 4 * c.M * c.C * c.F * (1 if direction == "fwd" else 2)


_FFN_INPUTS = {
    "x": "M C",
    "w1": Input("C F", fan_in="C"),
    "b1": "F",
    "w2": Input("F C", fan_in="F"),
    "b2": "C",
}

FFN = _row(
    "ffn",
    _FFN_INPUTS,
    [
        Case("odd", M=5, C=33, F=47),
        Case("erf", M=19, C=20, F=36, activation="gelu"),
        Case("relu", M=19, C=20, F=36, activation="relu"),
        Case("one_row", M=1, C=16, F=64),
        Case("many_rows", M=70, C=17, F=31),
        Case("one_over_a_tile", M=33, C=65, F=129),
        # more than one group of 8 tiles of 128 rows
        Case("rows_over_a_group", M=1100, C=17, F=24),
        Case("gpt2_width", M=8192, C=768, F=3072, tags=("aot", "bench")),
        Case("gpt2_xl_width", M=8192, C=1600, F=6400, tags=("aot", "bench")),
        Case("cpu_bench", M=256, C=256, F=1024, tags=("bench", "cpu")),
    ],
    outputs={"y": "M C"},
    flops=_ffn_flops,
    errors=(
        Wrong("w1_rows", "w1 must have shape", shapes={"w1": (32, 47)}),
        Wrong("w2_rows", "w2 must have shape", shapes={"w2": (46, 33)}),
        Wrong("b1_length", "b1 must have shape", shapes={"b1": (33,)}),
        Wrong("b2_length", "b2 must have shape", shapes={"b2": (47,)}),
        Wrong("unknown_activation", "activation must be one of", options={"activation": "swish"}),
    ),
)

CROSS_ENTROPY = _row(
    "cross_entropy",
    {"logits": "M V", "targets": Index("M", below="V")},
    [
        Case("odd", M=7, V=101),
        Case("none", M=9, V=33, reduction="none"),
        Case("sum", M=9, V=33, reduction="sum"),
        Case("ignored", M=10, V=29, values={"targets": _some_ignored}),
        Case("ignored_none", M=10, V=29, reduction="none", values={"targets": _some_ignored}),
        Case(
            "all_ignored_sum",
            M=4,
            V=29,
            reduction="sum",
            values={"targets": _all_ignored},
            tags=("degenerate",),
        ),
        Case("all_ignored_mean", M=4, V=29, values={"targets": _all_ignored}, tags=("degenerate",)),
        Case("smoothed", M=6, V=50, label_smoothing=0.1),
        Case("smoothed_ignored", M=6, V=50, label_smoothing=0.3, values={"targets": _some_ignored}),
        Case("logits_spread_by_100", M=6, V=40, values={"logits": _spread_by_100}),
        Case("several_tiles", M=3, V=4099),
        Case("gpt2_vocabulary", M=8192, V=50257, tags=("aot", "bench")),
        Case("cpu_bench", M=64, V=50257, tags=("bench", "cpu")),
    ],
    outputs={"loss": ""},
    flops=lambda c, direction: c.M * c.V * 4,
    errors=(
        Wrong("target_too_large", "targets must lie in", values={"targets": lambda t: t + 101}),
        Wrong("target_count", "targets must have shape", shapes={"targets": (6,)}),
        Wrong("unknown_reduction", "reduction must be one of", options={"reduction": "max"}),
        Wrong("smoothing_over_1", "label_smoothing must lie in", options={"label_smoothing": 1.5}),
    ),
)

# every row above, by name
CATALOG = {row.name: row for row in list(globals().values()) if isinstance(row, Op)}


def find(name):
    """The row of an op; ValueError for a name the catalog does not hold."""
    if name not in CATALOG:
        raise ValueError(f"op must be one of {', '.join(CATALOG)}, got {name!r}")
    return CATALOG[name]
