"""The launchers: choose tiles, allocate, launch."""

import torch
import triton

from .._launch import accumulator, contiguous_rows, launch
from .._philox import signed, threshold
from .backward import (
    _attention_bwd_delta_kernel,
    _attention_bwd_dkdv_kernel,
    _attention_bwd_dq_kernel,
)
from .configuration import configuration, descriptor, head_options, section
from .forward import LOG2E, _attention_fwd_kernel


def forward(
    q, k, v, lengths, cu_seqlens,
    causal, bottom_right, window, global_tokens, scale, dropout, seed, precision,
):  # fmt: skip
    """-> o (B, H, Tq, D) contiguous, lse (B, H, Tq)."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    q, k, v = map(contiguous_rows, (q, k, v))
    lengths, cu_seqlens = contiguous(lengths), contiguous(cu_seqlens)
    o = torch.empty((B, H, Tq, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=accumulator(q.dtype), device=q.device)
    dense = is_dense(Tq, Tk, lengths, cu_seqlens, causal, bottom_right, window)
    options = configuration("forward", Tq, D, q.dtype, causal, dropout=dropout) | head_options(
        D, q.dtype
    )
    k_desc, v_desc, tma = descriptors(options, options["BLOCK_N"], dense, k, v)
    launch(
        _attention_fwd_kernel, programs(Tq, options["BLOCK_M"], cu_seqlens) * B * H,
        q, k, v, o, lse, k_desc, v_desc, lengths, cu_seqlens,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        H, H // Hkv, Tq, Tk, D, *order(B * H, H // Hkv, k, cu_seqlens),
        scale * LOG2E.value, window, global_tokens or None, *dropping(dropout, seed),
        CAUSAL=causal, BOTTOM_RIGHT=bottom_right, PRESCALED=unfoldable(scale), PRECISION=precision,
        **options | tma,
    )  # fmt: skip
    return o, lse


def backward(
    do, dlse, q, k, v, o, lse, lengths, cu_seqlens,
    causal, bottom_right, window, global_tokens, scale, dropout, seed, precision,
):  # fmt: skip
    """-> dq, dk, dv, contiguous. dlse is None where the caller did not use lse."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    group = H // Hkv
    do, q, k, v = map(contiguous_rows, (do, q, k, v))
    lengths, cu_seqlens = contiguous(lengths), contiguous(cu_seqlens)
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if H == 0:
        # no head reads the keys
        return dq, dk.zero_(), dv.zero_()
    dense = is_dense(Tq, Tk, lengths, cu_seqlens, causal, bottom_right, window)
    masks = {"CAUSAL": causal, "BOTTOM_RIGHT": bottom_right}
    queries = order(B * H, group, k, cu_seqlens)

    head = head_options(D, q.dtype)
    options = configuration("dq", Tq, D, q.dtype, causal, dropout=dropout) | head
    launch(
        _attention_bwd_delta_kernel, programs(Tq, options["BLOCK_M"], cu_seqlens) * B * H,
        o, do, dlse, delta, lengths, cu_seqlens, *do.stride()[:3],
        H, Tq, Tk, D, *queries, window, global_tokens or None,
        BLOCK_M=options["BLOCK_M"], **masks, **head,
    )  # fmt: skip
    read = do, q, k, v, lse, delta
    strides = [s for x in read[:4] for s in x.stride()[:3]]
    sizes = H, group, Tq, Tk, D
    numbers = (
        scale, scale * LOG2E.value, window, global_tokens or None, *dropping(dropout, seed),
    )  # fmt: skip
    k_desc, v_desc, tma = descriptors(options, options["BLOCK_N"], dense, k, v)
    launch(
        _attention_bwd_dq_kernel, programs(Tq, options["BLOCK_M"], cu_seqlens) * B * H,
        *read, dq, k_desc, v_desc, lengths, cu_seqlens, *strides, *sizes, *queries, *numbers,
        PRECISION=precision, **masks, **options | tma,
    )  # fmt: skip
    plain = dense and window is None and group == 1
    options = configuration("dkdv", Tq, D, q.dtype, causal, plain=plain, dropout=dropout) | head
    do_desc, q_desc, tma = descriptors(options, options["BLOCK_M"], dense, do, q)
    launch(
        _attention_bwd_dkdv_kernel, programs(Tk, options["BLOCK_N"], cu_seqlens) * B * Hkv,
        *read, dk, dv, do_desc, q_desc, lengths, cu_seqlens, *strides, *sizes,
        *order(B * Hkv, 1, q, cu_seqlens), *numbers,
        PRECISION=precision, **masks, **options | tma,
    )  # fmt: skip
    return dq, dk, dv


def unfoldable(scale):
    """Whether the scale must be applied before the maximum: not positive, or 0 in float32."""
    return scale * LOG2E.value < 2.0**-126


def contiguous(numbers):
    """lengths or cu_seqlens without strides; None stays None."""
    return None if numbers is None else numbers.contiguous()


def programs(T, block, cu_seqlens):
    """Tiles of one head: enough for any split of T into so many documents."""
    if cu_seqlens is None:
        return triton.cdiv(T, block)
    return T // block + len(cu_seqlens) - 1


def order(pairs, sharing, x, cu_seqlens):
    """(pairs of a batch row and a head, how many are walked together, documents).

    sharing: how many pairs read the same rows of x (B, H, T, D), which the L2 is to hold.
    """
    documents = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    return pairs, section(pairs, sharing, x), documents


def is_dense(Tq, Tk, lengths, cu_seqlens, causal, bottom_right, window):
    """Whether every query surely sees a key and every key is seen, so that all may be read."""
    if lengths is not None or cu_seqlens is not None:
        return False
    if window is not None:
        return Tq == Tk
    return not causal or (Tq <= Tk if bottom_right else Tq >= Tk)


def descriptors(options, rows, dense, *tensors):
    """TMA descriptors of both tensors, and which loops use them; the tensors where none does."""
    made = [descriptor(x, rows, options["BLOCK_D"]) for x in tensors] if options["TMA"] else tensors
    described = not any(isinstance(x, torch.Tensor) for x in made)
    # a descriptor leaves out no rows but those past the end
    flags = {"TMA": described, "TMA_MASKED": described and dense}
    return (*made, flags) if described else (*tensors, flags)


def dropping(dropout, seed):
    """(least word that is kept, seed, what is kept is multiplied with); (None, 0, 1) without."""
    if not dropout:
        return None, 0, 1.0
    return threshold(dropout), signed(seed), 1 / (1 - dropout) if dropout < 1 else 0.0
