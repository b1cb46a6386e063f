"""The backward kernels: delta, then dk and dv by tiles of keys, dq by tiles of queries."""

import triton
import triton.language as tl

from .._launch import cast, dot
from .._philox import kept
from .forward import LOG2E, load_rows, load_tile
from .masks import (
    UNSPECIALIZED,
    key_span,
    key_walk,
    locate,
    masked_start,
    query_walk,
    sees,
    visible,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, lengths_ptr, cu_seqlens_ptr,
    stride_dob, stride_doh, stride_dot, H, Tq, Tk, D, pairs, section, documents,
    window, global_tokens, CAUSAL: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do ⊙ o) − dlse; 0 where a query sees nothing, whatever do holds."""
    b, h, block, begin, rows, n, shift = locate(
        Tq, Tq, Tk, H, pairs, section, documents, lengths_ptr, cu_seqlens_ptr,
        BOTTOM_RIGHT, BLOCK_M, False,
    )  # fmt: skip
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = sees(offs_m, rows, n, shift, window, global_tokens, CAUSAL)
    head = (b * H + h) * Tq + begin
    do_ptr += b * stride_dob + h * stride_doh + begin * stride_dot
    o = load_rows(o_ptr + head * D, D, offs_m, mask_m, offs_d, D, False, WHOLE_D)
    do = load_rows(do_ptr, stride_dot, offs_m, mask_m, offs_d, D, False, WHOLE_D)
    delta = tl.sum(o.to(ACC) * do.to(ACC), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + head + offs_m, mask=mask_m, other=0.0)
    tl.store(delta_ptr + head + offs_m, delta, mask=offs_m < rows)


@triton.jit
def _attention_bwd_dkdv_tile(
    dk, dv, k, v, q, do, lse, delta, i, j, n, window, global_tokens, scale_log2e,
    index, seed, least, keep_scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What queries at i (1, BLOCK_M) add to the gradients of keys at j (BLOCK_N, 1).

    Keys lie along rows, so that p and ds are left operands as they are, with no transposition.
    """
    s = tl.zeros((k.shape[0], q.shape[0]), dk.dtype)
    x = dot(k, tl.trans(q), s, PRECISION) * scale_log2e - (lse * LOG2E)[None, :]
    if MASKED:
        seen = visible(i, j, n, window, global_tokens, CAUSAL)
        x = tl.where(seen, x, float("-inf"))
    p = tl.exp2(x)
    if least is None:
        # the sum starts from −delta, which then needs no registers of its own
        ds = p * dot(v, tl.trans(do), s - delta[None, :], PRECISION)
        dropped = p
    else:
        keep = kept(index + j, seed, least)
        dp = tl.where(keep, dot(v, tl.trans(do), s, PRECISION) * keep_scale, 0.0)
        ds = p * (dp - delta[None, :])
        dropped = tl.where(keep, p * keep_scale, 0.0)
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    dv = dot(cast(dropped, do.dtype), do, dv, PRECISION)
    dk = dot(cast(ds, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_dkdv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, do_desc, q_desc,
    lengths_ptr, cu_seqlens_ptr,
    stride_dob, stride_doh, stride_dot, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H, group, Tq, Tk, D, pairs, section, documents,
    scale, scale_log2e, window, global_tokens, least, seed, keep_scale,
    CAUSAL: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, TMA_MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program a tile of keys of one key head: all query heads of its group, one by one."""
    Hkv = H // group
    b, h_k, block, begin, rows, n, shift = locate(
        Tk, Tq, Tk, Hkv, pairs, section, documents, lengths_ptr, cu_seqlens_ptr,
        BOTTOM_RIGHT, BLOCK_N, False,
    )  # fmt: skip
    k_ptr += b * stride_kb + h_k * stride_kh + begin * stride_kt
    v_ptr += b * stride_vb + h_k * stride_vh + begin * stride_vt
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    # keys that no query sees are not read: they may hold NaN
    low, high, _, _, global_high = key_span(
        shift, rows - 1 + shift, n, window, global_tokens, CAUSAL
    )
    mask_n = (offs_n < high) & ((offs_n >= low) | (offs_n < global_high))
    k = load_rows(k_ptr, stride_kt, offs_n, mask_n, offs_d, D, False, WHOLE_D)
    v = load_rows(v_ptr, stride_vt, offs_n, mask_n, offs_d, D, False, WHOLE_D)
    j = offs_n[:, None]
    open_first, open_last, head, left, first, masked = query_walk(
        block, rows, n, shift, window, global_tokens, CAUSAL, BLOCK_M, BLOCK_N
    )
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    # one loop over the tiles of all heads: a loop around it would keep registers from this one
    opened = (open_last - open_first) // BLOCK_M
    for number in range(0, group * opened):
        h = h_k * group + number // tl.maximum(opened, 1)
        start = open_first + number % tl.maximum(opened, 1) * BLOCK_M
        offs_m = start + tl.arange(0, BLOCK_M)
        q = load_tile(
            q_ptr + b * stride_qb + h * stride_qh + begin * stride_qt, q_desc, stride_qt,
            b, h, begin, start, offs_m < rows, offs_d, D, TMA, True, WHOLE_D, BLOCK_M,
        )  # fmt: skip
        do = load_tile(
            do_ptr + b * stride_dob + h * stride_doh + begin * stride_dot, do_desc, stride_dot,
            b, h, begin, start, offs_m < rows, offs_d, D, TMA, True, WHOLE_D, BLOCK_M,
        )  # fmt: skip
        line = (b * H + h) * Tq + begin + offs_m
        lse = tl.load(lse_ptr + line)
        delta = tl.load(delta_ptr + line)
        dk, dv = _attention_bwd_dkdv_tile(
            dk, dv, k, v, q, do, lse, delta, (offs_m + shift)[None, :], j, n, window,
            global_tokens, scale_log2e, line[None, :] * Tk + begin, seed, least, keep_scale,
            CAUSAL, False, PRECISION,
        )  # fmt: skip
    for number in range(0, group * masked):
        h = h_k * group + number // tl.maximum(masked, 1)
        start = masked_start(number % tl.maximum(masked, 1), open_last, head, left, first, BLOCK_M)
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = sees(offs_m, rows, n, shift, window, global_tokens, CAUSAL)
        q = load_tile(
            q_ptr + b * stride_qb + h * stride_qh + begin * stride_qt, q_desc, stride_qt,
            b, h, begin, start, mask_m, offs_d, D, TMA_MASKED, False, WHOLE_D, BLOCK_M,
        )  # fmt: skip
        do = load_tile(
            do_ptr + b * stride_dob + h * stride_doh + begin * stride_dot, do_desc, stride_dot,
            b, h, begin, start, mask_m, offs_d, D, TMA_MASKED, False, WHOLE_D, BLOCK_M,
        )  # fmt: skip
        line = (b * H + h) * Tq + begin + offs_m
        lse = tl.load(lse_ptr + line, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + line, mask=mask_m, other=0.0)
        dk, dv = _attention_bwd_dkdv_tile(
            dk, dv, k, v, q, do, lse, delta, (offs_m + shift)[None, :], j, n, window,
            global_tokens, scale_log2e, line[None, :] * Tk + begin, seed, least, keep_scale,
            CAUSAL, True, PRECISION,
        )  # fmt: skip
    T = Tk if cu_seqlens_ptr is None else n
    offs = ((b * Hkv + h_k) * Tk + begin + offs_n)[:, None] * D + offs_d[None, :]
    mask = (offs_n < T)[:, None] & (offs_d < D)[None, :]
    tl.store(dk_ptr + offs, cast(dk * scale, dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs, cast(dv, dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attention_bwd_dq_tile(
    dq, q, do, k, v, lse, delta, i, j, n, window, global_tokens, scale_log2e,
    index, seed, least, keep_scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What keys at j (1, BLOCK_N) add to the gradients of queries at i (BLOCK_M, 1)."""
    s = tl.zeros((q.shape[0], k.shape[0]), dq.dtype)
    x = dot(q, tl.trans(k), s, PRECISION) * scale_log2e - (lse * LOG2E)[:, None]
    if MASKED:
        seen = visible(i, j, n, window, global_tokens, CAUSAL)
        x = tl.where(seen, x, float("-inf"))
    p = tl.exp2(x)
    if least is None:
        ds = p * dot(do, tl.trans(v), s - delta[:, None], PRECISION)
    else:
        dp = dot(do, tl.trans(v), s, PRECISION) * keep_scale
        ds = p * (tl.where(kept(index + j, seed, least), dp, 0.0) - delta[:, None])
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    return dot(cast(ds, k.dtype), k, dq, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, k_desc, v_desc,
    lengths_ptr, cu_seqlens_ptr,
    stride_dob, stride_doh, stride_dot, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H, group, Tq, Tk, D, pairs, section, documents,
    scale, scale_log2e, window, global_tokens, least, seed, keep_scale,
    CAUSAL: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, TMA_MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, h, block, begin, rows, n, shift = locate(
        Tq, Tq, Tk, H, pairs, section, documents, lengths_ptr, cu_seqlens_ptr,
        BOTTOM_RIGHT, BLOCK_M, CAUSAL,
    )  # fmt: skip
    h_k = h // group
    q_ptr += b * stride_qb + h * stride_qh + begin * stride_qt
    do_ptr += b * stride_dob + h * stride_doh + begin * stride_dot
    k_ptr += b * stride_kb + h_k * stride_kh + begin * stride_kt
    v_ptr += b * stride_vb + h_k * stride_vh + begin * stride_vt

    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = sees(offs_m, rows, n, shift, window, global_tokens, CAUSAL)
    q = load_rows(q_ptr, stride_qt, offs_m, mask_m, offs_d, D, False, WHOLE_D)
    do = load_rows(do_ptr, stride_dot, offs_m, mask_m, offs_d, D, False, WHOLE_D)
    line = (b * H + h) * Tq + begin
    lse = tl.load(lse_ptr + line + offs_m, mask=mask_m, other=0.0)
    delta = tl.load(delta_ptr + line + offs_m, mask=mask_m, other=0.0)
    i = (offs_m + shift)[:, None]
    low, high, global_high, open_first, open_last, head, left, first, masked = key_walk(
        block, rows, n, shift, window, global_tokens, CAUSAL, BLOCK_M, BLOCK_N
    )
    index = (line + offs_m)[:, None] * Tk + begin

    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
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
        dq = _attention_bwd_dq_tile(
            dq, q, do, k, v, lse, delta, i, offs_n[None, :], n, window, global_tokens, scale_log2e,
            index, seed, least, keep_scale, CAUSAL, False, PRECISION,
        )  # fmt: skip
    for number in range(0, masked):
        start = masked_start(number, open_last, head, left, first, BLOCK_N)
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = (offs_n < high) & ((offs_n >= low) | (offs_n < global_high))
        k = load_tile(
            k_ptr, k_desc, stride_kt, b, h_k, begin, start, mask_n, offs_d, D,
            TMA_MASKED, False, WHOLE_D, BLOCK_N,
        )  # fmt: skip
        v = load_tile(
            v_ptr, v_desc, stride_vt, b, h_k, begin, start, mask_n, offs_d, D,
            TMA_MASKED, False, WHOLE_D, BLOCK_N,
        )  # fmt: skip
        dq = _attention_bwd_dq_tile(
            dq, q, do, k, v, lse, delta, i, offs_n[None, :], n, window, global_tokens, scale_log2e,
            index, seed, least, keep_scale, CAUSAL, True, PRECISION,
        )  # fmt: skip
    offs = (line + offs_m)[:, None] * D + offs_d[None, :]
    mask = (offs_m < rows)[:, None] & (offs_d < D)[None, :]
    tl.store(dq_ptr + offs, cast(dq * scale, dq_ptr.dtype.element_ty), mask=mask)
