"""Backward kernels: dx with partial sums of dw and db, and their addition in a fixed order.

Rows that fit in registers are read once, by few programs that walk them. Of wider ones dx and the
partial sums are computed apart, each of which reads x and dy.
"""

import triton
import triton.language as tl

from .._launch import cast
from .forward import divide, load_columns, load_tile, store_tile


@triton.jit
def _load_rows(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, rows, offs_n,
    stride_dym, stride_dyn, stride_hm, stride_hn, M, mask, ACC: tl.constexpr,
):  # fmt: skip
    """Tiles of dy and x̂, and rstd (BLOCK_M,), 0 past the last row.

    Masked columns of x̂ hold anything; those of dy are 0.
    """
    mask_m = rows < M
    dy = load_tile(dy_ptr, rows, offs_n, stride_dym, stride_dyn, mask, ACC)
    h = load_tile(h_ptr, rows, offs_n, stride_hm, stride_hn, mask, ACC)
    mean = tl.load(mean_ptr + 2 * rows, mask=mask_m, other=0.0)
    rest = tl.load(mean_ptr + 2 * rows + 1, mask=mask_m, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
    return dy, (h - mean[:, None] - rest[:, None]) * rstd[:, None], rstd


@triton.jit
def _store_dx(
    dx_ptr, dh_ptr, rows, offs_n, stride_dhm, stride_dhn, N, mask, g, xhat, rstd, g_mean, slope,
    ACC: tl.constexpr,
):  # fmt: skip
    """dx = r (g − mean(g) − x̂·mean(g ⊙ x̂)), and dh where there is one."""
    dx = rstd[:, None] * (g - g_mean[:, None] - xhat * slope[:, None])
    if dh_ptr is not None:
        dx += load_tile(dh_ptr, rows, offs_n, stride_dhm, stride_dhn, mask, ACC)
    store_tile(dx_ptr, rows, offs_n, N, mask, dx)


@triton.jit
def _store_parts(dw_part_ptr, db_part_ptr, part, offs_n, N, dw, db):
    """A program's sums over its rows (BLOCK_N,), the part-th of all."""
    offs = part.to(tl.int64) * N + offs_n
    tl.store(dw_part_ptr + offs, dw, mask=offs_n < N)
    tl.store(db_part_ptr + offs, db, mask=offs_n < N)


@triton.jit
def _layer_norm_bwd_dx_kernel(
    dy_ptr, dh_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_part_ptr, db_part_ptr,
    stride_dym, stride_dyn, stride_dhm, stride_dhn, stride_hm, stride_hn, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile of BLOCK_M rows of at most BLOCK_N columns."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    first, step = pid.to(tl.int64) * BLOCK_M, programs.to(tl.int64) * BLOCK_M
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    share = divide(1.0, N, ACC)
    w = load_columns(w_ptr, offs_n, mask_n, ACC)
    dw = tl.zeros((BLOCK_N,), ACC)
    db = tl.zeros((BLOCK_N,), ACC)
    # in stages: the rows to come are on their way while these are reduced
    for i in tl.range(0, tl.cdiv(tl.cdiv(M, BLOCK_M) - pid, programs), num_stages=STAGES):
        rows = first + step * i + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & mask_n[None, :]
        dy, xhat, rstd = _load_rows(
            dy_ptr, h_ptr, mean_ptr, rstd_ptr, rows, offs_n,
            stride_dym, stride_dyn, stride_hm, stride_hn, M, mask, ACC,
        )  # fmt: skip
        g = w * dy
        _store_dx(
            dx_ptr, dh_ptr, rows, offs_n, stride_dhm, stride_dhn, N, mask, g, xhat, rstd,
            tl.sum(g, 1) * share, tl.sum(g * xhat, 1) * share, ACC,
        )  # fmt: skip
        dw += tl.sum(dy * xhat, 0)
        db += tl.sum(dy, 0)
    _store_parts(dw_part_ptr, db_part_ptr, pid, offs_n, N, dw, db)


@triton.jit
def _layer_norm_bwd_dx_wide_kernel(
    dy_ptr, dh_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr,
    stride_dym, stride_dyn, stride_dhm, stride_dhn, stride_hm, stride_hn, M, N,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row, read twice: from memory, then from the cache."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    share = divide(1.0, N, ACC)
    first = tl.zeros((1, BLOCK_N), ACC)
    second = tl.zeros((1, BLOCK_N), ACC)
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < N)[None, :]
        dy, xhat, rstd = _load_rows(
            dy_ptr, h_ptr, mean_ptr, rstd_ptr, rows, offs_n,
            stride_dym, stride_dyn, stride_hm, stride_hn, M, mask, ACC,
        )  # fmt: skip
        g = load_columns(w_ptr, offs_n, offs_n < N, ACC) * dy
        first += g
        second += g * xhat
    g_mean, slope = tl.sum(first, 1) * share, tl.sum(second, 1) * share
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < N)[None, :]
        dy, xhat, rstd = _load_rows(
            dy_ptr, h_ptr, mean_ptr, rstd_ptr, rows, offs_n,
            stride_dym, stride_dyn, stride_hm, stride_hn, M, mask, ACC,
        )  # fmt: skip
        g = load_columns(w_ptr, offs_n, offs_n < N, ACC) * dy
        _store_dx(
            dx_ptr, dh_ptr, rows, offs_n, stride_dhm, stride_dhn, N, mask,
            g, xhat, rstd, g_mean, slope, ACC,
        )  # fmt: skip


@triton.jit
def _layer_norm_bwd_columns_kernel(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, dw_part_ptr, db_part_ptr,
    stride_dym, stride_dyn, stride_hm, stride_hn, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Partial sums of BLOCK_N columns over every sections-th tile of BLOCK_M rows."""
    tiles = tl.cdiv(N, BLOCK_N)
    section, sections = tl.program_id(0) // tiles, tl.num_programs(0) // tiles
    first, step = section.to(tl.int64) * BLOCK_M, sections.to(tl.int64) * BLOCK_M
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    db = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for i in tl.range(0, tl.cdiv(tl.cdiv(M, BLOCK_M) - section, sections), num_stages=STAGES):
        rows = first + step * i + tl.arange(0, BLOCK_M)
        dy, xhat, _ = _load_rows(
            dy_ptr, h_ptr, mean_ptr, rstd_ptr, rows, offs_n,
            stride_dym, stride_dyn, stride_hm, stride_hn, M,
            (rows < M)[:, None] & (offs_n < N)[None, :], ACC,
        )  # fmt: skip
        dw += dy * xhat
        db += dy
    _store_parts(dw_part_ptr, db_part_ptr, section, offs_n, N, tl.sum(dw, 0), tl.sum(db, 0))


@triton.jit
def _layer_norm_bwd_dwdb_kernel(
    dw_part_ptr, db_part_ptr, dw_ptr, db_ptr, P, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns: P partial sums, BLOCK_M at a time."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dw = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    db = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, P, BLOCK_M):
        parts = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (parts < P)[:, None] & mask_n[None, :]
        offs = (parts * N)[:, None] + offs_n[None, :]
        dw += tl.load(dw_part_ptr + offs, mask=mask, other=0.0)
        db += tl.load(db_part_ptr + offs, mask=mask, other=0.0)
    tl.store(dw_ptr + offs_n, cast(tl.sum(dw, 0), dw_ptr.dtype.element_ty), mask=mask_n)
    tl.store(db_ptr + offs_n, cast(tl.sum(db, 0), db_ptr.dtype.element_ty), mask=mask_n)
