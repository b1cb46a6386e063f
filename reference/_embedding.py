"""Token embedding plus learned positions.

    y[..., t, :] = wte[tokens[..., t]] + wpe[positions[..., t]]
    dwte[v] = Σ over tokens equal to v of dy,   dwpe likewise over positions

Shapes: tokens (..., T) int; wte (V, C); wpe (P, C) or None; positions broadcastable to tokens,
0 … T−1 by default; y (..., T, C). dtype float64. `sinusoidal_positions` gives a wpe that is not
learned.
Source: Radford et al. 2018, section 3.1 (h₀ = U Wₑ + Wₚ).
"""

import numpy as np

from ._checks import expect_ids, expect_rows, expect_shape
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
    expect_rows("embedding", "tokens", tokens, "(..., T)")
    if positions is None:
        positions = np.arange(tokens.shape[-1])
    positions = np.broadcast_to(
        expect_ids("embedding", "positions", positions, len(wpe), "P"), tokens.shape
    )
    return y + wpe[positions], (tokens, positions, wte, wpe)


def embedding_backward(dy, cache):
    """-> dwte, dwpe (None where wpe was absent)."""
    _, _, *tables = cache
    return tuple(
        None if table is None else _table(len(table), *rows)
        for table, rows in zip(tables, row_gradients(dy, cache))
    )


def row_gradients(dy, cache):
    """(ids, rows) of dwte and of dwpe: their rows at the ids that were read, the others are 0."""
    tokens, positions, _, wpe = cache
    dy = floats(dy)
    return _rows(tokens, dy), None if wpe is None else _rows(positions, dy)


def _rows(index, dy):
    ids, place = np.unique(index, return_inverse=True)
    rows = np.zeros_like(dy, shape=(len(ids), dy.shape[-1]))
    np.add.at(rows, place.reshape(index.shape), dy)
    return ids, rows


def _table(length, ids, rows):
    table = np.zeros_like(rows, shape=(length, rows.shape[1]))
    table[ids] = rows
    return table
