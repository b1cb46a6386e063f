"""Softmax cross-entropy of integer targets.

    lse = log Σ_v exp(logits_v)
    loss = (1 − α)·(lse − logits_target) + α·(lse − mean_v logits_v),   0 where ignored
    dlogits = dloss·(softmax(logits) − (1 − α)·onehot(target) − α/V)

Shapes: logits (..., V) of any strides; targets (...) int; loss () or, for reduction "none", (...).
Algorithm: one program a row walks the vocabulary once with a running maximum and sum; backward
recomputes the softmax from lse in one more pass. log(softmax) is never formed.
Saved for backward: logits, targets and lse in float32. The loss is float32 for 16-bit logits.
dtypes: float16, bfloat16, float32, float64. Deterministic.
A target out of range is a ValueError on a CPU; on CUDA, where asking would stall the stream, it
makes its row's loss NaN.
Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (online normaliser); Szegedy et al. 2015,
arXiv:1512.00567 (smoothing).
"""

import torch
import triton
import triton.language as tl

from ._checks import expect_alike, expect_choice, expect_dimensions, expect_shape
from ._launch import accumulator, cast, launch, resolve, tile, tl_accumulator, wide

REDUCTIONS = ("mean", "sum", "none")


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr, targets_ptr, loss_ptr, lse_ptr,
    stride_m, stride_v, V, ignore_index, alpha,
    SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_m
    target = tl.load(targets_ptr + row)
    m_i = tl.full((), float("-inf"), ACC)
    l_i = tl.zeros((), ACC)
    total = tl.zeros((), ACC)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        x = tl.load(row_ptr + offs_v.to(tl.int64) * stride_v, mask=mask_v, other=float("-inf"))
        x = x.to(ACC)
        m_new = tl.maximum(m_i, tl.max(x, 0))
        # a tile of −inf alone must not turn into −inf − (−inf)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp(m_i - m_safe) + tl.sum(tl.exp(x - m_safe), 0)
        m_i = m_new
        if SMOOTH:
            total += tl.sum(tl.where(mask_v, x, 0.0), 0)
    m_safe = tl.where(m_i == float("-inf"), 0.0, m_i)
    lse = m_safe + tl.log(l_i)
    inside = (target >= 0) & (target < V)
    picked = tl.load(row_ptr + target.to(tl.int64) * stride_v, mask=inside, other=float("nan"))
    loss = (1 - alpha) * (lse - picked.to(ACC))
    if SMOOTH:
        loss += alpha * (lse - total / V)
    tl.store(loss_ptr + row, tl.where(target == ignore_index, 0.0, loss))
    tl.store(lse_ptr + row, lse)


