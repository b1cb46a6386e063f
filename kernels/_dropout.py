"""Dropout: each element is kept with probability 1 − p, and scaled so that its mean stays.

    y_i = x_i/(1 − p) where kept_i, else 0
    dx_i = dy_i/(1 − p) where kept_i, else 0
    kept_i:  word 0 of Philox 4×32-10 at counter i under the key `seed` is ≥ ⌊p·2³²⌋

i counts the elements of x in C order, whatever its strides, in 64 bits.

Shapes: x, y (...) of any strides; what is not contiguous is copied first, its gradient likewise.
Algorithm: one pass over the flattened elements, the same kernel forward and backward, which draws
the mask again: it is a function of (i, p, seed) alone, so tiles change nothing. A call of Philox
makes four words for one element, of which one counts: counters are the elements' indices, so that
kernels with other tiles, attention's among them, can find the same mask. A dropped element is 0
whatever x holds; p = 1 drops everything.
Saved for backward: p and seed, no tensor.
dtypes: float16, bfloat16, float32, float64 (1/(1 − p) passes as float32). Deterministic.
Source: Srivastava et al. 2014, JMLR 15; Salmon et al. 2011 (Philox).
"""

import torch
import triton
import triton.language as tl

from ._checks import expect_alike, expect_dropout
from ._configurations import architecture, find
from ._launch import cast, launch, resolve, tl_accumulator, wide
from ._philox import keep_mask, kept, signed, threshold


@triton.jit(do_not_specialize=["seed", "least"])
def _dropout_kernel(
    x_ptr, y_ptr, N, scale, seed, least, BLOCK_N: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    y = tl.where(kept(offs_n, seed, least), x, 0.0) * scale
    tl.store(y_ptr + offs_n, cast(y, y_ptr.dtype.element_ty), mask=mask_n)


def _configuration(dtype):
    """-> BLOCK_N, num_warps: a pure function of dtype and chip."""
    row = find(
        "dropout",
        kernel="both",
        architecture=architecture(),
        bits=16 if dtype.itemsize == 2 else 32,
    )
    return {name: row[name] for name in ("BLOCK_N", "num_warps")}


def _drop(x, p, seed):
    """y of x, or dx of dy: contiguous, of x's shape."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = _configuration(x.dtype)
    launch(
        _dropout_kernel, triton.cdiv(x.numel(), options["BLOCK_N"]),
        x.contiguous(), y, x.numel(), _scale(p), seed, threshold(p),
        ACC=tl_accumulator(x.dtype), **options,
    )  # fmt: skip
    return y


def _scale(p):
    """1/(1 − p); where nothing is kept, any number."""
    return 1 / (1 - p) if p < 1 else 1.0


def _launch_all(x, p, seed):
    """One forward and backward call straight through the launchers, to be compiled."""
    y = _drop(x, p, signed(seed))
    return y, _drop(y, p, signed(seed))


@torch.library.custom_op("gaugeblock::dropout_fwd", mutates_args=())
def _fwd_op(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    return _drop(x, p, seed)


@_fwd_op.register_fake
def _(x, p, seed):
    return x.new_empty(x.shape)


@torch.library.custom_op("gaugeblock::dropout_bwd", mutates_args=())
def _bwd_op(dy: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    return _drop(dy, p, seed)


@_bwd_op.register_fake
def _(dy, p, seed):
    return dy.new_empty(dy.shape)


def _save(ctx, inputs, output):
    _, ctx.p, ctx.seed = inputs


def _differentiate(ctx, dy):
    return _bwd_op(dy, ctx.p, ctx.seed), None, None


_fwd_op.register_autograd(_differentiate, setup_context=_save)


def _eager(x, p, seed):
    """The plain torch twin."""
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    mask = keep_mask(index, p, signed(seed))
    return (wide(x) * _scale(p)).where(mask, 0.0).to(x.dtype)


def dropout(x, p, seed, *, impl="auto"):
    """y = x/(1 − p) where Philox of the element's index and the seed keeps it, else 0.

    Shapes: x, y (...). p in 0 … 1; seed an integer of 64 bits. The same seed gives the same mask.
    Raises ValueError for p or seed out of range, TypeError for dtypes.
    """
    expect_alike("dropout", x=x)
    expect_dropout("dropout", "p", p, seed)
    p, seed = float(p), signed(int(seed))
    if resolve("dropout", impl, x) == "eager":
        return _eager(x, p, seed)
    return _fwd_op(x, p, seed)
