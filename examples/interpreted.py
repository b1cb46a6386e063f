"""Triton's interpreter made ready for Liger's kernels; import it before them. No use on a GPU.

In Triton 3.7 it has no libdevice, and it leaves float arguments Python floats, which have no `.to`.
It has no bfloat16 arithmetic either: what it says of Liger in bfloat16 means nothing.
"""

import os

# read when kernels are defined, that is when Liger is imported
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

_convert = interpreter._implicit_cvt


def _with_floats(x):
    if not isinstance(x, float):
        return _convert(x)
    return tl.tensor(interpreter.TensorHandle(np.array([x], np.float32), tl.float32), tl.float32)


interpreter._implicit_cvt = _with_floats
# looked up at the call: the interpreter replaces tl.rsqrt for the time of a launch
libdevice.rsqrt = lambda x: tl.rsqrt(x)
