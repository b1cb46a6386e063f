"""The reference's attention has no more than three arrays of scores, and keeps none of them."""

import tracemalloc

import numpy as np
import pytest
from gaugeblock.reference import attention, attention_backward

B, H, T, D = 1, 2, 400, 8
SCORES = B * H * T * T
OPTIONS = {
    "plain": {},
    "causal_lse": dict(causal=True, return_lse=True),
    "dropout": dict(dropout=0.2),
    "window_stride": dict(causal=True, window=3, stride=5),
    "documents": dict(cu_seqlens=(0, 100, 400)),
    "cosine": dict(score="cosine", temperature=np.full(H, 0.3), dropout=0.1),
}


def peak(call, start):
    tracemalloc.reset_peak()
    result = call()
    return tracemalloc.get_traced_memory()[1] - start, result


@pytest.mark.parametrize("name", OPTIONS)
def test_no_more_than_three_score_arrays_are_alive(name):
    options = OPTIONS[name]
    q, k, v, do = np.random.default_rng(0).standard_normal((4, B, H, T, D))
    dy = (do, do[..., 0]) if options.get("return_lse") else do
    tracemalloc.start()
    try:
        start, _ = tracemalloc.get_traced_memory()
        forward, (_, cache) = peak(lambda: attention(q, k, v, **options), start)
        kept, _ = tracemalloc.get_traced_memory()
        backward, _ = peak(lambda: attention_backward(dy, cache), start)
    finally:
        tracemalloc.stop()
    # three in float64, a boolean mask and what dropout keeps; the rest is of the size of q
    allowed = 3 * 8 * SCORES + 2 * SCORES + 20 * q.nbytes
    assert max(forward, backward) <= allowed
    # what dropout keeps, and the mask
    assert kept - start <= 2 * SCORES + 10 * q.nbytes
    # the test sees an array
    assert forward > 8 * SCORES and backward > 2 * 8 * SCORES
