"""What the oracle knows about an op: its formula, its inputs, its cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np


@dataclass(frozen=True)
class Input:
    """A floating input. `fan_in` names the dimension whose inverse root scales the values.

    grad:  whether it has a gradient.
    dtype: its dtype where that is not the one which is checked.
    keyword: passed by its name, and only in the cases that give it (`Case.keywords`); a candidate
           that does not declare it is not checked on those. An op may have one, its last input.
    """

    shape: str
    fan_in: str | None = None
    grad: bool = True
    dtype: str | None = None
    keyword: bool = False


@dataclass(frozen=True)
class Index:
    """An integer input with values in 0 … dims[below] − 1; keyword as of `Input`."""

    shape: str
    below: str
    dtype: str = "int64"
    keyword: bool = False


class Case:
    """A named point of an op's domain; the name says why it exists.

    Keywords that occur in the op's shapes are dimensions, the others are options passed by keyword;
    a tuple of integers among them reaches the candidate as an int32 tensor.

    tags:   what it exercises, for selection; "aot" cases are compiled, "bench" cases are timed,
            "full" cases are left out of quick checks.
    values: {name of an input or "d" + output: function(array, dims, rng) -> array} where normal
            values do not do; None leaves an optional input out.
    shapes: {input or output: shape string} where this case has another rank.
    keywords: the keyword inputs that it gives.
    """

    def __init__(self, name, *, tags=(), values=None, shapes=None, keywords=(), **settings):
        self.name = name
        self.shapes = dict(shapes or {})
        self.keywords = tuple(keywords)
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
    moves:     moves(c, itemsize, direction) -> compulsory bytes (read, written), where that is not
               every tensor once.
    errors:    calls that must be refused.
    kernel:    why the catalog has no kernel for it; None where it has one, or outside the catalog.
    lacks:     an expression over the cases that the catalog's kernel cannot do yet.
    sizes:     {dimension: the dimension whose size it takes where a case does not set it}.
    batch:     the dimension along which results are independent of each other.
    updates:   {output: input} that a candidate may update in place and return nothing.
    unspecified: unspecified(inputs, options) -> {output or gradient: mask of what is not compared}.
    accepts:   accepts(got, inputs, options, arithmetics) -> mask of right answers, for an op whose
               output is a choice, so that rounding may make either of two answers right.
    sampled:   sampled(inputs, options, dys, rng) -> [Part], the parts of the results that are
               compared at the shapes of "bench" cases (`gaugeblock.reference.oracle.sampled`).
    """

    name: str
    reference: Callable
    inputs: dict
    cases: tuple
    outputs: dict = field(default_factory=lambda: {"y": ""})
    backward: Callable | None = None
    flops: Callable | None = None
    moves: Callable | None = None
    errors: tuple = ()
    kernel: str | None = None
    lacks: str | None = None
    sizes: dict = field(default_factory=dict)
    batch: str | None = None
    updates: dict = field(default_factory=dict)
    unspecified: Callable | None = None
    accepts: Callable | None = None
    sampled: Callable | None = None

    def __post_init__(self):
        self.inputs = {k: Input(v) if isinstance(v, str) else v for k, v in self.inputs.items()}
        self.cases = tuple(self.cases)
        names = [case.name for case in self.cases]
        if len(set(names)) < len(names):
            raise ValueError(f"Op {self.name}: case names must be unique, got {', '.join(names)}")
        keywords = [name for name in list(self.inputs)[:-1] if self._is_keyword(name)]
        if keywords:
            raise ValueError(
                f"Op {self.name}: a keyword input must be the last, {keywords[0]} is not"
            )

    @property
    def supported(self):
        """The expression that selects the cases which the catalog's kernel can do; None for all."""
        return f"not ({self.lacks})" if self.lacks else None

    def dims(self, case):
        """{dimension: size} of a case."""
        names = {d for name in self.given(case) for d in self.spec(case, name).split()}
        names |= {spec.below for spec in self.inputs.values() if isinstance(spec, Index)}
        sizes = {d: case.settings[of] for d, of in self.sizes.items()} | case.settings
        missing = names - set(sizes)
        if missing:
            raise ValueError(
                f"Op {self.name}: case {case.name} must set every dimension, "
                f"{', '.join(sorted(missing))} missing"
            )
        return {d: size for d, size in sizes.items() if d in names}

    def spec(self, case, name):
        """The shape string of an input, an output, or (with "d" before it) an input's gradient."""
        if name in case.shapes:
            return case.shapes[name]
        if name in self.inputs:
            return self.inputs[name].shape
        return self.outputs[name] if name in self.outputs else self.spec(case, name[1:])

    def options(self, case):
        """The keyword options of a case."""
        dims = self.dims(case)
        return {k: v for k, v in case.settings.items() if k not in dims}

    def shape(self, spec, dims):
        return tuple(dims[d] for d in spec.split())

    def floating(self):
        """The names of the floating inputs."""
        return [name for name, spec in self.inputs.items() if isinstance(spec, Input)]

    def _is_keyword(self, name):
        return getattr(self.inputs[name], "keyword", False)

    def given(self, case):
        """The names of the inputs of a case: all but the keyword inputs that it does not give."""
        return [n for n in self.inputs if n in case.keywords or not self._is_keyword(n)]

    def called(self, fn, before=0):
        """fn as it is called with all inputs by position, after `before` other arguments."""
        if not any(map(self._is_keyword, self.inputs)):
            return fn

        def call(*arguments, **options):
            first, inputs = arguments[:before], list(zip(self.inputs, arguments[before:]))
            named = {n: x for n, x in inputs if self._is_keyword(n) and x is not None}
            others = (x for n, x in inputs if not self._is_keyword(n))
            return fn(*first, *others, **named, **options)

        return call

    def differentiable(self, given=None):
        """The names of the inputs that have gradients; of those that are given, if told."""
        names = [name for name in self.floating() if self.inputs[name].grad]
        return names if given is None else [n for n in names if given.get(n) is not None]

    def draw(self, case, rng, normal=None):
        """Inputs of a case, {name: float64 or int64 array}.

        normal: normal(name, shape, scale) -> array in place of float64 normal values.
        """
        dims = self.dims(case)
        drawn = {}
        for name in self.given(case):
            spec = self.inputs[name]
            shape = self.shape(self.spec(case, name), dims)
            if isinstance(spec, Index):
                drawn[name] = rng.integers(0, max(dims[spec.below], 1), shape, dtype=spec.dtype)
            else:
                scale = dims[spec.fan_in] ** -0.5 if spec.fan_in else 1.0
                drawn[name] = normal(name, shape, scale) if normal else rng.standard_normal(shape)
                if spec.fan_in and not normal:
                    drawn[name] *= scale
            if name in case.values:
                drawn[name] = case.values[name](drawn[name], dims, rng)
        return drawn

    def select(self, cases="quick", expression=None):
        """The cases of a suite ("quick", "full", "bench"), narrowed by an expression over tags.

        In an expression such as "causal and not window" a word is true for a case that has it as a
        tag, as its name, or as an option that is set.
        """
        if cases not in ("quick", "full", "bench"):
            raise ValueError(f"check: cases must be quick or full or bench, got {cases!r}")
        skip = {"aot", "bench"} if cases == "full" else {"aot", "bench", "full"}
        if cases == "bench":
            chosen = [case for case in self.cases if "bench" in case.tags]
        else:
            chosen = [case for case in self.cases if not case.tags & skip]
        if not expression:
            return chosen
        chosen = [case for case in chosen if self.matches(case, expression)]
        if not chosen:
            words = sorted(set().union(*map(self._words, self.cases)))
            raise ValueError(
                f"check: expression must select a case of {self.name}, {expression!r} selects "
                f"none; its words are {', '.join(words)}"
            )
        return chosen

    def matches(self, case, expression):
        """Whether an expression over tags, names and options that are set is true of a case."""
        return _matches(expression, self._words(case))

    def _words(self, case):
        options = self.options(case)
        words = {case.name, *case.tags, *case.keywords, *(k for k, v in options.items() if v)}
        return words | {v for v in options.values() if isinstance(v, str)}

    def flop_count(self, case, direction="fwd"):
        """Floating-point operations of one call."""
        return self.flops(SimpleNamespace(**case.settings), direction)

    def traffic(self, case, itemsize, direction="fwd"):
        """Compulsory traffic of one call, (bytes read, bytes written): every tensor once.

        Forward: inputs, then outputs. Backward: inputs and output gradients, then gradients.
        """
        if self.moves:
            c = SimpleNamespace(**{**self.dims(case), **case.settings})
            return self.moves(c, itemsize, direction)
        given = self.given(case)
        if direction == "fwd":
            return self._size(case, given, itemsize), self._size(case, self.outputs, itemsize)
        gradients = [name for name in self.differentiable() if name in given]
        read = self._size(case, [*given, *self.outputs], itemsize)
        return read, self._size(case, gradients, itemsize)

    def tensor_bytes(self, case, itemsize):
        """The memory that a case's inputs and outputs take, in bytes."""
        return self._size(case, [*self.given(case), *self.outputs], itemsize)

    def _size(self, case, names, itemsize):
        dims = self.dims(case)
        return sum(
            math.prod(self.shape(self.spec(case, name), dims)) * self._itemsize(name, itemsize)
            for name in names
        )

    def byte_count(self, case, itemsize, direction="fwd"):
        """All compulsory traffic of one call in bytes."""
        return sum(self.traffic(case, itemsize, direction))

    def _itemsize(self, name, itemsize):
        spec = self.inputs.get(name)
        return np.dtype(spec.dtype).itemsize if spec and spec.dtype else itemsize


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
    for name in op.differentiable(arrays):
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
