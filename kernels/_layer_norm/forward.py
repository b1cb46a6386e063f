"""Forward kernels: a tile of whole rows in registers, or a wide row in several tiles."""

import triton
import triton.language as tl

from .._launch import cast


@triton.jit
def divide(a, b, ACC: tl.constexpr):
    """a/b, correctly rounded: the compiler's own float32 division may be off by 2 ulp."""
    # a size of 1 arrives as a constant, which has no .to
    b = tl.cast(b, ACC)
    if tl.float32 == ACC:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def _inverse_root(x, ACC: tl.constexpr):
    """1/√x, each step correctly rounded."""
    if tl.float32 == ACC:
        return tl.div_rn(1.0, tl.sqrt_rn(x))
    return 1.0 / tl.sqrt(x)


@triton.jit
def load_tile(ptr, rows, offs_n, stride_m, stride_n, mask, ACC: tl.constexpr):
    """A tile in ACC, zeros where masked; rows are int64."""
    ptrs = ptr + (rows * stride_m)[:, None] + offs_n.to(tl.int64)[None, :] * stride_n
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_columns(ptr, offs_n, mask_n, ACC: tl.constexpr):
    """(1, BLOCK_N) of w or b; kept in the cache while rows stream through it."""
    ptrs = ptr + offs_n[None, :]
    return tl.load(ptrs, mask=mask_n[None, :], other=0.0, eviction_policy="evict_last").to(ACC)


@triton.jit
def store_tile(ptr, rows, offs_n, N, mask, x):
    """x rounded into the contiguous rows of ptr."""
    ptrs = ptr + (rows * N)[:, None] + offs_n[None, :]
    tl.store(ptrs, cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_sum(
    x_ptr, r_ptr, rows, offs_n, stride_xm, stride_xn, stride_rm, stride_rn, mask, ACC: tl.constexpr
):  # fmt: skip
    h = load_tile(x_ptr, rows, offs_n, stride_xm, stride_xn, mask, ACC)
    if r_ptr is not None:
        h += load_tile(r_ptr, rows, offs_n, stride_rm, stride_rn, mask, ACC)
    return h


@triton.jit
def _statistics(first, second, N, eps, ACC: tl.constexpr):
    """What is left of the mean, and rstd, from rows' Σd and Σd², d = h less its rounded mean.

    What rounding left of a large offset is taken out of the variance and of the centre.
    """
    rest = divide(first, N, ACC)
    variance = tl.maximum(divide(second, N, ACC) - rest * rest, 0.0, tl.PropagateNan.ALL)
    return rest, _inverse_root(variance + eps, ACC)


@triton.jit
def _store_statistics(mean_ptr, rstd_ptr, rows, mask_m, mean, rest, rstd):
    tl.store(mean_ptr + 2 * rows, mean, mask=mask_m)
    tl.store(mean_ptr + 2 * rows + 1, rest, mask=mask_m)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_xn, stride_rm, stride_rn, M, N, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of at most BLOCK_N columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_n = rows < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    h = _load_sum(x_ptr, r_ptr, rows, offs_n, stride_xm, stride_xn, stride_rm, stride_rn, mask, ACC)
    if h_ptr is not None:
        store_tile(h_ptr, rows, offs_n, N, mask, h)
    mean = divide(tl.sum(h, 1), N, ACC)
    d = tl.where(mask_n[None, :], h - mean[:, None], 0.0)
    rest, rstd = _statistics(tl.sum(d, 1), tl.sum(d * d, 1), N, eps, ACC)
    w = load_columns(w_ptr, offs_n, mask_n, ACC)
    b = load_columns(b_ptr, offs_n, mask_n, ACC)
    y = w * ((d - rest[:, None]) * rstd[:, None]) + b
    store_tile(y_ptr, rows, offs_n, N, mask, y)
    _store_statistics(mean_ptr, rstd_ptr, rows, mask_m, mean, rest, rstd)


@triton.jit
def _layer_norm_fwd_wide_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_xn, stride_rm, stride_rn, N, eps,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row, read three times: from memory, then from the cache."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    total = tl.zeros((1, BLOCK_N), ACC)
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < N)[None, :]
        total += _load_sum(
            x_ptr, r_ptr, rows, offs_n, stride_xm, stride_xn, stride_rm, stride_rn, mask, ACC
        )
    mean = divide(tl.sum(total, 1), N, ACC)

    first = tl.zeros((1, BLOCK_N), ACC)
    second = tl.zeros((1, BLOCK_N), ACC)
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < N)[None, :]
        h = _load_sum(
            x_ptr, r_ptr, rows, offs_n, stride_xm, stride_xn, stride_rm, stride_rn, mask, ACC
        )
        d = tl.where(mask, h - mean[:, None], 0.0)
        first += d
        second += d * d
    rest, rstd = _statistics(tl.sum(first, 1), tl.sum(second, 1), N, eps, ACC)
    _store_statistics(mean_ptr, rstd_ptr, rows, rows >= 0, mean, rest, rstd)

    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < N)[None, :]
        h = _load_sum(
            x_ptr, r_ptr, rows, offs_n, stride_xm, stride_xn, stride_rm, stride_rn, mask, ACC
        )
        if h_ptr is not None:
            store_tile(h_ptr, rows, offs_n, N, mask, h)
        w = load_columns(w_ptr, offs_n, offs_n < N, ACC)
        b = load_columns(b_ptr, offs_n, offs_n < N, ACC)
        y = w * ((h - mean[:, None] - rest[:, None]) * rstd[:, None]) + b
        store_tile(y_ptr, rows, offs_n, N, mask, y)
