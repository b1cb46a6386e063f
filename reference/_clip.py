"""Gradients clipped by their global norm.

    norm = √Σ g²  over all elements of all gradients
    g ← g·min(1, max_norm/(norm + 10⁻⁶))

An infinite norm makes finite gradients 0 and infinite ones NaN; a norm that is NaN makes all NaN.

Shapes: any. dtype float64.
Source: Pascanu et al. 2013, arXiv:1211.5063, algorithm 1; the 10⁻⁶ and the edges as in
torch.nn.utils.clip_grad_norm_.
"""

import numpy as np

from ._checks import expect_number
from ._rounding import floats


def clip_grad_norm(grads, max_norm):
    """(clipped, norm) of a list, tuple or dict of gradients; None among them stays None."""
    if not isinstance(grads, (list, tuple, dict)):
        kind = type(grads).__name__
        raise TypeError(f"clip_grad_norm: grads must be a list, tuple or dict, got {kind}")
    expect_number("clip_grad_norm", "max_norm", max_norm)
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_norm: max_norm must be at least 0, got {max_norm}")
    arrays = [floats(g) for g in (grads.values() if isinstance(grads, dict) else grads)]
    norm = np.sqrt(sum((np.sum(g * g) for g in arrays if g is not None), np.float64(0)))
    with np.errstate(invalid="ignore"):
        factor = np.minimum(1.0, max_norm / (norm + 1e-6))
        clipped = [None if g is None else g * factor for g in arrays]
    if isinstance(grads, dict):
        return dict(zip(grads, clipped)), norm
    return type(grads)(clipped), norm
