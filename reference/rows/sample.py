"""Row of `sample`, and which tokens are right within rounding."""

import itertools

import numpy as np

from .._sample import cumulative, distribution, penalised
from ..oracle.op import Case, Index, Input, Wrong
from .parts import sample_parts
from .row import CPU, FAMILY, LARGE, row
from .values import all_negative, constant_rows, outlier_row, spread_by_100, tiny, zeros


def _uniform(u, dims, rng):
    """Uniform, and below 1 in every storage dtype."""
    return rng.random(u.shape) * (1 - 2**-7)


def _largest_below_1(u, dims, rng):
    """The largest number below 1 that bfloat16 holds."""
    return np.full_like(u, 1 - 2**-8)


def _rounded(logits, dims, rng):
    """Logits with many equals."""
    return np.round(2 * logits) / 2


def _last_3_masked(logits, dims, rng):
    logits[..., -3:] = -np.inf
    return logits


def _first_140_logits_masked(logits, dims, rng):
    logits[..., :140] = -np.inf
    return logits


def _one_finite(logits, dims, rng):
    """Only token row + 1 can be drawn."""
    rows = np.arange(len(logits))
    only = np.full_like(logits, -np.inf)
    only[rows, rows + 1] = logits[rows, rows + 1]
    return only


def _offset_1000(x, dims, rng):
    """exp overflows unless the maximum is subtracted."""
    return x + 1000


def accepts(token, inputs, options, runs):
    """Boolean (...): is each token right, within the rounding of legal runs?

    token:  the candidate's, (...).
    inputs: {"logits": (..., V), "u": (...)} in float64, and {"previous": (..., P)} or none.
    runs:   callables, each taking a float64 array into one legal arithmetic.

    A token is right if some legal set of kept tokens holds it, and its interval of the exact
    distribution over that set, widened by twice the largest error of a legal distribution and a
    float32 ulp, holds u. Legal sets are those of the runs, and the exact ones with their
    thresholds moved by that tolerance and with equals at the edge of top_p chosen in any way.
    """
    u, token, options = inputs["u"], np.asarray(token), dict(options)
    penalty = options.pop("repetition_penalty", 1.0), inputs.get("previous")
    logits = penalised(inputs["logits"], *penalty)
    temperature = options.get("temperature", 1.0)
    index = np.where((token >= 0) & (token < logits.shape[-1]), token, 0).astype(np.int64)
    if temperature == 0:
        return token == logits.argmax(-1)

    s = logits / temperature
    legal = [cumulative(penalised(run(inputs["logits"]), *penalty), **options) for run in runs]
    sets = [np.asarray(kept) for kept, _ in legal]
    errors = [
        np.abs(np.asarray(cdf, np.float64) - distribution(s, kept)).max(-1)
        for kept, (_, cdf) in zip(sets, legal)
    ]
    tolerance = 2 * np.max(errors, axis=0, initial=0.0) + np.finfo(np.float32).eps
    right = np.zeros(u.shape, bool)
    for kept in [*sets, *_exact_sets(logits, options, tolerance.max(initial=0.0))]:
        member, below, above = _interval(s, kept, index)
        right |= member & (below - tolerance <= u) & (u < above + tolerance)
    return right & (index == token)


def _interval(s, kept, index):
    """(may a token be kept, ends of its interval), whichever of the equals at the edge are kept.

    Some of the tokens that equal the least kept one may be left out: how many is given, which is
    not. With `before` of them below the token and `after` above it, between chosen − after and
    before of them count towards its lower end.
    """

    def at(x):
        return np.take_along_axis(x, index[..., None], -1)[..., 0]

    equal = s == np.where(kept, s, np.inf).min(-1, keepdims=True)
    mass = np.diff(distribution(s, kept), axis=-1, prepend=0.0)
    # the largest, for the others of these differences may have lost digits
    each = np.where(equal & kept, mass, 0.0).max(-1)
    others = np.where(equal, 0.0, mass)
    is_equal = at(equal)
    before = at(np.cumsum(equal, -1)) - is_equal
    after = equal.sum(-1) - before - is_equal
    chosen = (equal & kept).sum(-1) - is_equal
    start = at(np.cumsum(others, -1)) - at(others)
    below = start + np.maximum(chosen - after, 0) * each
    above = start + np.minimum(before, chosen) * each + np.where(is_equal, each, at(mass))
    return at(kept) | is_equal, below, above


