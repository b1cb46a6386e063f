"""Softmax cross-entropy of integer targets.

    lse = log Σ_v exp(logits_v)
    loss = (1 − α)·(lse − logits_target) + α·(lse − mean_v logits_v),   0 where ignored
    dlogits = dloss·(softmax(logits) − (1 − α)·onehot(target) − α/V)

Shapes: logits (..., V) of any strides; targets (...) int; loss () or, for reduction "none", (...).
Algorithm: a row is split over programs, so that few rows fill a chip too; each reads its tile once
and leaves its maximum and sum, and a second kernel adds them in order; log(softmax) is not formed.
The gradient is computed later, by one more pass that recomputes the softmax from lse, or with the
loss: one program walks a row, and walks it again for the gradient of a loss gradient of 1 while the
row is still in the cache (few rows are split, as above); backward multiplies by dloss where that is
not 1, which the kernel sees for itself. Rows of contiguous logits are read from the 16-byte step at
or before their first element: tiles inside a row need no mask and are moved 16 bytes at a time
whatever the row stride is; a row's first and last tile are masked.
Saved for backward: logits, targets and lse in float32; or targets and dlogits, which backward
multiplies in place. The loss is float32 for 16-bit logits. An ignored row is not read.
In place: dlogits overwrite the logits, only where that is asked; torch's version counters see it.
dtypes: float16, bfloat16, float32, float64. Deterministic. A row's bits depend on no other row and
not on their number, but on V and on where in 16 bytes the row begins.
A target out of range is a ValueError on a CPU; on CUDA, where asking would stall the stream, it
makes its row's loss NaN.
Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (online normaliser); Szegedy et al. 2015,
arXiv:1512.00567 (smoothing).
"""

import torch
import triton
import triton.language as tl

from ._checks import expect_alike, expect_choice, expect_dimensions
from ._configurations import architecture, find
from ._launch import accumulator, cast, launch, resolve, tile, tl_accumulator, wide
from ._loss import (
    add_part,
    eager_loss,
    expect_options,
    expect_targets,
    loss_of,
    merge,
    new_parts,
    part,
    reduce,
    slope_of,
)

GRADIENTS = ("later", "with_loss")
# with fewer rows than this a program for each leaves a chip empty
_FEW_ROWS = 256
# programs that look at dloss, and scale where it is not 1
_SCALE_PROGRAMS = 2048
# elements between rows, beyond V, that the gradient of padded logits keeps
_MOST_PADDING = 1024


@triton.jit
def _row_start(row, stride_m, VEC: tl.constexpr):
    """(the step of VEC elements in which a row begins, elements of the step before the row)."""
    start = row * stride_m // VEC * VEC
    return start, (row * stride_m - start).to(tl.int32)


@triton.jit
def _load_tile(ptr, split, head, V, stride_v, BLOCK_V: tl.constexpr):
    """A tile of the row that begins `head` elements after ptr, −∞ outside it."""
    offs = split * BLOCK_V + tl.arange(0, BLOCK_V)
    ptrs = ptr + offs.to(tl.int64) * stride_v
    # a mask that cuts anywhere would make the compiler load single elements
    if tl.minimum(split * BLOCK_V - head, V + head - split * BLOCK_V - BLOCK_V) >= 0:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=(offs >= head) & (offs < V + head), other=float("-inf"))
    return x


@triton.jit
def _store_tile(ptr, x, split, head, V, stride_v, BLOCK_V: tl.constexpr):
    offs = split * BLOCK_V + tl.arange(0, BLOCK_V)
    ptrs = ptr + offs.to(tl.int64) * stride_v
    x = cast(x, ptr.dtype.element_ty)
    if tl.minimum(split * BLOCK_V - head, V + head - split * BLOCK_V - BLOCK_V) >= 0:
        tl.store(ptrs, x)
    else:
        tl.store(ptrs, x, mask=(offs >= head) & (offs < V + head))


