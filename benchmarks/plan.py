"""What is timed, in which order: the most valuable first, since time may run out."""

from __future__ import annotations

from gaugeblock.reference.catalog import CATALOG, find

# the tags of a suite's cases, in order
SUITES = {"quick": ("family",), "full": ("family", "large", "sweep")}


def planned(ops, suite, device):
    """[(op, case)] of a suite on "cpu" or "cuda".

    By tag, and within a tag the first case of every op before the second of any. On a CPU there
    are cases of its own. Raises ValueError for an unknown suite or op.
    """
    if suite not in SUITES:
        raise ValueError(f"bench: suite must be one of {', '.join(SUITES)}, got {suite!r}")
    rows = [find(name) for name in ops] or list(CATALOG.values())
    found = []
    for tag in ("cpu",) if device == "cpu" else SUITES[suite]:
        cases = {op.name: [c for c in op.cases if {"bench", tag} <= c.tags] for op in rows}
        longest = max(map(len, cases.values()), default=0)
        for i in range(longest):
            found += [(op, cases[op.name][i]) for op in rows if i < len(cases[op.name])]
    return found
