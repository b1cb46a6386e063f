"""Attention of new queries over a key/value cache that lies in pages: decoding.

    k[b] = the pages block_table[b] one after the other, of which lengths[b] = n keys are there
    s = scale·q kᵀ where key j is visible to query t, else −∞
    o = softmax(s) v

Shapes: q, o (B, H, Tq, D); k_pages, v_pages (P, Hkv, page, D); block_table (B, pages) and lengths
(B,) int32 or int64. H a multiple of Hkv, D ≤ 256, any page. Any strides where the last dimension
is contiguous; q and pages are copied where it is not. A contiguous cache is one page a row.
Visible: query t stands at t' = t + n − Tq and sees keys j ≤ t', with a window of w only j > t' − w.
A query that sees nothing gives o = 0. Keys that no query sees are not read, nor are entries of the
table past the last key.
Algorithm: a row's keys are split; one program walks a split for a tile of the queries of all heads
that read one key head, with a running maximum and sum (online softmax), and leaves them and the
unnormalised o; a second kernel merges the splits, always in the same order. Where splits begin is
computed on the device, from the row's own length, the window and the shapes of a row: its bits
depend on no neighbour and not on the capacity of the cache. Exponentials are exp2 with log2(e)
folded into the scale. Lengths and pages are clamped: wrong ones on a GPU, where they are not
checked, give a wrong o and touch no foreign memory.
No gradient: nothing is saved, and to differentiate what Triton computed is an error.
dtypes: float16, bfloat16, float32 (IEEE products, not TF32), float64 (scale passes as float32).
Source: Kwon et al. 2023, arXiv:2309.06180; the splits as in Dao, Haziza, Massa and Sizov 2023,
"Flash-Decoding for long-context inference".
"""

import math

import torch
import triton
import triton.language as tl

from ._checks import (
    expect_alike,
    expect_dimensions,
    expect_integer,
    expect_integers,
    expect_shape,
    readable,
)
from ._launch import (
    accumulator,
    cast,
    contiguous_rows,
    dot,
    launch,
    resolve,
    tile,
    tl_accumulator,
    wide,
)

_LARGEST_HEAD_DIM = 256
# keys in a split are a multiple of this, and so many splits are the most that a row has
_SPLIT: tl.constexpr = tl.constexpr(256)
_MOST_SPLITS = 32
_LOG2E = 1 / math.log(2)


