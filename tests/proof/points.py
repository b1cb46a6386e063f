"""The reference at a point: inputs of a case, outputs, gradients. One table for all proofs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gaugeblock.reference import _sample
from gaugeblock.reference.catalog import CATALOG

from gaugeblock import reference

# a result that is NaN has no gradient to compare
_NAN_SEEN = ("nan_seen", "nan_key_seen", "nan_query_seen", "relu_nan")


@dataclass(frozen=True)
class Point:
    """Inputs {name: array}, options, and a gradient for every output."""

    op: object
    case: object
    inputs: dict
    options: dict
    dys: tuple

    def floating(self):
        """The names of the floating inputs that are given."""
        return [n for n in self.op.floating() if self.inputs.get(n) is not None]

    def differentiable(self):
        return self.floating() if backward_of(self.op) else []

    def at(self, **changed):
        """The outputs with some inputs changed."""
        return outputs_of(forward(self.op)(*(self.inputs | changed).values(), **self.options)[0])

    def gradients(self):
        """One for each differentiable input."""
        return self.both()[1]

    def both(self):
        """(outputs, gradients) of one forward and, where there is one, its backward."""
        y, cache = forward(self.op)(*self.inputs.values(), **self.options)
        if not backward_of(self.op):
            return outputs_of(y), []
        dys = self.dys if len(self.dys) > 1 else self.dys[0]
        given = backward_of(self.op)(dys, cache)
        given = given if isinstance(given, tuple) else (given,)
        return outputs_of(y), [g for g in given if g is not None]


def outputs_of(y):
    return tuple(np.asarray(part) for part in (y if isinstance(y, tuple) else (y,)))


def forward(op):
    """fn(*inputs, **options) -> y, cache. `sample` also gives what it draws from."""
    if op.name == "sample":
        return op.called(_drawn_from)
    return op.called(getattr(reference, op.name))


def _drawn_from(logits, u, **options):
    token, _ = _sample.sample(logits, u, **options)
    names = ("repetition_penalty", "previous")
    penalty = {name: options.pop(name) for name in names if name in options}
    return (_sample.cumulative(_sample.penalised(logits, **penalty), **options)[1], token), None


def outputs(op):
    """The names of what `forward` gives."""
    return ("cdf", "token") if op.name == "sample" else tuple(op.outputs)


def backward_of(op):
    return getattr(reference, f"{op.name}_backward", None)


def point(op, case):
    """The inputs of a case and normal output gradients, the same ones every time."""
    rng = np.random.default_rng(list(case.name.encode()))
    inputs, options = op.draw(case, rng), op.options(case)
    p = Point(op, case, inputs, options, ())
    dys = []
    for name, y in zip(outputs(op), p.at()):
        # where an output is −∞ by definition its gradient is never read
        dy = np.where(np.isfinite(y), rng.standard_normal(y.shape), 0.0)
        change = case.values.get(f"d{name}")
        dys.append(change(dy, op.dims(case), rng) if change else dy)
    return Point(op, case, inputs, options, tuple(dys))


def catalog_points(*, gradients=False):
    """(op, case) of the whole catalog that can be compared; those with gradients, if told."""
    for op in CATALOG.values():
        if gradients and not backward_of(op):
            continue
        yield from ((op, case) for case in op.select("full") if not case.name.endswith(_NAN_SEEN))
