"""Covering arrays: few cases in which every pair of settings occurs together."""

from __future__ import annotations

from itertools import combinations

import numpy as np


def covering(axes, legal=lambda case: True, tries=40):
    """A list of {axis: setting} in which every pair of settings of two axes occurs that can.

    axes:  {name: settings}; legal: legal(case) says whether a whole case may be.
    Greedy: of some random legal cases through a pair that is missing, the one that covers most is
    taken. The same list every time.
    Source: the AETG algorithm, Cohen et al. 1997, IEEE TSE 23(7).
    """
    draw = np.random.default_rng(0)
    indices = {name: range(len(settings)) for name, settings in axes.items()}
    missing = {
        ((a, i), (b, j)) for a, b in combinations(axes, 2) for i in indices[a] for j in indices[b]
    }
    cases = []
    while missing:
        pair = min(missing)
        best, most = None, ()
        for _ in range(tries):
            chosen = {name: int(draw.integers(len(settings))) for name, settings in axes.items()}
            chosen |= dict(pair)
            if legal({name: axes[name][i] for name, i in chosen.items()}):
                covered = missing & set(combinations(chosen.items(), 2))
                if len(covered) > len(most):
                    best, most = chosen, covered
        # no legal case holds the pair
        missing -= set(most) | {pair}
        if best:
            cases.append({name: axes[name][i] for name, i in best.items()})
    return cases
