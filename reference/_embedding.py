"""Token embedding plus learned positions.

    y[..., t, :] = wte[tokens[..., t]] + wpe[positions[..., t]]
    dwte[v] = Σ over tokens equal to v of dy,   dwpe likewise over positions

Shapes: tokens (..., T) int; wte (V, C); wpe (P, C) or None; positions broadcastable to tokens,
0 … T−1 by default; y (..., T, C). dtype float64. `sinusoidal_positions` gives a wpe that is not
learned.
Source: Radford et al. 2018, section 3.1 (h₀ = U Wₑ + Wₚ).
"""

import numpy as np

from ._checks import expect_ids, expect_shape
from ._rounding import floats


def embedding(tokens, wte, wpe=None, positions=None):
    """y = wte[tokens] + wpe[positions]  ->  y, cache."""
    wte, wpe = floats(wte, wpe)
    expect_shape("embedding", "wte", wte, "(V, C)", (None, None))
    tokens = expect_ids("embedding", "tokens", tokens, len(wte), "V")
    y = wte[tokens]
    if wpe is None:
        return y, (tokens, None, wte, None)
    expect_shape("embedding", "wpe", wpe, "(P, C)", (None, wte.shape[1]))
    if positions is None:
        positions = np.arange(tokens.shape[-1])
    positions = np.broadcast_to(
        expect_ids("embedding", "positions", positions, len(wpe), "P"), tokens.shape
    )
    return y + wpe[positions], (tokens, positions, wte, wpe)


def embedding_backward(dy, cache):
    """-> dwte, dwpe (None where wpe was absent)."""
    tokens, positions, wte, wpe = cache
    dy = floats(dy)
    dwte = _scatter_add(np.zeros_like(wte), tokens, dy)
    return dwte, None if wpe is None else _scatter_add(np.zeros_like(wpe), positions, dy)


def _scatter_add(table, index, rows):
    np.add.at(table, index, rows)
    return table
