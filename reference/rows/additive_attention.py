"""Row of `additive_attention`."""

import numpy as np

from .._attention import visible_keys
from ..oracle.op import Case, Input, Wrong
from .attention_parts import additive_attention_parts
from .row import CPU, row
from .values import all_negative, huge_outlier, spread_by_10, tiny


def _flops(c, direction):
    """The products; backward those of both operands, and the scores' network element by element."""
    queries, keys, pairs = c.B * c.Tq * c.C * c.A, c.B * c.Tk * c.K * c.A, c.B * c.Tq * c.Tk
    forward = 2 * (queries + keys + pairs * (c.A + c.D)) + 2 * pairs * c.A
    return forward if direction == "fwd" else 2 * forward


def _case(name, B, Tq, Tk, C, K, D, A, *, hidden=None, values=None, **rest):
    """`hidden` is what keys and values that are not there hold, and rows that have none."""

    def visible(dims):
        return visible_keys(Tq, Tk, lengths=rest["lengths"])[:, 0]

    def keys(x, dims, rng):
        return np.where(visible(dims).any(-2)[..., None], x, hidden)

    def queries(x, dims, rng):
        return np.where(visible(dims).any(-1)[..., None], x, hidden)

    values = dict(values or {})
    if hidden is not None:
        values |= {"k": keys, "v": keys, "q": queries, "do": queries}
    return Case(name, B=B, Tq=Tq, Tk=Tk, C=C, K=K, D=D, A=A, values=values, **rest)


def _spread(w, dims, rng):
    """Weights of very different keys, and gradients that are no residue."""
    return 2.5 * w


def _one_nan(x, dims, rng):
    x[-1, 3, 2] = np.nan
    return x


def _nan_seen(inputs, options):
    """A row that sees a NaN holds one; what else becomes of its batch row is not compared."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    visible = visible_keys(q.shape[1], k.shape[1], lengths=options.get("lengths"))[:, 0]
    wrong_keys = ~(np.isfinite(k).all(-1) & np.isfinite(v).all(-1)) & visible.any(-2)
    wrong_queries = ~np.isfinite(q).all(-1) & visible.any(-1)
    rows = wrong_queries | wrong_keys.any(-1, keepdims=True)
    batch = rows.any(-1)[:, None, None]
    everything = np.bool_(rows.any())
    skipped = {"o": batch & ~rows[..., None], "dq": batch, "dk": batch, "dv": batch}
    return skipped | dict.fromkeys(("dw_q", "dw_k", "dw"), everything)


ADDITIVE_ATTENTION = row(
    "additive_attention",
    {
        "q": "B Tq C",
        "k": "B Tk K",
        "v": "B Tk D",
        "w_q": Input("C A", fan_in="C"),
        "w_k": Input("K A", fan_in="K"),
        "w": Input("A", fan_in="A"),
    },
    [
        _case("odd", 2, 7, 13, 12, 10, 9, 11),
        _case("one_query", 3, 1, 19, 8, 8, 8, 16),
        _case("one_key", 2, 5, 1, 8, 6, 8, 4),
        _case("two_units", 2, 6, 9, 5, 7, 8, 2),
        _case("longer_queries", 1, 37, 11, 8, 8, 5, 9),
        _case("one_over_a_tile", 1, 17, 65, 8, 8, 16, 17),
        _case("lengths", 3, 5, 17, 8, 6, 8, 7, lengths=(17, 6, 1), hidden=np.nan),
        _case("length_zero", 3, 4, 12, 8, 6, 8, 7, lengths=(5, 0, 12), hidden=np.inf),
        # tanh is flat
        _case("saturated", 2, 6, 9, 8, 8, 8, 8, values={"k": spread_by_10}),
        _case("scores_spread", 2, 6, 9, 8, 8, 8, 8, values={"w": _spread}),
        _case("tiny", 2, 6, 9, 8, 8, 8, 8, values={"v": tiny}),
        _case("negative", 2, 6, 9, 8, 8, 8, 8, values=dict.fromkeys("qkv", all_negative)),
        _case("outlier_key", 2, 6, 9, 8, 8, 8, 8, values={"k": huge_outlier}),
        _case("nan_seen", 2, 6, 9, 8, 8, 8, 8, values={"k": _one_nan}),
        _case("no_queries", 2, 0, 9, 8, 8, 8, 8, tags=("full", "degenerate")),
        _case("cpu_bench", 16, 32, 48, 128, 128, 128, 64, tags=CPU),
    ],
    outputs={"o": "B Tq D"},
    batch="B",
    flops=_flops,
    unspecified=_nan_seen,
    errors=(
        Wrong("q_rank", "q must have shape", shapes={"q": (7, 12)}),
        Wrong("k_batch", "k must have shape", shapes={"k": (3, 13, 10)}),
        Wrong("v_length", "v must have shape", shapes={"v": (2, 12, 9)}),
        Wrong("w_q_rows", "w_q must have shape", shapes={"w_q": (10, 11)}),
        Wrong("w_k_units", "w_k must have shape", shapes={"w_k": (10, 12)}),
        Wrong("w_rank", "w must have shape", shapes={"w": (11, 1)}),
        Wrong("no_keys", "Tk must be at least 1", shapes={"k": (2, 0, 10), "v": (2, 0, 9)}),
        Wrong("long_length", "lengths must lie in", options={"lengths": (13, 14)}),
        Wrong("one_length", "lengths must have shape", options={"lengths": (13,)}),
    ),
    kernel="no model of the family runs it; its plain products belong to cuBLAS",
    sampled=additive_attention_parts,
)
