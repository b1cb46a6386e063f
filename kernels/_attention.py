"""Fused masked-softmax attention.

    s = scale·q kᵀ where key j is visible to query i, else −∞
    p = softmax(s),   o = p v,   lse = log Σ exp(s)
    dv = pᵀ do,   dp = do vᵀ,   ds = p ⊙ (dp − delta),   delta = rowsum(do ⊙ o) − dlse
    dq = scale·ds k,   dk = scale·dsᵀ q

Shapes: q, o (B, H, Tq, D); k, v (B, H, Tk, D); lse (B, H, Tq). D ≤ 256, any lengths, any strides.
Causal: query i sees keys j ≤ i + Tk − Tq ("bottom_right") or j ≤ i ("top_left"). A query that sees
nothing gives o = 0, lse = −∞ and no gradient; a key that no query sees is never read.
Algorithm: forward, one program a tile of queries walks the keys with a running maximum and sum
(online softmax): an unmasked loop, then the masked diagonal and tail. Nothing of size Tq·Tk is
stored. Backward recomputes p from lse in two passes, one over keys for dk and dv, one over queries
for dq, so that no sum depends on the order in which programs finish: bitwise deterministic.
Exponentials are exp2 with log2(e) folded into the scale.
Saved for backward: q, k, v, o and lse in float32.
dtypes: float16, bfloat16, float32 (IEEE products, not TF32), float64 (scale passes as float32).
Source: Dao 2023, arXiv:2307.08691; Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ._checks import expect_alike, expect_choice, expect_dimensions, expect_shape
from ._launch import accumulator, cast, dot, launch, resolve, tile, tl_accumulator, wide

_LARGEST_HEAD_DIM = 256
_LN2: tl.constexpr = tl.constexpr(math.log(2))
_LOG2E: tl.constexpr = tl.constexpr(1 / math.log(2))


@triton.jit
def _load_rows(
    ptr, offset, stride_t, stride_d, offs_t, mask_t, offs_d, D,
    WHOLE_T: tl.constexpr, WHOLE_D: tl.constexpr,
):  # fmt: skip
    """Rows offs_t of a (T, D) matrix, zeros where masked. WHOLE_* promises that a mask is true."""
    ptrs = ptr + offset + offs_t.to(tl.int64)[:, None] * stride_t
    ptrs += offs_d.to(tl.int64)[None, :] * stride_d
    if WHOLE_T and WHOLE_D:
        return tl.load(ptrs)
    if WHOLE_T:
        return tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
    if WHOLE_D:
        return tl.load(ptrs, mask=mask_t[:, None], other=0.0)
    return tl.load(ptrs, mask=mask_t[:, None] & (offs_d[None, :] < D), other=0.0)


@triton.jit
def _visible(offs_m, offs_n, Tq, seen, shift, CAUSAL: tl.constexpr):
    """Which keys offs_n (columns) the queries offs_m (rows) see."""
    visible = (offs_m < Tq)[:, None] & (offs_n < seen)[None, :]
    if CAUSAL:
        visible = visible & (offs_n[None, :] <= offs_m[:, None] + shift)
    return visible


@triton.jit
def _attention_fwd_tile(
    acc, m_i, l_i, q, k_ptr, v_ptr, offset_k, offset_v,
    stride_kt, stride_kd, stride_vt, stride_vd,
    start, offs_m, offs_d, Tq, seen, shift, D, scale_log2e,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys: acc, m_i, l_i after it."""
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < seen
    k = _load_rows(
        k_ptr, offset_k, stride_kt, stride_kd, offs_n, mask_n, offs_d, D, not MASKED, WHOLE_D
    )
    v = _load_rows(
        v_ptr, offset_v, stride_vt, stride_vd, offs_n, mask_n, offs_d, D, not MASKED, WHOLE_D
    )
    s = tl.zeros((q.shape[0], BLOCK_N), acc.dtype)
    s = dot(q, tl.trans(k), s) * scale_log2e  # (BLOCK_M, BLOCK_N)
    if MASKED:
        s = tl.where(_visible(offs_m, offs_n, Tq, seen, shift, CAUSAL), s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1))
    m_safe = m_new
    if MASKED:
        # a row that has seen nothing yet must not turn into −inf − (−inf)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = dot(cast(p, v.dtype), v, acc * alpha[:, None])
    return acc, m_new, l_i


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    H, Tq, Tk, D, seen, shift, scale_log2e,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    # causal: the last queries see the most keys, so they start first
    block = blocks - 1 - tl.program_id(0) % blocks if CAUSAL else tl.program_id(0) % blocks
    b, h = head // H, head % H
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    # rows that see nothing are not read: whatever they hold stays out
    mask_m = offs_m < Tq
    if CAUSAL:
        mask_m = mask_m & (offs_m + shift >= 0)
    q = _load_rows(
        q_ptr, b * stride_qb + h * stride_qh, stride_qt, stride_qd, offs_m, mask_m, offs_d, D,
        False, WHOLE_D,
    )  # fmt: skip
    offset_k = b * stride_kb + h * stride_kh
    offset_v = b * stride_vb + h * stride_vh

    # keys before `open_end` are visible to every row of the tile, keys from `end` on to none
    open_end, end = seen, seen
    if CAUSAL:
        open_end = tl.maximum(tl.minimum(seen, block * BLOCK_M + shift + 1), 0)
        end = tl.maximum(tl.minimum(seen, block * BLOCK_M + BLOCK_M + shift), 0)
    open_end = open_end // BLOCK_N * BLOCK_N

    m_i = tl.full((BLOCK_M,), float("-inf"), ACC)
    l_i = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for start in range(0, open_end, BLOCK_N):
        acc, m_i, l_i = _attention_fwd_tile(
            acc, m_i, l_i, q, k_ptr, v_ptr, offset_k, offset_v,
            stride_kt, stride_kd, stride_vt, stride_vd,
            start, offs_m, offs_d, Tq, seen, shift, D, scale_log2e,
            CAUSAL, False, WHOLE_D, BLOCK_N,
        )  # fmt: skip
    for start in range(open_end, end, BLOCK_N):
        acc, m_i, l_i = _attention_fwd_tile(
            acc, m_i, l_i, q, k_ptr, v_ptr, offset_k, offset_v,
            stride_kt, stride_kd, stride_vt, stride_vd,
            start, offs_m, offs_d, Tq, seen, shift, D, scale_log2e,
            CAUSAL, True, WHOLE_D, BLOCK_N,
        )  # fmt: skip

    # l_i is 0 only where nothing was seen; where a NaN was seen it is NaN
    saw = l_i != 0.0
    l_i = tl.where(saw, l_i, 1.0)
    o = acc / l_i[:, None]
    rows = head * Tq + offs_m
    tl.store(
        o_ptr + rows[:, None] * D + offs_d[None, :], cast(o, o_ptr.dtype.element_ty),
        mask=(offs_m < Tq)[:, None] & (offs_d < D)[None, :],
    )  # fmt: skip
    lse = tl.where(saw, (m_i + tl.log2(l_i)) * _LN2, float("-inf"))
    tl.store(lse_ptr + rows, lse, mask=offs_m < Tq)


