"""Position-wise feed-forward network with bias and activation fused into its products.

    z = x w1 + b1,   a = f(z),   y = a w2 + b2 (+ residual)
    da = dy w2ᵀ,   dz = da ⊙ f'(z),   dx = dz w1ᵀ,   dresidual = dy
    dw1 = xᵀ dz,   db1 = Σ dz,   dw2 = aᵀ dy,   db2 = Σ dy

f is tanh-GELU, erf-GELU or ReLU (gradient 0 at 0).
Shapes: x, y (..., C) of any strides; w1 (C, F); b1 (F,); w2 (F, C); b2 (C,); residual like x.
Algorithm: five tiled products (`_product`). Bias and activation, the residual, and f'(z) are
applied in their epilogues; the weight gradients' products sum their right operands' columns, which
are the bias gradients. With few rows, or few tiles in a weight gradient, the contraction is split.
Saved for backward, in the storage dtype: x, w1, w2 and, with save="activations", z and a. With
save="inputs" z is never stored and a is not kept: backward makes both by the same product as
forward, so the gradients have the same bits. Nothing is kept where nothing needs a gradient.
Deterministic: no atomics, splits are added in order. How the contraction is split depends on the
number of rows, not on what the other rows hold.
dtypes: float16, bfloat16, float32 (IEEE products, not TF32), float64.
Source: Vaswani et al. 2017, section 3.3; Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

import torch
import torch.nn.functional as F

from ._activations import ACTIVATIONS
from ._checks import expect_alike, expect_choice, expect_dimensions, expect_shape
from ._launch import resolve
from ._product import product

SAVES = ("activations", "inputs")


def _hidden(x, w1, b1, activation, keep):
    """-> z (None unless it is kept), a (M, F)."""
    z = x.new_empty((x.shape[0], w1.shape[1])) if keep else None
    return z, product(x, w1, epilogue="activate", activation=activation, bias=b1, z=z)


def _forward(x, w1, b1, w2, b2, residual, activation, keep):
    """x, residual (M, C) -> y (M, C), z, a (M, F); z and a are empty unless they are kept."""
    z, a = _hidden(x, w1, b1, activation, keep)
    y = product(a, w2, bias=b2, add=residual)
    return (y, z, a) if keep else (y, x.new_empty((0,)), x.new_empty((0,)))


def _backward(dy, x, w1, b1, w2, z, a, activation, kept):
    """-> dx, dw1, db1, dw2, db2."""
    if not kept:
        z, a = _hidden(x, w1, b1, activation, True)
    db1, db2 = w1.new_empty(w1.shape[1:]), w2.new_empty(w2.shape[1:])
    dz = product(dy, w2.t(), epilogue="slope", activation=activation, z=z)
    dw2 = product(a.t(), dy, sums=db2)
    dw1 = product(x.t(), dz, sums=db1)
    return product(dz, w1.t()), dw1, db1, dw2, db2


def _launch_all(x, w1, b1, w2, b2, residual=None, activation="gelu_tanh"):
    """One forward and backward call straight through the launchers, to be compiled."""
    y, z, a = _forward(x, w1, b1, w2, b2, residual, activation, True)
    return y, _backward(y, x, w1, b1, w2, z, a, activation, True)


@torch.library.custom_op("gaugeblock::ffn_fwd", mutates_args=())
def _fwd_op(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
    residual: torch.Tensor | None, activation: str, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _forward(x, w1, b1, w2, b2, residual, activation, keep)


@_fwd_op.register_fake
def _(x, w1, b1, w2, b2, residual, activation, keep):
    kept = (x.shape[0], w1.shape[1]) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(kept), x.new_empty(kept)


@torch.library.custom_op("gaugeblock::ffn_bwd", mutates_args=())
def _bwd_op(
    dy: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor,
    z: torch.Tensor, a: torch.Tensor, activation: str, kept: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _backward(dy, x, w1, b1, w2, z, a, activation, kept)


@_bwd_op.register_fake
def _(dy, x, w1, b1, w2, z, a, activation, kept):
    return (
        x.new_empty(x.shape), w1.new_empty(w1.shape), w1.new_empty(w1.shape[1:]),
        w2.new_empty(w2.shape), w2.new_empty(w2.shape[1:]),
    )  # fmt: skip


def _save(ctx, inputs, output):
    x, w1, b1, w2, _, residual, ctx.activation, ctx.kept = inputs
    _, z, a = output
    ctx.added = residual is not None
    # nobody differentiates z and a: no zeros of their size
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w1, b1, w2, z, a)


def _differentiate(ctx, dy, dz, da):
    if dy is None:
        return (None,) * 8
    gradients = _bwd_op(dy, *ctx.saved_tensors, ctx.activation, ctx.kept)
    return *gradients, dy if ctx.added else None, None, None


_fwd_op.register_autograd(_differentiate, setup_context=_save)


def _eager(x, w1, b1, w2, b2, activation="gelu_tanh", *, residual=None):
    """The plain torch twin."""
    # oneDNN's bfloat16 product reads one value past an odd row of a slice, and 0·NaN is NaN;
    # the same for dy, below
    x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    z = F.linear(x, w1.t(), b1)
    y = F.linear(ACTIVATIONS[activation](z), w2.t(), b2)
    if residual is not None:
        y = y + residual
    if y.requires_grad:
        y.register_hook(torch.Tensor.contiguous)
    return y


def ffn(
    x, w1, b1, w2, b2, activation="gelu_tanh", *, residual=None, save="activations", impl="auto"
):
    """y = f(x w1 + b1) w2 + b2 (+ residual).

    Shapes: x, y (..., C); w1 (C, F); b1 (F,); w2 (F, C); b2 (C,); residual like x, or None.
    activation: "gelu_tanh" (GPT-2's), "gelu" (erf) or "relu". save: what is kept for backward,
    "activations" (z and a) or "inputs", from which backward computes them again: the same
    gradients bit for bit, for one more product. The eager twin keeps what torch keeps.
    Raises ValueError for shapes, options or devices that do not fit, TypeError for dtypes.
    """
    given = {} if residual is None else {"residual": residual}
    expect_alike("ffn", x=x, w1=w1, b1=b1, w2=w2, b2=b2, **given)
    expect_choice("ffn", "activation", activation, ACTIVATIONS)
    expect_choice("ffn", "save", save, SAVES)
    expect_dimensions("ffn", "x", x, "(..., C)")
    expect_shape("ffn", "w1", w1, "(C, F)", (x.shape[-1], None))
    C, n_inner = w1.shape
    expect_shape("ffn", "b1", b1, "(F,)", (n_inner,))
    expect_shape("ffn", "w2", w2, "(F, C)", (n_inner, C))
    expect_shape("ffn", "b2", b2, "(C,)", (C,))
    if residual is not None:
        expect_shape("ffn", "residual", residual, "x's shape", tuple(x.shape))
    if resolve("ffn", impl, x) == "eager":
        return _eager(x, w1, b1, w2, b2, activation, residual=residual)
    differentiated = any(t.requires_grad for t in (x, w1, b1, w2, b2, *given.values()))
    keep = save == "activations" and torch.is_grad_enabled() and differentiated
    rows = None if residual is None else residual.reshape(-1, C)
    y, _, _ = _fwd_op(
        x.reshape(-1, C), w1, b1.contiguous(), w2, b2.contiguous(), rows, activation, keep
    )
    return y.view(x.shape)
