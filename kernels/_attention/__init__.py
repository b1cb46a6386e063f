"""Fused masked-softmax attention.

    s = scale·q kᵀ where key j is visible to query i, else −∞
    p = softmax(s),   p̃ = p ⊙ keep/(1 − dropout),   o = p̃ v,   lse = log Σ exp(s)
    dv = p̃ᵀ do,   dp = (do vᵀ) ⊙ keep/(1 − dropout)
    ds = p ⊙ (dp − delta),   delta = rowsum(do ⊙ o) − dlse,   dq = scale·ds k,   dk = scale·dsᵀ q

Shapes: q, o (B, H, Tq, D); k, v (B, Hkv, Tk, D), Hkv divides H; lse (B, H, Tq); lengths (B,);
cu_seqlens (n + 1,). D ≤ 256, any lengths; any strides, where the last dimension is contiguous: a
tensor whose last dimension is not is copied.
Masks: causal with either alignment, windows, global tokens beside a window, lengths, packed
documents, all of which combine. A query that sees nothing gives o = 0, lse = −∞ and no gradient; a
key that no query sees is never read.
Algorithm: forward, one program a tile of queries walks the keys with a running maximum and sum
(online softmax): first the tiles that all its queries see, unmasked, then the others; tiles that
nobody sees are skipped. Nothing of size Tq·Tk is stored. Backward computes p again from lse in two
passes, one over keys for dk and dv, one over queries for dq, so that no sum depends on the order in
which programs finish: bitwise deterministic. Exponentials are exp2 with log2(e) folded into the
scale. The tiles of a packed document start where it does: o, lse and dq of more than 16 queries are
bit for bit what they are for the document alone.
Saved for backward: q, k, v, o and lse in float32; dropout's mask is computed again.
dtypes: float16, bfloat16, float32 (IEEE products unless TF32 is asked for), float64 (scale passes
as float32).
Source: Dao 2023, arXiv:2307.08691; Milakov and Gimelshein 2018, arXiv:1805.02867; masks as in the
reference.
"""

import torch

from .._checks import (
    expect_alike,
    expect_choice,
    expect_dimensions,
    expect_dropout,
    expect_integer,
    expect_integers,
    expect_shape,
    readable,
)
from .._launch import accumulator, resolve
from .._philox import signed
from . import eager as twin
from . import launchers
from .configuration import LARGEST_HEAD_DIM


@torch.library.custom_op("gaugeblock::attention_fwd", mutates_args=())
def _fwd_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    lengths: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    causal: bool, bottom_right: bool, window: int | None, global_tokens: int,
    scale: float, dropout: float, seed: int, precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return launchers.forward(
        q, k, v, lengths, cu_seqlens, causal, bottom_right, window, global_tokens, scale, dropout,
        seed, precision,
    )  # fmt: skip


@_fwd_op.register_fake
def _(q, k, v, *options):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


