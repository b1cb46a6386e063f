"""Training: every weight of a model stepped by AdamW, batch after batch.

    loss, g = the model's on the next batch
    per weight:  p, m, v = adamw(p, g, m, v, …),   weight_decay for matrices alone

Norms and biases are not decayed, as in GPT; `decays` says otherwise. The state has torch's names:
{key: {"step", "exp_avg", "exp_avg_sq"}}.

dtype float64.
Source: Loshchilov and Hutter 2019, arXiv:1711.05101; Radford et al. 2018, section 4.1 ("on all
non bias or gain weights").
"""

import numpy as np

from ._adamw import adamw


def is_matrix(key, w):
    """Whether a weight is neither a gain nor a bias."""
    return w.ndim > 1


def adamw_step(
    weights, gradients, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
    decays=is_matrix,
):  # fmt: skip
    """Step every weight {key: array}; the dicts `weights` and `state` hold what follows.

    state:  {} before the first step.
    decays: decays(key, weight) says whether weight_decay is for this one.
    """
    for key, p in weights.items():
        s = state.setdefault(
            key, {"step": 0, "exp_avg": np.zeros_like(p), "exp_avg_sq": np.zeros_like(p)}
        )
        s["step"] += 1
        decay = weight_decay if decays(key, p) else 0.0
        (weights[key], s["exp_avg"], s["exp_avg_sq"]), _ = adamw(
            p, gradients[key], s["exp_avg"], s["exp_avg_sq"], s["step"], lr, *betas, eps, decay
        )


def train(model, batches, lr=1e-3, **options):
    """Step a model once for each batch  ->  the loss before each step (n,).

    batches: the arguments of model.loss_and_gradients, a tuple each.
    lr:      a number, or lr(step) for step 1 and so on.
    options: those of `adamw_step`.
    """
    losses, state = [], {}
    for step, batch in enumerate(batches, start=1):
        loss, gradients = model.loss_and_gradients(*batch)
        losses.append(loss)
        rate = lr(step) if callable(lr) else lr
        adamw_step(model.weights, gradients, state, rate, **options)
    return np.stack(losses)
