"""Small inputs that are hard on rounding: `cases(op)`, as the catalog's cases are.

An op needs a line in `SMALL`, its smallest shapes, and gets `EXTREMES` on its first floating input;
`SPECIAL` has what is hard on one op alone.
"""

from __future__ import annotations

import numpy as np
from gaugeblock.reference.oracle.op import Case

# dimensions, and options that have no default
SMALL = {
    "linear": dict(M=2, K=4, N=2),
    "embedding": dict(B=2, T=3, V=4, P=3, C=2),
    "layer_norm": dict(M=2, N=5),
    "residual_layer_norm": dict(M=1, N=5),
    "attention": dict(B=1, H=1, Tq=2, Tk=3, D=2),
    "paged_attention": dict(B=1, H=1, Hkv=1, Tq=1, D=2, P=2, page=2, pages=2),
    "ffn": dict(M=1, C=2, F=3),
    "cross_entropy": dict(M=2, V=5),
    "linear_cross_entropy": dict(M=1, C=2, V=4),
    "dropout": dict(M=3, N=4, p=0.3, seed=7),
    "adamw": dict(
        M=2, N=3, step=3, lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1
    ),
    "sample": dict(M=2, V=6),
    "additive_attention": dict(B=1, Tq=1, Tk=2, C=2, K=1, D=2, A=2),
    "adam": dict(M=2, N=3, step=3, lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01),
}  # fmt: skip
# what an input has to be for the op to have a meaning
NEEDED = {
    "paged_attention": {"lengths": lambda x, dims, rng: np.full_like(x, 3)},
    "adamw": {"v": lambda x, dims, rng: x * x},
    "adam": {"v": lambda x, dims, rng: x * x},
    "sample": {"u": lambda x, dims, rng: rng.random(x.shape)},
}


def _on_zero(x, dims, rng):
    return 0 * x


def _absent(x, dims, rng):
    return None


def _first_row_nan(dy, dims, rng):
    """In a row that sees nothing, whose gradient nobody may read."""
    dy[0, 0, 0] = np.nan
    return dy


EXTREMES = {
    "normal": lambda x, dims, rng: x,
    "offset_1e4": lambda x, dims, rng: x + 1e4,
    "offset_1e8": lambda x, dims, rng: x + 1e8,
    "tiny_spread": lambda x, dims, rng: 1e4 + 1e-6 * x,
    "tiny": lambda x, dims, rng: 1e-30 * x,
    "huge": lambda x, dims, rng: 1e30 * x,
    "outlier": lambda x, dims, rng: np.where(np.arange(x.size).reshape(x.shape) == 1, 1e3, 1) * x,
    "zeros": _on_zero,
}


def _put(*values):
    """These values in place of a tensor's, again and again."""
    return lambda x, dims, rng: np.resize(np.array(values, float), x.shape)


def _indices(*values):
    return lambda x, dims, rng: np.resize(np.array(values), x.shape)


def _attention(name, Tq=2, Tk=3, D=2, H=1, Hkv=1, **rest):
    return Case(name, B=1, H=H, Hkv=Hkv, Tq=Tq, Tk=Tk, D=D, **rest)


def _gelu(name, z, activation):
    """Pre-activations of exactly z, with products that do not round."""
    values = {"x": _put(1.0, 0.0), "w1": _on_zero, "b1": _put(*z)}
    return Case(name, M=1, C=2, F=3, activation=activation, values=values)


def _logits(name, *row, target=0, **options):
    values = {"logits": _put(*row), "targets": _indices(target)}
    return Case(name, M=1, V=len(row), values=values, **options)


_FAR = {"deep": (-6.0, -30.0, 1.5), "middle": (-0.75, -2.5, 0.1), "high": (6.0, 30.0, 3.0)}
_ADAMW = {k: v for k, v in SMALL["adamw"].items() if k not in "MN"}

