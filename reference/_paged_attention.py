"""Attention of new queries over a key/value cache that lies in pages.

    k[b] = the pages block_table[b] one after the other, of which lengths[b] keys are there
    o = attention(q, k, v, causal, bottom right by lengths, window)
    dk_pages, dv_pages: the gradients of the gathered keys and values, added where a page is shared

The queries are the last Tq of the lengths[b] positions. What a page holds past lengths[b] changes
nothing. Entries of the table past the last page that is used are not read. A contiguous cache is
one page a row.

Shapes: q, o (B, H, Tq, D); k_pages, v_pages (P, Hkv, page, D); block_table (B, pages) int;
lengths (B,) int. dtype float64.
Source: Kwon et al. 2023, arXiv:2309.06180.
"""

import numpy as np

from ._attention import attention, attention_backward, expect_groups, expect_window
from ._checks import expect_ids, expect_shape
from ._rounding import floats


def paged_attention(q, k_pages, v_pages, block_table, lengths, *, window=None, scale=None):
    """o = attention of q over the pages of its row  ->  o, cache."""
    q, k_pages, v_pages = floats(q, k_pages, v_pages)
    expect_shape("paged_attention", "q", q, "(B, H, Tq, D)", (None,) * 4)
    B, H, _, D = q.shape
    expect_shape("paged_attention", "k_pages", k_pages, "(P, Hkv, page, D)", (None, None, None, D))
    expect_shape("paged_attention", "v_pages", v_pages, "(P, Hkv, page, D)", k_pages.shape)
    expect_shape("paged_attention", "block_table", block_table, "(B, pages)", (B, None))
    expect_shape("paged_attention", "lengths", lengths, "(B,)", (B,))
    P, Hkv, page, _ = k_pages.shape
    expect_groups("paged_attention", H, Hkv)
    expect_window("paged_attention", window)
    capacity = np.shape(block_table)[1] * page
    lengths = expect_ids("paged_attention", "lengths", lengths, capacity + 1, "(pages·page + 1)")
    used = np.arange(np.shape(block_table)[1]) * page < lengths[:, None]
    table = expect_ids("paged_attention", "block_table", np.where(used, block_table, 0), P, "P")

    k, v = _gathered(k_pages, table), _gathered(v_pages, table)
    o, cache = attention(q, k, v, causal=True, lengths=lengths, window=window, scale=scale)
    return o, (cache, table, k_pages.shape)


def paged_attention_backward(do, cache):
    """-> dq, dk_pages, dv_pages."""
    cache, table, shape = cache
    dq, dk, dv = attention_backward(do, cache)
    return dq, _scattered(dk, table, shape), _scattered(dv, table, shape)


def _gathered(pages, table):
    """(B, Hkv, pages·page, D): the pages of each row, one after the other."""
    rows = pages[table].swapaxes(1, 2)  # (B, Hkv, pages, page, D)
    return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])


def _scattered(dk, table, shape):
    """The gradient of `_gathered`."""
    _, Hkv, page, D = shape
    rows = dk.reshape(dk.shape[0], Hkv, -1, page, D).swapaxes(1, 2)
    dpages = np.zeros(shape)
    np.add.at(dpages, table, rows)
    return dpages