@triton.jit
def _cross_entropy_parts_kernel(
    logits_ptr, targets_ptr, m_ptr, l_ptr, total_ptr,
    stride_m, stride_v, M, V, splits, ignore_index,
    SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of a row: its maximum and sums."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    if tl.load(targets_ptr + row) == ignore_index:
        return
    start, head = _row_start(row, stride_m, VEC)
    x = _load_tile(logits_ptr + start, split, head, V, stride_v, BLOCK_V).to(ACC)
    m, l = part(x, 0)
    at = split.to(tl.int64) * M + row
    tl.store(m_ptr + at, m)
    tl.store(l_ptr + at, l)
    if SMOOTH:
        offs_v = split * BLOCK_V - head + tl.arange(0, BLOCK_V)
        inside = (offs_v >= 0) & (offs_v < V)
        tl.store(total_ptr + at, tl.sum(tl.where(inside, x, 0.0), 0))


@triton.jit
def _cross_entropy_bwd_kernel(
    dloss_ptr, logits_ptr, targets_ptr, lse_ptr, dlogits_ptr,
    stride_dloss, stride_m, stride_v, stride_dm, stride_dv, V, splits, ignore_index, alpha,
    SAME_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    target = tl.load(targets_ptr + row)
    start, head = _row_start(row, stride_m, VEC)
    to = start if SAME_ROWS else row * stride_dm - head
    offs_v = split * BLOCK_V - head + tl.arange(0, BLOCK_V)
    if target == ignore_index:
        dx = tl.zeros((BLOCK_V,), ACC)
    else:
        x = _load_tile(logits_ptr + start, split, head, V, stride_v, BLOCK_V).to(ACC)
        dloss = tl.load(dloss_ptr + row * stride_dloss)
        lse = tl.load(lse_ptr + row)
        dx = dloss * slope_of(x, offs_v, target.to(tl.int32), lse, V, alpha)
    _store_tile(dlogits_ptr + to, dx, split, head, V, stride_dv, BLOCK_V)


@triton.jit
def _cross_entropy_fwd_bwd_kernel(
    rate_ptr, logits_ptr, targets_ptr, loss_ptr, dlogits_ptr,
    stride_m, stride_v, stride_dm, stride_dv, V, splits, ignore_index, alpha,
    SMOOTH: tl.constexpr, SAME_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A row's loss, and its gradient for a loss gradient of `rate`; dlogits may be the logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    start, head = _row_start(row, stride_m, VEC)
    to = start if SAME_ROWS else row * stride_dm - head
    offs = tl.arange(0, BLOCK_V)
    if target == ignore_index:
        tl.store(loss_ptr + row, tl.zeros((), ACC))
        for split in range(0, splits):
            _store_tile(
                dlogits_ptr + to, tl.zeros((BLOCK_V,), ACC), split, head, V, stride_dv, BLOCK_V
            )
    else:
        inside = (target >= 0) & (target < V)
        # read before any thread can have overwritten it: the sums below are barriers
        picked = tl.load(
            logits_ptr + row * stride_m + target.to(tl.int64) * stride_v,
            mask=inside, other=float("nan"),
        ).to(ACC)  # fmt: skip
        m_i = tl.full((), float("-inf"), ACC)
        l_i = tl.zeros((), ACC)
        total = tl.zeros((), ACC)
        for split in range(0, splits):
            x = _load_tile(logits_ptr + start, split, head, V, stride_v, BLOCK_V).to(ACC)
            m, l = part(x, 0)
            m_i, l_i = add_part(m_i, l_i, m, l)
            if SMOOTH:
                offs_v = split * BLOCK_V - head + offs
                total += tl.sum(tl.where((offs_v >= 0) & (offs_v < V), x, 0.0), 0)
        loss, lse = loss_of(m_i, l_i, total, picked, V, alpha, SMOOTH)
        tl.store(loss_ptr + row, loss)
        rate = tl.load(rate_ptr)
        for split in range(0, splits):
            x = _load_tile(logits_ptr + start, split, head, V, stride_v, BLOCK_V).to(ACC)
            offs_v = split * BLOCK_V - head + offs
            dx = rate * slope_of(x, offs_v, target.to(tl.int32), lse, V, alpha)
            _store_tile(dlogits_ptr + to, dx, split, head, V, stride_dv, BLOCK_V)


@triton.jit
def _cross_entropy_scale_kernel(
    dloss_ptr, targets_ptr, dlogits_ptr,
    stride_dloss, stride_m, stride_v, M, V, splits, ignore_index,
    PROGRAMS: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dlogits *= dloss, rows that are not to change are not touched."""
    for i in range(0, tl.cdiv(M - tl.program_id(0), PROGRAMS)):
        row = (tl.program_id(0) + i * PROGRAMS).to(tl.int64)
        target = tl.load(targets_ptr + row)
        # an ignored row's gradient is 0 whatever dloss is
        dloss = tl.where(
            target == ignore_index, 1.0, tl.load(dloss_ptr + row * stride_dloss).to(ACC)
        )
        if dloss != 1.0:
            start, head = _row_start(row, stride_m, VEC)
            for split in range(0, splits):
                dx = _load_tile(dlogits_ptr + start, split, head, V, stride_v, BLOCK_V).to(ACC)
                _store_tile(dlogits_ptr + start, dloss * dx, split, head, V, stride_v, BLOCK_V)


def _options(kernel, V, x):
    """Launch options and the tiles of a row: a pure function of V, dtype and chip."""
    found = find(
        "cross_entropy", kernel=kernel, architecture=architecture(),
        bits=min(8 * x.element_size(), 32),
    )  # fmt: skip
    # strides other than 1 have no step of 16 bytes
    vec = 16 // x.element_size() if x.stride(1) == 1 else 1
    BLOCK_V = tile(V + vec - 1, found["BLOCK_V"])
    warps = max(1, found["num_warps"] * BLOCK_V // found["BLOCK_V"])
    options = dict(BLOCK_V=BLOCK_V, VEC=vec, ACC=tl_accumulator(x.dtype), num_warps=warps)
    return options, triton.cdiv(V + vec - 1, BLOCK_V)


def _forward(logits, targets, ignore_index, alpha, kernel="forward"):
    """logits (M, V), targets (M,) -> losses (M,), lse (M,)."""
    M, V = logits.shape
    losses = torch.empty((M,), dtype=accumulator(logits.dtype), device=logits.device)
    lse = torch.empty_like(losses)
    options, splits = _options(kernel, V, logits)
    parts = new_parts(splits, M, alpha != 0, lse)
    launch(
        _cross_entropy_parts_kernel, M * splits,
        logits, targets, *parts, *logits.stride(), M, V, splits, ignore_index,
        SMOOTH=alpha != 0, **options,
    )  # fmt: skip
    merge(parts, logits, logits.stride(), targets, losses, lse, V, ignore_index, alpha)
    return losses, lse


def _new_gradient(logits):
    """Empty, with the row stride of padded logits, so that both have rows at the same steps."""
    V = logits.shape[1]
    if logits.stride(1) == 1 and V <= logits.stride(0) < V + _MOST_PADDING:
        return torch.empty_strided(
            logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device
        )
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _backward(dlosses, logits, targets, lse, ignore_index, alpha, dlogits=None):
    """-> dlogits (M, V); `dlogits` is written where it is given."""
    M, V = logits.shape
    dlogits = _new_gradient(logits) if dlogits is None else dlogits
    options, splits = _options("backward", V, logits)
    launch(
        _cross_entropy_bwd_kernel, M * splits,
        dlosses, logits, targets, lse, dlogits,
        dlosses.stride(0), *logits.stride(), *dlogits.stride(), V, splits, ignore_index, alpha,
        SAME_ROWS=logits.stride() == dlogits.stride(), **options,
    )  # fmt: skip
    return dlogits


def _forward_backward(logits, targets, ignore_index, alpha, reduction, dlogits):
    """-> the reduced loss; dlogits, which may be logits, become its gradient."""
    M, V = logits.shape
    kept = targets != ignore_index
    rate = torch.ones((), dtype=accumulator(logits.dtype), device=logits.device)
    if reduction == "mean":
        rate = rate / kept.sum()
    if M < _FEW_ROWS:
        losses, lse = _forward(logits, targets, ignore_index, alpha, "with_loss")
        _backward(rate.expand(M), logits, targets, lse, ignore_index, alpha, dlogits)
        return reduce(losses, kept, reduction)
    losses = torch.empty((M,), dtype=rate.dtype, device=logits.device)
    options, splits = _options("with_loss", V, logits)
    launch(
        _cross_entropy_fwd_bwd_kernel, M,
        rate, logits, targets, losses, dlogits,
        *logits.stride(), *dlogits.stride(), V, splits, ignore_index, alpha,
        SMOOTH=alpha != 0, SAME_ROWS=logits.stride() == dlogits.stride(), **options,
    )  # fmt: skip
    return reduce(losses, kept, reduction)


def _scale(dlogits, dloss, targets, ignore_index):
    """dlogits *= dloss, one for all rows or one a row, where it is not 1."""
    M, V = dlogits.shape
    dloss = dloss.expand(M)
    options, splits = _options("backward", V, dlogits)
    programs = min(M, _SCALE_PROGRAMS)
    launch(
        _cross_entropy_scale_kernel, programs,
        dloss, targets, dlogits, dloss.stride(0), *dlogits.stride(), M, V, splits, ignore_index,
        PROGRAMS=programs, **options,
    )  # fmt: skip


def _launch_all(logits, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """One call of everything straight through the launchers, to be compiled."""
    losses, lse = _forward(logits, targets, ignore_index, label_smoothing)
    _backward(losses, logits, targets, lse, ignore_index, label_smoothing)
    dlogits = _new_gradient(logits)
    loss = _forward_backward(logits, targets, ignore_index, label_smoothing, reduction, dlogits)
    _scale(dlogits, loss, targets, ignore_index)


@torch.library.custom_op("gaugeblock::cross_entropy_fwd", mutates_args=())
def _fwd_op(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(logits, targets, ignore_index, alpha)


@_fwd_op.register_fake
def _(logits, targets, ignore_index, alpha):
    losses = logits.new_empty(logits.shape[:1], dtype=accumulator(logits.dtype))
    return losses, torch.empty_like(losses)


@torch.library.custom_op("gaugeblock::cross_entropy_bwd", mutates_args=())
def _bwd_op(
    dlosses: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor,
    ignore_index: int, alpha: float,
) -> torch.Tensor:  # fmt: skip
    return _backward(dlosses, logits, targets, lse, ignore_index, alpha)


@_bwd_op.register_fake
def _(dlosses, logits, targets, lse, ignore_index, alpha):
    return _new_gradient(logits)


def _save(ctx, inputs, output):
    logits, targets, ctx.ignore_index, ctx.alpha = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _differentiate(ctx, dlosses, dlse):
    return _bwd_op(dlosses, *ctx.saved_tensors, ctx.ignore_index, ctx.alpha), None, None, None


_fwd_op.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("gaugeblock::cross_entropy_with_gradient", mutates_args=())
def _with_gradient_op(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, alpha: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dlogits = _new_gradient(logits)
    return _forward_backward(logits, targets, ignore_index, alpha, reduction, dlogits), dlogits


@torch.library.custom_op("gaugeblock::cross_entropy_with_gradient_", mutates_args=("logits",))
def _with_gradient_inplace_op(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, alpha: float, reduction: str
) -> torch.Tensor:
    return _forward_backward(logits, targets, ignore_index, alpha, reduction, logits)


@_with_gradient_inplace_op.register_fake
def _empty_loss(logits, targets, ignore_index, alpha, reduction):
    shape = logits.shape[:1] if reduction == "none" else ()
    return logits.new_empty(shape, dtype=accumulator(logits.dtype))


@_with_gradient_op.register_fake
def _(logits, *rest):
    return _empty_loss(logits, *rest), _new_gradient(logits)


@torch.library.custom_op("gaugeblock::cross_entropy_scale_", mutates_args=("dlogits",))
def _scale_op(
    dlogits: torch.Tensor, dloss: torch.Tensor, targets: torch.Tensor, ignore_index: int
) -> None:
    _scale(dlogits, dloss, targets, ignore_index)


@torch.library.custom_op("gaugeblock::cross_entropy_known_gradient", mutates_args=())
def _known_gradient_op(
    logits: torch.Tensor, loss: torch.Tensor, dlogits: torch.Tensor, targets: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor:  # fmt: skip
    """loss as a function of the logits, whose gradient for a dloss of 1 is dlogits."""
    return loss.clone()


@_known_gradient_op.register_fake
def _(logits, loss, dlogits, targets, ignore_index):
    return torch.empty_like(loss)


def _save_gradient(ctx, inputs, output):
    _, _, dlogits, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(dlogits, targets)


def _hand_out_gradient(ctx, dloss):
    # in place, so that a second backward is refused by the version counter of what it saved
    dlogits, targets = ctx.saved_tensors
    _scale_op(dlogits, dloss, targets, ctx.ignore_index)
    return dlogits, None, None, None, None


_known_gradient_op.register_autograd(_hand_out_gradient, setup_context=_save_gradient)


def _eager(
    logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean",
    gradient="later", inplace=False,
):  # fmt: skip
    """The plain torch twin; how the gradient is computed is autograd's."""
    return eager_loss(wide(logits), targets, ignore_index, label_smoothing, reduction)


def cross_entropy(
    logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean",
    gradient="later", inplace=False, impl="auto",
):  # fmt: skip
    """loss = lse − logits[target], averaged over the targets that are not ignored.

    Shapes: logits (..., V); targets (...) int. "mean" and "sum" give a scalar, "none" (...).
    gradient: "later" reads the logits once more in backward. "with_loss" computes the gradient of
        a loss gradient of 1 beside the loss, in the logits' dtype, and backward multiplies it where
        dloss is another: less traffic, memory from the forward pass on, one backward pass alone,
        and in float16 a loss scale comes too late for what was rounded to 0.
    inplace: with "with_loss", and where a gradient will be wanted, it is written over the logits,
        which nothing may read afterwards; to the eager twin it means nothing.
    Raises ValueError for shapes, options or (on a CPU) targets out of range, TypeError for dtypes.
    """
    expect_alike("cross_entropy", logits=logits)
    expect_dimensions("cross_entropy", "logits", logits, "(..., V)")
    V = logits.shape[-1]
    expect_options("cross_entropy", ignore_index, label_smoothing, reduction)
    expect_choice("cross_entropy", "gradient", gradient, GRADIENTS)
    targets = expect_targets("cross_entropy", "logits", logits, targets, V, ignore_index)
    if inplace:
        _expect_overwritable(logits, gradient)
    alpha = float(label_smoothing)
    if resolve("cross_entropy", impl, logits) == "eager":
        return _eager(
            logits, targets, ignore_index=ignore_index, label_smoothing=alpha, reduction=reduction
        )
    rows, row_targets = logits.reshape(-1, V), targets.reshape(-1).contiguous()
    if gradient == "later" or not (torch.is_grad_enabled() and logits.requires_grad):
        losses, _ = _fwd_op(rows, row_targets, ignore_index, alpha)
        return reduce(losses.view(targets.shape), targets != ignore_index, reduction)
    options = row_targets, ignore_index, alpha, reduction
    if inplace:
        dlogits = rows.detach()
        loss = _with_gradient_inplace_op(dlogits, *options)
    else:
        loss, dlogits = _with_gradient_op(rows.detach(), *options)
    loss = _known_gradient_op(rows, loss, dlogits, row_targets, ignore_index)
    return loss.view(targets.shape) if reduction == "none" else loss


def _expect_overwritable(logits, gradient):
    """Raise ValueError unless the gradient can be written over the logits."""
    if gradient != "with_loss":
        raise ValueError(
            f"cross_entropy: inplace needs gradient='with_loss', got {gradient!r}: "
            "what overwrites the logits must be there with the loss"
        )
    # each dimension, from the one of the least stride on, must step over those before it
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape)):
        if size > 1 and stride < extent:
            raise ValueError(
                "cross_entropy: inplace needs logits whose elements do not overlap, "
                f"got strides {tuple(logits.stride())}; use a copy"
            )
        extent += (size - 1) * stride
    try:
        logits.view(-1, logits.shape[-1])
    except RuntimeError:
        raise ValueError(
            "cross_entropy: inplace needs logits whose rows one stride describes, "
            f"got strides {tuple(logits.stride())}; use a copy"
        ) from None
