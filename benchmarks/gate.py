"""No time without parity: a provider is checked before it is timed, at the shape that is timed."""

from __future__ import annotations

import functools

from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.result import describe
from gaugeblock.reference.oracle.sampled import expectation_of


class Wrong(AssertionError):
    """A provider that is not timed because its answers are wrong."""


# one: a case's inputs may take gigabytes
@functools.lru_cache(maxsize=1)
def _expectation(op, case, dtype):
    return expectation_of(CATALOG[op], case, dtype)


def gate(op, case, dtype, fn, device):
    """The results of the check. Raises `Wrong` where outputs or gradients miss their budgets."""
    results = _expectation(op, case, dtype).judge(TorchAdapter(device), fn)
    failures = [describe(r) for r in results if not r.passed]
    if failures:
        raise Wrong("; ".join(failures))
    return results
