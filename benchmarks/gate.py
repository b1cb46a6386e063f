"""No time without parity: a provider is checked before it is timed."""

from __future__ import annotations

import functools

from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.expectation import Expectation
from gaugeblock.reference.oracle.op import Case
from gaugeblock.reference.oracle.result import describe

# Rows, batches and heads are independent: so many of them keep the float64 reference to seconds.
# Widths, lengths, head dimensions, vocabularies and options stay those that are timed.
_MOST = {"B": 1, "H": 2, "M": 320}


class Wrong(AssertionError):
    """A provider that is not timed because its answers are wrong."""


@functools.lru_cache(maxsize=4)
def _expectation(op, case, dtype):
    row = CATALOG[op]
    sizes = {k: min(v, _MOST.get(k, v)) for k, v in row.dims(case).items()}
    small = Case(case.name, values=case.values, tags=case.tags, shapes=case.shapes, **{**case.settings, **sizes})
    return Expectation(row, small, dtype)


def gate(op, case, dtype, fn, device):
    """The results of the check. Raises `Wrong` where outputs or gradients miss their budgets."""
    results = _expectation(op, case, dtype).judge(TorchAdapter(device), fn)
    failures = [describe(r) for r in results if not r.passed]
    if failures:
        raise Wrong("; ".join(failures))
    return results
