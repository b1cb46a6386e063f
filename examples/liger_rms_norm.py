"""Liger-Kernel's RMS normalisation, an op that the catalog does not hold.

python examples/liger_rms_norm.py
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from gaugeblock.reference.oracle import Case, Op, check
from gaugeblock.reference.report import print_report
from liger_kernel.ops import rms_norm as liger
from triton.runtime import interpreter


def rms_norm(x, w, eps=1e-5):
    """y = w ⊙ x/√(mean(x²) + ε)."""
    return w * (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps))


def rms_norm_backward(dy, x, w, eps=1e-5):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    g = w * dy
    return r * (g - x * r * r * (g * x).mean(-1, keepdims=True)), (dy * x * r).sum(0)


def candidate(x, w, eps=1e-5):
    # "gemma": every step in float32; in_place would write dx over dy
    return liger.LigerRMSNormFunction.apply(x, w, eps, 0.0, "gemma", False)


# The interpreter has no libdevice and leaves float arguments Python floats, which have no `.to`.
liger.rsqrt = lambda x: tl.rsqrt(x)
_convert = interpreter._implicit_cvt
interpreter._implicit_cvt = lambda x: (
    tl.tensor(interpreter.TensorHandle(np.array([x], np.float32), tl.float32), tl.float32)
    if isinstance(x, float)
    else _convert(x)
)

RMS_NORM = Op(
    "rms_norm",
    rms_norm,
    {"x": "M N", "w": "N"},
    [Case("odd_row", M=5, N=77), Case("one_row", M=1, N=64), Case("eps", M=4, N=20, eps=0.5)],
    outputs={"y": "M N"},
    backward=rms_norm_backward,
)

if __name__ == "__main__":
    report = check(RMS_NORM, candidate)
    print_report(report)
    raise SystemExit(not report.passed)
