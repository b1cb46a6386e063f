"""The language-model head and its loss: cross-entropy of a linear map.

    logits = x wᵀ + b,   loss = cross_entropy(logits, targets)
    dlogits = dloss·(softmax(logits) − (1 − α)·onehot(target) − α/V),   0 where ignored
    dx = dlogits w,   dw = dlogitsᵀ x,   db = Σ dlogits

Shapes: x (..., C); w (V, C), tied to an embedding or not; targets (...) int; b (V,) or None; loss
() or, for reduction "none", (...). Any strides.
Algorithm: the logits are never stored whole. Forward: a program computes tiles of logits for its
rows and its part of the vocabulary, and keeps their running maximum and sum and the target's logit;
a second kernel adds the parts in order. Backward: for chunks of the vocabulary, a kernel computes
the logits again and stores dlogits of the chunk; two products give dw of the chunk and add to dx in
float32. Deterministic. A row's loss depends on no other row and not on their number.
Saved for backward: x, w, targets, b, and lse in float32.
Memory beside inputs and outputs: in backward dlogits of a chunk, a 24th of the logits' bytes, dx in
float32 and what a product splits; at GPT-2's width and 8,192 rows under a tenth of the logits.
dtypes: float16, bfloat16, float32 (IEEE products, not TF32), float64. The logits are float32 and
dlogits in the dtype of x. A target out of range is a ValueError on a CPU; on CUDA it makes its
row's loss NaN.
Source: Wijmans et al. 2024, arXiv:2411.09009 (logits never stored); Hsu et al. 2024,
arXiv:2410.10989 (chunks).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ._checks import expect_alike, expect_dimensions, expect_shape
from ._configurations import architecture, find
from ._launch import accumulator, cast, launch, resolve, tl_accumulator, wide
from ._loss import (
    add_part,
    eager_loss,
    expect_options,
    expect_targets,
    merge,
    new_parts,
    part,
    reduce,
    slope_of,
)
from ._product import locate, operands, product, walk

_OP = "linear_cross_entropy"
# columns of a part of the vocabulary: a row's bits depend on it, so that it is one for all shapes
_SPLIT: tl.constexpr = tl.constexpr(512)
# dlogits are made in so many chunks of the vocabulary
_CHUNKS = 24
# tiles of rows that walk the vocabulary together: their x stays in the L2 cache
_GROUP_M = 32


@triton.jit
def _halves(s):
    """The left and the right columns of a tile: what is done to one half needs fewer registers."""
    s = tl.reshape(s, (s.shape[0], 2, s.shape[1] // 2))
    return tl.split(tl.permute(s, (0, 2, 1)))


@triton.jit
def _logits(s, b_ptr, offs_v, V):
    """x wᵀ of some columns -> logits, −∞ in the columns past the last."""
    if b_ptr is not None:
        s += tl.load(b_ptr + offs_v, mask=offs_v < V, other=0.0).to(s.dtype)[None, :]
    return tl.where((offs_v < V)[None, :], s, float("-inf"))


@triton.jit
def _add_columns(
    m_i, l_i, total, picked, s, b_ptr, offs_v, target, V, SMOOTH: tl.constexpr
):  # fmt: skip
    """The running maximum and sums, and the target's logit, with some more columns."""
    s = _logits(s, b_ptr, offs_v, V)
    m, l = part(s, 1)
    m_i, l_i = add_part(m_i, l_i, m, l)
    if SMOOTH:
        total += tl.sum(tl.where((offs_v < V)[None, :], s, 0.0), 1)
    picked += tl.sum(tl.where(offs_v[None, :] == target[:, None], s, 0.0), 1)
    return m_i, l_i, total, picked


