"""Layer normalisation over the last axis.

    x̂ = (x − μ)·r,   r = (σ² + ε)^(−1/2),   y = w ⊙ x̂ + b
    dx = r (g − mean(g) − x̂·mean(g ⊙ x̂)),   g = w ⊙ dy
    dw = Σ dy ⊙ x̂,   db = Σ dy

Shapes: x, y (..., N) of any strides (rows are flattened; a layout that no single row stride
describes is copied); w, b (N,). N ≤ 65,536.
Algorithm: one program a row holds the whole row, so x is read once and y written once; the variance
is two-pass over values centred twice. Backward: a fixed number of programs each walk their rows,
write dx and keep a partial dw and db in registers; a second kernel adds the partials in a fixed
order. Bitwise deterministic.
Saved for backward: x, w, and mean and rstd in float32.
dtypes: float16, bfloat16, float32, float64 (eps passes as float32).
Source: Ba et al. 2016, arXiv:1607.06450.
"""

import torch
import triton
import triton.language as tl

from ._checks import expect_alike, expect_dimensions, expect_shape
from ._launch import accumulator, cast, launch, resolve, tile, tl_accumulator, wide

_LARGEST_ROW = 65_536
# rows are dealt to this many programs: two waves on the largest chips, a cheap second stage
_BACKWARD_PROGRAMS = 256


@triton.jit
def _divide(a, b, ACC: tl.constexpr):
    """a/b, correctly rounded: the compiler's own float32 division may be off by 2 ulp."""
    if tl.float32 == ACC:
        # a size of 1 arrives as a constant, which has no .to
        return tl.div_rn(a, b * 1.0)
    return a / b


