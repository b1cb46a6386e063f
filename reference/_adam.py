"""One step of Adam as GPT-1 was trained with it.

    m ← m + (1 − β₁)(g − m),   v ← β₂ v + (1 − β₂) g²
    lr_t = lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ)
    p ← p − lr_t·(m/(√v + ε) + λ p)

λ is `weight_decay` and t is `step`, 1 for the first. The corrections of both moments are folded
into the rate, so that ε is added to the root of the uncorrected moment: it weighs 1/√(1 − β₂ᵗ)
times as much as in `adamw`. The decay is decoupled, and takes the folded rate too. There is no
backward: an optimiser's step ends the graph.

Shapes: p, g, m, v (...), all alike; the others numbers. dtype float64.
Source: Kingma and Ba 2015, arXiv:1412.6980, last paragraph of section 2; the decay as in `opt.py`
of OpenAI's finetune-transformer-lm, whose matrices alone are given one.
"""

import numpy as np

from ._adamw import prepared
from ._rounding import rescaled


def adam(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay=0.0):
    """One step  ->  (p, m, v), None."""
    (p, g, m, v), scalars = prepared(
        "adam", (p, g, m, v), step, lr, beta1, beta2, eps, weight_decay
    )
    lr, beta1, beta2, eps, decay = scalars
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * (g * g)
    rate = lr * np.sqrt(1 - rescaled(beta2**step)) / (1 - rescaled(beta1**step))
    p = p - rate * (m / (rescaled(np.sqrt(v)) + eps) + decay * p)
    return (p, m, v), None
