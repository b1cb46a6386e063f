"""Rows of `attention` and `paged_attention`."""

import itertools

import numpy as np

from .._attention import visible_keys
from ..oracle.covering import covering
from ..oracle.op import Case, Index, Input, Wrong
from .attention_parts import attention_parts, paged_attention_parts
from .row import CPU, FAMILY, LARGE, SWEEP, row
from .values import (
    all_negative,
    all_positive,
    constant_rows,
    huge_outlier,
    rising,
    spread_by_10,
    spread_by_100,
    tiny,
)

_MASKS = ("causal", "align", "window", "stride", "global_tokens", "lengths", "cu_seqlens")


def _visible(options, Tq, Tk):
    return visible_keys(Tq, Tk, **{k: v for k, v in options.items() if k in _MASKS})


def _attention_flops(c, direction):
    # forward q kᵀ and p v; backward those scores again and dv, dp, dq, dk
    products = 2 if direction == "fwd" else 5
    return products * 2 * c.B * c.H * c.D * _visible_pairs(c)


def _visible_pairs(c):
    """Pairs of a query and a key that it sees, in one head."""
    options = {k: v for k, v in vars(c).items() if k in _MASKS}
    if options.keys() - {"causal", "window"}:
        return float(_visible(options, c.Tq, c.Tk).mean() * c.Tq * c.Tk)
    # a mask of all pairs would take gigabytes at the lengths that are timed
    causal, window = options.get("causal"), options.get("window")
    own = np.arange(c.Tq) + c.Tk - c.Tq
    first = np.zeros_like(own) if window is None else own - window + 1
    last = own + (0 if causal else c.Tk + c.Tq if window is None else window - 1)
    seen = np.minimum(last, c.Tk - 1) - np.maximum(first, 0) + 1
    return float(np.maximum(seen, 0).sum())


def _attention_moves(c, itemsize, direction):
    queries, keys = c.B * c.H * c.Tq * c.D, c.B * c.Hkv * c.Tk * c.D
    lse = 4 * c.B * c.H * c.Tq if getattr(c, "return_lse", False) else 0
    if direction == "fwd":
        return itemsize * (queries + 2 * keys), itemsize * queries + lse
    return itemsize * (2 * queries + 2 * keys) + lse, itemsize * (queries + 2 * keys)