@triton.jit
def _attention_bwd_delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr,
    stride_dob, stride_doh, stride_dot, stride_dod, H, Tq, D, shift,
    CAUSAL: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    offs_m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < Tq
    if CAUSAL:
        mask_m = mask_m & (offs_m + shift >= 0)
    o = _load_rows(o_ptr, head * Tq * D, D, 1, offs_m, mask_m, offs_d, D, False, WHOLE_D)
    do = _load_rows(
        do_ptr, head // H * stride_dob + head % H * stride_doh, stride_dot, stride_dod,
        offs_m, mask_m, offs_d, D, False, WHOLE_D,
    )  # fmt: skip
    delta = tl.sum(o.to(ACC) * do.to(ACC), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + head * Tq + offs_m, mask=mask_m, other=0.0)
    tl.store(delta_ptr + head * Tq + offs_m, delta, mask=offs_m < Tq)


@triton.jit
def _attention_bwd_scores(q, k, v, do, lse, delta, visible, scale_log2e, ACC: tl.constexpr):
    """p and ds of a tile, queries along rows; both 0 where the mask hides."""
    s = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), ACC))
    p = tl.exp2(tl.where(visible, s * scale_log2e - (lse * _LOG2E)[:, None], float("-inf")))
    dp = dot(do, tl.trans(v), tl.zeros((q.shape[0], k.shape[0]), ACC))
    ds = tl.where(visible, p * (dp - delta[:, None]), 0.0)
    return p, ds