@triton.jit
def _splits(lengths_ptr, b, capacity, Tq, window, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """Of row b: keys n; the first key of the first split; keys in a split."""
    n = tl.load(lengths_ptr + b).to(tl.int64)
    n = tl.minimum(tl.maximum(n, 0), capacity).to(tl.int32)
    first = tl.maximum(n - Tq - window + 1, 0) // BLOCK_N * BLOCK_N
    return n, first, tl.maximum(tl.cdiv(n - first, SPLITS * _SPLIT), 1) * _SPLIT


@triton.jit
def _pages(
    table_ptr, stride, start, high, page, P, BLOCK_N: tl.constexpr, WHOLE_PAGES: tl.constexpr
):  # fmt: skip
    """The page of each of a tile's keys before `high`, or of all where one page holds the tile."""
    offs = start
    if not WHOLE_PAGES:
        offs = start + tl.arange(0, BLOCK_N)
    pages = tl.load(table_ptr + (offs // page).to(tl.int64) * stride, mask=offs < high, other=0)
    # carried to the next tile in half the registers
    return tl.minimum(tl.maximum(pages.to(tl.int64), 0), P - 1).to(tl.int32)


@triton.jit
def _load_rows(ptr, offs, mask, offs_d, D, WHOLE_D: tl.constexpr):
    """Rows of D elements at offs, zeros where masked."""
    ptrs = ptr + offs[:, None] + offs_d[None, :]
    if WHOLE_D:
        return tl.load(ptrs, mask=mask[:, None], other=0.0)
    return tl.load(ptrs, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _paged_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, acc_ptr, m_ptr, l_ptr,
    stride_qb, stride_qh, stride_qt, stride_kp, stride_kh, stride_kt,
    stride_vp, stride_vh, stride_vt, stride_tb, stride_tp,
    H, Hkv, Tq, D, P, page, capacity, window, splits, scale_log2e,
    WHOLE_PAGES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # heads before splits: neighbours in memory are read at the same time
    group = H // Hkv
    tiles = tl.cdiv(group * Tq, BLOCK_M)
    pid = tl.program_id(0)
    block, kv_head = pid % tiles, (pid // tiles % Hkv).to(tl.int64)
    split, b = pid // tiles // Hkv % splits, (pid // tiles // Hkv // splits).to(tl.int64)
    n, first, size = _splits(lengths_ptr, b, capacity, Tq, window, BLOCK_N, SPLITS)
    begin = first + split * size
    if begin >= n:
        return

    # rows of a tile: the group's heads of one query, then those of the next
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    head, t = kv_head * group + offs_m % group, offs_m // group
    own = t + n - Tq
    mask_m = offs_m < group * Tq
    offs_q = b * stride_qb + head * stride_qh + t.to(tl.int64) * stride_qt
    q = _load_rows(q_ptr, offs_q, mask_m, offs_d, D, WHOLE_D)

    # of the split's keys, those that some query of the tile sees
    low = block * BLOCK_M // group + n - Tq - window + 1
    high = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // group + n - Tq + 1, n)
    low, high = tl.maximum(low, begin), tl.minimum(high, begin + size)
    m_i = tl.full((BLOCK_M,), float("-inf"), ACC)
    l_i = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    # masked throughout: beside the loads the masks are free, and the loads never pause
    table_ptr += b * stride_tb
    low_tile = low // BLOCK_N * BLOCK_N
    ahead = _pages(table_ptr, stride_tp, low_tile, high, page, P, BLOCK_N, WHOLE_PAGES)
    for start in range(low_tile, high, BLOCK_N):
        # looked up a tile ahead: keys that wait for their pages would be loaded one tile at a time
        pages = ahead.to(tl.int64)
        ahead = _pages(table_ptr, stride_tp, start + BLOCK_N, high, page, P, BLOCK_N, WHOLE_PAGES)
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = (offs_n >= low) & (offs_n < high)
        slots = (offs_n % page).to(tl.int64)
        offs_k = pages * stride_kp + kv_head * stride_kh + slots * stride_kt
        offs_v = pages * stride_vp + kv_head * stride_vh + slots * stride_vt
        k = _load_rows(k_ptr, offs_k, mask_n, offs_d, D, WHOLE_D)
        v = _load_rows(v_ptr, offs_v, mask_n, offs_d, D, WHOLE_D)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), ACC)) * scale_log2e
        near = (offs_n[None, :] <= own[:, None]) & (offs_n[None, :] > own[:, None] - window)
        s = tl.where(near & mask_n[None, :], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # a row that has seen nothing yet must not turn into −inf − (−inf)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = dot(cast(p, v.dtype), v, acc * alpha[:, None])
        m_i = m_new

    parts = ((b * H + head) * Tq + t) * splits + split
    tl.store(m_ptr + parts, m_i, mask=mask_m)
    tl.store(l_ptr + parts, l_i, mask=mask_m)
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    tl.store(acc_ptr + parts[:, None] * D + offs_d[None, :], acc, mask=mask)


@triton.jit
def _paged_attention_merge_kernel(
    acc_ptr, m_ptr, l_ptr, lengths_ptr, o_ptr, H, Tq, D, capacity, window, splits,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query of one head: its splits side by side, SPLITS of them whatever the capacity is."""
    row = tl.program_id(0).to(tl.int64)
    n, first, size = _splits(lengths_ptr, row // Tq // H, capacity, Tq, window, BLOCK_N, SPLITS)
    offs_s = tl.arange(0, SPLITS)
    offs_d = tl.arange(0, BLOCK_D)
    mask_s = offs_s * size < n - first
    parts = row * splits + offs_s
    m = tl.load(m_ptr + parts, mask=mask_s, other=float("-inf"))
    l = tl.load(l_ptr + parts, mask=mask_s, other=0.0)
    mask = mask_s[:, None] & (offs_d < D)[None, :]
    acc = tl.load(acc_ptr + parts[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    most = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(l * weight, 0)
    # 0 only where nothing was seen; where a NaN was seen it is NaN
    o = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(o_ptr + row * D + offs_d, cast(o, o_ptr.dtype.element_ty), mask=offs_d < D)


# (most of BLOCK_M, BLOCK_N, stages) by the padded head dimension: 16 to 32 KiB of keys and values a
# stage, so that several programs share a multiprocessor, and no spills on sm_80 or sm_90.
_TILES = {64: (64, 64, 4), 128: (64, 64, 3), 256: (32, 32, 3)}
_WIDE_TILES = {64: (32, 32, 3), 128: (16, 16, 3), 256: (16, 16, 2)}


def _configuration(rows, D, dtype):
    """Launch options for so many queries of a key head: a pure function of shapes and dtype."""
    BLOCK_D = tile(D, _LARGEST_HEAD_DIM)
    # results of many elements need the registers of eight warps
    table, many = (_TILES, 4096) if dtype.itemsize == 2 else (_WIDE_TILES, 1024)
    BLOCK_M, BLOCK_N, stages = table[max(BLOCK_D, 64)]
    BLOCK_M = tile(rows, BLOCK_M)
    return dict(
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        WHOLE_D=BLOCK_D == D,
        # a key head with many queries has programs enough without splits
        SPLITS=max(_MOST_SPLITS // triton.next_power_of_2(triton.cdiv(rows, BLOCK_M) or 1), 1),
        ACC=tl_accumulator(dtype),
        num_warps=8 if many <= BLOCK_M * BLOCK_D else 4,
        num_stages=stages,
    )


def _most_splits(capacity, Tq, window, BLOCK_N, SPLITS):
    """The most splits that a row of any length up to the capacity has."""
    # the first split may begin before the first visible key, where a tile does
    keys = min(capacity, Tq + window - 1 + BLOCK_N - 1)
    return min(SPLITS, triton.cdiv(keys, _SPLIT.value))


def _forward(q, k_pages, v_pages, block_table, lengths, window, scale):
    """-> o (B, H, Tq, D) contiguous."""
    q, k_pages, v_pages = map(contiguous_rows, (q, k_pages, v_pages))
    lengths = lengths.contiguous()
    (B, H, Tq, D), (P, Hkv, page, _) = q.shape, k_pages.shape
    o = torch.empty((B, H, Tq, D), dtype=q.dtype, device=q.device)
    # nothing to read where there are no pages
    capacity = block_table.shape[1] * page if P else 0
    window = capacity if window is None else min(window, capacity)
    options = _configuration(H // Hkv * Tq, D, q.dtype)
    tiles = triton.cdiv(H // Hkv * Tq, options["BLOCK_M"])
    shared = {k: options[k] for k in ("BLOCK_N", "BLOCK_D", "SPLITS")}
    splits = _most_splits(capacity, Tq, window, options["BLOCK_N"], options["SPLITS"])
    acc = torch.empty((B, H, Tq, splits, D), dtype=accumulator(q.dtype), device=q.device)
    m, l = torch.empty((2, B, H, Tq, splits), dtype=acc.dtype, device=q.device)
    launch(
        _paged_attention_fwd_kernel, B * splits * Hkv * tiles,
        q, k_pages, v_pages, block_table, lengths, acc, m, l,
        *q.stride()[:3], *k_pages.stride()[:3], *v_pages.stride()[:3], *block_table.stride(),
        H, Hkv, Tq, D, P, page, capacity, window, splits, scale * _LOG2E,
        WHOLE_PAGES=page % options["BLOCK_N"] == 0, **options,
    )  # fmt: skip
    launch(
        _paged_attention_merge_kernel, B * H * Tq,
        acc, m, l, lengths, o, H, Tq, D, capacity, window, splits, num_warps=4, **shared,
    )  # fmt: skip
    return o


def _launch_all(q, k_pages, v_pages, block_table, lengths, window=None, scale=1.0):
    """One call straight through the launchers, to be compiled."""
    return _forward(q, k_pages, v_pages, block_table, lengths, window, scale)


@torch.library.custom_op("gaugeblock::paged_attention_fwd", mutates_args=())
def _fwd_op(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
    block_table: torch.Tensor, lengths: torch.Tensor, window: int | None, scale: float,
) -> torch.Tensor:  # fmt: skip
    return _forward(q, k_pages, v_pages, block_table, lengths, window, scale)


@_fwd_op.register_fake
def _(q, k_pages, v_pages, block_table, lengths, window, scale):
    return q.new_empty(q.shape)


def _eager(q, k_pages, v_pages, block_table, lengths, *, window=None, scale=None):
    """The plain torch twin."""
    (B, H, Tq, D), (P, Hkv, page, _) = q.shape, k_pages.shape
    scale = D**-0.5 if scale is None else scale
    Tk = block_table.shape[1] * page
    if not P or not Tk:
        return q.new_zeros(q.shape)
    j = torch.arange(Tk, device=q.device)
    n = lengths[:, None, None].clamp(0, Tk)
    own = torch.arange(Tq, device=q.device)[:, None] + n - Tq
    visible = (j <= own) & (j < n)
    if window is not None:
        visible = visible & (j > own - window)
    # what nobody sees may hold anything, NaN included, and so may the table's entries for it
    seen, sees = visible.any(1)[:, None, :, None], visible.any(2)[:, None, :, None]
    table = block_table.where(seen.view(*block_table.shape, page).any(2), 0).clamp(0, P - 1).long()
    k, v = (
        x[table].transpose(1, 2).reshape(B, Hkv, Tk, D).where(seen, 0.0) for x in (k_pages, v_pages)
    )
    k, v = (x.repeat_interleave(H // Hkv, 1) for x in (k, v))
    scores = scale * (wide(q.where(sees, 0.0)) @ wide(k).mT)
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    p = scores.where(sees, 0.0).softmax(-1)
    return (wide(p.to(v.dtype)) @ wide(v)).where(sees, 0.0).to(q.dtype)


def paged_attention(
    q, k_pages, v_pages, block_table, lengths, *, window=None, scale=None, impl="auto"
):
    """o = attention of q over the keys in the pages of its row, causal.

    Shapes: q, o (B, H, Tq, D); k_pages, v_pages (P, Hkv, page, D); block_table (B, pages) and
    lengths (B,) int32 or int64. The queries are the last Tq of a row's lengths[b] positions; a
    window of w shows w keys, a query's own among them. scale defaults to D^(−1/2).
    Raises ValueError for shapes, devices or (on a CPU) lengths and pages out of range, TypeError
    for dtypes.
    """
    expect_alike("paged_attention", q=q, k_pages=k_pages, v_pages=v_pages)
    expect_shape("paged_attention", "q", q, "(B, H, Tq, D)", (None,) * 4)
    expect_dimensions("paged_attention", "q", q, "(B, H, Tq, D)")
    B, H, _, D = q.shape
    pages = "(P, Hkv, page, D)"
    expect_shape("paged_attention", "k_pages", k_pages, pages, (None, None, None, D))
    expect_shape("paged_attention", "v_pages", v_pages, pages, tuple(k_pages.shape))
    _expect_integers(q, "block_table", block_table, "(B, pages)", (B, None))
    _expect_integers(q, "lengths", lengths, "(B,)", (B,))
    P, Hkv, page, _ = k_pages.shape
    if Hkv < 1 or H % Hkv:
        raise ValueError(f"paged_attention: H must be a multiple of Hkv, got H = {H}, Hkv = {Hkv}")
    if page < 1:
        raise ValueError("paged_attention: page must be at least 1, got 0")
    if window is not None:
        expect_integer("paged_attention", "window", window)
    if window is not None and window < 1:
        raise ValueError(
            f"paged_attention: window must be at least 1 (a key itself), got {window}; "
            "None has no window"
        )
    _expect_pages(block_table, lengths, P, page)
    scale = D**-0.5 if scale is None else float(scale)
    if resolve("paged_attention", impl, q) == "eager":
        return _eager(q, k_pages, v_pages, block_table, lengths, window=window, scale=scale)
    if D > _LARGEST_HEAD_DIM:
        raise ValueError(
            f"paged_attention: D must be at most {_LARGEST_HEAD_DIM}, got {D}; use impl='eager'"
        )
    return _fwd_op(q, k_pages, v_pages, block_table, lengths, window, scale)


def _expect_integers(q, name, ids, rule, shape):
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"paged_attention: {name} must be a torch tensor, got {type(ids).__name__}")
    expect_shape("paged_attention", name, ids, rule, shape)
    expect_integers("paged_attention", name, ids)
    if ids.device != q.device:
        raise ValueError(
            f"paged_attention: {name} must be on q's device {q.device}, got {ids.device}; move it"
        )


def _expect_pages(block_table, lengths, P, page):
    """Raise ValueError for a length or a used page out of range, where the values are at hand."""
    if not (readable(lengths) and readable(block_table)):
        return
    capacity = block_table.shape[1] * page
    wrong = lengths[(lengths < 0) | (lengths > capacity)]
    if len(wrong):
        raise ValueError(
            f"paged_attention: lengths must lie in 0 … pages·page = {capacity}, got {int(wrong[0])}"
        )
    used = torch.arange(0, capacity, page) < lengths[:, None]
    wrong = block_table[used & ((block_table < 0) | (block_table >= P))]
    if len(wrong):
        raise ValueError(
            f"paged_attention: block_table must lie in 0 … P − 1 = {P - 1}, got {int(wrong[0])}"
        )
