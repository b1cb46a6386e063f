"""Liger-Kernel's RMS normalisation, an op that the catalog does not hold.

gaugeblock check examples.liger_rms_norm:RMS_NORM examples.liger_rms_norm:candidate
"""

from . import interpreted  # noqa: F401

# isort: split
import numpy as np
from gaugeblock.reference.oracle import Case, Op
from liger_kernel.ops.rms_norm import LigerRMSNormFunction


def rms_norm(x, w, eps=1e-5):
    return w * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def rms_norm_backward(dy, x, w, eps=1e-5):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    g = w * dy
    return r * (g - x * r * r * (g * x).mean(-1, keepdims=True)), (dy * x * r).sum(0)


def candidate(x, w, eps=1e-5):
    # "gemma": every step in float32; in_place would write dx over dy
    return LigerRMSNormFunction.apply(x, w, eps, 0.0, "gemma", False)


CASES = [Case("odd_row", M=5, N=77), Case("one_row", M=1, N=64), Case("eps", M=4, N=20, eps=0.5)]
RMS_NORM = Op("rms_norm", rms_norm, {"x": "M N", "w": "N"}, CASES, backward=rms_norm_backward)