@triton.jit
def _cross_entropy_bwd_kernel(
    dloss_ptr, logits_ptr, targets_ptr, lse_ptr, dlogits_ptr,
    stride_dloss, stride_m, stride_v, V, ignore_index, alpha,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_v = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    target = tl.load(targets_ptr + row)
    dloss = tl.load(dloss_ptr + row * stride_dloss)
    lse = tl.load(lse_ptr + row)
    x = tl.load(
        logits_ptr + row * stride_m + offs_v.to(tl.int64) * stride_v,
        mask=mask_v,
        other=float("-inf"),
    ).to(ACC)
    slope = tl.exp(x - lse) - alpha / V
    slope -= tl.where(offs_v == target, 1 - alpha, 0.0)
    # before the product: where every target is ignored the mean's dloss is infinite
    dx = tl.where(target == ignore_index, 0.0, dloss) * slope
    tl.store(dlogits_ptr + row * V + offs_v, cast(dx, dlogits_ptr.dtype.element_ty), mask=mask_v)


def _forward(logits, targets, ignore_index, alpha):
    """logits (M, V), targets (M,) -> losses (M,), lse (M,)."""
    M, V = logits.shape
    losses = torch.empty((M,), dtype=accumulator(logits.dtype), device=logits.device)
    lse = torch.empty_like(losses)
    launch(
        _cross_entropy_fwd_kernel, M,
        logits, targets, losses, lse,
        logits.stride(0), logits.stride(1), V, ignore_index, alpha,
        SMOOTH=alpha != 0, BLOCK_V=tile(V, 4096), ACC=tl_accumulator(logits.dtype), num_warps=8,
    )  # fmt: skip
    return losses, lse


def _backward(dlosses, logits, targets, lse, ignore_index, alpha):
    """-> dlogits (M, V)."""
    M, V = logits.shape
    dlogits = torch.empty((M, V), dtype=logits.dtype, device=logits.device)
    BLOCK_V = tile(V, 4096)
    launch(
        _cross_entropy_bwd_kernel, M * triton.cdiv(V, BLOCK_V),
        dlosses, logits, targets, lse, dlogits,
        dlosses.stride(0), logits.stride(0), logits.stride(1), V, ignore_index, alpha,
        BLOCK_V=BLOCK_V, ACC=tl_accumulator(logits.dtype), num_warps=8,
    )  # fmt: skip
    return dlogits


def _launch_all(logits, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """One forward and backward call straight through the launchers, to be compiled."""
    losses, lse = _forward(logits, targets, ignore_index, label_smoothing)
    return losses, _backward(losses, logits, targets, lse, ignore_index, label_smoothing)


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
    dlosses: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    alpha: float,
) -> torch.Tensor:
    return _backward(dlosses, logits, targets, lse, ignore_index, alpha)


@_bwd_op.register_fake
def _(dlosses, logits, targets, lse, ignore_index, alpha):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, targets, ctx.ignore_index, ctx.alpha = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _differentiate(ctx, dlosses, dlse):
    return _bwd_op(dlosses, *ctx.saved_tensors, ctx.ignore_index, ctx.alpha), None, None, None


_fwd_op.register_autograd(_differentiate, setup_context=_save)


def _eager(logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """The plain torch twin."""
    kept = targets != ignore_index
    x = wide(logits)
    lse = x.logsumexp(-1)
    picked = x.gather(-1, targets.where(kept, targets.new_zeros(())).long()[..., None])[..., 0]
    losses = (1 - label_smoothing) * (lse - picked)
    if label_smoothing:
        losses = losses + label_smoothing * (lse - x.mean(-1))
    return _reduce(losses.where(kept, losses.new_zeros(())), kept, reduction)


def _reduce(losses, kept, reduction):
    """ "none", "sum", or the "mean" over the kept ones."""
    if reduction == "none":
        return losses
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()


def cross_entropy(
    logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean", impl="auto"
):
    """loss = lse − logits[target], averaged over the targets that are not ignored.

    Shapes: logits (..., V); targets (...) int. "mean" and "sum" give a scalar, "none" (...).
    Raises ValueError for shapes, options or (on a CPU) targets out of range, TypeError for dtypes.
    """
    expect_alike("cross_entropy", logits=logits)
    expect_dimensions("cross_entropy", "logits", logits, "(..., V)")
    V = logits.shape[-1]
    if not isinstance(targets, torch.Tensor):
        raise TypeError(
            f"cross_entropy: targets must be a torch tensor, got {type(targets).__name__}"
        )
    expect_shape("cross_entropy", "targets", targets, "(...)", logits.shape[:-1])
    expect_choice("cross_entropy", "reduction", reduction, REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing must lie in 0 … 1, got {label_smoothing}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"cross_entropy: targets must be integers, got {targets.dtype}")
    if targets.device != logits.device:
        raise ValueError(
            f"cross_entropy: targets must be on logits' device {logits.device}, "
            f"got {targets.device}; move them"
        )
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
        if len(wrong):
            raise ValueError(
                f"cross_entropy: targets must lie in 0 … V − 1 = {V - 1} or be {ignore_index}, "
                f"got {int(wrong[0])}"
            )
    if resolve("cross_entropy", impl, logits) == "eager":
        return _eager(
            logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing,
            reduction=reduction,
        )  # fmt: skip
    rows, row_targets = logits.reshape(-1, V), targets.reshape(-1).contiguous()
    losses, _ = _fwd_op(rows, row_targets, ignore_index, float(label_smoothing))
    return _reduce(losses.view(targets.shape), targets != ignore_index, reduction)
