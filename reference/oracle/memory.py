"""What values alone do not show: damage, stale results, unwritten memory, bits that change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .budget import root_mean_square
from .result import Result

_REPEATS = 3


def examine(expectation, adapter, fn, layout, deterministic=False, batch_invariant=False):
    """Results of the values, then of the memory behind them.

    A wrong value ends it: what follows could only repeat it.
    """
    session = expectation.open(adapter, layout)
    first = expectation.call(session, fn)
    results = expectation.results(session, first, layout)
    if all(r.passed for r in results):
        probe = Probe(expectation, adapter, fn, layout, session, first)
        # at a large shape other content would cost another reference
        if expectation.whole:
            results += probe.stale() or probe.unwritten()
        if deterministic:
            results += probe.repeats()
        if batch_invariant and expectation.whole:
            results += probe.batch()
    return results


class Probe:
    """Further calls of a candidate whose first answers are right."""

    def __init__(self, expectation, adapter, fn, layout, session, first):
        self.expectation, self.adapter, self.fn = expectation, adapter, fn
        self.layout, self.session, self.first = layout, session, first

    def unwritten(self):
        """The same content at new addresses, with NaN in what the candidate allocates.

        After stale(), which was right at new addresses too: the NaN makes the difference. The other
        way round what is freed here would lie in the memory of the calls there.
        """
        with self.adapter.poisoned():
            again = self._new_call()
        if same_bits(again, self.first):
            return []
        return self._named(
            self._failures(again),
            "uninitialised",
            "wrong once fresh memory holds NaN: it is read unwritten",
        )

    def stale(self):
        """Other content at new addresses, then at the addresses of the first call."""
        other = self._new_call(draw=1)
        content = self.expectation.content(self.layout, 1)
        self.session.refill(content.inputs, content.dys)
        reused = self.expectation.call(self.session, self.fn)
        self.session.damage()
        if same_bits(other, reused) and not self._suspicious(other):
            return []
        return self._named(
            self._failures(other, 1), "stale", "wrong for new content at new addresses"
        ) or self._named(
            self._failures(reused, 1), "stale", "wrong for new content at the same addresses"
        )

    def repeats(self):
        """The same call again: bits must not change."""
        calls = [self._new_call() for _ in range(_REPEATS)]
        for call in calls:
            if not same_bits(call, self.first):
                hint = f"changes from run to run, in {_where_bits_differ(call, self.first)}"
                return [_failure(self.expectation, self.layout, "outputs", "repeat", hint)]
        return []

    def batch(self):
        """One row of the batch by itself: bits must be those it has beside the others."""
        cut = cut_batch(self.expectation, self.layout)
        if cut is None:
            return []
        row, inputs, options, dys, axes = cut
        op = self.expectation.op
        session = self.adapter.open(
            inputs, options, dys, self.layout,
            gradients=op.differentiable(inputs), updates=op.updates,
        )  # fmt: skip
        alone = self.expectation.call(session, self.fn)
        if isinstance(alone[0], str):
            return [_failure(self.expectation, self.layout, "outputs", alone[0], alone[1])]
        for together, single, names in zip(self.first, alone, axes):
            for a, b, (name, axis) in zip(together, single, names):
                if axis is None:
                    continue
                if not np.array_equal(np.take(a.values, [row], axis), b.values, equal_nan=True):
                    hint = f"{name} of row {row} of the batch changes with its neighbours"
                    return [_failure(self.expectation, self.layout, name, "batch", hint)]
        return []

    def _suspicious(self, other):
        """Whether an answer to the new content is further off than the first one might have been.

        The new content's own legal runs, which cost far more, decide only then.
        """
        if self.expectation.op.accepts:
            return True
        content, before = (self.expectation.content(self.layout, draw) for draw in (1, 0))
        for part in (0, 1):
            for i, (answer, want) in enumerate(zip(other[part], content.exact[part])):
                with np.errstate(invalid="ignore"):
                    error = np.abs(answer.values - want)
                error = root_mean_square(error[np.isfinite(error)])
                if error > before.bound(part, i, answer.dtype).budget.rms:
                    return True
        return False

    def _new_call(self, draw=0):
        session = self.expectation.open(self.adapter, self.layout, draw)
        return self.expectation.call(session, self.fn)

    def _failures(self, answers, draw=0):
        results = self.expectation.compare(answers, self.layout, draw)
        return [r for r in results if not r.passed]

    @staticmethod
    def _named(failures, kind, hint):
        """The failures under the name of their cause; a crash keeps its own."""
        named = []
        for r in failures:
            own = r.kind in ("exception", "timeout", "form")
            said = f"{hint}: {r.hint}" if r.hint else hint
            named.append(replace(r, kind=r.kind if own else kind, hint=said))
        return named


def cut_batch(expectation, layout):
    """One row of a case: (row, inputs, options, output gradients, axes).

    axes holds [(name, batch axis)] of the outputs and of the gradients. None where the op has no
    batch or the case has one row.
    """
    op, case = expectation.op, expectation.case
    size = op.dims(case).get(op.batch, 1)
    if op.batch is None or size < 2 or "cu_seqlens" in expectation.options:
        return None
    row = size - 1

    def axis_of(name):
        axes = op.spec(case, name).split()
        return axes.index(op.batch) if op.batch in axes else None

    def cut(x, axis):
        return x if axis is None else np.take(x, [row], axis)

    content = expectation.content(layout)
    inputs = {n: x if x is None else cut(x, axis_of(n)) for n, x in content.inputs.items()}
    options = {
        n: (v[row],) if isinstance(v, (tuple, list)) and len(v) == size else v
        for n, v in expectation.options.items()
    }
    outputs = [(n, axis_of(n)) for n in op.outputs]
    names = op.differentiable(inputs)
    gradients = [(f"d{n}", axis_of(n)) for n in names]
    dys = content.dys
    if dys is not None:
        dys = tuple(cut(dy, axis) for dy, (_, axis) in zip(dys, outputs))
    if all(axis is None for _, axis in outputs):
        return None
    return row, inputs, options, dys, (outputs, gradients)


def same_bits(a, b):
    """Whether two calls gave the same values, part by part."""
    if isinstance(a[0], str) or isinstance(b[0], str):
        return False
    return not _where_bits_differ(a, b)


def _where_bits_differ(a, b):
    if isinstance(a[0], str):
        return a[1]
    different = [
        f"{what} {i}"
        for what, left, right in zip(("output", "gradient"), a, b)
        for i, (x, y) in enumerate(zip(left, right))
        if not np.array_equal(x.values, y.values, equal_nan=True)
    ]
    return ", ".join(different)


def _failure(expectation, layout, output, kind, hint):
    where = (expectation.op.name, expectation.case.name, expectation.dtype, layout, output)
    return Result(*where, False, kind, hint=hint)
