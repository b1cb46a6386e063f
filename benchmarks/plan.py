"""What is timed, in which order: the most valuable first, since time may run out."""

from __future__ import annotations

import math

from gaugeblock.reference.catalog import CATALOG, find

DTYPES, DIRECTIONS = ("float32", "float16", "bfloat16"), ("fwd", "bwd")
# the tags of a suite's cases, in order
SUITES = {"quick": ("family",), "full": ("family", "large", "sweep")}


def settled(dtypes, direction, budget_s, device):
    """(dtypes, directions) that are meant, each once.

    dtypes: None for bfloat16 on a GPU and float32 on a CPU. direction: "fwd", "bwd" or "both".
    Raises ValueError for what is none.
    """
    for dtype in dtypes or ():
        if dtype not in DTYPES:
            raise ValueError(f"bench: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if direction not in (*DIRECTIONS, "both"):
        raise ValueError(f"bench: direction must be fwd, bwd or both, got {direction!r}")
    if budget_s is not None and not 0 < budget_s < math.inf:
        raise ValueError(f"bench: budget-s must be more than 0, got {budget_s}")
    usual = "bfloat16" if device == "cuda" else "float32"
    directions = DIRECTIONS if direction == "both" else (direction,)
    return tuple(dict.fromkeys(dtypes or (usual,))), directions


def planned(ops, suite, device):
    """[(op, case)] of a suite on "cpu" or "cuda".

    By tag, and within a tag the first case of every op before the second of any. On a CPU there
    are cases of its own. Raises ValueError for an unknown suite or op.
    """
    if suite not in SUITES:
        raise ValueError(f"bench: suite must be one of {', '.join(SUITES)}, got {suite!r}")
    rows = [find(name) for name in dict.fromkeys(ops)] or list(CATALOG.values())
    found = []
    for tag in ("cpu",) if device == "cpu" else SUITES[suite]:
        cases = {op.name: [c for c in op.cases if {"bench", tag} <= c.tags] for op in rows}
        longest = max(map(len, cases.values()), default=0)
        for i in range(longest):
            found += [(op, cases[op.name][i]) for op in rows if i < len(cases[op.name])]
    return found
