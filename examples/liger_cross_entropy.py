"""Liger-Kernel's cross-entropy, held against the oracle's `cross_entropy` in Triton's interpreter.

Liger writes the gradient over the logits while it computes the loss, so the adapter gives it a copy
in the layout that came. The interpreter has no bfloat16 arithmetic: float32 and float16 only.

    python examples/liger_cross_entropy.py
    TRITON_INTERPRET=1 gaugeblock check cross_entropy examples.liger_cross_entropy:cross_entropy
"""

import os

# read by Triton when the kernels are defined, that is when Liger is imported
os.environ["TRITON_INTERPRET"] = "1"

from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction


def cross_entropy(logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    loss, *_ = LigerCrossEntropyFunction.apply(
        logits.clone(), targets, None, ignore_index, 0.0, label_smoothing, reduction
    )
    return loss


if __name__ == "__main__":
    from gaugeblock.reference.oracle import check
    from gaugeblock.reference.report import print_report

    report = check("cross_entropy", cross_entropy, dtypes=("float32", "float16"))
    print_report(report)
    raise SystemExit(not report.passed)