@triton.jit
def _inverse_root(x, ACC: tl.constexpr):
    """1/√x, each step correctly rounded."""
    if tl.float32 == ACC:
        return tl.div_rn(1.0, tl.sqrt_rn(x))
    return 1.0 / tl.sqrt(x)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_xn, N, eps,
    BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = offs_n < N
    x = tl.load(x_ptr + row * stride_xm + offs_n * stride_xn, mask=mask_n, other=0.0).to(ACC)
    mean = _divide(tl.sum(x, 0), N, ACC)
    centred = tl.where(mask_n, x - mean, 0.0)
    # what rounding left of a large offset goes in a second centring
    rest = _divide(tl.sum(centred, 0), N, ACC)
    centred = tl.where(mask_n, centred - rest, 0.0)
    rstd = _inverse_root(_divide(tl.sum(centred * centred, 0), N, ACC) + eps, ACC)
    w = tl.load(w_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    b = tl.load(b_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    y = w * (centred * rstd) + b
    tl.store(y_ptr + row * N + offs_n, cast(y, y_ptr.dtype.element_ty), mask=mask_n)
    tl.store(mean_ptr + 2 * row, mean)
    tl.store(mean_ptr + 2 * row + 1, rest)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _layer_norm_bwd_dx_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_part_ptr, db_part_ptr,
    stride_dym, stride_dyn, stride_xm, stride_xn, M, N,
    PROGRAMS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = offs_n < N
    w = tl.load(w_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    dw = tl.zeros((BLOCK_N,), ACC)
    db = tl.zeros((BLOCK_N,), ACC)
    for i in range(0, tl.cdiv(M - pid, PROGRAMS)):
        row = (pid + i * PROGRAMS).to(tl.int64)
        x = tl.load(x_ptr + row * stride_xm + offs_n * stride_xn, mask=mask_n, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + row * stride_dym + offs_n * stride_dyn, mask=mask_n, other=0.0).to(
            ACC
        )
        mean = tl.load(mean_ptr + 2 * row)
        rest = tl.load(mean_ptr + 2 * row + 1)
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.where(mask_n, (x - mean - rest) * rstd, 0.0)
        g = w * dy
        dx = rstd * (g - tl.sum(g, 0) / N - xhat * (tl.sum(g * xhat, 0) / N))
        tl.store(dx_ptr + row * N + offs_n, cast(dx, dx_ptr.dtype.element_ty), mask=mask_n)
        dw += dy * xhat
        db += dy
    part = pid.to(tl.int64) * N + offs_n
    tl.store(dw_part_ptr + part, dw, mask=mask_n)
    tl.store(db_part_ptr + part, db, mask=mask_n)


@triton.jit
def _layer_norm_bwd_dwdb_kernel(
    dw_part_ptr, db_part_ptr, dw_ptr, db_ptr, P, N,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dw = tl.zeros((BLOCK_P, BLOCK_N), ACC)
    db = tl.zeros((BLOCK_P, BLOCK_N), ACC)
    for start in range(0, P, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (offs_p < P)[:, None] & mask_n[None, :]
        offs = offs_p[:, None] * N + offs_n[None, :]
        dw += tl.load(dw_part_ptr + offs, mask=mask, other=0.0)
        db += tl.load(db_part_ptr + offs, mask=mask, other=0.0)
    tl.store(dw_ptr + offs_n, cast(tl.sum(dw, 0), dw_ptr.dtype.element_ty), mask=mask_n)
    tl.store(db_ptr + offs_n, cast(tl.sum(db, 0), db_ptr.dtype.element_ty), mask=mask_n)


def _warps(BLOCK_N):
    return min(max(BLOCK_N // 512, 1), 16)


def _forward(x, w, b, eps):
    """x (M, N) -> y (M, N), mean (M, 2), rstd (M,)."""
    M, N = x.shape
    acc = accumulator(x.dtype)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    # the mean and its correction: together they place the centre to better than one ulp
    mean = torch.empty((M, 2), dtype=acc, device=x.device)
    rstd = torch.empty((M,), dtype=acc, device=x.device)
    BLOCK_N = tile(N, _LARGEST_ROW)
    launch(
        _layer_norm_fwd_kernel, M,
        x, w, b, y, mean, rstd, x.stride(0), x.stride(1), N, eps,
        BLOCK_N=BLOCK_N, ACC=tl_accumulator(x.dtype), num_warps=_warps(BLOCK_N),
    )  # fmt: skip
    return y, mean, rstd


def _backward(dy, x, w, mean, rstd):
    """-> dx (M, N), dw (N,), db (N,)."""
    M, N = x.shape
    acc, ACC = accumulator(x.dtype), tl_accumulator(x.dtype)
    dx = torch.empty((M, N), dtype=x.dtype, device=x.device)
    dw, db = torch.empty_like(w), torch.empty_like(w)
    programs = min(M, _BACKWARD_PROGRAMS)
    dw_part = torch.empty((programs, N), dtype=acc, device=x.device)
    db_part = torch.empty((programs, N), dtype=acc, device=x.device)
    BLOCK_N = tile(N, _LARGEST_ROW)
    launch(
        _layer_norm_bwd_dx_kernel, programs,
        dy, x, w, mean, rstd, dx, dw_part, db_part,
        dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), M, N,
        PROGRAMS=programs, BLOCK_N=BLOCK_N, ACC=ACC, num_warps=_warps(BLOCK_N),
    )  # fmt: skip
    launch(
        _layer_norm_bwd_dwdb_kernel, triton.cdiv(N, 32),
        dw_part, db_part, dw, db, programs, N,
        BLOCK_P=64, BLOCK_N=32, ACC=ACC, num_warps=4,
    )  # fmt: skip
    return dx, dw, db


def _launch_all(x, w, b, eps=1e-5):
    """One forward and backward call straight through the launchers, to be compiled."""
    y, mean, rstd = _forward(x, w, b, eps)
    return y, _backward(y, x, w, mean, rstd)


@torch.library.custom_op("gaugeblock::layer_norm_fwd", mutates_args=())
def _fwd_op(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _forward(x, w, b, eps)


@_fwd_op.register_fake
def _(x, w, b, eps):
    acc = accumulator(x.dtype)
    M = x.shape[0]
    return x.new_empty(x.shape), x.new_empty((M, 2), dtype=acc), x.new_empty((M,), dtype=acc)


@torch.library.custom_op("gaugeblock::layer_norm_bwd", mutates_args=())
def _bwd_op(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(dy, x, w, mean, rstd)


@_bwd_op.register_fake
def _(dy, x, w, mean, rstd):
    return x.new_empty(x.shape), torch.empty_like(w), torch.empty_like(w)


def _save(ctx, inputs, output):
    x, w, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, w, mean, rstd)


def _differentiate(ctx, dy, dmean, drstd):
    return *_bwd_op(dy, *ctx.saved_tensors), None


_fwd_op.register_autograd(_differentiate, setup_context=_save)


def _eager(x, w, b, eps=1e-5):
    """The plain torch twin."""
    # widened once: two casts would round, and add, two gradients
    centred = wide(x)
    centred = centred - centred.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    xhat = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (wide(w) * xhat + wide(b)).to(x.dtype)


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
    if x.shape[-1] > _LARGEST_ROW:
        raise ValueError(
            f"layer_norm: N must be at most {_LARGEST_ROW}, got {x.shape[-1]}; use impl='eager'"
        )
    rows = x.reshape(-1, x.shape[-1])
    return _fwd_op(rows, w.contiguous(), b.contiguous(), eps)[0].view(x.shape)
