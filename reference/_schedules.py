"""Learning rates: linear warm-up, then a cosine, a line or the inverse root of the step.

    warm-up:  peak·step/warmup                                      up to step = warmup
    cosine:   floor + (peak − floor)·(1 + cos(π x))/2               x = (step − warmup)/
    linear:   floor + (peak − floor)·(1 − x)                            (total − warmup)
    noam:     factor·n_embd^(−1/2)·min(step^(−1/2), step·warmup^(−3/2))

`step` counts from 1 for the first update, as in `adamw`: that update has peak/warmup, update number
`warmup` has the peak, number `total` the floor, and so have all after it. At step 0 the rate is 0,
and the peak without a warm-up. A step may be a number or an array of them.

GPT-1 warms up over 2,000 updates and takes the cosine to 0; its fine-tuning takes the line. GPT-3
takes the cosine to floor = peak/10. (OpenAI's code of GPT-1 takes x = step/total, so that the rate
jumps where the warm-up ends; here it is the papers' words.)

Shapes: those of step. dtype float64.
Source: Radford et al. 2018, section 4.1; Brown et al. 2020, arXiv:2005.14165, appendix B; Vaswani
et al. 2017, arXiv:1706.03762, equation 3.
"""

import numpy as np

from ._rounding import floats


def cosine_schedule(step, *, peak, warmup, total, floor=0.0):
    """Warm-up, then half a cosine from the peak to the floor."""
    x = _share("cosine_schedule", step, peak, warmup, total, floor)
    return _warmed_up(step, peak, warmup, floor + (peak - floor) * (1 + np.cos(np.pi * x)) / 2)


def linear_schedule(step, *, peak, warmup, total, floor=0.0):
    """Warm-up, then a line from the peak to the floor."""
    x = _share("linear_schedule", step, peak, warmup, total, floor)
    return _warmed_up(step, peak, warmup, floor + (peak - floor) * (1 - x))


def noam_schedule(step, *, n_embd, warmup=4000, factor=1.0):
    """Warm-up, then the inverse root of the step."""
    _expect_steps("noam_schedule", step, warmup)
    for name, value in (("n_embd", n_embd), ("warmup", warmup)):
        if not value >= 1:
            raise ValueError(f"noam_schedule: {name} must be at least 1, got {value}")
    step = floats(step)
    with np.errstate(divide="ignore"):
        return factor * n_embd**-0.5 * np.minimum(step**-0.5, step * warmup**-1.5)


def _share(name, step, peak, warmup, total, floor):
    """How much of the way from the peak to the floor is done, 0 … 1."""
    _expect_steps(name, step, warmup)
    if not total > warmup:
        raise ValueError(f"{name}: total must be more than warmup = {warmup}, got {total}")
    if not 0 <= floor <= peak < np.inf:
        raise ValueError(f"{name}: floor must lie in 0 … peak = {peak}, got {floor}")
    return np.clip((floats(step) - warmup) / (total - warmup), 0, 1)


def _warmed_up(step, peak, warmup, rate):
    step = floats(step)
    return np.where(step < warmup, peak * step / (warmup or 1), rate)[()]


def _expect_steps(name, step, warmup):
    step = np.asarray(step)
    wrong = ~(step >= 0)
    if wrong.any():
        raise ValueError(f"{name}: step must be at least 0, got {step[wrong][0]}")
    if not warmup >= 0:
        raise ValueError(f"{name}: warmup must be at least 0, got {warmup}")
