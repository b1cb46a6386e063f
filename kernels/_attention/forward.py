"""The forward kernel: one program a tile of queries, online softmax over the tiles of keys."""

import math

import triton
import triton.language as tl

from .._launch import cast, dot
from .._philox import kept
from .masks import UNSPECIALIZED, key_walk, locate, masked_start, sees, visible

LN2: tl.constexpr = tl.constexpr(math.log(2))
LOG2E: tl.constexpr = tl.constexpr(1 / math.log(2))


@triton.jit
def load_rows(
    ptr, stride_t, offs_t, mask_t, offs_d, D, WHOLE_T: tl.constexpr, WHOLE_D: tl.constexpr
):
    """Rows offs_t of a (T, D) matrix, zeros where masked. WHOLE_* promises that a mask is true."""
    ptrs = ptr + offs_t.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    if WHOLE_T and WHOLE_D:
        return tl.load(ptrs)
    if WHOLE_T:
        return tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
    if WHOLE_D:
        return tl.load(ptrs, mask=mask_t[:, None], other=0.0)
    return tl.load(ptrs, mask=mask_t[:, None] & (offs_d[None, :] < D), other=0.0)


@triton.jit
def load_tile(
    ptr, desc, stride_t, b, h, begin, start, mask_t, offs_d, D,
    TMA: tl.constexpr, WHOLE_T: tl.constexpr, WHOLE_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows start … start + BLOCK − 1: by a descriptor, which gives zeros past T, or by pointers."""
    if TMA:
        row = tl.cast(begin + start, tl.int32)
        tile = desc.load([tl.cast(b, tl.int32), tl.cast(h, tl.int32), row, 0])
        return tile.reshape(BLOCK, offs_d.shape[0])
    else:
        offs = start + tl.arange(0, BLOCK)
        return load_rows(ptr, stride_t, offs, mask_t, offs_d, D, WHOLE_T, WHOLE_D)


@triton.jit
def scale_scores(s, scale_log2e, PRESCALED: tl.constexpr):
    """Scores in base 2, and the factor that is still to be folded into the exponent's argument.

    The maximum of s·scale is max(s)·scale only where the scale is positive.
    """
    if PRESCALED:
        return s * scale_log2e, 1.0
    else:
        return s, scale_log2e


@triton.jit
def _attention_fwd_tile(
    acc, m_i, l_i, q, k, v, i, j, n, window, global_tokens, scale_log2e, index, seed, least,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRESCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys at positions j (1, BLOCK_N), queries at i (BLOCK_M, 1): acc, m_i, l_i."""
    s = tl.zeros((q.shape[0], k.shape[0]), acc.dtype)
    s, factor = scale_scores(dot(q, tl.trans(k), s, PRECISION), scale_log2e, PRESCALED)
    if MASKED:
        s = tl.where(visible(i, j, n, window, global_tokens, CAUSAL), s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
    # a row that has seen nothing yet, or −inf alone, must not turn into −inf − (−inf)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    if least is not None:
        p = tl.where(kept(index + j, seed, least), p, 0.0)
    acc = dot(cast(p, v.dtype), v, acc * alpha[:, None], PRECISION)
    return acc, m_new, l_i


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, k_desc, v_desc, lengths_ptr, cu_seqlens_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    H, group, Tq, Tk, D, pairs, section, documents,
    scale_log2e, window, global_tokens, least, seed, keep_scale,
    CAUSAL: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PRESCALED: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, TMA_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    b, h, block, begin, rows, n, shift = locate(
        Tq, Tq, Tk, H, pairs, section, documents, lengths_ptr, cu_seqlens_ptr,
        BOTTOM_RIGHT, BLOCK_M, CAUSAL,
    )  # fmt: skip
    h_k = h // group
    q_ptr += b * stride_qb + h * stride_qh + begin * stride_qt
    k_ptr += b * stride_kb + h_k * stride_kh + begin * stride_kt
    v_ptr += b * stride_vb + h_k * stride_vh + begin * stride_vt

    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = sees(offs_m, rows, n, shift, window, global_tokens, CAUSAL)
    q = load_rows(q_ptr, stride_qt, offs_m, mask_m, offs_d, D, False, WHOLE_D)
    i = (offs_m + shift)[:, None]
    low, high, global_high, open_first, open_last, head, left, first, masked = key_walk(
        block, rows, n, shift, window, global_tokens, CAUSAL, BLOCK_M, BLOCK_N
    )
    # where dropout counts the scores from
    index = ((b * H + h) * Tq + begin + offs_m)[:, None] * Tk + begin

    m_i = tl.full((BLOCK_M,), float("-inf"), ACC)
    l_i = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for start in range(open_first, open_last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        k = load_tile(
            k_ptr, k_desc, stride_kt, b, h_k, begin, start, offs_n < n, offs_d, D,
            TMA, True, WHOLE_D, BLOCK_N,
        )  # fmt: skip
        v = load_tile(
            v_ptr, v_desc, stride_vt, b, h_k, begin, start, offs_n < n, offs_d, D,
            TMA, True, WHOLE_D, BLOCK_N,
        )  # fmt: skip
        acc, m_i, l_i = _attention_fwd_tile(
            acc, m_i, l_i, q, k, v, i, offs_n[None, :], n, window, global_tokens, scale_log2e,
            index, seed, least, CAUSAL, False, PRESCALED, PRECISION,
        )  # fmt: skip
    for number in range(0, masked):
        start = masked_start(number, open_last, head, left, first, BLOCK_N)
        offs_n = start + tl.arange(0, BLOCK_N)
        # keys that no query of the tile sees are not read: they may hold NaN
        mask_n = (offs_n < high) & ((offs_n >= low) | (offs_n < global_high))
        k = load_tile(
            k_ptr, k_desc, stride_kt, b, h_k, begin, start, mask_n, offs_d, D,
            TMA_MASKED, False, WHOLE_D, BLOCK_N,
        )  # fmt: skip
        v = load_tile(
            v_ptr, v_desc, stride_vt, b, h_k, begin, start, mask_n, offs_d, D,
            TMA_MASKED, False, WHOLE_D, BLOCK_N,
        )  # fmt: skip
        acc, m_i, l_i = _attention_fwd_tile(
            acc, m_i, l_i, q, k, v, i, offs_n[None, :], n, window, global_tokens, scale_log2e,
            index, seed, least, CAUSAL, True, PRESCALED, PRECISION,
        )  # fmt: skip

    # l_i is 0 only where nothing was seen; where a NaN was seen it is NaN
    saw = l_i != 0.0
    l_i = tl.where(saw, l_i, 1.0)
    o = acc * (keep_scale / l_i)[:, None]
    offs = (b * H + h) * Tq + begin + offs_m
    tl.store(
        o_ptr + offs[:, None] * D + offs_d[None, :], cast(o, o_ptr.dtype.element_ty),
        mask=(offs_m < rows)[:, None] & (offs_d < D)[None, :],
    )  # fmt: skip
    lse = tl.where(saw, (m_i + tl.log2(l_i)) * LN2, float("-inf"))
    tl.store(lse_ptr + offs, lse, mask=offs_m < rows)
