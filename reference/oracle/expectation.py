"""What a case must give: rounded inputs, exact results, legal results, and the comparison."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from .._rounding import Rounded, saturated
from .adapters import WrongForm
from .budget import DTYPES, budget, evaluate, legal_arithmetics, precision, root_mean_square, ulp
from .explain import explain, tile_of
from .result import Result

# layouts whose strides of 0 need values that repeat
_REPEATS = ("expanded", "broadcast_grad")
# characters of an exception's message
_MOST_SAID = 300


class Content:
    """One draw of a case: inputs as the candidate gets them and in float64, output gradients.

    exact: (outputs, gradients) in float64; legal: the same of each legal run. Computed when asked.
    """

    def __init__(self, expectation, inputs, wide, dys):
        self.expectation, self.inputs, self.wide, self.dys = expectation, inputs, wide, dys
        self._bounds = {}

    @cached_property
    def exact(self):
        return evaluate(self.expectation.op, self.wide, self.expectation.options, self.dys)

    @cached_property
    def legal(self):
        precision = self.expectation.precision
        return [self._legal(arithmetic) for arithmetic in legal_arithmetics(precision)]

    def bound(self, part, i, dtype):
        """What a tensor must be and how far off it may be, kept: every candidate asks for it."""
        key = part, i, dtype
        if key not in self._bounds:
            want = np.asarray(self.exact[part][i], np.float64)
            name = self.names(part)[i]
            skip = np.zeros(want.shape, bool) | self.unspecified.get(name, False)
            legal = [run[part][i] for run in self.legal]
            self._bounds[key] = Bound(want, skip, legal, DTYPES[dtype])
        return self._bounds[key]

    def names(self, part):
        """The names of the outputs (part 0) or gradients (part 1)."""
        op = self.expectation.op
        if not part:
            return list(op.outputs)
        return [f"d{name}" for name in op.differentiable(self.inputs)]

    @cached_property
    def unspecified(self):
        """{tensor: mask of the elements that are not compared}."""
        unspecified = self.expectation.op.unspecified
        return unspecified(self.wide, self.expectation.options) if unspecified else {}

    def _legal(self, arithmetic):
        op, options, wide, dys = (
            self.expectation.op, self.expectation.options, self.wide, self.dys,
        )  # fmt: skip
        if self.expectation.leaves_float32:
            # its roundings cannot be had: those of a backward stable kernel move its inputs
            wide = {
                k: x if k not in op.floating() else _moved(arithmetic, x) for k, x in wide.items()
            }
            dys = None if dys is None else tuple(_moved(arithmetic, dy) for dy in dys)
        if dys is None or op.backward is not None:
            return evaluate(op, wide, options, dys, arithmetic)
        # central differences see no roundings: gradients get the outputs' relative error
        outputs, _ = evaluate(op, wide, options, None, arithmetic)
        share = max(map(_relative_error, outputs, self.exact[0]))
        draw = np.random.default_rng(int(arithmetic.unit * 2**20))
        return outputs, [
            g + share * np.abs(g).max(-1, initial=0, keepdims=True) * draw.uniform(-1, 1, g.shape)
            for g in map(np.atleast_1d, self.exact[1])
        ]


class Expectation:
    """A case in a dtype: rounded inputs, exact results, and the results of the legal runs."""

    # every element is compared
    whole = True

    def __init__(self, op, case, dtype, seed=0, backward=True):
        self.op, self.case, self.precision = op, case, precision(dtype)
        self.dtype, self.storage, self.seed = self.precision.name, self.precision.storage, seed
        self.options = op.options(case)
        self.backward = bool(backward and op.differentiable() and self.precision.gradients)
        # the draw depends on the case alone, whatever else is checked beside it
        self._key = [*f"{op.name}/{case.name}".encode()]
        self._contents = {}

    def content(self, layout="contiguous", draw=0):
        """The content for a layout; draws beyond 0 are other values of the same case."""
        kind = (layout if layout in _REPEATS else "", draw)
        if kind not in self._contents:
            self._contents[kind] = self._drawn(*kind)
        return self._contents[kind]

    def _drawn(self, layout, draw):
        op = self.op
        rng = np.random.default_rng([self.seed, *([draw] if draw else []), *self._key])
        drawn = op.draw(self.case, rng)
        inputs = {k: self._stored(k, x, layout) for k, x in drawn.items()}
        wide = {k: x if x is None else _wide(x) for k, x in inputs.items()}
        dys = None
        if self.backward:
            dys = self._output_gradients(wide, rng, layout == "broadcast_grad")
        return Content(self, inputs, wide, dys)

    def _stored(self, name, x, layout):
        """A drawn input as the candidate gets it."""
        if x is None or name not in self.op.floating():
            return x
        x = saturated(x, np.dtype(self.op.inputs[name].dtype or self.storage))
        return _repeated(x) if layout == "expanded" else x

    def _output_gradients(self, wide, rng, broadcast):
        """Output gradients, rounded to the storage dtype; all equal where they are broadcast."""
        outputs, _ = evaluate(self.op, wide, self.options, None)
        dys = []
        for name, y in zip(self.op.outputs, outputs):
            dy = rng.standard_normal(np.shape(y))
            if broadcast and dy.size:
                # not of the case's own values: what is in hidden rows would be in all of them
                dy = np.broadcast_to(dy.flat[0], dy.shape)
            elif f"d{name}" in self.case.values:
                dy = self.case.values[f"d{name}"](dy, self.op.dims(self.case), rng)
            dys.append(dy.astype(self.storage).astype(np.float64))
        return tuple(dys)

    def vanishes(self):
        """Whether the dtype is too narrow for the case: an input's values all round to 0."""
        drawn = self.op.draw(self.case, np.random.default_rng(0))
        arrays = [drawn[n] for n in self.op.floating() if drawn.get(n) is not None]
        nonzero = [x for x in arrays if x.any()]
        return not all(saturated(x, self.storage).any() for x in nonzero)

    @cached_property
    def leaves_float32(self):
        """Whether the reference turns what it is given into float64 by itself."""
        if self.op.accepts:
            return False
        arithmetic = legal_arithmetics(self.precision)[0]
        outputs, _ = evaluate(self.op, self.content().wide, self.options, None, arithmetic)
        return any(not isinstance(y, Rounded) for y in outputs if np.size(y))

    def judge(self, adapter, fn, layout="contiguous"):
        """Run the candidate once; its `results`."""
        session = self.open(adapter, layout)
        return self.results(session, self.call(session, fn), layout)

    def results(self, session, answers, layout="contiguous"):
        """A `Result` for each output and gradient, and one for damage to the caller's memory."""
        return self.compare(answers, layout) + self.damage(session, layout)

    def damage(self, session, layout="contiguous"):
        """A `Result` for what a call wrote where it may not, if it did."""
        found = session.damage()
        where = (self.op.name, self.case.name, self.dtype, layout, "inputs")
        return [Result(*where, False, "damage", hint=", ".join(found))] if found else []

    def open(self, adapter, layout="contiguous", draw=0):
        """The candidate's arguments in memory."""
        content = self.content(layout, draw)
        return adapter.open(
            content.inputs, self.options, content.dys, layout,
            gradients=self.op.differentiable(content.inputs), updates=self.op.updates,
        )  # fmt: skip

    def call(self, session, fn):
        """([Answer], [Answer]), or (kind, message) where the candidate gave none."""
        try:
            return session.run(self.op.called(fn))
        except WrongForm as error:
            return "form", str(error)
        except TimeoutError as error:
            return "timeout", str(error)
        except (Exception, SystemExit) as error:
            return "exception", _said(error)

    def compare(self, answers, layout="contiguous", draw=0):
        """The answers of a call against the budgets of their content."""
        if isinstance(answers[0], str):
            where = (self.op.name, self.case.name, self.dtype, layout, "outputs")
            return [Result(*where, False, answers[0], hint=answers[1])]
        outputs = self.compare_part(0, answers[0], layout, draw)
        # with too few outputs there is nothing to say of gradients
        if outputs and outputs[-1].kind == "form":
            return outputs
        return outputs + self.compare_part(1, answers[1], layout, draw)

    def compare_part(self, part, got, layout="contiguous", draw=0):
        """The answers of the outputs (part 0) or of the gradients (part 1) against theirs."""
        where = (self.op.name, self.case.name, self.dtype, layout)
        content = self.content(layout, draw)
        wants = content.exact[part]
        if len(wants) != len(got):
            hint = f"must return {len(wants)} tensors, returned {len(got)}"
            return [Result(*where, "outputs", False, "form", hint=hint)]
        return [
            self._tensor((*where, name), part, i, content, answer)
            for i, (name, answer) in enumerate(zip(content.names(part), got))
        ]

    def _tensor(self, where, part, i, content, answer):
        allowed = (self.storage.name,) if part else self.precision.results
        want = np.asarray(content.exact[part][i])
        if answer.values.shape != want.shape:
            hint = f"must have shape {want.shape}, has {answer.values.shape}"
            return Result(*where, False, "shape", hint=hint)
        if self.op.accepts:
            return self._choice(where, content, answer, want)
        if answer.dtype not in allowed:
            hint = f"must be {' or '.join(allowed)}, is {answer.dtype}"
            return Result(*where, False, "dtype", hint=hint)
        bound = content.bound(part, i, answer.dtype)
        places = self._places(content, where[-1])
        return compare(where, answer, bound, self._axes(where[-1]), places)

    def _choice(self, where, content, answer, want):
        """An output that is a choice: right where some legal computation would choose it."""
        if not answer.dtype.startswith(("int", "uint")):
            return Result(*where, False, "dtype", hint=f"must be integers, is {answer.dtype}")
        # equal values stay equal in a kernel, and so does a choice among them
        runs = [replace(a, noise=False).array for a in legal_arithmetics(self.precision)]
        right = self.op.accepts(answer.values, content.wide, self.options, runs)
        if np.all(right):
            return Result(*where, True, discrimination=np.inf)
        first = tuple(map(int, np.unravel_index(np.argmin(right), want.shape)))
        got, wanted = float(answer.values[first]), float(want[first])
        hint = f"{list(first)} is {got:g}, must be {wanted:g}"
        return Result(*where, False, "choice", first, got, wanted, hint=hint, first=first)

    def _places(self, content, name):
        """Where the compared elements lie; None where it is all of them."""
        return None

    def _axes(self, name):
        """The names of a tensor's axes."""
        return self.op.spec(self.case, name).split()


