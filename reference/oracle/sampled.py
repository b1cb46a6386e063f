"""Exact results of some elements, where those of all would take hours or gigabytes.

The candidate runs on the whole inputs, at the shape that is timed. Of what it returns, parts are
compared: some rows of an output with all that they depend on, some columns of a gradient with all
rows that are summed there. `Op.sampled` names the parts and computes each in float64 or under a
legal arithmetic; from there exact values and budgets come as for whole tensors. The first and last
index and edges of tiles are always among those that are compared. What is not compared must be
finite.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from .._rounding import saturated
from .adapters import Answer, Take
from .budget import DTYPES, legal_arithmetics
from .expectation import Bound, Expectation, _repeated
from .explain import Places
from .result import Result

ALL_RUNS = 32
# multiplications of the legal computations of a part, all together; in sums one after the other
_PRODUCTS = 2**32
_TILES = (64, 128)
# values are drawn up to here and then repeat; a prime, so that no two rows or columns are alike
_PERIOD = 1_048_573
# of inputs and outputs in float32: the values as drawn, the candidate's with what its memory is
# compared with afterwards, and its gradients
_COPIES = 6


@dataclass(frozen=True)
class Part:
    """Some elements of outputs and gradients.

    takes:   {output, or "d" + input: Take}: which they are.
    compute: compute(arithmetic) -> {the same names: their values}; float64 for None.
    inputs:  {input: values} that `Op.accepts` judges them by.
    infinite: tensors whose other elements need not be finite.
    runs:    legal computations that the budget comes from, 8 at least (`runs_for`).
    """

    takes: dict
    compute: Callable
    inputs: dict = field(default_factory=dict)
    infinite: tuple = ()
    runs: int = 8


def spread(n, count, rng, always=()):
    """Sorted indices below n: all of them, or `count`: first, last, edges of tiles, others random.

    always: further indices that must be among them.
    """
    if n <= count:
        return np.arange(n)
    chosen = {0, n - 1, *(int(i) for i in always[: count // 2])}
    for tile in _TILES:
        last = (n - 1) // tile * tile
        chosen |= {i for i in (tile - 1, tile, last - 1, last) if 0 <= i < n}
    chosen = set(sorted(chosen)[:count])
    edges = np.arange(_TILES[0], n, _TILES[0])
    for edge in rng.permutation(edges)[: max(count - len(chosen), 0) // 4]:
        chosen |= {int(edge) - 1, int(edge)}
    while len(chosen) < count:
        chosen.add(int(rng.integers(n)))
    return np.array(sorted(chosen))


def runs_for(products):
    """How many legal computations there is time for, each with so many multiplications."""
    return int(np.clip(_PRODUCTS // max(products, 1), 8, ALL_RUNS))


def taken_in(arithmetic):
    """A function that takes arrays into an arithmetic, or into float64 for None. None passes."""

    def take(x):
        if x is None:
            return None
        return x.astype(np.float64) if arithmetic is None else arithmetic.array(x)

    return take


def blocks(indices, most):
    """The indices (or those below a number) in blocks of at most so many."""
    indices = np.arange(indices) if isinstance(indices, int) else indices
    most = max(int(most), 1)
    return [indices[start : start + most] for start in range(0, len(indices), most)]


class SampledContent:
    """One draw of a case, and what is compared of its results; the rest as in `Content`."""

    def __init__(self, expectation, inputs, dys, parts):
        self.expectation, self.inputs, self.parts = expectation, inputs, parts
        self.dys = None if dys is None else tuple(dys[name] for name in self.names(0))
        self._bounds = {}

    def names(self, part):
        """The names of the outputs (part 0) or gradients (part 1)."""
        op = self.expectation.op
        if part:
            return [f"d{name}" for name in op.differentiable(self.inputs)]
        return [name for name in op.outputs if any(name in p.takes for p in self.parts)]

    @cached_property
    def exact(self):
        values = self._computed(None, self.parts)
        return tuple(
            [values[name] for name in self.names(part)] if part == 0 or self.dys else []
            for part in (0, 1)
        )

    @cached_property
    def legal(self):
        # what the parts keep for each other comes from the exact run
        _ = self.exact
        runs = list(enumerate(self.expectation.arithmetics()))
        # each may hold all inputs once more
        each = _COPIES * self.expectation.op.tensor_bytes(self.expectation.case, 4)
        threads = max(1, min(len(os.sched_getaffinity(0)), _free_bytes() // each))
        with ThreadPoolExecutor(int(threads)) as pool:
            return list(pool.map(lambda run: self._computed(run[1], self._with(run[0])), runs))

    def _with(self, number):
        """The parts that have a legal run of this number."""
        return [part for part in self.parts if part.runs > number]

    def bound(self, part, i, dtype):
        """What the elements must be and how far off they may be."""
        name = self.names(part)[i]
        if (name, dtype) not in self._bounds:
            want = self.exact[part][i]
            legal = [run[name] for run in self.legal if name in run]
            skip = np.zeros(want.shape, bool)
            self._bounds[name, dtype] = Bound(want, skip, legal, DTYPES[dtype])
        return self._bounds[name, dtype]

    def take(self, name):
        """All elements of a tensor that are compared."""
        takes = [p.takes[name] for p in self.parts if name in p.takes]
        if len(takes) == 1:
            return takes[0]
        rows = np.concatenate([take.rows for take in takes])
        if any(take.columns is None for take in takes):
            return Take(rows)
        wide = [np.broadcast_to(t.columns, (len(t.rows), t.columns.shape[-1])) for t in takes]
        return Take(rows, np.concatenate(wide))

    @staticmethod
    def _computed(arithmetic, parts):
        found = {}
        for part in parts:
            for name, values in part.compute(arithmetic).items():
                rows = np.asarray(values).reshape(len(part.takes[name].rows), -1)
                found.setdefault(name, []).append(rows)
        return {name: np.concatenate(values) for name, values in found.items()}


class Sampled(Expectation):
    """`Expectation` of which parts are compared."""

    whole = False

    def arithmetics(self):
        """The legal computations; the first few hold serial and pairwise sums, of every kind."""
        runs = legal_arithmetics(self.precision)
        few = range(0, 24, 3)
        return [*(runs[i] for i in few), *(r for i, r in enumerate(runs) if i not in few)]

    def _drawn(self, layout, draw):
        op, dims = self.op, self.op.dims(self.case)
        key = [self.seed, *([draw] if draw else []), *self._key]
        rng = np.random.default_rng(key)

        def normal(name, shape, scale):
            x = rng.standard_normal(min(math.prod(shape), _PERIOD)) * scale
            dtype = op.inputs[name].dtype if name in op.inputs else None
            return np.resize(saturated(x, np.dtype(dtype or self.storage)), shape)

        drawn = op.draw(self.case, rng, normal)
        inputs = {name: self._stored(name, x, layout) for name, x in drawn.items()}
        dys = None
        if self.backward:
            # not the values of the inputs once more
            rng = np.random.default_rng([*key, 1])
            dys = {}
            for name in op.outputs:
                dy = normal(name, op.shape(op.spec(self.case, name), dims), 1.0)
                if layout == "broadcast_grad" and dy.size:
                    dy = np.broadcast_to(dy.flat[0], dy.shape)
                elif f"d{name}" in self.case.values:
                    dy = self.case.values[f"d{name}"](dy, dims, rng)
                dys[name] = saturated(dy, self.storage)
        parts = op.sampled(inputs, self.options, dys, np.random.default_rng([*key, 2]))
        return SampledContent(self, inputs, dys, parts)

    def _stored(self, name, x, layout):
        if x is None or name not in self.op.floating():
            return x
        dtype = np.dtype(self.op.inputs[name].dtype or self.storage)
        x = x if x.dtype == dtype else saturated(x, dtype)
        return _repeated(x) if layout == "expanded" else x

    def vanishes(self):
        return False

    leaves_float32 = False

    def open(self, adapter, layout="contiguous", draw=0):
        content = self.content(layout, draw)
        take = [
            [(self._shape(name), content.take(name)) for name in content.names(part)]
            if part == 0 or self.backward
            else []
            for part in (0, 1)
        ]
        return adapter.open(
            content.inputs, self.options, content.dys, layout, take=take,
            gradients=self.op.differentiable(content.inputs), updates=self.op.updates,
        )  # fmt: skip

    def _shape(self, name):
        return self.op.shape(self.op.spec(self.case, name), self.op.dims(self.case))

    def _places(self, content, name):
        shape = self._shape(name)
        return Places(shape, content.take(name).of(shape))

    def _tensor(self, where, part, i, content, answer):
        name, shape = where[-1], self._shape(where[-1])
        if answer.shape != shape:
            hint = f"must have shape {shape}, has {answer.shape}"
            return Result(*where, False, "shape", hint=hint)
        result = super()._tensor(where, part, i, content, Answer(answer.values, answer.dtype))
        may = any(name in p.infinite for p in content.parts)
        may |= not np.isfinite(content.exact[part][i]).all()
        if result.passed and not answer.finite and not may:
            hint = "NaN or infinite outside the elements that are compared"
            return Result(*where, False, "nonfinite", hint=hint)
        return result

    def _choice(self, where, content, answer, want):
        if not answer.dtype.startswith(("int", "uint")):
            return Result(*where, False, "dtype", hint=f"must be integers, is {answer.dtype}")
        most = content.parts[0].runs
        runs = [replace(a, noise=False).array for a in self.arithmetics()[:most]]
        ends = np.cumsum([p.takes[where[-1]].columns.size for p in content.parts])[:-1]
        chosen = zip(np.split(answer.values.ravel(), ends), content.parts)
        right = [self.op.accepts(values, p.inputs, self.options, runs) for values, p in chosen]
        right = np.concatenate(right).reshape(want.shape)
        if right.all():
            return Result(*where, True, discrimination=np.inf)
        first = np.unravel_index(np.argmin(right), want.shape)
        got, wanted = float(answer.values[first]), float(want[first])
        first = self._places(content, where[-1]).at(first)
        hint = f"is {got:g}, must be {wanted:g}"
        return Result(*where, False, "choice", first, got, wanted, hint=hint, first=first)


def expectation_of(op, case, dtype, seed=0, backward=True):
    """`Sampled` for a "bench" case of an op that has parts, else `Expectation`."""
    kind = Sampled if op.sampled and "bench" in case.tags else Expectation
    return kind(op, case, dtype, seed, backward)


def fits(op, case):
    """Whether a case and a candidate's tensors of its size fit into the memory that is free."""
    return _COPIES * op.tensor_bytes(case, 4) < _free_bytes()


def _free_bytes():
    """Memory that is free; no limit where that is not said."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    free = {line.split(":")[0]: line.split()[1] for line in lines}.get("MemAvailable", "inf")
    return 1024 * float(free)
