"""What the oracle knows about an op: its formula, its inputs, its cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np


@dataclass(frozen=True)
class Input:
    """A floating input. `fan_in` names the dimension whose inverse root scales the values."""

    shape: str
    fan_in: str | None = None


@dataclass(frozen=True)
class Index:
    """An integer input with values in 0 … dims[below] − 1."""

    shape: str
    below: str


class Case:
    """A named point of an op's domain; the name says why it exists.

    Keywords that occur in the op's shapes are dimensions, the others are options passed by keyword.

    tags:   what it exercises, for selection; "aot" cases are compiled, "bench" cases are timed,
            "full" cases are left out of quick checks.
    values: {input name: function(array, dims, rng) -> array} where normal values do not do.
    """

    def __init__(self, name, *, tags=(), values=None, **settings):
        self.name = name
        self.tags = frozenset(tags)
        self.values = dict(values or {})
        self.settings = settings

    def __repr__(self):
        return f"Case({self.name!r}, {', '.join(f'{k}={v}' for k, v in self.settings.items())})"


@dataclass(frozen=True)
class Wrong:
    """A call that must be refused: the op's first case with shapes or options replaced."""

    name: str
    match: str
    shapes: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)
    raises: type[Exception] = ValueError


@dataclass(eq=False)
class Op:
    """An op that kernels are checked against.

    reference: reference(*inputs, **options) -> y or a tuple, in NumPy; given float64 arrays.
    inputs:    {name: shape string, Input or Index}, in the order of the positional arguments.
    cases:     the points to check.
    outputs:   {name: shape string}; one output called y by default.
    backward:  backward(dy, *inputs, **options) -> a gradient for each floating input; central
               differences where absent.
    flops:     flops(c, direction) with c.M, c.N, … and direction "fwd" or "bwd".
    errors:    calls that must be refused.
    kernel:    why the catalog has no kernel for it; None where it has one, or outside the catalog.
    """

    name: str
    reference: Callable
    inputs: dict
    cases: tuple
    outputs: dict = field(default_factory=lambda: {"y": ""})
    backward: Callable | None = None
    flops: Callable | None = None
    errors: tuple = ()
    kernel: str | None = None

    def __post_init__(self):
        self.inputs = {k: Input(v) if isinstance(v, str) else v for k, v in self.inputs.items()}
        self.cases = tuple(self.cases)
        names = [case.name for case in self.cases]
        if len(set(names)) < len(names):
            raise ValueError(f"Op {self.name}: case names must be unique, got {', '.join(names)}")

    def dims(self, case):
        """{dimension: size} of a case."""
        names = {d for spec in self.inputs.values() for d in spec.shape.split()}
        names |= {spec.below for spec in self.inputs.values() if isinstance(spec, Index)}
        missing = names - set(case.settings)
        if missing:
            raise ValueError(
                f"Op {self.name}: case {case.name} must set every dimension, "
                f"{', '.join(sorted(missing))} missing"
            )
        return {d: case.settings[d] for d in case.settings if d in names}

    def options(self, case):
        """The keyword options of a case."""
        dims = self.dims(case)
        return {k: v for k, v in case.settings.items() if k not in dims}

    def shape(self, spec, dims):
        return tuple(dims[d] for d in spec.split())

    def floating(self):
        """The names of the inputs that have gradients."""
        return [name for name, spec in self.inputs.items() if isinstance(spec, Input)]

    def draw(self, case, rng):
        """Inputs of a case, {name: float64 or int64 array}."""
        dims = self.dims(case)
        drawn = {}
        for name, spec in self.inputs.items():
            shape = self.shape(spec.shape, dims)
            if isinstance(spec, Index):
                drawn[name] = rng.integers(0, dims[spec.below], shape)
            else:
                drawn[name] = rng.standard_normal(shape)
                if spec.fan_in:
                    drawn[name] *= dims[spec.fan_in] ** -0.5
            if name in case.values:
                drawn[name] = case.values[name](drawn[name], dims, rng)
        return drawn

    def select(self, cases="quick", expression=None):
        """The cases of a suite ("quick" or "full"), narrowed by an expression over their tags.

        In an expression such as "causal and not window" a word is true for a case that has it as a
        tag, as its name, or as an option that is set.
        """
        if cases not in ("quick", "full"):
            raise ValueError(f"check: cases must be quick or full, got {cases!r}")
        skip = {"aot", "bench"} if cases == "full" else {"aot", "bench", "full"}
        chosen = [case for case in self.cases if not case.tags & skip]
        if not expression:
            return chosen
        chosen = [case for case in chosen if _matches(expression, self._words(case))]
        if not chosen:
            words = sorted(set().union(*map(self._words, self.cases)))
            raise ValueError(
                f"check: expression must select a case of {self.name}, {expression!r} selects "
                f"none; its words are {', '.join(words)}"
            )
        return chosen

    def _words(self, case):
        options = self.options(case)
        words = {case.name, *case.tags, *(k for k, v in options.items() if v)}
        return words | {v for v in options.values() if isinstance(v, str)}

    def flop_count(self, case, direction="fwd"):
        """Floating-point operations of one call."""
        return self.flops(SimpleNamespace(**case.settings), direction)

    def byte_count(self, case, itemsize, direction="fwd"):
        """Compulsory traffic of one call in bytes: every tensor read or written once.

        Forward: inputs and outputs. Backward: inputs, outputs and their gradients.
        """
        dims = self.dims(case)
        ints = sum(
            math.prod(self.shape(s.shape, dims)) * 8
            for s in self.inputs.values()
            if isinstance(s, Index)
        )
        floats = sum(math.prod(self.shape(self.inputs[n].shape, dims)) for n in self.floating())
        first = next(iter(self.outputs.values()))
        floats += math.prod(self.shape(first, dims))
        return ints + floats * itemsize * (1 if direction == "fwd" else 2)


def _matches(expression, words):
    """Evaluate "a and not (b or c)" with each word true when it is among `words`."""
    tokens = expression.replace("(", " ( ").replace(")", " ) ").split()
    python = " ".join(t if t in ("and", "or", "not", "(", ")") else str(t in words) for t in tokens)
    try:
        return bool(eval(python, {"__builtins__": {}}))
    except (SyntaxError, TypeError):
        raise ValueError(
            f"check: expression must join words with and, or, not, got {expression!r}"
        ) from None


def numeric_gradient(op, dys, inputs, options, step=1e-5):
    """Gradients by central differences, one entry at a time: for small cases only."""
    arrays = dict(inputs)

    def objective():
        y = op.reference(*arrays.values(), **options)
        ys = y if isinstance(y, tuple) else (y,)
        return sum(float(np.sum(dy * out)) for dy, out in zip(dys, ys))

    gradients = []
    for name in op.floating():
        x = arrays[name] = np.array(arrays[name], dtype=np.float64)
        grad = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            value, h = x[i], step * max(1.0, abs(x[i]))
            x[i] = value + h
            above = objective()
            x[i] = value - h
            grad[i] = (above - objective()) / (2 * h)
            x[i] = value
        gradients.append(grad)
    return tuple(gradients)
