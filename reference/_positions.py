"""Sinusoidal positions: waves whose lengths rise from 2π to base·2π.

    y[t, 2i] = sin(t / base^(2i/C)),   y[t, 2i + 1] = cos(t / base^(2i/C))

Shapes: y (T, C). dtype float64.
Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
"""

import numpy as np


def sinusoidal_positions(T, C, base=10000.0):
    """-> y."""
    angles = np.arange(T)[:, None] / base ** (np.arange(0, C, 2) / C)
    y = np.zeros((T, C))
    y[:, 0::2], y[:, 1::2] = np.sin(angles), np.cos(angles)[:, : C // 2]
    return y