@triton.jit
def _attention_bwd_dkdv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_dob, stride_doh, stride_dot, stride_dod,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    H, Tq, Tk, D, seen, shift, scale, scale_log2e,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tk, BLOCK_N)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    b, h = head // H, head % H
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < seen
    k = _load_rows(
        k_ptr, b * stride_kb + h * stride_kh, stride_kt, stride_kd, offs_n, mask_n, offs_d, D,
        False, WHOLE_D,
    )  # fmt: skip
    v = _load_rows(
        v_ptr, b * stride_vb + h * stride_vh, stride_vt, stride_vd, offs_n, mask_n, offs_d, D,
        False, WHOLE_D,
    )  # fmt: skip
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    first = 0
    if CAUSAL:
        # the first query that sees the tile's first key, rounded down to a tile
        first = tl.maximum(block * BLOCK_N - shift, 0) // BLOCK_M * BLOCK_M
    for start in range(first, Tq, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < Tq
        if CAUSAL:
            mask_m = mask_m & (offs_m + shift >= 0)
        q = _load_rows(
            q_ptr, b * stride_qb + h * stride_qh, stride_qt, stride_qd, offs_m, mask_m, offs_d, D,
            False, WHOLE_D,
        )  # fmt: skip
        do = _load_rows(
            do_ptr, b * stride_dob + h * stride_doh, stride_dot, stride_dod, offs_m, mask_m,
            offs_d, D, False, WHOLE_D,
        )  # fmt: skip
        lse = tl.load(lse_ptr + head * Tq + offs_m, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + head * Tq + offs_m, mask=mask_m, other=0.0)
        visible = _visible(offs_m, offs_n, Tq, seen, shift, CAUSAL)
        p, ds = _attention_bwd_scores(q, k, v, do, lse, delta, visible, scale_log2e, ACC)
        dv = dot(tl.trans(cast(p, do.dtype)), do, dv)
        dk = dot(tl.trans(cast(ds, q.dtype)), q, dk)
    offs = (head * Tk + offs_n)[:, None] * D + offs_d[None, :]
    mask = (offs_n < Tk)[:, None] & (offs_d < D)[None, :]
    tl.store(dk_ptr + offs, cast(dk * scale, dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs, cast(dv, dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attention_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_dob, stride_doh, stride_dot, stride_dod,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    H, Tq, Tk, D, seen, shift, scale, scale_log2e,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) % blocks if CAUSAL else tl.program_id(0) % blocks
    b, h = head // H, head % H
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < Tq
    if CAUSAL:
        mask_m = mask_m & (offs_m + shift >= 0)
    q = _load_rows(
        q_ptr, b * stride_qb + h * stride_qh, stride_qt, stride_qd, offs_m, mask_m, offs_d, D,
        False, WHOLE_D,
    )  # fmt: skip
    do = _load_rows(
        do_ptr, b * stride_dob + h * stride_doh, stride_dot, stride_dod, offs_m, mask_m, offs_d, D,
        False, WHOLE_D,
    )  # fmt: skip
    lse = tl.load(lse_ptr + head * Tq + offs_m, mask=mask_m, other=0.0)
    delta = tl.load(delta_ptr + head * Tq + offs_m, mask=mask_m, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    end = seen
    if CAUSAL:
        end = tl.maximum(tl.minimum(seen, block * BLOCK_M + BLOCK_M + shift), 0)
    for start in range(0, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < seen
        k = _load_rows(
            k_ptr, b * stride_kb + h * stride_kh, stride_kt, stride_kd, offs_n, mask_n, offs_d, D,
            False, WHOLE_D,
        )  # fmt: skip
        v = _load_rows(
            v_ptr, b * stride_vb + h * stride_vh, stride_vt, stride_vd, offs_n, mask_n, offs_d, D,
            False, WHOLE_D,
        )  # fmt: skip
        visible = _visible(offs_m, offs_n, Tq, seen, shift, CAUSAL)
        _, ds = _attention_bwd_scores(q, k, v, do, lse, delta, visible, scale_log2e, ACC)
        dq = dot(cast(ds, k.dtype), k, dq)
    offs = (head * Tq + offs_m)[:, None] * D + offs_d[None, :]
    mask = (offs_m < Tq)[:, None] & (offs_d < D)[None, :]
    tl.store(dq_ptr + offs, cast(dq * scale, dq_ptr.dtype.element_ty), mask=mask)


# (BLOCK_M, BLOCK_N, warps, stages) by the padded head dimension: the largest tiles that do not
# spill on sm_80 and sm_90. float32 products run on the ordinary units and spill sooner.
_TILES = {
    "forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    "dkdv": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    "dq": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
}
_WIDE_TILES = {64: (32, 32, 4, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)}


def _tiles(kind, Tq, Tk, D, dtype):
    """Launch options of a kernel: a pure function of shapes and dtype."""
    BLOCK_D = tile(D, _LARGEST_HEAD_DIM)
    table = _TILES[kind] if dtype.itemsize == 2 else _WIDE_TILES
    BLOCK_M, BLOCK_N, warps, stages = table[max(BLOCK_D, 64)]
    return dict(
        BLOCK_M=tile(Tq, BLOCK_M),
        BLOCK_N=tile(Tk, BLOCK_N),
        BLOCK_D=BLOCK_D,
        WHOLE_D=BLOCK_D == D,
        ACC=tl_accumulator(dtype),
        num_warps=warps,
        num_stages=stages,
    )


def _shift_and_seen(Tq, Tk, causal, bottom_right):
    """The diagonal's offset, and the number of keys that any query sees."""
    shift = Tk - Tq if bottom_right else 0
    return shift, max(min(Tk, Tq + shift), 0) if causal else Tk


def _forward(q, k, v, causal, bottom_right, scale):
    """-> o (B, H, Tq, D) contiguous, lse (B, H, Tq)."""
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    o = torch.empty((B, H, Tq, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=accumulator(q.dtype), device=q.device)
    shift, seen = _shift_and_seen(Tq, Tk, causal, bottom_right)
    options = _tiles("forward", Tq, Tk, D, q.dtype)
    launch(
        _attention_fwd_kernel, triton.cdiv(Tq, options["BLOCK_M"]) * B * H,
        q, k, v, o, lse, *q.stride(), *k.stride(), *v.stride(),
        H, Tq, Tk, D, seen, shift, scale * _LOG2E.value, CAUSAL=causal, **options,
    )  # fmt: skip
    return o, lse


def _backward(do, dlse, q, k, v, o, lse, causal, bottom_right, scale):
    """-> dq, dk, dv, contiguous. dlse is None where the caller did not use lse."""
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    shift, seen = _shift_and_seen(Tq, Tk, causal, bottom_right)
    delta = torch.empty_like(lse)
    dq = torch.empty((B, H, Tq, D), dtype=q.dtype, device=q.device)
    dk = torch.empty((B, H, Tk, D), dtype=q.dtype, device=q.device)
    dv = torch.empty((B, H, Tk, D), dtype=q.dtype, device=q.device)
    options = _tiles("dq", Tq, Tk, D, q.dtype)
    shared = {k: options[k] for k in ("BLOCK_D", "WHOLE_D", "ACC")}
    launch(
        _attention_bwd_delta_kernel, triton.cdiv(Tq, options["BLOCK_M"]) * B * H,
        o, do, delta if dlse is None else dlse, delta, *do.stride(), H, Tq, D, shift,
        CAUSAL=causal, HAS_DLSE=dlse is not None, BLOCK_M=options["BLOCK_M"], **shared,
    )  # fmt: skip
    read = (do, q, k, v, lse, delta)
    sizes = (
        *do.stride(), *q.stride(), *k.stride(), *v.stride(),
        H, Tq, Tk, D, seen, shift, scale, scale * _LOG2E.value,
    )  # fmt: skip
    launch(
        _attention_bwd_dq_kernel, triton.cdiv(Tq, options["BLOCK_M"]) * B * H,
        *read, dq, *sizes, CAUSAL=causal, **options,
    )  # fmt: skip
    options = _tiles("dkdv", Tq, Tk, D, q.dtype)
    launch(
        _attention_bwd_dkdv_kernel, triton.cdiv(Tk, options["BLOCK_N"]) * B * H,
        *read, dk, dv, *sizes, CAUSAL=causal, **options,
    )  # fmt: skip
    return dq, dk, dv


def _launch_all(q, k, v, causal=False, align="bottom_right", scale=1.0, return_lse=False):
    """One forward and backward call straight through the launchers, to be compiled."""
    options = causal, align == "bottom_right", scale
    o, lse = _forward(q, k, v, *options)
    return o, _backward(o, lse if return_lse else None, q, k, v, o, lse, *options)


@torch.library.custom_op("gaugeblock::attention_fwd", mutates_args=())
def _fwd_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    causal: bool, bottom_right: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _forward(q, k, v, causal, bottom_right, scale)


@_fwd_op.register_fake
def _(q, k, v, causal, bottom_right, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


@torch.library.custom_op("gaugeblock::attention_bwd", mutates_args=())
def _bwd_op(
    do: torch.Tensor, dlse: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    causal: bool, bottom_right: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _backward(do, dlse, q, k, v, o, lse, causal, bottom_right, scale)


@_bwd_op.register_fake
def _(do, dlse, q, k, v, o, lse, causal, bottom_right, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, do, dlse):
    if do is None and dlse is None:
        return (None,) * 6
    q, k, v, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    dlse = None if dlse is None else dlse.contiguous()
    return *_bwd_op(do, dlse, q, k, v, o, lse, *ctx.options), None, None, None


_fwd_op.register_autograd(_differentiate, setup_context=_save)


def _visible_keys(Tq, Tk, causal=False, align="bottom_right", device=None):
    """Boolean (Tq, Tk): may query i see key j?"""
    if not causal:
        return torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    shift = Tk - Tq if align == "bottom_right" else 0
    return torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(shift)


def _eager(q, k, v, *, causal=False, align="bottom_right", scale=None, return_lse=False):
    """The plain torch twin."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    Tq, Tk = q.shape[2], k.shape[2]
    visible = _visible_keys(Tq, Tk, causal, align, q.device)
    shift, seen = _shift_and_seen(Tq, Tk, causal, align == "bottom_right")
    # what nobody sees may hold anything, NaN included: unseen keys are cut off, unseeing queries 0
    k, v, visible = k[:, :, :seen], v[:, :, :seen], visible[:, :seen]
    blind = min(-shift, Tq) if causal and shift < 0 else 0
    q, visible = q[:, :, blind:], visible[blind:]
    scores = (scale * (wide(q) @ wide(k).mT)).masked_fill(~visible, -math.inf)
    o = (wide(scores.softmax(-1).to(v.dtype)) @ wide(v)).to(q.dtype)
    o = F.pad(o, (0, 0, blind, 0))
    if not return_lse:
        return o
    return o, F.pad(scores.logsumexp(-1), (blind, 0), value=-math.inf)


def attention(
    q, k, v, *, causal=False, align="bottom_right", scale=None, return_lse=False, impl="auto"
):
    """o = softmax(scale·q kᵀ) v over the keys that each query sees.

    Shapes: q, o (B, H, Tq, D); k, v (B, H, Tk, D), Tk ≥ 1, D ≤ 256. scale defaults to D^(−1/2).
    With return_lse: (o, lse), lse (B, H, Tq) in float32, the natural log of the softmax's sum.
    Raises ValueError for shapes, options or devices that do not fit, TypeError for dtypes.
    """
    expect_alike("attention", q=q, k=k, v=v)
    expect_shape("attention", "q", q, "(B, H, Tq, D)", (None,) * 4)
    B, H, _, D = q.shape
    expect_shape("attention", "k", k, "(B, H, Tk, D)", (B, H, None, D))
    expect_shape("attention", "v", v, "(B, H, Tk, D)", tuple(k.shape))
    expect_choice("attention", "align", align, ("bottom_right", "top_left"))
    if k.shape[2] < 1:
        raise ValueError("attention: Tk must be at least 1, got 0")
    expect_dimensions("attention", "q", q, "(B, H, Tq, D)")
    scale = D**-0.5 if scale is None else float(scale)
    if resolve("attention", impl, q) == "eager":
        return _eager(q, k, v, causal=causal, align=align, scale=scale, return_lse=return_lse)
    if D > _LARGEST_HEAD_DIM:
        raise ValueError(
            f"attention: D must be at most {_LARGEST_HEAD_DIM}, got {D}; use impl='eager'"
        )
    o, lse = _fwd_op(q, k, v, causal, align == "bottom_right", scale)
    return (o, lse) if return_lse else o
