"""A token drawn from the truncated softmax of the logits, given a uniform number.

    s = ℓ/temperature,   p = softmax of s over the tokens that the filters keep
    cdf_v = Σ_{v' ≤ v} p_v',   token = the v with cdf_{v−1} ≤ u < cdf_v

ℓ are the logits; those of the tokens in `previous` are first divided by `repetition_penalty` where
positive and multiplied by it where not, once however often a token is there; −1 there is padding.

Temperature 0 is greedy: the largest logit, the lowest index of equals. The filters, in this order,
each on the softmax of what the one before has kept:

    top_k   the k largest, with all that equal the k-th; everything where k ≥ V
    top_p   the smallest set of the most probable tokens whose mass reaches p: a token goes when
            its mass and that of all less probable ones is ≤ 1 − p; of equals the lower index
            goes first, any other choice is as right; the most probable token stays
    min_p   probability ≥ min_p times the largest

A logit of −∞ is never drawn. Rows with NaN or +∞, or without a finite logit, are unspecified.
Within a rounding of a boundary, of an interval or of a filter, either neighbour is right.
There is no backward: a choice has no gradient.

Shapes: logits (..., V); u (...) in 0 … 1, 1 excluded; previous (..., P) int; token (...) int64.
dtype float64.
Source: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2020, arXiv:1904.09751 (top-p);
Nguyen et al. 2024, arXiv:2407.01082 (min-p); Keskar et al. 2019, arXiv:1909.05858, section 4.1
(penalty); order and edges as in Hugging Face's `generate`.
"""

import numpy as np

from ._checks import expect_ids, expect_integer, expect_number, expect_shape
from ._rounding import floats, rescaled


def sample(
    logits, u, temperature=1.0, top_k=None, top_p=None, min_p=None, *,
    repetition_penalty=1.0, previous=None,
):  # fmt: skip
    """The token whose cumulative interval holds u  ->  token, None."""
    logits, u = floats(logits, u)
    expect_shape("sample", "logits", logits, "(..., V)", (*u.shape, None))
    if logits.shape[-1] < 1:
        raise ValueError("sample: V must be at least 1, got 0")
    outside = ~((u >= 0) & (u < 1))
    if outside.any():
        raise ValueError(f"sample: u must lie in 0 … 1, 1 excluded, got {u[outside].flat[0]}")
    logits = penalised(logits, repetition_penalty, previous)
    _, cdf = cumulative(logits, temperature, top_k, top_p, min_p)
    return (cdf > u[..., None]).argmax(-1), None


def penalised(logits, repetition_penalty=1.0, previous=None):
    """The logits, those of tokens in `previous` made less likely by a penalty above 1."""
    expect_number("sample", "repetition_penalty", repetition_penalty)
    if not 0 < repetition_penalty < np.inf:
        raise ValueError(
            f"sample: repetition_penalty must be finite and above 0, got {repetition_penalty}"
        )
    if previous is None:
        if repetition_penalty != 1:
            raise ValueError(
                "sample: repetition_penalty must come with previous, got none; "
                "previous are the tokens that are penalised"
            )
        return logits
    V = logits.shape[-1]
    expect_shape("sample", "previous", previous, "(..., P)", (*logits.shape[:-1], None))
    previous = expect_ids("sample", "previous", previous, V, "V", also=-1)
    # one column more, for padding
    found = np.zeros((*logits.shape[:-1], V + 1), bool)
    np.put_along_axis(found, previous, True, -1)
    penalty = np.full_like(logits, repetition_penalty, shape=())
    less = np.where(logits > 0, logits / penalty, logits * penalty)
    return np.where(found[..., :V], less, logits)


def cumulative(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """(kept, cdf): which tokens the filters keep, and the cumulative distribution over them."""
    logits = floats(logits)
    _expect_filters(temperature, top_k, top_p, min_p)
    if temperature == 0:
        kept = np.arange(logits.shape[-1]) == logits.argmax(-1)[..., None]
        return kept, distribution(logits, kept)
    s = rescaled(logits / temperature)
    kept = s > -np.inf
    if top_k is not None:
        kept = kept & (s >= np.sort(s, -1)[..., -min(top_k, s.shape[-1]), None])
    # 1 keeps everything, however the mass was rounded
    if top_p is not None and top_p < 1:
        p = _softmax(s, kept)
        order = np.argsort(p, -1, kind="stable")
        stays = np.cumsum(np.take_along_axis(p, order, -1), -1) > 1 - top_p
        stays[..., -1:] = True
        np.put_along_axis(chosen := np.zeros_like(kept), order, stays, -1)
        kept = kept & chosen
    if min_p is not None:
        p = _softmax(s, kept)
        most = p.max(-1, keepdims=True)
        # the most probable stays, whatever rounding does to the product
        kept = kept & ((p >= min_p * most) | (p == most))
    return kept, distribution(s, kept)


def distribution(s, kept):
    """The cumulative softmax of s over the kept tokens; its last value is exactly 1."""
    total = np.cumsum(_softmax(s, kept), -1)
    return total / total[..., -1:]


def _softmax(s, kept):
    s = np.where(kept, s, -np.inf)
    with np.errstate(invalid="ignore"):
        e = np.exp(s - s.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)


def _expect_filters(temperature, top_k, top_p, min_p):
    for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        if value is not None or name == "temperature":
            expect_number("sample", name, value)
    if not 0 <= temperature < np.inf:
        raise ValueError(f"sample: temperature must be finite and at least 0, got {temperature}")
    if top_k is not None:
        expect_integer("sample", "top_k", top_k)
        if top_k < 1:
            raise ValueError(f"sample: top_k must be at least 1, got {top_k}; None keeps all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample: top_p must lie in 0 … 1, 0 excluded, got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"sample: min_p must lie in 0 … 1, got {min_p}")
