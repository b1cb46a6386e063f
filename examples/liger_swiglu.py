"""Liger-Kernel's SwiGLU gate, an op that the catalog does not hold; its gradients come from
central differences.

gaugeblock check examples.liger_swiglu:SWIGLU examples.liger_swiglu:candidate
"""

from . import interpreted  # noqa: F401

# isort: split
import numpy as np
from gaugeblock.reference.oracle import Case, Op, stored
from liger_kernel.ops.swiglu import LigerSiLUMulFunction


def swiglu(a, b):
    # Liger keeps a·σ(a) in the storage dtype before it multiplies
    return stored(a / (1 + np.exp(-a))) * b


def candidate(a, b):
    # the backward writes the gradients over a and b
    return LigerSiLUMulFunction.apply(a.clone(), b.clone())


CASES = [Case("odd", M=5, N=77), Case("one_row", M=1, N=64), Case("one_over_a_tile", M=3, N=257)]
SWIGLU = Op("swiglu", swiglu, {"a": "M N", "b": "M N"}, CASES)
