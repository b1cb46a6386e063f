"""Sinusoidal positions, which need not be learned.

    y[t, 2i] = sin(t/base^(2i/C)),   y[t, 2i + 1] = cos(t/base^(2i/C))

Where C is odd the last column is a sine without its cosine. The table stands in for `wpe` of
`embedding`.

Shapes: y (T, C). dtype float64.
Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
"""

import numpy as np

from ._checks import expect_integer


def sinusoidal_positions(T, C, base=10000.0):
    """y[t, 2i] = sin(t/base^(2i/C)), y[t, 2i + 1] the cosine  ->  y."""
    for name, value in (("T", T), ("C", C)):
        expect_integer("sinusoidal_positions", name, value)
        if value < 1:
            raise ValueError(f"sinusoidal_positions: {name} must be at least 1, got {value}")
    if not 0 < base < np.inf:
        raise ValueError(f"sinusoidal_positions: base must be finite and above 0, got {base}")
    column = np.arange(C)
    angle = np.arange(T)[:, None] / base ** (2 * (column // 2) / C)
    return np.where(column % 2 == 0, np.sin(angle), np.cos(angle))
