"""Position-wise feed-forward network with bias and activation fused into its products.

    z = x w1 + b1,   a = f(z),   y = a w2 + b2
    da = dy w2ᵀ,   dz = da ⊙ f'(z),   dx = dz w1ᵀ
    dw1 = xᵀ dz,   db1 = Σ dz,   dw2 = aᵀ dy,   db2 = Σ dy

f is tanh-GELU, erf-GELU or ReLU (gradient 0 at 0).
Shapes: x, y (..., C) of any strides; w1 (C, F); b1 (F,); w2 (F, C); b2 (C,).
Algorithm: one tiled product kernel with an epilogue: bias and activation (storing z beside a),
bias, or the product with f'(z). The weight gradients' kernel also sums its right operand's columns,
which are the bias gradients. Programs run in groups of rows for the L2 cache. No atomics:
deterministic.
Saved for backward: x, w1, w2, z and a in the storage dtype.
dtypes: float16, bfloat16, float32 (IEEE products, not TF32), float64.
Source: Vaswani et al. 2017, section 3.3; Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ._checks import expect_alike, expect_choice, expect_dimensions, expect_shape
from ._launch import cast, dot, launch, resolve, tile, tl_accumulator

ACTIVATIONS = {
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}

_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(math.sqrt(2 / math.pi))
_SQRT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
_DENSITY_AT_0: tl.constexpr = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def _tanh(x):
    """tanh by one exponential of a number that is never positive, so that nothing overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        # a NaN must stay one
        return tl.where(z <= 0, 0.0, z)
    if ACTIVATION == "gelu":
        return z * (0.5 * (1.0 + tl.erf(z * _SQRT_HALF)))
    return 0.5 * z * (1.0 + _tanh((z + 0.044715 * z * z * z) * _SQRT_2_OVER_PI))


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    """f'(z)."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * _SQRT_HALF)) + z * tl.exp(-0.5 * z * z) * _DENSITY_AT_0
    t = _tanh((z + 0.044715 * z * z * z) * _SQRT_2_OVER_PI)
    inner = (1.0 + 3 * 0.044715 * z * z) * _SQRT_2_OVER_PI
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner


@triton.jit
def _ffn_product_kernel(
    a_ptr, b_ptr, bias_ptr, z_ptr, c_ptr, sums_ptr,
    stride_am, stride_ak, stride_bk, stride_bn, M, N, K,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, SUM_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """c = epilogue(a b); z and c (M, N) contiguous; sums = the column sums of b."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * blocks_n)
    group_m = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_n)
    block_m, block_n = group * GROUP_M + within % group_m, within // group_m

    offs_m = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    sums = tl.zeros((BLOCK_N,), ACC)
    for start in range(0, K, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < K
        a = tl.load(
            a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak,
            mask=mask_m[:, None] & mask_k[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn,
            mask=mask_k[:, None] & mask_n[None, :], other=0.0,
        )  # fmt: skip
        acc = dot(a, b, acc)
        if SUM_COLUMNS:
            sums += tl.sum(b.to(ACC), 0)

    offs = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if EPILOGUE == "bias" or EPILOGUE == "activate":
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    if EPILOGUE == "activate":
        tl.store(z_ptr + offs, cast(acc, z_ptr.dtype.element_ty), mask=mask)
        acc = _activate(acc, ACTIVATION)
    if EPILOGUE == "slope":
        acc *= _slope(tl.load(z_ptr + offs, mask=mask, other=0.0).to(ACC), ACTIVATION)
    tl.store(c_ptr + offs, cast(acc, c_ptr.dtype.element_ty), mask=mask)
    if SUM_COLUMNS:
        # every row of programs has the same sums; the first one writes them
        if block_m == 0:
            tl.store(sums_ptr + offs_n, cast(sums, sums_ptr.dtype.element_ty), mask=mask_n)


def _product(a, b, *, epilogue="none", activation="none", bias=None, z=None, sums=None):
    """epilogue(a b) for a (M, K), b (K, N) of any strides; `z` and `sums` are written or read."""
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty((M, N), dtype=a.dtype, device=a.device)
    half = a.dtype.itemsize == 2
    BLOCK_M = tile(M, 128 if half else 32)
    BLOCK_N = tile(N, 128 if half else 32)
    launch(
        _ffn_product_kernel, triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),
        a, b, b if bias is None else bias, c if z is None else z, c, b if sums is None else sums,
        a.stride(0), a.stride(1), b.stride(0), b.stride(1), M, N, K,
        EPILOGUE=epilogue, ACTIVATION=activation, SUM_COLUMNS=sums is not None,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=tile(K, 64 if half else 32), GROUP_M=8,
        ACC=tl_accumulator(a.dtype),
        num_warps=8 if half else 4, num_stages=3 if half else 2,
    )  # fmt: skip
    return c


def _forward(x, w1, b1, w2, b2, activation):
    """x (M, C) -> y (M, C), z (M, F), a (M, F)."""
    z = torch.empty((x.shape[0], w1.shape[1]), dtype=x.dtype, device=x.device)
    a = _product(x, w1, epilogue="activate", activation=activation, bias=b1, z=z)
    return _product(a, w2, epilogue="bias", bias=b2), z, a


def _backward(dy, x, w1, w2, z, a, activation):
    """-> dx, dw1, db1, dw2, db2."""
    db1 = torch.empty(w1.shape[1:], dtype=w1.dtype, device=w1.device)
    db2 = torch.empty(w2.shape[1:], dtype=w2.dtype, device=w2.device)
    dz = _product(dy, w2.t(), epilogue="slope", activation=activation, z=z)
    dw2 = _product(a.t(), dy, sums=db2)
    dw1 = _product(x.t(), dz, sums=db1)
    return _product(dz, w1.t()), dw1, db1, dw2, db2


def _launch_all(x, w1, b1, w2, b2, activation="gelu_tanh"):
    """One forward and backward call straight through the launchers, to be compiled."""
    y, z, a = _forward(x, w1, b1, w2, b2, activation)
    return y, _backward(y, x, w1, w2, z, a, activation)


@torch.library.custom_op("gaugeblock::ffn_fwd", mutates_args=())
def _fwd_op(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _forward(x, w1, b1, w2, b2, activation)


@_fwd_op.register_fake
def _(x, w1, b1, w2, b2, activation):
    z = x.new_empty((x.shape[0], w1.shape[1]))
    return x.new_empty(x.shape), z, torch.empty_like(z)


@torch.library.custom_op("gaugeblock::ffn_bwd", mutates_args=())
def _bwd_op(
    dy: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor,
    z: torch.Tensor, a: torch.Tensor, activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _backward(dy, x, w1, w2, z, a, activation)


@_bwd_op.register_fake
def _(dy, x, w1, w2, z, a, activation):
    return (
        x.new_empty(x.shape), w1.new_empty(w1.shape), w1.new_empty(w1.shape[1:]),
        w2.new_empty(w2.shape), w2.new_empty(w2.shape[1:]),
    )  # fmt: skip


def _save(ctx, inputs, output):
    x, w1, _, w2, _, ctx.activation = inputs
    _, z, a = output
    ctx.save_for_backward(x, w1, w2, z, a)


def _differentiate(ctx, dy, dz, da):
    return *_bwd_op(dy, *ctx.saved_tensors, ctx.activation), None


_fwd_op.register_autograd(_differentiate, setup_context=_save)


def _eager(x, w1, b1, w2, b2, activation="gelu_tanh"):
    """The plain torch twin."""
    # oneDNN's bfloat16 product reads one value past an odd row of a slice, and 0·NaN is NaN;
    # the same for dy, below
    x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    z = F.linear(x, w1.t(), b1)
    y = F.linear(ACTIVATIONS[activation](z), w2.t(), b2)
    if y.requires_grad:
        y.register_hook(torch.Tensor.contiguous)
    return y


def ffn(x, w1, b1, w2, b2, activation="gelu_tanh", *, impl="auto"):
    """y = f(x w1 + b1) w2 + b2.

    Shapes: x, y (..., C); w1 (C, F); b1 (F,); w2 (F, C); b2 (C,).
    activation: "gelu_tanh" (GPT-2's), "gelu" (erf) or "relu".
    Raises ValueError for shapes, options or devices that do not fit, TypeError for dtypes.
    """
    expect_alike("ffn", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    expect_choice("ffn", "activation", activation, ACTIVATIONS)
    expect_dimensions("ffn", "x", x, "(..., C)")
    expect_shape("ffn", "w1", w1, "(C, F)", (x.shape[-1], None))
    C, n_inner = w1.shape
    expect_shape("ffn", "b1", b1, "(F,)", (n_inner,))
    expect_shape("ffn", "w2", w2, "(F, C)", (n_inner, C))
    expect_shape("ffn", "b2", b2, "(C,)", (C,))
    if resolve("ffn", impl, x) == "eager":
        return _eager(x, w1, b1, w2, b2, activation)
    rows = x.reshape(-1, C)
    return _fwd_op(rows, w1, b1.contiguous(), w2, b2.contiguous(), activation)[0].view(x.shape)
