"""What `gaugeblock tune` tries on the rows of `layer_norm`'s and `residual_layer_norm`'s tables.

Timed for "forward" is the forward pass, for the other kernels the whole backward pass.
"""

import functools

import torch

from .._layer_norm import launchers, normalised
from . import Problem

KEY = ("kernel", "architecture", "bits", "width")
LAUNCH = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "PROGRAMS")
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
# what one program may have; chips without rows use sm_80's, the smallest of them has 99 KiB
_SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10}
# elements of a tile in one thread: more do not fit in its registers, fewer leave memory idle
_FORWARD_ELEMENTS, _BACKWARD_ELEMENTS = (16, 32, 64), (16, 32)
# of tables that have two gradients in and two terms, three tensors are in flight
_MOST_TENSORS = 3
_TIMED_ELEMENTS = 2**25


def candidates(row):
    """The launch configurations that are measured for a row of the table, its own first."""
    own = {name: row[name] for name in LAUNCH}
    tried = {"forward": _forward, "dx": _dx, "columns": _columns, "dwdb": _dwdb}[row["kernel"]](row)
    others = [dict(zip(LAUNCH, launch)) for launch in dict.fromkeys(tried)]
    return [own, *(x for x in others if x != own and _fits(row, x))]


def _forward(row):
    if row["width"] >= 8192:
        yield from _looped()
    for BLOCK_M, warps in _whole_rows(row["width"], _FORWARD_ELEMENTS):
        yield BLOCK_M, row["width"], warps, 1, None


def _dx(row):
    chip = MULTIPROCESSORS[row["architecture"]]
    if row["BLOCK_N"] < row["width"]:
        yield from _looped()
        return
    for BLOCK_M, warps in _whole_rows(row["width"], _BACKWARD_ELEMENTS):
        for stages in (1, 2, 3):
            # sixteen warps at most: each has a hundred registers a thread and more
            for programs in sorted({8 // warps, 16 // warps} - {0}):
                yield BLOCK_M, row["width"], warps, stages, programs * chip


def _columns(row):
    chip = MULTIPROCESSORS[row["architecture"]]
    for BLOCK_M, BLOCK_N, warps in ((16, 256, 4), (32, 128, 4), (16, 512, 8), (32, 64, 2)):
        for stages in (1, 2, 3):
            for programs in (2, 4, 8):
                yield BLOCK_M, BLOCK_N, warps, stages, programs * chip


def _dwdb(row):
    few = ((16, 64), (16, 128), (16, 256), (32, 128))
    many = ((64, 8), (64, 16), (128, 8), (128, 16), (256, 8), (256, 16), (64, 32))
    for BLOCK_M, BLOCK_N in few if row["width"] > 8192 else many:
        for warps in (4, 8):
            yield BLOCK_M, BLOCK_N, warps, 1, None


def _looped():
    """Tiles of a wide row."""
    for BLOCK_N, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16)):
        for stages in (1, 2, 3):
            yield 1, BLOCK_N, warps, stages, None


def _whole_rows(width, elements):
    """Rows and warps of tiles that leave so many elements to a thread."""
    for BLOCK_M in (1, 2, 4, 8, 16, 32):
        for warps in (1, 2, 4, 8, 16, 32):
            if BLOCK_M * width // (32 * warps) in elements:
                yield BLOCK_M, warps


def _fits(row, candidate):
    """Whether what is on its way fits in shared memory."""
    row_bytes = candidate["BLOCK_M"] * candidate["BLOCK_N"] * row["bits"] // 8
    stages = candidate["num_stages"] if candidate["num_stages"] > 1 else 0
    return _MOST_TENSORS * stages * row_bytes <= _SHARED_BYTES[row["architecture"]]


def problem(row, dtype, device, candidate=None):
    """`layer_norm` on inputs of the row's class."""
    return make_problem("layer_norm", row, dtype, device, candidate)


def make_problem(op, row, dtype, device, candidate):
    """The problem of either op."""
    M, N = _shape(row, candidate)
    draw = torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, generator=draw, device=device, dtype=dtype)
    residual = op == "residual_layer_norm"
    x, w, b, dy = random(M, N), random(N), random(N), random(M, N)
    r, dh = (random(M, N), random(M, N)) if residual else (None, None)

    def answers():
        y, h, mean, rstd = launchers.forward(op, x, r, w, b, 1e-5)
        sums = (h,) if residual else ()
        gradients = launchers.backward(op, dy, dh, h if residual else x, w, mean, rstd)
        return y, *sums, *gradients

    if row["kernel"] == "forward":
        timed = functools.partial(launchers.forward, op, x, r, w, b, 1e-5)
    else:
        _, h, mean, rstd = launchers.forward(op, x, r, w, b, 1e-5)
        timed = functools.partial(
            launchers.backward, op, dy, dh, h if residual else x, w, mean, rstd
        )
    if residual:
        names, inputs = ("y", "h", "dx", "dw", "db"), (x, r, w, b, dy, dh)
        return Problem(names, inputs, timed, answers, _residual_twin)
    return Problem(("y", "dx", "dw", "db"), (x, w, b, dy), timed, answers, _twin)


def _shape(row, candidate):
    """M, N: three quarters of the class where it is timed, as 768 is of 1,024."""
    N = 3 * row["width"] // 4
    if row["kernel"] in ("columns", "dwdb"):
        # widths of models
        N = 768 if row["width"] <= 8192 else 12_288
    if candidate is None:
        return _TIMED_ELEMENTS // N, N
    # ragged tiles whose rows are still in steps of 16 bytes, as where it is timed; every program
    # that walks rows has some to walk
    own, programs = candidate["BLOCK_M"], candidate["PROGRAMS"] or 1
    if row["kernel"] == "dwdb":
        # so many partial sums, or few where rows are wide
        own, programs = 2, 300
    elif row["kernel"] == "columns":
        programs = programs // -(-N // candidate["BLOCK_N"]) + 1
    return own * programs + own + 1, N + 16


def _twin(x, w, b, dy):
    inputs = [t.detach().requires_grad_() for t in (x, w, b)]
    y = normalised(*inputs, 1e-5)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def _residual_twin(x, r, w, b, dy, dh):
    h, w, b = (t.detach().requires_grad_() for t in (x + r, w, b))
    y = normalised(h, w, b, 1e-5)
    dx, dw, db = torch.autograd.grad(y, (h, w, b), dy)
    return y.detach(), h.detach(), dx + dh, dw, db
