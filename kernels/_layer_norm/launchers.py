"""The launchers of `layer_norm` and `residual_layer_norm`: configurations, memory, launches."""

import torch
import triton

from .._configurations import architecture, find, rows
from .._launch import accumulator, launch, tile, tl_accumulator
from .backward import (
    _layer_norm_bwd_columns_kernel,
    _layer_norm_bwd_dwdb_kernel,
    _layer_norm_bwd_dx_kernel,
    _layer_norm_bwd_dx_wide_kernel,
)
from .forward import _layer_norm_fwd_kernel, _layer_norm_fwd_wide_kernel

LARGEST_ROW = 65_536


def configuration(op, kernel, N, dtype):
    """-> the table's row for "forward", "dx", "columns" or "dwdb" at this width.

    A row that is wider than BLOCK_N is read in several tiles. Nothing depends on the number of
    rows, so that no row's result does.
    """
    key = {
        "kernel": kernel,
        "architecture": architecture(),
        "bits": 16 if dtype.itemsize == 2 else 32,
    }
    widths = [row["width"] for row in rows(op) if key.items() <= row.items()]
    row = dict(find(op, **key, width=min(w for w in widths if w >= N)))
    row["BLOCK_N"] = min(row["BLOCK_N"], tile(N, LARGEST_ROW))
    if N % 16 and kernel in ("forward", "dx"):
        # rows that do not begin at 16 bytes are loaded value by value, which takes registers
        row["num_warps"] = min(2 * row["num_warps"], 32)
    if dtype == torch.float64:
        # rows of float64 in several stages need more shared memory than there is
        row["num_stages"] = 1
    return row


def _tiles(row, dtype, *names):
    """The row's tiles as a kernel takes them."""
    options = {"ACC": tl_accumulator(dtype), "num_warps": row["num_warps"]}
    return options | {name: row["num_stages" if name == "STAGES" else name] for name in names}


def _strides(x):
    return (0, 0) if x is None else x.stride()


def forward(op, x, r, w, b, eps):
    """x, r (M, N) -> y, h (M, N), mean (M, 2), rstd (M,). r and h may be None."""
    M, N = x.shape
    acc = accumulator(x.dtype)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    h = None if r is None else torch.empty_like(y)
    # the mean and its correction: together they place the centre to better than one ulp
    mean = torch.empty((M, 2), dtype=acc, device=x.device)
    rstd = torch.empty((M,), dtype=acc, device=x.device)
    tensors = x, r, w, b, y, h, mean, rstd, *_strides(x), *_strides(r)
    row = configuration(op, "forward", N, x.dtype)
    if row["BLOCK_N"] >= N:
        launch(
            _layer_norm_fwd_kernel, triton.cdiv(M, row["BLOCK_M"]), *tensors, M, N, eps,
            **_tiles(row, x.dtype, "BLOCK_M", "BLOCK_N"),
        )  # fmt: skip
    else:
        launch(
            _layer_norm_fwd_wide_kernel, M, *tensors, N, eps,
            **_tiles(row, x.dtype, "BLOCK_N", "STAGES"),
        )  # fmt: skip
    return y, h, mean, rstd


def backward(op, dy, dh, h, w, mean, rstd):
    """-> dx (M, N), dw (N,), db (N,). dh may be None; h is x where nothing was added."""
    M, N = h.shape
    dx = torch.empty((M, N), dtype=h.dtype, device=h.device)
    row = configuration(op, "dx", N, h.dtype)
    strides = *_strides(dy), *_strides(dh), *_strides(h)
    if row["BLOCK_N"] >= N:
        programs = min(triton.cdiv(M, row["BLOCK_M"]), row["PROGRAMS"])
        dw_part, db_part = _parts(programs, h)
        launch(
            _layer_norm_bwd_dx_kernel, programs,
            dy, dh, h, w, mean, rstd, dx, dw_part, db_part, *strides, M, N,
            **_tiles(row, h.dtype, "BLOCK_M", "BLOCK_N", "STAGES"),
        )  # fmt: skip
    else:
        launch(
            _layer_norm_bwd_dx_wide_kernel, M,
            dy, dh, h, w, mean, rstd, dx, *strides, M, N,
            **_tiles(row, h.dtype, "BLOCK_N", "STAGES"),
        )  # fmt: skip
        dw_part, db_part = _column_parts(op, dy, h, mean, rstd)
    return dx, *_added(op, dw_part, db_part, w)


def _parts(programs, h):
    """Memory for the partial sums of so many programs."""
    return torch.empty((2, programs, h.shape[1]), dtype=accumulator(h.dtype), device=h.device)


def _column_parts(op, dy, h, mean, rstd):
    """Partial sums of dw and db (P, N) in tiles of columns."""
    M, N = h.shape
    row = configuration(op, "columns", N, h.dtype)
    columns = triton.cdiv(N, row["BLOCK_N"])
    sections = min(triton.cdiv(M, row["BLOCK_M"]), max(row["PROGRAMS"] // columns, 1))
    dw_part, db_part = _parts(sections, h)
    launch(
        _layer_norm_bwd_columns_kernel, sections * columns,
        dy, h, mean, rstd, dw_part, db_part, *_strides(dy), *_strides(h), M, N,
        **_tiles(row, h.dtype, "BLOCK_M", "BLOCK_N", "STAGES"),
    )  # fmt: skip
    return dw_part, db_part


def _added(op, dw_part, db_part, w):
    """dw, db (N,): partial sums (P, N) added in a fixed order."""
    (P, N), dw, db = dw_part.shape, torch.empty_like(w), torch.empty_like(w)
    row = configuration(op, "dwdb", N, w.dtype)
    launch(
        _layer_norm_bwd_dwdb_kernel, triton.cdiv(N, row["BLOCK_N"]),
        dw_part, db_part, dw, db, P, N,
        **_tiles(row, w.dtype, "BLOCK_M", "BLOCK_N"),
    )  # fmt: skip
    return dw, db
