"""Layer normalisation over the last axis.

    x̂ = (x − μ)·r,   r = (σ² + ε)^(−1/2),   y = w ⊙ x̂ + b
    dx = r (g − mean(g) − x̂·mean(g ⊙ x̂)),   g = w ⊙ dy
    dw = Σ dy ⊙ x̂,   db = Σ dy

Shapes: x, y (..., N) of any strides (rows are flattened; a layout that no single row stride
describes is copied); w, b (N,). N ≤ 65,536.
Algorithm: a program holds a tile of whole rows in registers, so x is read once and y written once;
the variance is two-pass, and what rounding left of the mean is taken out of it. Wider rows are
read in several tiles, once from memory and then from the cache. Backward: a fixed number of
programs each walk their rows, write dx and keep a partial dw and db in registers; a second kernel
adds the partials in a fixed order. Of rows too wide for registers dx and the partials are computed
apart, and x and dy read twice. Bitwise deterministic; a row of y or dx depends on no other row.
Saved for backward: x, w, and mean (in two parts) and rstd in float32.
dtypes: float16, bfloat16, float32, float64 (eps passes as float32).
Source: Ba et al. 2016, arXiv:1607.06450; the corrected two-pass variance of Chan, Golub and LeVeque
1983.
"""

import torch

from .._checks import expect_alike, expect_dimensions, expect_shape
from .._launch import accumulator, resolve, wide
from . import launchers
from .launchers import LARGEST_ROW


def _launch_all(x, w, b, eps=1e-5):
    """One forward and backward call straight through the launchers, to be compiled."""
    y, _, mean, rstd = launchers.forward("layer_norm", x, None, w, b, eps)
    return y, launchers.backward("layer_norm", y, None, x, w, mean, rstd)


@torch.library.custom_op("gaugeblock::layer_norm_fwd", mutates_args=())
def _fwd_op(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, _, mean, rstd = launchers.forward("layer_norm", x, None, w, b, eps)
    return y, mean, rstd


def fake_statistics(x):
    """Mean and rstd of x (M, N), without values."""
    M, acc = x.shape[0], accumulator(x.dtype)
    return x.new_empty((M, 2), dtype=acc), x.new_empty((M,), dtype=acc)


@_fwd_op.register_fake
def _(x, w, b, eps):
    return x.new_empty(x.shape), *fake_statistics(x)


@torch.library.custom_op("gaugeblock::layer_norm_bwd", mutates_args=())
def _bwd_op(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launchers.backward("layer_norm", dy, None, x, w, mean, rstd)


@_bwd_op.register_fake
def _(dy, x, w, mean, rstd):
    return x.new_empty(x.shape), torch.empty_like(w), torch.empty_like(w)


def _save(ctx, inputs, output):
    x, w, _, _ = inputs
    _, mean, rstd = output
    # nobody differentiates mean and rstd: no zeros for them
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, mean, rstd)


def _differentiate(ctx, dy, dmean, drstd):
    if dy is None:
        return (None,) * 4
    return *_bwd_op(dy, *ctx.saved_tensors), None


_fwd_op.register_autograd(_differentiate, setup_context=_save)


def normalised(x, w, b, eps):
    """The plain formula, in x's dtype."""
    centred = x - x.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)) + b


def _eager(x, w, b, eps=1e-5):
    """The plain torch twin."""
    # widened once: two casts would round, and add, two gradients
    return normalised(wide(x), wide(w), wide(b), eps).to(x.dtype)


def expect_row(op, x):
    """Raise ValueError for a row that is wider than the kernels take."""
    if x.shape[-1] > LARGEST_ROW:
        raise ValueError(
            f"{op}: N must be at most {LARGEST_ROW}, got {x.shape[-1]}; use impl='eager'"
        )


def layer_norm(x, w, b, eps=1e-5, *, impl="auto"):
    """y = w ⊙ (x − μ)/√(σ² + ε) + b over the last axis.

    Shapes: x, y (..., N); w, b (N,). y has x's dtype.
    Raises ValueError for shapes or devices that do not fit, TypeError for dtypes.
    """
    expect_alike("layer_norm", x=x, w=w, b=b)
    expect_dimensions("layer_norm", "x", x, "(..., N)")
    expect_shape("layer_norm", "w", w, "(N,)", x.shape[-1:])
    expect_shape("layer_norm", "b", b, "(N,)", x.shape[-1:])
    if resolve("layer_norm", impl, x) == "eager":
        return _eager(x, w, b, eps)
    expect_row("layer_norm", x)
    rows = x.reshape(-1, x.shape[-1])
    return _fwd_op(rows, w.contiguous(), b.contiguous(), eps)[0].view(x.shape)