class Bound:
    """A tensor's exact values, what of it is not compared, and its budget.

    Where a row holds a NaN it must hold one somewhere; which elements else is up to the tiles.
    """

    def __init__(self, want, skip, legal, dtype):
        self.want, self.dtype = want, dtype
        self.nan_rows = _rows_with(np.isnan(np.where(skip, 0.0, want)))
        self.given_up = skip
        self.skip = skip | self.nan_rows
        self.budget = budget(want, legal, dtype, self.skip)


def compare(where, answer, bound, axes=(), places=None):
    """The `Result` of one tensor; `places` where parts of one are compared."""
    want, skip, dtype, given_up = bound.want, bound.skip, bound.dtype, bound.given_up
    if not want.size:
        return Result(*where, True, error=0.0, budget=0.0, rms_error=0.0, rms_budget=0.0)
    missing = bound.nan_rows & ~_rows_with(np.isnan(np.where(given_up, 0.0, answer.values)))
    bound = bound.budget
    got, finite = answer.values, np.isfinite(want) & ~skip
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(got - np.where(finite, want, 0.0)), 0.0)
        same = np.where(finite, np.isfinite(got), (got == want) | skip)
        same &= ~missing
        bad = (error > bound.rows) | ~same
    rms_error = float(root_mean_square(error))
    kind = ""
    if not same.all():
        kind, worst = "nonfinite", np.unravel_index(np.argmin(same), same.shape)
    else:
        excess = error / np.where(bound.rows > 0, bound.rows, 1.0)
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        if bad.any():
            kind = "row"
        elif rms_error > bound.rms:
            kind = "rms"
    hint, first, tile = "", None, None
    if kind:
        first = np.unravel_index(np.argmax(bad), bad.shape) if bad.any() else None
        hint = explain(got, want, bad, axes, places)
        tile = tile_of(bad) if places is None else None

    def at(index):
        if index is None or places is None:
            return index if index is None else tuple(map(int, index))
        return places.at(index)

    return Result(
        *where,
        not kind,
        kind,
        at(worst),
        float(got[worst]),
        float(want[worst]),
        float(error[worst]),
        float(bound.rows[worst]),
        rms_error,
        bound.rms,
        bound.discrimination,
        hint,
        at(first),
        float(error[worst] / ulp(np.asarray(want[worst]), dtype)) if finite[worst] else None,
        tile,
    )


