"""What both losses share: targets, reductions, the sums of a row's parts, the plain torch loss."""

import torch
import triton
import triton.language as tl

from ._checks import expect_choice, expect_integer, expect_shape, readable
from ._launch import launch, tl_accumulator

REDUCTIONS = ("mean", "sum", "none")


def expect_options(op, ignore_index, label_smoothing, reduction):
    expect_choice(op, "reduction", reduction, REDUCTIONS)
    expect_integer(op, "ignore_index", ignore_index)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must lie in 0 … 1, got {label_smoothing}")


def expect_targets(op, name, rows, targets, V, ignore_index):
    """Targets (...) fit rows (..., any), which the op calls `name`; values only where at hand.

    -> targets as int32 or int64.
    """
    if not isinstance(targets, torch.Tensor):
        raise TypeError(f"{op}: targets must be a torch tensor, got {type(targets).__name__}")
    expect_shape(op, "targets", targets, "(...)", rows.shape[:-1])
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"{op}: targets must be integers, got {targets.dtype}")
    if targets.device != rows.device:
        raise ValueError(
            f"{op}: targets must be on {name}'s device {rows.device}, got {targets.device}; "
            "move them"
        )
    if targets.dtype not in (torch.int32, torch.int64):
        # torch compares in the tensor's dtype, in which V or ignore_index may be another number
        targets = targets.long()
    if readable(targets):
        wrong = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
        if len(wrong):
            raise ValueError(
                f"{op}: targets must lie in 0 … V − 1 = {V - 1} or be {ignore_index}, "
                f"got {int(wrong[0])}"
            )
    return targets


def reduce(losses, kept, reduction):
    """ "none", "sum", or the "mean" over the kept ones."""
    if reduction == "none":
        return losses
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()


def eager_loss(logits, targets, ignore_index, label_smoothing, reduction):
    """The loss of logits that are in their accumulators' dtype, by plain torch."""
    kept = targets != ignore_index
    # an ignored row counts for nothing, NaN included
    x = logits.where(kept[..., None], logits.new_zeros(()))
    lse = x.logsumexp(-1)
    picked = x.gather(-1, targets.where(kept, targets.new_zeros(())).long()[..., None])[..., 0]
    losses = (1 - label_smoothing) * (lse - picked)
    if label_smoothing:
        losses = losses + label_smoothing * (lse - x.mean(-1))
    return reduce(losses.where(kept, losses.new_zeros(())), kept, reduction)


@triton.jit
def part(x, axis: tl.constexpr):
    """Of logits, −∞ where there are none: their maximum m and Σ exp(x − m)."""
    m = tl.max(x, axis)
    # −inf alone must not turn into −inf − (−inf)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    if axis == 1:
        m_safe = m_safe[:, None]
    return m, tl.sum(tl.exp(x - m_safe), axis)


@triton.jit
def add_part(m_i, l_i, m, l):
    """The maximum and sum of two parts; the same bits wherever it is compiled."""
    m_new = tl.maximum(m_i, m)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, tl.fma(l_i, tl.exp(m_i - m_safe), l * tl.exp(m - m_safe))


@triton.jit
def loss_of(m_i, l_i, total, picked, V, alpha, SMOOTH: tl.constexpr):
    """(loss, lse) of rows with the maximum m_i, Σ exp(x − m_i) = l_i and Σ x = total."""
    lse = tl.where(m_i == float("-inf"), 0.0, m_i) + tl.log(l_i)
    loss = (1 - alpha) * (lse - picked)
    if SMOOTH:
        loss += alpha * (lse - total / V)
    return loss, lse


@triton.jit
def slope_of(x, offs_v, target, lse, V, alpha):
    """d loss / d logit of the columns offs_v."""
    uniform = alpha / V
    return tl.exp(x - lse) - tl.where(offs_v == target, 1 - alpha + uniform, uniform)


@triton.jit
def _loss_merge_kernel(
    m_ptr, l_ptr, total_ptr, picked_ptr, targets_ptr, loss_ptr, lse_ptr,
    stride_pm, stride_pv, M, V, splits, ignore_index, alpha,
    SMOOTH: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds the parts (splits, M) of rows, one after the other; rows that are ignored have none."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    target = tl.load(targets_ptr + offs_m, mask=mask_m, other=0)
    kept = mask_m & (target != ignore_index)
    m_i = tl.full((BLOCK_M,), float("-inf"), ACC)
    l_i = tl.zeros((BLOCK_M,), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    at = offs_m
    # unrolled, so that the loads of several parts are on their way together
    for _ in tl.range(0, splits, loop_unroll_factor=8):
        m = tl.load(m_ptr + at, mask=kept, other=0.0)
        l = tl.load(l_ptr + at, mask=kept, other=1.0)
        m_i, l_i = add_part(m_i, l_i, m, l)
        if SMOOTH:
            total += tl.load(total_ptr + at, mask=kept, other=0.0)
        at += M
    inside = kept & (target >= 0) & (target < V)
    picked = tl.load(
        picked_ptr + offs_m * stride_pm + target.to(tl.int64) * stride_pv,
        mask=inside, other=float("nan"),
    ).to(ACC)  # fmt: skip
    loss, lse = loss_of(m_i, l_i, total, picked, V, alpha, SMOOTH)
    tl.store(loss_ptr + offs_m, tl.where(kept, loss, 0.0), mask=mask_m)
    tl.store(lse_ptr + offs_m, lse, mask=mask_m)


def new_parts(splits, M, smooth, like):
    """Empty (m, l, total), each (splits, M); one for all where there is no smoothing."""
    m, l = torch.empty((2, splits, M), dtype=like.dtype, device=like.device)
    return m, l, torch.empty_like(m) if smooth else m


def merge(parts, picked, strides, targets, losses, lse, V, ignore_index, alpha):
    """Writes losses (M,) and lse (M,); picked holds the logits of rows and columns, so strided."""
    splits, M = parts[0].shape
    launch(
        _loss_merge_kernel, triton.cdiv(M, 128),
        *parts, picked, targets, losses, lse, *strides, M, V, splits, ignore_index, alpha,
        SMOOTH=alpha != 0, BLOCK_M=128, ACC=tl_accumulator(lse.dtype), num_warps=4,
    )  # fmt: skip
