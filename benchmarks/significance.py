"""Is one side slower? Intervals of the ratio of two times, and the verdict that they allow.

Times are compared by their logarithms, run against run. A run is a process of its own: calls within
one process share its memory, its code's place and the moment, so that their number proves little.

Source of the paired interval: Hodges and Lehmann 1963, Ann. Math. Statist. 34(2); Hollander, Wolfe
and Chicken 2014, Nonparametric Statistical Methods, section 3.3. Of the unpaired one: Welch 1947,
Biometrika 34. The level is divided among comparisons and looks as in Bonferroni's inequality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

SAME, FASTER, SLOWER, UNKNOWN = "same", "faster", "slower", "cannot tell"
# runs of each side without which two stored sides are not compared
LEAST_RUNS = 5


@dataclass(frozen=True)
class Interval:
    """A ratio of times, B over A, and where it lies but for the stated rate of error."""

    ratio: float
    low: float
    high: float

    def verdict(self, change):
        """What it says about a change that matters, as 0.03 for 3%.

        slower, faster: the whole interval is on one side of 1, and the ratio at least half the
        change away from it. same: the whole interval is within the change. Else cannot tell.
        """
        if self.low > 1 and self.ratio >= 1 + change / 2:
            return SLOWER
        if self.high < 1 and self.ratio <= 1 / (1 + change / 2):
            return FASTER
        if 1 / (1 + change) < self.low and self.high < 1 + change:
            return SAME
        return UNKNOWN


def paired(log_ratios, level):
    """The interval of pairs' log ratios that misses at a rate of at most `level`.

    The signed-rank statistic, exact: it needs no more than that a difference between equals is as
    likely positive as negative, which drawing the sides' order makes so. Too few pairs for the
    level give an interval without ends.
    """
    d = np.asarray(log_ratios, float)
    i, j = np.triu_indices(len(d))
    walsh = np.sort((d[i] + d[j]) / 2)
    reached = np.cumsum(_signed_ranks(len(d))) <= level / 2
    if not reached[0]:
        return Interval(math.exp(np.median(walsh)), 0.0, math.inf)
    outside = int(np.flatnonzero(reached)[-1])
    ends = np.median(walsh), walsh[outside], walsh[-1 - outside]
    return Interval(*map(math.exp, ends))


def least_pairs(level):
    """The number of pairs from which `paired` has ends."""
    return math.ceil(1 - math.log2(level))


def unpaired(a, b, level):
    """The interval of exp(mean log b − mean log a), by Welch's t; a, b times of runs."""
    a, b = np.log(a), np.log(b)
    shares = [np.var(x, ddof=1) / len(x) for x in (a, b)]
    difference, error = b.mean() - a.mean(), math.sqrt(sum(shares))
    if not error:
        # times that are all equal have no spread to judge by
        return Interval(math.exp(difference), 0.0, math.inf)
    freedom = sum(shares) ** 2 / sum(s**2 / (len(x) - 1) for s, x in zip(shares, (a, b)))
    reach = stats.t.isf(level / 2, freedom) * error
    ends = difference, difference - reach, difference + reach
    return Interval(*map(math.exp, ends))


def _signed_ranks(n):
    """P(W = w) for w = 0 … n(n + 1)/2, each rank's sign a fair coin's."""
    share = np.ones(1)
    for rank in range(1, n + 1):
        longer = np.zeros(len(share) + rank)
        longer[: len(share)] += share / 2
        longer[rank:] += share / 2
        share = longer
    return share