def _case(name, B, H, Tq, Tk, D, *, hidden=None, seen=None, **rest):
    """An attention case. `hidden` is what keys and values that no query sees hold, as do queries
    that see nothing and their output gradients; `seen` is put into a key that the last one sees.
    """
    options = {k: v for k, v in rest.items() if k in _MASKS}

    def keys(x, dims, rng):
        visible = _visible(options, dims["Tq"], dims["Tk"])
        if hidden is not None:
            x = np.where(visible.any(-2)[..., None], x, hidden)
        if seen is not None:
            x[-1, -1, np.flatnonzero(visible[-1, 0, -1])[-1], x.shape[-1] // 2] = seen
        return x

    def queries(x, dims, rng):
        return np.where(_visible(options, dims["Tq"], dims["Tk"]).any(-1)[..., None], x, hidden)

    values = dict(rest.pop("values", {}))
    if hidden is not None or seen is not None:
        values |= {"k": keys, "v": keys} if hidden is not None else {"v": keys}
    if hidden is not None:
        values |= {"q": queries, "do": queries}
    if rest.get("Hkv", H) != H:
        rest["tags"] = (*rest.get("tags", ()), "grouped")
    return Case(name, B=B, H=H, Tq=Tq, Tk=Tk, D=D, values=values, **rest)


def _one_nan(x, dims, rng):
    x[-1, -1, 3, 2] = np.nan
    return x


def _far_positive(q, dims, rng):
    return 0.3 * q + 4


def _far_negative(k, dims, rng):
    """Every score far below 0: a maximum that starts from 0 makes every exponential 0."""
    return 0.3 * k - 14


def _nan_seen(inputs, options):
    """Once a query sees a NaN, other rows and the gradients of its key head are not compared."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    (B, H, Tq, _), (_, Hkv, Tk, _) = q.shape, k.shape
    visible = _visible(options, Tq, Tk)
    wrong_keys = (~np.isfinite(k) | ~np.isfinite(v)).any(-1)
    wrong_queries = ~np.isfinite(q).all(-1) & visible.any(-1)
    rows = (visible & np.repeat(wrong_keys, H // Hkv, 1)[:, :, None, :]).any(-1) | wrong_queries
    heads = rows.any(-1).reshape(B, Hkv, H // Hkv).any(-1)
    by_query = np.repeat(heads, H // Hkv, 1)
    return {
        "o": (by_query[..., None] & ~rows)[..., None],
        "lse": by_query[..., None],
        "dq": by_query[..., None, None],
        "dk": heads[..., None, None],
        "dv": heads[..., None, None],
        "dtemperature": by_query.any(0),
    }


def _cosine(name, *sizes, temperature=True, values=None, **rest):
    """A case of cosines, with temperatures at which the weights differ."""
    if temperature:
        rest["keywords"] = ("temperature",)
        values = {"temperature": _learned} | (values or {})
    return _case(name, *sizes, score="cosine", values=values or {}, **rest)


def _learned(temperature, dims, rng):
    """Positive, and no two heads alike."""
    return 0.4 + 0.5 * rng.random(temperature.shape)


def _both_signs(temperature, dims, rng):
    return _learned(temperature, dims, rng) * (-1) ** np.arange(len(temperature))


def _some_rows_zero(x, dims, rng):
    x[..., ::3, :] = 0
    return x


def _strided():
    """The Sparse Transformer's heads."""
    yield _case("stride", 2, 2, 33, 33, 8, causal=True, window=1, stride=6)
    yield _case("stride_merged", 1, 2, 40, 40, 8, causal=True, window=7, stride=7)
    yield _case("stride_both_sides", 1, 2, 25, 41, 8, window=3, stride=5)
    yield _case("stride_of_one", 1, 1, 18, 18, 8, causal=True, window=2, stride=1)
    yield _case("stride_grouped", 2, 4, 37, 50, 8, Hkv=2, causal=True, window=3, stride=8)
    yield _case("stride_global", 1, 2, 45, 45, 8, causal=True, window=3, stride=9, global_tokens=2)
    yield _case("stride_top_left", 1, 2, 40, 21, 12, causal=True, align="top_left", window=2,
                stride=5)  # fmt: skip
    yield _case("stride_unseeing", 1, 2, 40, 21, 12, causal=True, window=2, stride=4,
                hidden=np.nan, return_lse=True)  # fmt: skip
    yield _case("stride_lengths", 3, 2, 17, 40, 8, causal=True, window=1, stride=4,
                lengths=(33, 0, 18), hidden=np.nan)  # fmt: skip
    yield _case("stride_documents", 1, 2, 50, 50, 8, causal=True, window=2, stride=7,
                global_tokens=1, cu_seqlens=(0, 17, 18, 50))  # fmt: skip
    yield _case("stride_over_tiles", 1, 1, 150, 150, 8, causal=True, window=70, stride=70)


def _cosines():
    """Scores that are cosines, with learned temperatures or a scale."""
    yield _cosine("cosine", 2, 2, 33, 33, 16, causal=True)
    yield _cosine("cosine_odd_head_dim", 1, 3, 17, 23, 5)
    yield _cosine("cosine_scale", 2, 2, 19, 23, 8, temperature=False, scale=2.0)
    yield _cosine("cosine_plain", 1, 2, 19, 19, 8, temperature=False, causal=True)
    yield _cosine("cosine_scale_and_temperature", 1, 2, 19, 19, 8, scale=-0.5)
    yield _cosine("cosine_temperature_of_both_signs", 1, 3, 21, 21, 8,
                  values={"temperature": _both_signs})  # fmt: skip
    yield _cosine("cosine_grouped", 2, 6, 19, 35, 16, Hkv=2, causal=True)
    yield _cosine("cosine_zero_vectors", 1, 2, 20, 20, 8, causal=True,
                  values={"q": _some_rows_zero, "k": _some_rows_zero})  # fmt: skip
    # a cosine does not see how long a vector is
    yield _cosine(
        "cosine_spread_by_100", 1, 2, 18, 34, 8, values={"q": spread_by_100, "k": spread_by_10}
    )
    yield _cosine("cosine_window_stride", 1, 2, 37, 37, 8, causal=True, window=3, stride=6)
    yield _cosine("cosine_lengths", 3, 2, 20, 37, 8, causal=True, lengths=(20, 0, 9),
                  hidden=np.nan, return_lse=True)  # fmt: skip
    yield _cosine("cosine_unseeing_nan", 1, 2, 40, 21, 12, causal=True, hidden=np.nan)
    yield _cosine("cosine_documents", 1, 2, 50, 50, 8, causal=True, cu_seqlens=(0, 17, 18, 50))
    yield _cosine("cosine_nan_key_seen", 2, 4, 20, 20, 8, Hkv=2, causal=True,
                  values={"k": _one_nan})  # fmt: skip
    yield _cosine("cosine_dropout", 2, 2, 19, 23, 8, causal=True, dropout=0.3, seed=1234)


def _timed(name, H, D, lengths, tags):
    """Causal cases of so many thousand tokens, 32 thousand in all."""
    for t in lengths:
        yield _case(f"causal_{t}k_{name}", 32 // t, H, 1024 * t, 1024 * t, D, causal=True,
                    tags=tags)  # fmt: skip


def _compiled():
    """Cases that are compiled, not run: between them every row of the kernels' table, every mask.

    Those of a row of the table alone are tagged "configuration".
    """
    for D, causal, Tq in itertools.product((64, 128, 256), (False, True), (8, 1024)):
        name = f"{'causal' if causal else 'full'}_{'few' if Tq == 8 else 'many'}_d{D}"
        yield _case(
            f"compiled_{name}", 2, 4, Tq, 1024, D, causal=causal, tags=("aot", "configuration")
        )
    tags = ("aot", "configuration")
    yield _case("compiled_padded_head", 2, 4, 1000, 1000, 80, causal=True, tags=tags)
    yield _case("compiled_grouped", 2, 4, 1024, 1024, 128, Hkv=2, causal=True, tags=tags)
    yield _case(
        "compiled_banded", 2, 4, 1024, 1024, 64, Hkv=2, causal=True, window=256, global_tokens=4,
        tags=("aot",),
    )  # fmt: skip
    yield _case(
        "compiled_lengths", 2, 4, 1024, 1024, 64, lengths=(1000, 500), window=300, tags=tags
    )
    yield _case(
        "compiled_documents", 1, 4, 2048, 2048, 64, causal=True, cu_seqlens=(0, 900, 2048),
        return_lse=True, dropout=0.1, seed=2**40, tags=("aot",),
    )  # fmt: skip


def _covering_attention():
    """Every pair of these settings occurs together in some case; what cannot be is left out."""
    sizes = [(1, 1), (1, 37), (16, 16), (15, 33), (33, 31), (65, 65), (63, 129), (130, 64)]
    masks = {
        "full": {},
        "causal": {"causal": True},
        "top_left": {"causal": True, "align": "top_left"},
        "window": {"window": 7},
        "causal_window": {"causal": True, "window": 5},
        "global": {"causal": True, "window": 4, "global_tokens": 2},
        "lengths": {"lengths": (0.6, 1.0, 0.0)},
        "causal_lengths": {"causal": True, "lengths": (1.0, 0.4, 0.1)},
        "documents": {"causal": True, "cu_seqlens": (0, 0.3, 0.3, 0.9, 1)},
    }
    values = {
        "normal": {},
        "large": {"q": spread_by_10, "k": spread_by_10},
        "tiny": {"q": tiny, "k": tiny, "v": tiny},
        "negative": {"q": all_negative, "k": all_negative, "v": all_negative},
        "constant": {"k": constant_rows, "v": constant_rows},
        "outlier": {"k": huge_outlier, "v": huge_outlier},
        "hidden_nan": {"hidden": np.nan},
    }
    axes = {
        "size": sizes,
        "D": [1, 5, 16, 33, 64, 80],
        "heads": [(1, 1), (2, 2), (4, 2), (3, 1), (6, 3)],
        "B": [1, 2, 3],
        "mask": list(masks),
        "values": list(values),
        "return_lse": [False, True],
    }

    def legal(c):
        documents = c["mask"] == "documents"
        return not documents or (c["B"] == 1 and c["size"][0] == c["size"][1])

    for c in covering(axes, legal):
        (Tq, Tk), (H, Hkv) = c["size"], c["heads"]
        options = dict(masks[c["mask"]])
        if "lengths" in options:
            options["lengths"] = tuple(round(s * Tk) for s in options["lengths"])[: c["B"]]
        if "cu_seqlens" in options:
            options["cu_seqlens"] = tuple(round(s * Tk) for s in options["cu_seqlens"])
        if c["return_lse"]:
            options["return_lse"] = True
        kind = values[c["values"]]
        settings = {"hidden": kind["hidden"]} if "hidden" in kind else {"values": kind}
        tags = ("full", "degenerate") if c["values"] == "constant" or Tk == 1 else ("full",)
        name = f"{c['mask']}_{c['values']}_{Tq}x{Tk}_d{c['D']}_{H}h{Hkv}_b{c['B']}"
        name += "_lse" if c["return_lse"] else ""
        yield _case(name, c["B"], H, Tq, Tk, c["D"], Hkv=Hkv, tags=tags, **settings, **options)


ATTENTION = row(
    "attention",
    {
        "q": "B H Tq D",
        "k": "B Hkv Tk D",
        "v": "B Hkv Tk D",
        "temperature": Input("H", keyword=True),
    },
    [
        _case("full", 2, 2, 33, 33, 16),
        _case("causal", 2, 2, 33, 33, 16, causal=True),
        _case("odd_head_dim", 1, 2, 17, 23, 5),
        _case("head_dim_over_a_tile", 1, 1, 20, 20, 65, causal=True),
        _case("one_query", 2, 2, 1, 37, 8, causal=True),
        _case("one_key", 1, 2, 5, 1, 8),
        _case("longer_cache", 1, 2, 13, 70, 12, causal=True),
        _case("unseeing_queries", 1, 2, 40, 21, 12, causal=True),
        _case("top_left", 1, 2, 40, 21, 12, causal=True, align="top_left"),
        _case(
            "top_left_hidden_nan", 1, 2, 21, 40, 12, causal=True, align="top_left", hidden=np.nan
        ),
        _case("one_over_a_tile", 1, 1, 65, 65, 8, causal=True),
        _case("several_tiles", 1, 1, 200, 200, 16),
        _case("several_tiles_causal", 1, 1, 200, 200, 16, causal=True),
        _case("scale_negative", 1, 1, 19, 19, 8, causal=True, scale=-0.7),
        _case("scale_zero", 1, 1, 9, 18, 8, scale=0.0),
        _case("scale_zero_causal", 1, 1, 19, 19, 8, causal=True, scale=0.0),
        _case("scores_spread_by_100", 1, 1, 18, 34, 8, values={"q": spread_by_100}),
        _case("scores_rise", 1, 1, 18, 150, 8, values={"q": all_positive, "k": rising}),
        _case("many_keys", 1, 1, 6, 700, 8, values={"v": all_positive}),
        _case(
            "all_scores_negative", 1, 1, 18, 34, 8, values={"q": _far_positive, "k": _far_negative}
        ),
        # cuDNN's backward is NaN here: a row's lse below −88.7, and a length of 64 past a tile
        _case(
            "all_scores_negative_causal",
            1,
            1,
            192,
            192,
            8,
            causal=True,
            values={"q": _far_positive, "k": _far_negative},
        ),
        _case("outlier_key", 1, 2, 33, 40, 16, causal=True, values={"k": huge_outlier}),
        _case("lse", 1, 2, 18, 20, 8, causal=True, return_lse=True),
        _case("lse_unseeing_queries", 1, 1, 20, 18, 8, causal=True, return_lse=True),
        _case("grouped_heads", 2, 6, 19, 35, 16, Hkv=2, causal=True),
        _case("one_key_head", 1, 4, 18, 18, 8, Hkv=1),
        _case("window", 1, 2, 50, 50, 8, causal=True, window=9),
        _case("window_both_sides", 1, 2, 37, 50, 8, window=6),
        _case("window_of_one", 1, 1, 18, 18, 8, causal=True, window=1),
        _case("window_over_tiles", 1, 1, 150, 150, 8, causal=True, window=70),
        _case("global_tokens", 1, 2, 45, 45, 8, causal=True, window=5, global_tokens=3),
        _case("global_both_sides", 1, 1, 30, 41, 8, window=4, global_tokens=2),
        _case("global_beyond_the_window", 1, 2, 30, 45, 8, window=4, global_tokens=40),
        _case("lengths", 3, 2, 5, 37, 8, lengths=(37, 20, 1), hidden=np.nan),
        _case("lengths_causal", 3, 2, 20, 37, 8, causal=True, lengths=(20, 37, 9), hidden=np.nan),
        _case("length_zero", 2, 1, 4, 19, 8, lengths=(0, 12), hidden=np.inf, return_lse=True),
        _case("lengths_top_left", 2, 1, 18, 33, 8, causal=True, align="top_left", lengths=(7, 30)),
        _case("lengths_window", 2, 1, 17, 40, 8, causal=True, window=6, lengths=(33, 19)),
        _case("documents", 1, 2, 50, 50, 8, causal=True, cu_seqlens=(0, 17, 18, 50)),
        _case("documents_full", 1, 2, 40, 40, 8, cu_seqlens=(0, 0, 25, 25, 40)),
        _case(
            "documents_window",
            1,
            1,
            45,
            45,
            8,
            causal=True,
            window=4,
            global_tokens=1,
            cu_seqlens=(0, 20, 45),
        ),
        _case("nan_seen", 2, 2, 20, 20, 8, causal=True, seen=np.nan),
        _case("nan_key_seen", 2, 2, 20, 20, 8, causal=True, values={"k": _one_nan}),
        _case("nan_query_seen", 2, 2, 20, 20, 8, causal=True, values={"q": _one_nan}),
        _case("unseeing_nan", 1, 2, 40, 21, 8, causal=True, hidden=np.nan, return_lse=True),
        _case("dropout", 2, 2, 19, 23, 8, causal=True, dropout=0.3, seed=1234),
        _case("dropout_other_seed", 1, 2, 19, 19, 8, dropout=0.5, seed=-7),
        _case("no_queries", 1, 2, 0, 9, 8, tags=("full", "degenerate")),
        *_covering_attention(),
        *_compiled(),
        _case("gpt2_causal_1k", 32, 12, 1024, 1024, 64, causal=True, tags=("aot", *FAMILY)),
        _case("gpt2_causal_512", 64, 12, 512, 512, 64, causal=True, tags=FAMILY),
        _case("gpt2_causal_2k", 16, 12, 2048, 2048, 64, causal=True, tags=FAMILY),
        _case("gpt2_xl_causal_1k", 16, 25, 1024, 1024, 64, causal=True, tags=FAMILY),
        _case("full_1k_d128", 4, 16, 1024, 1024, 128, tags=("aot", *SWEEP)),
        *_timed("d128", 16, 128, (2, 4, 8, 16), LARGE),
        *_timed("d64", 12, 64, (4, 8, 16), SWEEP),
        _case("full_4k_d128", 8, 16, 4096, 4096, 128, tags=LARGE),
        _case("full_16k_d128", 2, 16, 16384, 16384, 128, tags=LARGE),
        _case("banded_256_4k", 8, 12, 4096, 4096, 64, causal=True, window=256, tags=SWEEP),
        _case("banded_1024_4k", 8, 12, 4096, 4096, 64, causal=True, window=1024, tags=SWEEP),
        _case(
            "grouped_4k_d128", 8, 32, 4096, 4096, 128, causal=True, Hkv=8, tags=("grouped", *SWEEP)
        ),
        _case("cpu_bench", 1, 4, 256, 256, 64, causal=True, tags=CPU),
        _case("cpu_full", 2, 4, 128, 128, 64, tags=CPU),
        *_strided(),
        *_cosines(),
    ],
    outputs={"o": "B H Tq D", "lse": "B H Tq"},
    flops=_attention_flops,
    moves=_attention_moves,
    errors=(
        Wrong("k_head_dim", "k must have shape", shapes={"k": (2, 2, 33, 15)}),
        Wrong("v_length", "v must have shape", shapes={"v": (2, 2, 32, 16)}),
        Wrong("q_rank", "q must have shape", shapes={"q": (2, 33, 16)}),
        Wrong("no_keys", "Tk must be at least 1", shapes={"k": (2, 2, 0, 16), "v": (2, 2, 0, 16)}),
        Wrong("unknown_align", "align must be one of", options={"align": "middle"}),
        Wrong(
            "heads",
            "H must be a multiple of Hkv",
            shapes={"k": (2, 4, 33, 16), "v": (2, 4, 33, 16)},
        ),
        Wrong("no_window", "window must be at least 1", options={"window": 0}),
        Wrong("half_a_key", "window must be an integer", options={"window": 2.5}, raises=TypeError),
        Wrong(
            "half_a_token",
            "global_tokens must be an integer",
            options={"global_tokens": 2.5},
            raises=TypeError,
        ),
        Wrong("global_tokens", "global_tokens must be at least", options={"global_tokens": -1}),
        Wrong("dropout", "dropout must lie in", options={"dropout": 1.5}),
        Wrong("long_length", "lengths must lie in", options={"lengths": (33, 34)}),
        Wrong("one_length", "lengths must have shape", options={"lengths": (33,)}),
        Wrong("documents_in_a_batch", "q must have shape", options={"cu_seqlens": (0, 33)}),
        Wrong(
            "documents_too_short",
            "cu_seqlens must rise",
            options={"cu_seqlens": (0, 30)},
            shapes=dict.fromkeys("qkv", (1, 2, 33, 16)),
        ),
        Wrong(
            "documents_fall",
            "cu_seqlens must rise",
            options={"cu_seqlens": (0, 20, 10, 33)},
            shapes=dict.fromkeys("qkv", (1, 2, 33, 16)),
        ),
        Wrong("stride_alone", "stride must come with a window", options={"stride": 4}),
        Wrong("stride_zero", "stride must be at least 1", options={"stride": 0, "window": 4}),
        Wrong(
            "half_a_stride",
            "stride must be an integer",
            options={"stride": 2.5, "window": 4},
            raises=TypeError,
        ),
        Wrong("unknown_score", "score must be one of", options={"score": "cos"}),
        Wrong("temperature_of_dots", "temperature must come with", shapes={"temperature": (2,)}),
        Wrong(
            "temperatures",
            "temperature must have shape",
            options={"score": "cosine"},
            shapes={"temperature": (3,)},
        ),
    ),
    lacks="stride or cosine",
    sizes={"Hkv": "H"},
    batch="B",
    unspecified=_nan_seen,
    sampled=attention_parts,
)


# how full the caches of a batch are, turn about
_SHARES = (1.0, 0.45, 0.7)


def _pages(dims):
    """Every row has pages of its own, in no order: (B, pages)."""
    order = np.random.default_rng(0).permutation(dims["P"])
    return order[: dims["B"] * dims["pages"]].reshape(dims["B"], dims["pages"])


def _decode(name, B, H, Hkv, Tq, D, page, pages, shares=_SHARES, tags=(), **options):
    """A decoding case; what a page holds past its row's length is NaN, and so are spare pages."""

    def lengths(n, dims, rng):
        most = dims["pages"] * dims["page"]
        rows = np.array([round(shares[i % len(shares)] * most) for i in range(len(n))], n.dtype)
        # in an order that is the same for all inputs of a draw
        return np.random.default_rng(rng.bit_generator.seed_seq.entropy).permutation(rows)

    def cache(x, dims, rng):
        used = np.zeros((dims["P"], dims["page"]), bool)
        slot = np.arange(dims["pages"] * dims["page"]).reshape(dims["pages"], dims["page"])
        n = lengths(np.zeros(dims["B"], int), dims, rng)
        used[_pages(dims)] = slot < n[:, None, None]
        return np.where(used[:, None, :, None], x, np.nan)

    values = {
        "k_pages": cache,
        "v_pages": cache,
        "block_table": lambda table, dims, rng: _pages(dims).astype(table.dtype),
        "lengths": lengths,
    }
    tags = (*tags, *(["grouped"] if Hkv != H else []))
    sizes = {"B": B, "H": H, "Hkv": Hkv, "Tq": Tq, "D": D, "page": page, "pages": pages}
    return Case(name, **sizes, P=B * pages + 2, values=values, tags=tags, **options)


def _decode_keys(c):
    """Keys in the caches of all rows, where they are as full as usual."""
    most = c.pages * c.page
    return sum(round(_SHARES[i % len(_SHARES)] * most) for i in range(c.B))


def _decode_flops(c, direction):
    return 4 * c.H * c.Tq * c.D * _decode_keys(c)


def _decode_moves(c, itemsize, direction):
    queries, keys = c.B * c.H * c.Tq * c.D, c.Hkv * c.D * _decode_keys(c)
    return itemsize * (queries + 2 * keys) + 4 * c.B * (c.pages + 1), itemsize * queries


PAGED_ATTENTION = row(
    "paged_attention",
    {
        "q": Input("B H Tq D", grad=False),
        "k_pages": Input("P Hkv page D", grad=False),
        "v_pages": Input("P Hkv page D", grad=False),
        "block_table": Index("B pages", below="P", dtype="int32"),
        "lengths": Index("B", below="page", dtype="int32"),
    },
    [
        _decode("one_query", 3, 2, 2, 1, 16, 16, 4),
        _decode("grouped_heads", 3, 6, 2, 1, 8, 16, 3),
        _decode("one_key_head", 2, 4, 1, 1, 8, 8, 5),
        _decode("several_queries", 3, 2, 2, 5, 8, 16, 3),
        _decode("contiguous_cache", 3, 2, 2, 1, 16, 77, 1),
        _decode("odd_page", 2, 2, 1, 2, 5, 7, 6),
        _decode("page_of_one", 2, 2, 2, 1, 8, 1, 19),
        _decode("several_splits", 2, 2, 2, 1, 8, 64, 9, shares=(1.0, 0.5)),
        _decode("one_key", 3, 2, 2, 1, 8, 16, 2, shares=(0.03, 1.0, 0.5)),
        _decode("length_zero", 3, 2, 2, 1, 8, 16, 2, shares=(0.0, 1.0, 0.4)),
        _decode("more_queries_than_keys", 2, 1, 1, 6, 8, 8, 2, shares=(0.2, 1.0)),
        _decode("window", 3, 2, 2, 1, 8, 16, 4, window=9),
        _decode("window_several_queries", 2, 2, 1, 4, 8, 16, 4, window=20),
        _decode("scale", 2, 2, 2, 1, 8, 16, 2, scale=0.8),
        _decode("head_dim_over_a_tile", 2, 2, 2, 1, 65, 16, 3),
        _decode("long_row", 1, 1, 1, 1, 8, 128, 20, tags=("full",)),
        _decode("gpt2_decode", 32, 12, 12, 1, 64, 16, 128, tags=("aot", *FAMILY)),
        _decode("long_decode", 64, 32, 8, 1, 128, 64, 256, tags=LARGE),
        _decode("cpu_bench", 4, 4, 4, 1, 64, 16, 32, tags=CPU),
    ],
    outputs={"o": "B H Tq D"},
    flops=_decode_flops,
    moves=_decode_moves,
    errors=(
        Wrong("k_head_dim", "k_pages must have shape", shapes={"k_pages": (14, 2, 16, 15)}),
        Wrong("v_pages", "v_pages must have shape", shapes={"v_pages": (14, 2, 15, 16)}),
        Wrong("length_over_pages", "lengths must lie in", values={"lengths": lambda n: n + 64}),
        Wrong("half_a_key", "window must be an integer", options={"window": 2.5}, raises=TypeError),
        Wrong("no_window", "window must be at least 1", options={"window": 0}),
        Wrong("heads", "H must be a multiple of Hkv", shapes={"q": (3, 3, 2, 16)}),
        Wrong("page_unknown", "block_table must lie in", values={"block_table": lambda t: t + 14}),
    ),
    batch="B",
    sampled=paged_attention_parts,
)
