"""Liger-Kernel's Triton functions."""

from __future__ import annotations

import torch

from . import Provider, Unavailable, library

NAMES = ("liger_kernel",)
_NOTE = (
    "its losses compute gradients in their forward, over the logits: they are timed without, which "
    "needs no copy of the logits, but sets those of ignored targets to 0; they ask the device for "
    "the number of targets, and so wait for it"
)


def load(device):
    if device != "cuda":
        raise Unavailable("needs CUDA: its kernels are Triton's")
    return [Provider("liger_kernel", *_ops(), _limits, _NOTE)]


def _limits(op, case, dtype, direction):
    if direction == "bwd" and op.name != "layer_norm":
        return "computes the gradient in its forward; what is left of a backward scales it"
    return None


def _ops():
    """(version, {op: function})."""
    norm, version = library("liger_kernel.ops.layer_norm", "liger-kernel")
    loss, _ = library("liger_kernel.ops.cross_entropy", "liger-kernel")
    fused, _ = library("liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel")

    def layer_norm(x, w, b, eps=1e-5):
        return norm.LigerLayerNormFunction.apply(x, w, b, eps)

    def cross_entropy(logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
        # the gradient is written over logits that require one, the caller's own
        logits = logits.clone() if torch.is_grad_enabled() else logits.detach()
        found = loss.LigerCrossEntropyFunction.apply(
            logits, targets, None, ignore_index, 0.0, label_smoothing, reduction
        )
        return found[0]

    def linear_cross_entropy(
        x, w, targets, b=None, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"
    ):
        if not torch.is_grad_enabled():
            # it looks at `requires_grad` alone, and would compute gradients
            x, w, b = x.detach(), w.detach(), None if b is None else b.detach()
        found = fused.LigerFusedLinearCrossEntropyFunction.apply(
            x, w, targets, b, None, ignore_index, 0.0, label_smoothing, reduction
        )
        return found[0]

    ops = (layer_norm, cross_entropy, linear_cross_entropy)
    return version, {fn.__name__: fn for fn in ops}