def _said(error):
    """An exception in one line; what happened comes first in some messages, and last in others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " … ".join(dict.fromkeys((*lines[:2], *lines[-1:])))
    return f"{type(error).__name__}: {said[:_MOST_SAID]}" if said else type(error).__name__


def _rows_with(mask):
    """The rows in which the mask is true somewhere."""
    return mask.any(-1, keepdims=True) if mask.ndim else mask


def _wide(x):
    return x if x.dtype.kind in "iub" else x.astype(np.float64)


def _moved(arithmetic, x):
    """Float64 values off by up to a float32 ulp, drawn anew each time."""
    if x is None:
        return x
    return x * (1 + 2.0**-23 * arithmetic.draw(np.shape(x)))


def _repeated(x):
    """The values of x with its first row in place of all rows."""
    if x.ndim < 2 or len(x) < 2 or not np.isfinite(x).all():
        return x
    return np.ascontiguousarray(np.broadcast_to(x[:1], x.shape))


def _relative_error(got, want):
    """The largest error over a row's largest value, over all rows."""
    got, want = np.atleast_1d(got).astype(np.float64), np.atleast_1d(want)
    if not np.isfinite(want).all() or not want.size:
        return 0.0
    scale = np.abs(want).max(-1, keepdims=True)
    return float((np.abs(got - want) / np.where(scale == 0, 1.0, scale)).max())
