"""One step of AdamW: Adam with decoupled weight decay.

    p ← p·(1 − lr·λ)
    m ← m + (1 − β₁)(g − m),   v ← β₂ v + (1 − β₂) g²
    m̂ = m/(1 − β₁ᵗ),   v̂ = v/(1 − β₂ᵗ)
    p ← p − lr·m̂/(√v̂ + ε)

λ is `weight_decay` and t is `step`, 1 for the first. The decay comes first, does not pass through
the moments, and ε is outside the root, as in torch.optim.AdamW. The update uses m and v before they
are rounded to the storage dtype. There is no backward: an optimiser's step ends the graph.

Shapes: p, g, m, v (...), all alike; the others numbers. dtype float64.
Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; Kingma and Ba 2015,
arXiv:1412.6980 (bias correction).
"""

import numpy as np

from ._checks import expect_integer, expect_number, expect_shape
from ._rounding import floats, rescaled


def adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
    """One step  ->  (p, m, v), None."""
    (p, g, m, v), scalars = prepared(
        "adamw", (p, g, m, v), step, lr, beta1, beta2, eps, weight_decay
    )
    lr, beta1, beta2, eps, decay = scalars
    p = p * (1 - lr * decay)
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * (g * g)
    mhat = m / (1 - rescaled(beta1**step))
    root = rescaled(np.sqrt(v / (1 - rescaled(beta2**step))))
    p = p - lr * mhat / (root + eps)
    return (p, m, v), None


def prepared(op, arrays, step, *scalars):
    """(p, g, m, v) of one shape, and lr … weight_decay in the arithmetic of p."""
    p, *others = floats(*arrays)
    for name, array in zip("gmv", others):
        expect_shape(op, name, array, "as p", p.shape)
    _expect_hyperparameters(op, step, *scalars)
    # in the precision of p: a kernel may take its scalars, and 1 − βᵗ, in float32
    return (p, *others), [np.full_like(p, scalar, shape=()) for scalar in scalars]


def _expect_hyperparameters(op, step, lr, beta1, beta2, eps, weight_decay):
    expect_integer(op, "step", step)
    if step < 1:
        raise ValueError(f"{op}: step must be at least 1, got {step}; the first step is 1")
    if step >= 2**63:
        raise ValueError(f"{op}: step must be below 2⁶³, got {step}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        expect_number(op, name, value)
        if not 0 <= value < np.inf:
            raise ValueError(f"{op}: {name} must be finite and at least 0, got {value}")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        expect_number(op, name, value)
        if not 0 <= value < 1:
            raise ValueError(f"{op}: {name} must lie in 0 … 1, 1 excluded, got {value}")
