"""Dropout: each element is kept with probability 1 − p, and scaled so that its mean stays.

    y_i = x_i/(1 − p) where kept_i, else 0
    dx_i = dy_i/(1 − p) where kept_i, else 0
    kept_i:  word 0 of Philox 4×32-10 at counter i under the key `seed` is ≥ ⌊p·2³²⌋

i counts the elements of x in C order, whatever its strides, in 64 bits. The mask depends on
(i, p, seed) alone: the backward draws it again. p = 0 keeps everything; p = 1 drops everything, in
y and dx, as torch does. A dropped element is 0 whatever x holds there.

Shapes: x, y (...); p a number in 0 … 1; seed an integer of 64 bits. dtype float64.
Source: Srivastava et al. 2014, JMLR 15; the scaling at training time as in
torch.nn.functional.dropout.
"""

import numpy as np

from ._philox import expect_dropout, keep_mask
from ._rounding import floats, rescaled


def dropout(x, p, seed):
    """y = x/(1 − p) where kept, else 0  ->  y, cache."""
    x = floats(x)
    expect_dropout("dropout", "p", p, seed)
    return drop(x, keep_mask(x.shape, p, seed), p)


def drop(x, kept, p):
    """`dropout` with its mask given."""
    # in the precision of x: a kernel may take p, and multiply by 1/(1 − p), in float32
    keep = rescaled(1 - np.full_like(x, p, shape=())) or 1
    return np.where(kept, x / keep, 0.0), (kept, keep)


def dropout_backward(dy, cache):
    """-> dx."""
    kept, keep = cache
    dy = floats(dy)
    return (np.where(kept, dy / keep, 0.0),)
