"""Liger-Kernel's cross-entropy, held against the oracle's `cross_entropy` in Triton's interpreter.

Liger writes the gradient over the logits while it computes the loss, so the adapter gives it a copy
in the layout that came. The interpreter has no bfloat16 arithmetic: float32 and float16 only.

    gaugeblock check cross_entropy examples.liger_cross_entropy:cross_entropy
"""

from . import interpreted  # noqa: F401

# isort: split
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction


def cross_entropy(logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    loss, *_ = LigerCrossEntropyFunction.apply(
        logits.clone(), targets, None, ignore_index, 0.0, label_smoothing, reduction
    )
    return loss