def _exact_sets(logits, options, tolerance):
    """The sets kept in float64, with top_p and min_p moved to either side of their thresholds."""
    top_p, min_p = options.get("top_p"), options.get("min_p")
    moves = (-tolerance, 0.0, tolerance)
    top_ps = [None] if top_p is None else [min(max(top_p + t, 1e-300), 1.0) for t in moves]
    min_ps = [None] if min_p is None else [min(min_p * (1 + t), 1.0) for t in moves]
    for top_p, min_p in itertools.product(top_ps, min_ps):
        kept, _ = cumulative(logits, **{**options, "top_p": top_p, "min_p": min_p})
        yield kept
        # all that equal the least kept one stay, as where a kernel looks for a threshold
        yield logits >= np.where(kept, logits, np.inf).min(-1, keepdims=True)


def _sample_case(name, M, V, *, values=None, tags=(), **options):
    return Case(name, M=M, V=V, values={"u": _uniform} | (values or {}), tags=tags, **options)


def _penalty(name, M, V, P, *, values=None, **options):
    """A case with tokens that came before, some of them several times."""
    values = {"previous": _padded} | (values or {})
    return _sample_case(name, M, V, P=P, values=values, keywords=("previous",), **options)


def _padded(previous, dims, rng):
    """The first columns of all rows but one are padding."""
    previous[1:, : previous.shape[1] // 3] = -1
    return previous


def _all_padding(previous, dims, rng):
    return np.full_like(previous, -1)


def _every_token(previous, dims, rng):
    return np.broadcast_to(np.arange(dims["P"]) % dims["V"], previous.shape).copy()


SAMPLE = row(
    "sample",
    {
        "logits": Input("M V", grad=False),
        "u": Input("M", grad=False, dtype="float32"),
        "previous": Index("M P", below="V", keyword=True),
    },
    [
        _sample_case("odd", 7, 101),
        _sample_case("one_row", 1, 50),
        _sample_case("one_token", 5, 1, tags=("degenerate",)),
        _sample_case("many_rows", 67, 33),
        _sample_case("one_below_a_tile", 5, 1023),
        _sample_case("one_over_a_tile", 5, 1025),
        _sample_case("several_tiles", 3, 4099),
        _sample_case("several_tiles_filtered", 3, 4097, top_k=50, top_p=0.9),
        _sample_case("greedy", 9, 77, temperature=0.0),
        _sample_case("greedy_equals", 9, 77, temperature=0.0, values={"logits": _rounded}),
        _sample_case("cold", 9, 77, temperature=0.3),
        _sample_case("hot", 9, 77, temperature=3.0),
        _sample_case("top_k", 19, 77, top_k=5),
        _sample_case("top_k_one", 19, 77, top_k=1),
        # all that equal the k-th stay
        _sample_case("top_k_equals", 19, 77, top_k=5, values={"logits": _rounded}),
        _sample_case("top_k_over_the_vocabulary", 19, 20, top_k=50),
        _sample_case("top_p", 19, 77, top_p=0.7),
        _sample_case("top_p_equals", 19, 77, top_p=0.7, values={"logits": _rounded}),
        # less than the most probable token: it stays
        _sample_case("top_p_small", 19, 77, top_p=1e-3),
        _sample_case("top_p_one", 19, 77, top_p=1.0),
        _sample_case("min_p", 19, 77, min_p=0.2),
        _sample_case("min_p_one", 19, 77, min_p=1.0),
        _sample_case("min_p_zero", 19, 77, min_p=0.0),
        # each filter sees the distribution that the one before has left
        _sample_case("top_k_then_top_p", 40, 77, top_k=6, top_p=0.6),
        _sample_case("all_filters", 40, 77, temperature=1.7, top_k=20, top_p=0.8, min_p=0.3),
        _sample_case("u_zero", 9, 77, top_k=3, values={"u": zeros}),
        _sample_case("u_near_one", 9, 77, top_k=3, values={"u": _largest_below_1}),
        _sample_case("padded_vocabulary", 9, 67, values={"logits": _last_3_masked}),
        _sample_case("first_tile_masked", 9, 300, values={"logits": _first_140_logits_masked}),
        _sample_case("one_finite", 9, 77, top_k=4, top_p=0.9, values={"logits": _one_finite}),
        _sample_case("logits_spread_by_100", 9, 77, values={"logits": spread_by_100}),
        _sample_case("offset_1000", 9, 77, values={"logits": _offset_1000}),
        _sample_case("outlier_row", 9, 77, values={"logits": outlier_row}),
        _sample_case("tiny", 9, 77, values={"logits": tiny}),
        _sample_case("negative", 9, 77, values={"logits": all_negative}),
        _sample_case("constant_rows", 9, 77, values={"logits": constant_rows}),
        _sample_case("no_rows", 0, 16, tags=("degenerate", "full")),
        _sample_case("gpt2_vocabulary", 64, 50257, temperature=0.8, top_k=200, top_p=0.95,
                     tags=("aot", *FAMILY)),
        _sample_case("gpt2_full_batch", 8192, 50257, tags=("aot", *LARGE)),
        _sample_case("compiled_short_rows", 64, 1000, top_k=50, top_p=0.9, min_p=0.1,
                     tags=("aot", "configuration")),
        _sample_case("compiled_greedy", 64, 50257, temperature=0.0,
                     tags=("aot", "configuration")),
        _sample_case("cpu_bench", 4, 50257, temperature=0.8, top_k=200, tags=CPU),
        _penalty("penalty", 19, 77, 40, repetition_penalty=1.8),
        _penalty("penalty_below_1", 19, 77, 40, repetition_penalty=0.4),
        _penalty("penalty_greedy", 40, 77, 60, repetition_penalty=3.0, temperature=0.0),
        # once, however often a token is there
        _penalty("penalty_repeats", 19, 7, 40, repetition_penalty=1.3),
        # before the temperature and the filters
        _penalty("penalty_filters", 40, 77, 50, repetition_penalty=1.5, temperature=0.6, top_k=9,
                 top_p=0.9, min_p=0.05),
        _penalty("penalty_of_nothing", 9, 77, 5, repetition_penalty=2.0,
                 values={"previous": _all_padding}),
        _penalty("penalty_of_everything", 19, 30, 35, repetition_penalty=2.0,
                 values={"previous": _every_token}),
        _penalty("penalty_neutral", 9, 77, 30, repetition_penalty=1.0),
        _penalty("penalty_masked", 9, 67, 40, repetition_penalty=1.5,
                 values={"logits": _last_3_masked}),
    ],
    outputs={"token": "M"},
    batch="M",
    accepts=accepts,
    flops=lambda c, direction: c.M * c.V * (5 if direction == "fwd" else 0),
    errors=(
        Wrong("u_count", "logits must have shape", shapes={"u": (6,)}),
        Wrong("u_one", "u must lie in", values={"u": lambda u: u * 0 + 1}),
        Wrong("u_negative", "u must lie in", values={"u": lambda u: u - 1}),
        Wrong("no_tokens", "V must be at least 1", shapes={"logits": (7, 0)}),
        Wrong("top_p_text", "top_p must be a number", options={"top_p": "1"}, raises=TypeError),
        Wrong("temperature_negative", "temperature must be", options={"temperature": -1.0}),
        Wrong("top_k_zero", "top_k must be at least 1", options={"top_k": 0}),
        Wrong("top_k_float", "top_k must be an integer", options={"top_k": 2.5}, raises=TypeError),
        Wrong("top_p_zero", "top_p must lie in", options={"top_p": 0.0}),
        Wrong("top_p_over_1", "top_p must lie in", options={"top_p": 1.5}),
        Wrong("min_p_over_1", "min_p must lie in", options={"min_p": 1.5}),
        Wrong("penalty_zero", "repetition_penalty must be", options={"repetition_penalty": 0.0}),
        Wrong("penalty_alone", "repetition_penalty must come with",
              options={"repetition_penalty": 1.2}),
        Wrong("previous_rows", "previous must have shape", shapes={"previous": (6, 3)}),
    ),
    lacks="previous",
    sampled=sample_parts,
)  # fmt: skip
