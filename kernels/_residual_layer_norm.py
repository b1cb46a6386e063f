"""Residual addition, then layer normalisation of the sum.

    h = x + r,   y = w ⊙ (h − μ)/√(σ² + ε) + b
    dx = dr = dh + r (g − mean(g) − ĥ·mean(g ⊙ ĥ)),   g = w ⊙ dy
    dw = Σ dy ⊙ ĥ,   db = Σ dy

with ĥ the normalised h and r, in dx, its inverse deviation.

Shapes: x, r, y, h (..., N) of any strides (rows are flattened; a layout that no single row stride
describes is copied); w, b (N,). N ≤ 65,536.
Algorithm: the kernels of `layer_norm`, which add r to x on the way in and write h beside y; y comes
from the unrounded h. Backward reads the h that was written, and adds dh on the way out; a dh that
nobody gave is neither read nor made. dx and dr are one tensor, written once. Bitwise
deterministic; a row of y, h or dx depends on no other row.
Saved for backward: h, w, and mean (in two parts) and rstd in float32; neither x nor r.
dtypes: float16, bfloat16, float32, float64 (eps passes as float32).
Source: Vaswani et al. 2017, section 5.4 (add and norm); Ba et al. 2016, arXiv:1607.06450.
"""

import torch

from ._checks import expect_alike, expect_dimensions, expect_shape
from ._launch import resolve, wide
from ._layer_norm import expect_row, fake_statistics, launchers, normalised

_OP = "residual_layer_norm"


def _rows(x):
    return None if x is None else x.reshape(-1, x.shape[-1])


def _forward(x, r, w, b, eps):
    """-> y and h in x's shape, mean, rstd."""
    y, h, mean, rstd = launchers.forward(_OP, _rows(x), _rows(r), w, b, eps)
    return y.view(x.shape), h.view(x.shape), mean, rstd


def _backward(dy, dh, h, w, mean, rstd):
    """-> dx in h's shape, dw, db."""
    dx, dw, db = launchers.backward(_OP, _rows(dy), _rows(dh), _rows(h), w, mean, rstd)
    return dx.view(h.shape), dw, db


def _launch_all(x, r, w, b, eps=1e-5):
    """One forward and backward call straight through the launchers, to be compiled."""
    y, h, mean, rstd = _forward(x, r, w, b, eps)
    return y, _backward(y, h, h, w, mean, rstd)


@torch.library.custom_op("gaugeblock::residual_layer_norm_fwd", mutates_args=())
def _fwd_op(
    x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, b: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _forward(x, r, w, b, eps)


@_fwd_op.register_fake
def _(x, r, w, b, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), *fake_statistics(_rows(x))


@torch.library.custom_op("gaugeblock::residual_layer_norm_bwd", mutates_args=())
def _bwd_op(
    dy: torch.Tensor, dh: torch.Tensor | None, h: torch.Tensor, w: torch.Tensor,
    mean: torch.Tensor, rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _backward(dy, dh, h, w, mean, rstd)


@_bwd_op.register_fake
def _(dy, dh, h, w, mean, rstd):
    return h.new_empty(h.shape), torch.empty_like(w), torch.empty_like(w)


def _save(ctx, inputs, output):
    _, h, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, inputs[2], mean, rstd)


def _differentiate(ctx, dy, dh, dmean, drstd):
    if dy is None:
        # h alone was used
        return dh, dh, None, None, None
    dx, dw, db = _bwd_op(dy, dh, *ctx.saved_tensors)
    return dx, dx, dw, db, None


_fwd_op.register_autograd(_differentiate, setup_context=_save)


def _eager(x, r, w, b, eps=1e-5):
    """The plain torch twin."""
    h = wide(x) + wide(r)
    return normalised(h, wide(w), wide(b), eps).to(x.dtype), h.to(x.dtype)


def residual_layer_norm(x, r, w, b, eps=1e-5, *, impl="auto"):
    """(y, h): h = x + r, and y = w ⊙ (h − μ)/√(σ² + ε) + b over the last axis of the unrounded h.

    Shapes: x, r, y, h (..., N); w, b (N,). y and h have x's dtype. h is kept for the gradient: not
    to be changed in place before it.
    Raises ValueError for shapes or devices that do not fit, TypeError for dtypes.
    """
    expect_alike(_OP, x=x, r=r, w=w, b=b)
    expect_dimensions(_OP, "x", x, "(..., N)")
    expect_shape(_OP, "r", r, "(..., N)", x.shape)
    expect_shape(_OP, "w", w, "(N,)", x.shape[-1:])
    expect_shape(_OP, "b", b, "(N,)", x.shape[-1:])
    if resolve(_OP, impl, x) == "eager":
        return _eager(x, r, w, b, eps)
    expect_row(_OP, x)
    # rows are flattened inside: torch takes views of one gradient for tensors of their own, and
    # two leaves would accumulate into the same memory
    y, h, _, _ = _fwd_op(x, r, w.contiguous(), b.contiguous(), eps)
    return y, h