@triton.jit
def _linear_cross_entropy_parts_kernel(
    x, w, b_ptr, targets_ptr, m_ptr, l_ptr, total_ptr, picked_ptr,
    stride_xm, stride_xc, stride_wc, stride_wv, M, V, C,
    SMOOTH: tl.constexpr, TMA: tl.constexpr, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows and a part of the vocabulary: maximum, sums and the target's logit."""
    block_m, split = locate(tl.program_id(0), M, V, BLOCK_M, _SPLIT, GROUP_M)
    offs_m = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_m = offs_m < M
    target = tl.load(targets_ptr + offs_m, mask=mask_m, other=-1)
    # one that is out of range is in no column
    column = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    begin = split * _SPLIT
    end = tl.minimum(begin + _SPLIT, V)
    m_i = tl.full((BLOCK_M,), float("-inf"), ACC)
    l_i = tl.zeros((BLOCK_M,), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    picked = tl.zeros((BLOCK_M,), ACC)
    for first_v in range(begin, end, BLOCK_N):
        s, _ = walk(
            x, w, stride_xm, stride_xc, stride_wc, stride_wv, block_m * BLOCK_M, first_v, M, V, C,
            0, C, False, TMA, A_TURNED, B_TURNED, BLOCK_M, BLOCK_N, BLOCK_K, ACC,
        )  # fmt: skip
        left, right = _halves(s)
        offs_v = first_v + tl.arange(0, BLOCK_N // 2)
        m_i, l_i, total, picked = _add_columns(
            m_i, l_i, total, picked, left, b_ptr, offs_v, column, V, SMOOTH
        )
        m_i, l_i, total, picked = _add_columns(
            m_i, l_i, total, picked, right, b_ptr, offs_v + BLOCK_N // 2, column, V, SMOOTH
        )
    at = split.to(tl.int64) * M + offs_m
    tl.store(m_ptr + at, m_i, mask=mask_m)
    tl.store(l_ptr + at, l_i, mask=mask_m)
    if SMOOTH:
        tl.store(total_ptr + at, total, mask=mask_m)
    tl.store(picked_ptr + offs_m, picked, mask=mask_m & (column >= begin) & (column < end))


@triton.jit
def _store_slopes(
    s, b_ptr, dlogits_ptrs, sums_ptr, offs_n, column, lse, dloss, kept, mask_m, N, V, alpha
):
    """dlogits of some columns, and their sums."""
    s = _logits(s, b_ptr, offs_n, N)
    slope = slope_of(s, offs_n[None, :], column[:, None], lse[:, None], V, alpha)
    dx = tl.where(kept[:, None], dloss[:, None] * slope, 0.0)
    # whole tiles of columns, for which there is room: what is past the last is not read
    ptrs = dlogits_ptrs + offs_n[None, :]
    tl.store(ptrs, cast(dx, dlogits_ptrs.dtype.element_ty), mask=mask_m[:, None])
    if sums_ptr is not None:
        tl.store(sums_ptr + offs_n, tl.sum(dx, 0))


@triton.jit
def _linear_cross_entropy_dlogits_kernel(
    x, w, b_ptr, targets_ptr, dloss_ptr, lse_ptr, dlogits_ptr, sums_ptr,
    stride_xm, stride_xc, stride_wc, stride_wv, stride_dloss, stride_dm,
    M, N, C, first, V, ignore_index, alpha,
    TMA: tl.constexpr, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dlogits of N columns from `first` on; sums: their sums over each tile of rows, or None."""
    block_m, block_n = locate(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    s, _ = walk(
        x, w, stride_xm, stride_xc, stride_wc, stride_wv, block_m * BLOCK_M, block_n * BLOCK_N,
        M, N, C, 0, C, False, TMA, A_TURNED, B_TURNED, BLOCK_M, BLOCK_N, BLOCK_K, ACC,
    )  # fmt: skip
    offs_m = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_m = offs_m < M
    target = tl.load(targets_ptr + offs_m, mask=mask_m, other=-1)
    kept = mask_m & (target != ignore_index)
    column = tl.where((target >= 0) & (target < V), target - first, -1).to(tl.int32)
    # rows that have no gradient have exponentials of 0
    lse = tl.load(lse_ptr + offs_m, mask=kept, other=float("inf"))
    dloss = tl.load(dloss_ptr + offs_m * stride_dloss, mask=kept, other=0.0)
    dlogits_ptrs = dlogits_ptr + offs_m[:, None] * stride_dm
    if sums_ptr is not None:
        sums_ptr += block_m.to(tl.int64) * stride_dm
    left, right = _halves(s)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    _store_slopes(
        left, b_ptr, dlogits_ptrs, sums_ptr, offs_n, column, lse, dloss, kept, mask_m, N, V, alpha
    )
    _store_slopes(
        right, b_ptr, dlogits_ptrs, sums_ptr, offs_n + BLOCK_N // 2, column, lse, dloss, kept,
        mask_m, N, V, alpha,
    )  # fmt: skip


def _options(kernel, x, b):
    """Launch options: a pure function of dtype, bias, chip: no bits of a row depend on M."""
    found = find(
        _OP, kernel=kernel, architecture=architecture(), bits=16 if x.element_size() == 2 else 32
    )
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "TMA"
    options = {name: found[name] for name in names}
    if b is not None:
        # the bias of a wide tile, one element a register, would spill
        options["BLOCK_N"] = min(options["BLOCK_N"], 128)
    return options


def _launch_tiles(kernel, columns, x, w, *args, **options):
    """Run a kernel on tiles of x wᵀ that have so many columns."""
    x_read, w_read, described = operands(x, w.t(), options)
    launch(
        kernel, triton.cdiv(x.shape[0], options["BLOCK_M"]) * triton.cdiv(w.shape[0], columns),
        x_read, w_read, *args,
        **options | described, GROUP_M=_GROUP_M, ACC=tl_accumulator(x.dtype),
    )  # fmt: skip


def _forward(x, w, targets, b, ignore_index, alpha):
    """x (M, C), w (V, C), targets (M,), b (V,) or None -> losses (M,), lse (M,)."""
    (M, C), V = x.shape, w.shape[0]
    losses = torch.empty((M,), dtype=accumulator(x.dtype), device=x.device)
    lse, picked = torch.empty_like(losses), torch.empty_like(losses)
    parts = new_parts(triton.cdiv(V, _SPLIT.value), M, alpha != 0, lse)
    _launch_tiles(
        _linear_cross_entropy_parts_kernel, _SPLIT.value, x, w,
        b, targets, *parts, picked, *x.stride(), *w.t().stride(), M, V, C,
        SMOOTH=alpha != 0, **_options("forward", x, b),
    )  # fmt: skip
    merge(parts, picked, (1, 0), targets, losses, lse, V, ignore_index, alpha)
    return losses, lse


def _chunk(V, BLOCK_N):
    """Columns of dlogits that are stored at a time."""
    return triton.cdiv(triton.cdiv(V, BLOCK_N), _CHUNKS) * BLOCK_N


def _backward(dlosses, x, w, targets, b, lse, ignore_index, alpha, chunks=None):
    """-> dx (M, C), dw (V, C), db (V,) or None. chunks: which are computed, all by default."""
    (M, C), V = x.shape, w.shape[0]
    options = _options("dlogits", x, b)
    columns = _chunk(V, options["BLOCK_N"])
    dlogits = torch.empty((M, columns), dtype=x.dtype, device=x.device)
    dx = torch.empty((M, C), dtype=x.dtype, device=x.device)
    dw = torch.empty((V, C), dtype=w.dtype, device=w.device)
    db = None if b is None else lse.new_empty((V,))
    sums = None if b is None else lse.new_empty((triton.cdiv(M, options["BLOCK_M"]), columns))
    # rounded to the dtype of dx once, with the last chunk
    acc = dx if columns >= V else torch.empty((M, C), dtype=lse.dtype, device=x.device)
    for i in range(triton.cdiv(V, columns)) if chunks is None else chunks:
        first = i * columns
        N = min(columns, V - first)
        d, w_chunk = dlogits.narrow(1, 0, N), w.narrow(0, first, N)
        _launch_tiles(
            _linear_cross_entropy_dlogits_kernel, options["BLOCK_N"], x, w_chunk,
            None if b is None else b.narrow(0, first, N), targets, dlosses, lse, d, sums,
            *x.stride(), *w_chunk.t().stride(), dlosses.stride(0), columns,
            M, N, C, first, V, ignore_index, alpha, **options,
        )  # fmt: skip
        product(d.t(), x, out=dw.narrow(0, first, N))
        product(d, w_chunk, out=dx if first + N == V else acc, add=acc if first else None)
        if b is not None:
            torch.sum(sums.narrow(1, 0, N), 0, out=db.narrow(0, first, N))
    return dx, dw, None if b is None else db.to(b.dtype)


def _launch_all(
    x, w, targets, b=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):  # fmt: skip
    """Calls straight through the launchers, with and without a bias, to be compiled."""
    for bias in (b, None):
        losses, lse = _forward(x, w, targets, bias, ignore_index, label_smoothing)
        columns = _chunk(w.shape[0], _options("dlogits", x, bias)["BLOCK_N"])
        last = triton.cdiv(w.shape[0], columns) - 1
        # the others are launched as the second is
        chunks = sorted({0, min(1, last), last})
        _backward(losses, x, w, targets, bias, lse, ignore_index, label_smoothing, chunks)


@torch.library.custom_op("gaugeblock::linear_cross_entropy_fwd", mutates_args=())
def _fwd_op(
    x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, b: torch.Tensor | None,
    ignore_index: int, alpha: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _forward(x, w, targets, b, ignore_index, alpha)


@_fwd_op.register_fake
def _(x, w, targets, b, ignore_index, alpha):
    losses = x.new_empty(x.shape[:1], dtype=accumulator(x.dtype))
    return losses, torch.empty_like(losses)


@torch.library.custom_op("gaugeblock::linear_cross_entropy_bwd", mutates_args=())
def _bwd_op(
    dlosses: torch.Tensor, x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor,
    b: torch.Tensor | None, lse: torch.Tensor, ignore_index: int, alpha: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dx, dw, db = _backward(dlosses, x, w, targets, b, lse, ignore_index, alpha)
    # an operator returns tensors alone
    return dx, dw, x.new_empty((0,)) if db is None else db


@_bwd_op.register_fake
def _(dlosses, x, w, targets, b, lse, ignore_index, alpha):
    return x.new_empty(x.shape), w.new_empty(w.shape), x.new_empty((0,) if b is None else b.shape)


def _save(ctx, inputs, output):
    x, w, targets, b, ctx.ignore_index, ctx.alpha = inputs
    ctx.save_for_backward(x, w, targets, b, output[1])


def _differentiate(ctx, dlosses, dlse):
    dx, dw, db = _bwd_op(dlosses, *ctx.saved_tensors, ctx.ignore_index, ctx.alpha)
    return dx, dw, None, None if ctx.saved_tensors[3] is None else db, None, None


_fwd_op.register_autograd(_differentiate, setup_context=_save)


def _eager(
    x, w, targets, b=None, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):  # fmt: skip
    """The plain torch twin: it stores the logits."""
    logits = F.linear(wide(x), wide(w), None if b is None else wide(b))
    return eager_loss(logits, targets, ignore_index, label_smoothing, reduction)


def linear_cross_entropy(
    x, w, targets, b=None, *, ignore_index=-100, label_smoothing=0.0, reduction="mean", impl="auto"
):
    """loss = cross_entropy(x wᵀ + b, targets), averaged over the targets that are not ignored.

    Shapes: x (..., C); w (V, C); targets (...) int; b (V,) or None. "mean" and "sum" give a scalar,
    "none" (...). A logit of −∞ (b = −∞ for columns that pad a vocabulary) has probability 0.
    Raises ValueError for shapes, options or (on a CPU) targets out of range, TypeError for dtypes.
    """
    expect_alike(_OP, x=x, w=w, **({} if b is None else {"b": b}))
    expect_dimensions(_OP, "x", x, "(..., C)")
    C = x.shape[-1]
    expect_shape(_OP, "w", w, "(V, C)", (None, C))
    V = w.shape[0]
    if V == 0:
        raise ValueError(f"{_OP}: w must have at least one row, got {tuple(w.shape)}")
    if b is not None:
        expect_shape(_OP, "b", b, "(V,)", (V,))
    expect_options(_OP, ignore_index, label_smoothing, reduction)
    targets = expect_targets(_OP, "x", x, targets, V, ignore_index)
    alpha = float(label_smoothing)
    if resolve(_OP, impl, x) == "eager":
        return _eager(
            x, w, targets, b,
            ignore_index=ignore_index, label_smoothing=alpha, reduction=reduction,
        )  # fmt: skip
    b = None if b is None else b.contiguous()
    losses, _ = _fwd_op(
        x.reshape(-1, C), w, targets.reshape(-1).contiguous(), b, ignore_index, alpha
    )
    return reduce(losses.view(targets.shape), targets != ignore_index, reduction)