@torch.library.custom_op("gaugeblock::attention_bwd", mutates_args=())
def _bwd_op(
    do: torch.Tensor, dlse: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    lengths: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    causal: bool, bottom_right: bool, window: int | None, global_tokens: int,
    scale: float, dropout: float, seed: int, precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return launchers.backward(
        do, dlse, q, k, v, o, lse, lengths, cu_seqlens, causal, bottom_right, window,
        global_tokens, scale, dropout, seed, precision,
    )  # fmt: skip


@_bwd_op.register_fake
def _(do, dlse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, lengths, cu_seqlens, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, lengths, cu_seqlens)


def _differentiate(ctx, do, dlse):
    if do is None and dlse is None:
        return (None,) * 13
    q, k, v, o, lse, lengths, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    dlse = None if dlse is None else dlse.contiguous()
    gradients = _bwd_op(do, dlse, q, k, v, o, lse, lengths, cu_seqlens, *ctx.options)
    return *gradients, *(None,) * 10


_fwd_op.register_autograd(_differentiate, setup_context=_save)


def attention(
    q, k, v, *, causal=False, align="bottom_right", window=None, global_tokens=0, lengths=None,
    cu_seqlens=None, scale=None, dropout=0.0, seed=0, return_lse=False, precision="ieee",
    impl="auto",
):  # fmt: skip
    """o = softmax(scale·q kᵀ) v over the keys that each query sees.

    Shapes: q, o (B, H, Tq, D); k, v (B, Hkv, Tk, D), Tk ≥ 1, D ≤ 256; query head h reads key head
    h // (H // Hkv). Row b has n = lengths[b] keys (integers (B,); Tk by default), and query i
    stands at i' = i + n − Tq (align="bottom_right") or i' = i ("top_left"). Causal: it sees keys
    j ≤ i'. A window of w keeps j > i' − w and, where not causal, |i' − j| < w; keys
    j < global_tokens are exempt from it. cu_seqlens, integers (n + 1,) from 0 to T, packs n
    documents along T of tensors with B = 1: each sees itself alone.
    scale defaults to D^(−1/2). dropout keeps score ((b·H + h)·Tq + i)·Tk + j as `dropout` keeps an
    element of that index under the seed. With return_lse: (o, lse), lse (B, H, Tq) in float32, the
    natural log of the softmax's sum. precision is that of float32 products: "ieee", "tf32" or
    "tf32x3" (three TF32 products, almost as exact as IEEE, on the matrix units).
    lengths and cu_seqlens, tensors or lists, are checked on the CPU; what lies on a GPU is not
    read, which would wait for it: wrong numbers there are clamped.
    Raises ValueError for shapes, options or devices that do not fit, TypeError for dtypes.
    """
    lengths, cu_seqlens = _as_int(lengths), _as_int(cu_seqlens)
    _check(q, k, v, align, window, global_tokens, lengths, cu_seqlens, dropout, seed, precision)
    implementation = resolve("attention", impl, q)
    D, Tq, Tk = q.shape[3], q.shape[2], k.shape[2]
    if D > LARGEST_HEAD_DIM and implementation == "triton":
        raise ValueError(
            f"attention: D must be at most {LARGEST_HEAD_DIM}, got {D}; use impl='eager'"
        )
    # a window that hides nothing is none
    window = None if window is None or window >= Tq + Tk else int(window)
    arguments = (
        q, k, v, *(None if x is None else x.to(q.device) for x in (lengths, cu_seqlens)),
        bool(causal), align == "bottom_right", window,
        min(int(global_tokens), Tk) if window else 0,
        D**-0.5 if scale is None else float(scale), float(dropout), signed(int(seed)), precision,
    )  # fmt: skip
    o, lse = twin.eager(*arguments) if implementation == "eager" else _fwd_op(*arguments)
    return (o, lse) if return_lse else o


def _as_int(values):
    """lengths or cu_seqlens as a tensor, whatever sequence they come as; None stays None."""
    if values is None or isinstance(values, torch.Tensor):
        return values
    return torch.tensor(values) if len(values) else torch.empty(0, dtype=torch.int64)


def _check(q, k, v, align, window, global_tokens, lengths, cu_seqlens, dropout, seed, precision):
    expect_alike("attention", q=q, k=k, v=v)
    expect_shape("attention", "q", q, "(B, H, Tq, D)", (None,) * 4)
    B, H, Tq, D = q.shape
    expect_shape("attention", "k", k, "(B, Hkv, Tk, D)", (B, None, None, D))
    expect_shape("attention", "v", v, "(B, Hkv, Tk, D)", tuple(k.shape))
    expect_choice("attention", "align", align, ("bottom_right", "top_left"))
    expect_choice("attention", "precision", precision, ("ieee", "tf32", "tf32x3"))
    expect_dropout("attention", "dropout", dropout, seed)
    Hkv, Tk = k.shape[1:3]
    if Tk < 1:
        raise ValueError("attention: Tk must be at least 1, got 0")
    if Hkv < 1 or H % Hkv:
        raise ValueError(f"attention: H must be a multiple of Hkv, got H = {H}, Hkv = {Hkv}")
    expect_dimensions("attention", "q", q, "(B, H, Tq, D)")
    expect_integer("attention", "global_tokens", global_tokens)
    if window is not None:
        expect_integer("attention", "window", window)
    if window is not None and window < 1:
        raise ValueError(
            f"attention: window must be at least 1 (a key itself), got {window}; None has no window"
        )
    if global_tokens < 0:
        raise ValueError(f"attention: global_tokens must be at least 0, got {global_tokens}")
    if lengths is not None:
        _expect_lengths(lengths, B, Tk)
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("attention: cu_seqlens must come without lengths, got both; give one")
        _expect_documents(cu_seqlens, B, Tq, Tk)


def _expect_lengths(lengths, B, Tk):
    expect_integers("attention", "lengths", lengths)
    expect_shape("attention", "lengths", lengths, "(B,)", (B,))
    if readable(lengths):
        for n in lengths.tolist():
            if not 0 <= n <= Tk:
                raise ValueError(f"attention: lengths must lie in 0 … Tk = {Tk}, got {n}")


def _expect_documents(cu_seqlens, B, Tq, Tk):
    expect_integers("attention", "cu_seqlens", cu_seqlens)
    expect_shape("attention", "cu_seqlens", cu_seqlens, "(n + 1,)", (None,))
    if B != 1 or Tq != Tk:
        raise ValueError(
            "attention: q must have shape (1, H, T, D) and k (1, Hkv, T, D) with cu_seqlens, "
            f"got B = {B}, Tq = {Tq}, Tk = {Tk}"
        )
    if len(cu_seqlens) < 2:
        raise ValueError(
            f"attention: cu_seqlens must rise from 0 to T = {Tk}, got {len(cu_seqlens)} numbers"
        )
    if readable(cu_seqlens):
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] != Tk or sorted(starts) != starts:
            raise ValueError(f"attention: cu_seqlens must rise from 0 to T = {Tk}, got {starts}")


def _eager(q, k, v, **options):
    return attention(q, k, v, **options, impl="eager")


def _launch_all(q, k, v, causal=False, align="bottom_right", window=None, global_tokens=0,
                lengths=None, cu_seqlens=None, scale=None, dropout=0.0, seed=0, return_lse=False,
                precision="ieee"):  # fmt: skip
    """One forward and backward call straight through the launchers, to be compiled."""
    ragged = [
        None if x is None else torch.empty(len(x), dtype=torch.int32, device=q.device)
        for x in (lengths, cu_seqlens)
    ]
    options = (
        *ragged, causal, align == "bottom_right", window, global_tokens,
        q.shape[3] ** -0.5 if scale is None else scale, dropout, seed, precision,
    )  # fmt: skip
    o, lse = launchers.forward(q, k, v, *options)
    return launchers.backward(o, lse if return_lse else None, q, k, v, o, lse, *options)