SPECIAL = {
    "linear": [
        Case("cancelling", M=1, K=4, N=2, values={"x": _put(1e8, 1, -1e8, 1), "w": _put(1.0)}),
        Case("rank_three", B=2, T=1, K=3, N=2, shapes={"x": "B T K", "y": "B T N"}),
        Case("no_bias", M=2, K=3, N=2, values={"b": _absent}),
    ],
    "embedding": [
        Case("repeated", B=2, T=3, V=4, P=3, C=2, values={"tokens": _indices(1)}),
        Case("rank_one", T=3, V=3, P=4, C=2, shapes={"tokens": "T", "y": "T C"}),
        Case("no_positions", B=1, T=2, V=3, P=1, C=2, values={"wpe": _absent}),
    ],
    "layer_norm": [
        Case("one_column", M=1, N=1),
        Case("rank_three", B=1, T=2, N=3, shapes={"x": "B T N", "y": "B T N"}),
        Case("constant_row", M=1, N=4, values={"x": _put(3.7)}),
        Case("tiny_eps", M=1, N=4, eps=1e-12, values={"x": EXTREMES["tiny_spread"]}),
        Case("gradient_along_the_ones", M=1, N=4, values={"dy": _put(1.0), "w": _put(1.0)}),
    ],
    "residual_layer_norm": [
        Case("one_column", M=1, N=1),
        Case("cancelling", M=1, N=4, values={"x": _put(1e8, 1e8 + 1), "r": _put(-1e8)}),
    ],
    "attention": [
        _attention("one_key", Tk=1),
        _attention("one_visible_key", causal=True, Tq=3, return_lse=True),
        _attention("large_logits", values={"q": _put(1e2, -1e2), "k": _put(1e2, 0, -1e2, 0, 3, 1)}),
        _attention("equal_large_logits", values={"q": _put(1e2), "k": _put(1e2)}),
        _attention("one_key_has_all", values={"q": _put(8.0), "k": _put(4, 4, -2, 0, -1, 0)}),
        _attention(
            "lse_near_zero", Tq=1, Tk=2, return_lse=True,
            values={"q": _put(1.0, 0.0), "k": _put(0.0, 1.0, -56.0, 1.0)},
        ),
        _attention("causal", Tq=3, causal=True),
        _attention("unseeing", Tq=3, Tk=2, causal=True, return_lse=True),
        _attention("unseeing_nan", Tq=3, Tk=2, causal=True, return_lse=True, values={
            "do": _first_row_nan, "dlse": _first_row_nan}),
        _attention("window", Tq=3, window=1, global_tokens=1),
        _attention("documents", Tq=3, causal=True, cu_seqlens=(0, 1, 3)),
        _attention("grouped", H=2, scale=-0.7),
        _attention("cosine", score="cosine", keywords=("temperature",), H=2, values={
            "q": EXTREMES["huge"], "k": EXTREMES["tiny"], "temperature": _put(0.01, -2.0)}),
        _attention(
            "cosines", score="cosine", keywords=("temperature",), H=2, return_lse=True,
            values={"temperature": _put(0.5, -2.0)},
        ),
        _attention("strided", Tq=4, Tk=4, D=1, causal=True, window=1, stride=2),
        _attention("dropout", dropout=0.4, seed=-3, return_lse=True),
    ],
    "paged_attention": [
        Case("one_key", B=1, H=1, Hkv=1, Tq=1, D=2, P=2, page=2, pages=1, values={
            "lengths": _indices(1)}),
        Case("grouped", B=2, H=2, Hkv=1, Tq=1, D=1, P=3, page=2, pages=2, window=2, scale=0.3,
             values={"lengths": _indices(3, 2), "block_table": _indices(2, 0, 1, 1)}),
        # entries past the last page that is used are not read
        Case("unread_entries", B=2, H=1, Hkv=1, Tq=1, D=1, P=3, page=2, pages=3, values={
            "lengths": _indices(2, 4), "block_table": _indices(1, 99, -7, 2, 0, 99)}),
    ],
    "ffn": [
        *(_gelu(f"{a}_{name}", z, a) for a in ("gelu", "gelu_tanh") for name, z in _FAR.items()),
        Case("relu", M=1, C=2, F=3, activation="relu"),
        Case("gelu_offset", M=1, C=2, F=3, activation="gelu", values={
            "b1": EXTREMES["offset_1e4"]}),
        Case("residual", M=1, C=2, F=2, keywords=("residual",)),
    ],
    "cross_entropy": [
        _logits("logits_of_1e4", 1e4, -1e4, 0.0, 9999.0),
        _logits("wrong_by_2e4", 1e4, -1e4, 0.0, target=1),
        _logits("confident", 40.0, 1.0, 0.0, -2.0),
        _logits("confident_near_zero", 0.0, -45.0, -50.0),
        _logits("confident_and_smoothed", 40.0, 1.0, 0.0, label_smoothing=0.1),
        _logits("at_its_smoothed_target", 0.0, -3.0, -3.0, label_smoothing=0.1),
        _logits("all_smoothed", 2.0, 1.0, 0.0, label_smoothing=1.0),
        _logits("one_class", 3.0),
        _logits("equal", 7.3, 7.3, 7.3, target=2),
        Case("ignored", M=3, V=4, label_smoothing=0.2, values={"targets": _indices(1, -100, 3)}),
        Case("none", M=3, V=3, reduction="none", values={"targets": _indices(1, -100, 2)}),
        Case("sum", M=2, V=3, reduction="sum"),
        Case("rank_three", B=1, T=2, V=3, label_smoothing=0.1, reduction="none",
             shapes={"logits": "B T V", "targets": "B T"}),
    ],
    "linear_cross_entropy": [
        Case("smoothed", M=2, C=2, V=3, label_smoothing=0.1),
        Case("confident", M=1, C=1, V=3, values={
            "x": _put(1.0), "w": _put(40.0, 1.0, 0.0), "b": _on_zero, "targets": _indices(0)}),
        Case("no_bias", M=2, C=2, V=3, reduction="sum", values={"b": _absent}),
    ],
    "dropout": [Case("mostly_dropped", M=4, N=5, p=0.99, seed=-1)],
    "adamw": [
        Case("first_step", M=2, N=3, **_ADAMW | dict(step=1), values={
            "m": _on_zero, "v": _on_zero}),
        Case("late", M=2, N=3, **_ADAMW | dict(step=100_000)),
        Case("tiny_gradients", M=2, N=3, **_ADAMW, values={
            "g": EXTREMES["tiny"], "m": EXTREMES["tiny"], "v": _on_zero}),
        Case("no_decay", M=2, N=3, **_ADAMW | dict(weight_decay=0.0, eps=0.0)),
    ],
    "adam": [
        Case("first_step", M=2, N=3, **_ADAMW | dict(step=1)),
        Case("default_decay", M=2, N=3, **{k: v for k, v in _ADAMW.items() if "weight" not in k}),
    ],
    "additive_attention": [
        Case("one_key", B=1, Tq=2, Tk=1, C=1, K=1, D=2, A=2),
        Case("lengths", B=2, Tq=1, Tk=2, C=1, K=1, D=1, A=2, lengths=(1, 0)),
        Case("one_key_has_all", B=1, Tq=1, Tk=2, C=1, K=1, D=2, A=1, values={
            "k": _put(1.0, -1.0), "w_k": _put(9.0), "w": _put(30.0)}),
    ],
    "sample": [
        Case("cold", M=1, V=5, temperature=1e-3),
        Case("rows_of_a_batch", B=1, T=2, V=3, top_p=0.6, min_p=0.6,
             shapes={"logits": "B T V", "u": "B T", "token": "B T"},
             values={"logits": _put(3.0, 0, 0, 0.4, 0.3, 0)}),
        Case("penalty", M=2, V=4, P=3, repetition_penalty=1.7, keywords=("previous",), values={
            "logits": _put(2.0, 0, -1, 1), "previous": _indices(0, 2, 0, -1, 1, 3)}),
        Case("penalty_of_rank_three", B=2, T=2, V=3, P=1, repetition_penalty=3.0,
             keywords=("previous",), shapes={
                 "logits": "B T V", "u": "B T", "token": "B T", "previous": "B T P"}),
        Case("min_p_of_0", M=1, V=4, top_k=2, min_p=0.0),
        Case("greedy", M=1, V=5, temperature=0.0),
        Case("top_k", M=2, V=5, top_k=2, values={"logits": _put(3.0, 1, 3, 3, 0, 0, 1, 2, 2, 0)}),
        Case("top_p", M=2, V=5, top_p=0.5),
        Case("top_p_of_equals", M=1, V=4, top_p=0.45, values={"logits": _put(1.0)}),
        Case("top_p_tiny", M=1, V=4, top_p=1e-9),
        Case("top_p_and_min_p", M=3, V=6, top_p=0.9, min_p=0.2),
        Case("min_p", M=2, V=5, min_p=0.3),
        Case("min_p_of_1", M=1, V=3, min_p=1.0, values={"logits": _put(0.1, 0.7, 0.7)}),
        Case("rank_three", B=1, T=2, V=4, top_k=3, top_p=0.8, min_p=0.1, temperature=2.0,
             shapes={"logits": "B T V", "u": "B T", "token": "B T"}),
        Case("greedy_rank_three", B=2, T=1, V=3, temperature=0.0,
             shapes={"logits": "B T V", "u": "B T", "token": "B T"}),
        Case("rank_one", V=4, shapes={"logits": "V", "u": "", "token": ""}),
        Case("never_drawn", M=1, V=4, values={"logits": _put(-np.inf, 0.5, -np.inf, 0)}),
        Case("at_the_edge", M=2, V=4, values={"logits": _put(0.0), "u": _put(0.5, 0.0)}),
        Case("filtered", M=2, V=8, temperature=0.7, top_k=6, top_p=0.8, min_p=0.05),
        Case("logits_of_1e4", M=1, V=4, values={"logits": _put(1e4, -1e4, 9999.0, 9998.0)}),
    ],
}  # fmt: skip


def cases(op):
    """Every adversarial case of a row of the catalog."""
    first, needed = op.floating()[0], NEEDED.get(op.name, {})
    for name, change in EXTREMES.items():
        yield Case(name, **SMALL[op.name], values=needed | {first: change})
    for case in SPECIAL.get(op.name, ()):
        case.values = needed | case.values
        yield case
