"""The smallest shape at which a candidate still fails."""

from __future__ import annotations

import time

from .memory import examine
from .op import Case
from .sampled import expectation_of

# shrinking in one call of the oracle, all failures together
SECONDS = 30.0


def shrunk(op, result, fn, adapter, seed=0, seconds=SECONDS, backward=True):
    """(the smallest failing case found, seconds spent). Dimensions shrink one at a time.

    A smaller case counts where one of its tensors fails in the same way or where it crashes alike.
    """
    start = time.monotonic()
    case = next(c for c in op.cases if c.name == result.case)
    best, progress = case, True
    while progress:
        progress = False
        for smaller in _smaller(op, best):
            if time.monotonic() - start > seconds:
                return best, time.monotonic() - start
            if fails(op, smaller, result, fn, adapter, seed, backward):
                best, progress = smaller, True
                break
    return best, time.monotonic() - start


def fails(op, case, result, fn, adapter, seed=0, backward=True):
    """Whether the candidate fails a case in the way of `result`."""
    try:
        expectation = expectation_of(op, case, result.dtype, seed, backward)
        results = examine(
            expectation, adapter, fn, result.layout,
            deterministic=result.kind == "repeat", batch_invariant=result.kind == "batch",
        )  # fmt: skip
    except (ValueError, TypeError, IndexError):
        # the op has no such shape
        return False
    return any(
        r.output == result.output and not r.passed and r.kind == result.kind for r in results
    )


def _smaller(op, case):
    """Cases with one dimension smaller, the boldest step first."""
    dims = op.dims(case)
    for name in sorted(dims, key=dims.get, reverse=True):
        size = dims[name]
        for new in dict.fromkeys((1, size // 2, size - size // 4, size - 1)):
            if 0 < new < size:
                yield _resized(op, case, {name: new})
    # sizes that must stay equal shrink together
    for size in sorted(set(dims.values()), reverse=True):
        names = [n for n, s in dims.items() if s == size]
        for new in dict.fromkeys((1, size // 2, size - 1)):
            if len(names) > 1 and 0 < new < size:
                yield _resized(op, case, dict.fromkeys(names, new))


def _resized(op, case, sizes):
    """The case with other sizes; lists of lengths or starts follow."""
    dims = op.dims(case)
    settings = {**case.settings, **sizes}
    for name, value in case.settings.items():
        if not isinstance(value, (tuple, list)):
            continue
        most = settings.get("Tk", max(value, default=0))
        value = tuple(min(v, most) for v in value)
        settings[name] = (
            value[: sizes.get("B", len(value))] if len(value) == dims.get("B") else value
        )
    return Case(
        case.name, tags=case.tags, values=case.values, shapes=case.shapes, keywords=case.keywords,
        **settings,
    )  # fmt: skip
