"""Liger-Kernel's SwiGLU gate, an op that the catalog does not hold.

python examples/liger_swiglu.py
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from gaugeblock.reference.oracle import Case, Op, check
from gaugeblock.reference.report import print_report
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from triton.runtime import interpreter


def swiglu(a, b):
    """y = a·σ(a) ⊙ b."""
    return a / (1 + np.exp(-a)) * b


def swiglu_backward(dy, a, b):
    s = 1 / (1 + np.exp(-a))
    return dy * b * s * (1 + a * (1 - s)), dy * a * s


def candidate(a, b):
    # the backward writes the gradients over a and b
    return LigerSiLUMulFunction.apply(a.clone(), b.clone())


# The interpreter leaves float arguments Python floats, which have no `.to`.
_convert = interpreter._implicit_cvt
interpreter._implicit_cvt = lambda x: (
    tl.tensor(interpreter.TensorHandle(np.array([x], np.float32), tl.float32), tl.float32)
    if isinstance(x, float)
    else _convert(x)
)

SWIGLU = Op(
    "swiglu",
    swiglu,
    {"a": "M N", "b": "M N"},
    [Case("odd", M=5, N=77), Case("one_row", M=1, N=64), Case("one_over_a_tile", M=3, N=257)],
    outputs={"y": "M N"},
    backward=swiglu_backward,
)

if __name__ == "__main__":
    report = check(SWIGLU, candidate)
    print_report(report)
    raise SystemExit(not report.passed)
