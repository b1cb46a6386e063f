"""The arithmetic the reference runs in: float64, or the roundings that a legal kernel may make.

A reference function is one formula. Given plain arrays it computes in float64. Given `Rounded`
arrays it computes the same formula in float32 with a chosen summation order, and rounds to the
storage dtype wherever the formula says `stored(...)`. The oracle derives its error budgets from the
spread of such runs, so an op needs no second model of itself.

Products, quotients and elementary functions are off by a random part of their last place, which
stands for what legal kernels do differently there: fused multiply-adds, other libraries, the same
formula with its factors in another order.

Source of the model: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapters 3-4;
the random last place is the stochastic arithmetic of Vignes 1993, Math. Comput. Simul. 35(3).
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from scipy.special import erf

_LOG2E = np.float32(np.log2(np.e))
# links of a product's chain that are taken one by one
_LINKS = 256
# the mean of (half a unit of the last place / x)² over x's mantissa, which is uniform in log x
_HALF_UNIT_SQUARED = 2.0**-48 * 3 / (8 * np.log(2))
_SMALLEST_NORMAL = np.finfo(np.float32).tiny
# how far a good implementation may be off, in units of the last place
_OFF = {
    np.multiply: 0.5, np.divide: 0.5, np.sqrt: 1.0, np.log: 1.0, np.exp: 1.5, np.exp2: 1.5,
    np.tanh: 1.5, erf: 1.5,
}  # fmt: skip


@dataclass
class Arithmetic:
    """One legal way to compute: where values are rounded, and in which order sums are taken.

    storage: dtype that intermediates are stored in (float32, float16, bfloat16, ...).
    chunk:   length of the partial sums, which are then added one after the other; the terms come
             in a random order. 0 leaves the order to NumPy (pairwise sums, BLAS products).
    stores:  which of the formula's `stored` values are rounded, by the order in which they come:
             the first where stores[0], the second where stores[1], and round again.
    unit:    rounding happens in this unit, round(x·unit)/unit. Kernels fold scales and log2(e) into
             their operands or not, so each unit is one legal draw of the rounding errors.
    roads:   elementary functions take the other common road: exp(x) as 2^(x log2 e), tanh through
             exp, erf by a rational function; corrections that a kernel may leave out are left out,
             and subnormal results are flushed to zero, as a GPU's fast functions do.
    normalised: values marked with a unit of their own (softmax weights) are rounded without it.
    noise:   products, quotients and elementary functions are off by a part of their last place.
    operand: what the operands of a product keep of their mantissa: "float32" all of it, "tf32" ten
             bits, rounded to nearest or, as tensor cores do with what they are given, cut off.
    """

    storage: np.dtype
    chunk: int = 0
    stores: tuple[bool, ...] = (True,)
    unit: float = 1.0
    roads: bool = False
    normalised: bool = False
    noise: bool = True
    operand: str = "float32"

    def __post_init__(self):
        self._marks = 0
        self._draw = np.random.default_rng(int(self.unit * 2**20))

    def array(self, values):
        """The values as an array that computes under this arithmetic."""
        out = np.asarray(values, dtype=np.float32)
        if self.roads:
            out = np.where(np.abs(out) < _SMALLEST_NORMAL, np.float32(0), out)
        out = np.asarray(out).view(Rounded)
        out.arithmetic = self
        return out

    def round(self, x):
        """The nearest values of the storage dtype in this arithmetic's unit, in float32."""
        unit = np.float32(self.unit)
        return saturated(np.asarray(x) * unit, self.storage).astype(np.float32) / unit

    def draw_unit(self):
        """Another unit for each value: a kernel that converts twice need not get back."""
        return self._draw.uniform(1, 2)

    def draw(self, shape):
        """Uniform numbers in −1 … 1."""
        return self._draw.uniform(-1, 1, shape)

    def takes_another(self):
        """Whether the next formula with an equal in exact arithmetic gives way to it."""
        return bool(self.chunk and self._draw.integers(2))

    def rounds_next(self):
        """Whether the formula's next `stored` value is rounded."""
        self._marks += 1
        return self.stores[(self._marks - 1) % len(self.stores)]

    def matmul(self, a, b):
        """a @ b, its terms in a random order, `chunk` of them at a time.

        Beyond `_LINKS` parts several make a link of the chain.
        """
        if self.operand == "tf32":
            a, b = (tf32(x, cut=self.roads) for x in (a, b))
        if not self.chunk or a.shape[-1] == 0 or a.ndim < 2 or b.ndim < 2:
            return np.matmul(a, b)
        length = a.shape[-1]
        order = self._draw.permutation(length)
        parts = -(-length // (self.chunk * _LINKS))
        if self.chunk * parts == 1:
            return _added_one_by_one(a, b, order)
        size = self.chunk * parts
        some = (order[start : start + size] for start in range(0, length, size))
        return self.chain((np.matmul(a[..., i], b[..., i, :]) for i in some), parts - 1)

    def chain(self, sums, links):
        """Partial sums, added one after the other in place of a longer chain.

        links: roundings in each that the longer chain makes at the size of the whole sum so far.
        What they add is drawn; those at the size of the partial sum itself are in it.
        """
        total = squares = None
        for part in sums:
            before, total = total, part if total is None else total + part
            if links and before is not None:
                # the mean square of a sum that grows from the one to the other
                square = np.maximum(np.multiply(before, total, dtype=np.float64), 0)
                squares = square if squares is None else np.add(squares, square, out=squares)
        if squares is None:
            return total
        off = np.sqrt(links * _HALF_UNIT_SQUARED / 3 * squares).astype(np.float32)
        return total + off * self._draw.standard_normal(total.shape, np.float32)

    def sum(self, x, axis=0, keepdims=False):
        """The sum over axes, its terms in a random order, `chunk` of them at a time."""
        if not self.chunk or x.size == 0:
            return np.add.reduce(x, axis=axis, keepdims=keepdims)
        axes = tuple(range(x.ndim)) if axis is None else np.atleast_1d(axis) % x.ndim
        rest = [a for a in range(x.ndim) if a not in axes]
        columns = x.transpose(*axes, *rest).reshape(-1, *(x.shape[a] for a in rest))
        columns = columns[self._draw.permutation(len(columns))]
        if self.chunk > 1:
            columns = np.add.reduceat(columns, range(0, len(columns), self.chunk))
        # accumulate adds one after the other, where reduce may add in pairs
        total = np.add.accumulate(columns)[-1]
        return np.expand_dims(total, tuple(axes)) if keepdims else total

    def apply(self, ufunc, *inputs, **options):
        """A ufunc, off by a part of its last place, on the road that this arithmetic takes."""
        result = self._road(ufunc, *inputs, **options)
        if not (self.noise and self.chunk) or ufunc not in _OFF or options:
            return result
        part = _OFF[ufunc] * 2.0**-23 * self._draw.uniform(-1, 1, np.shape(result))
        off = (result * (1 + part)).astype(np.float32)
        return np.where(_exact(ufunc, result, *inputs), result, off)

    def scatter_add(self, out, index, values):
        """np.add.at, in a random order."""
        index = np.broadcast_to(index, np.shape(index))
        order = self._draw.permutation(index.size)
        rows = np.broadcast_to(values, index.shape + out.shape[1:]).reshape(-1, *out.shape[1:])
        np.add.at(out, index.reshape(-1)[order], rows[order])

    def _road(self, ufunc, *inputs, **options):
        if self.roads and not options:
            if ufunc is np.exp:
                return np.exp2(inputs[0] * _LOG2E)
            if ufunc is np.tanh:
                e = np.exp2(np.float32(-2) * _LOG2E * np.abs(inputs[0]))
                return np.copysign((1 - e) / (1 + e), inputs[0])
            if ufunc is erf:
                return _erf_by_rational(inputs[0])
        return ufunc(*inputs, **options)


class Rounded(np.ndarray):
    """A float32 array whose products and sums follow an `Arithmetic`."""

    arithmetic: Arithmetic | None = None

    def __array_finalize__(self, source):
        self.arithmetic = getattr(source, "arithmetic", None)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        arithmetic = next(x.arithmetic for x in (*inputs, *(out or ())) if isinstance(x, Rounded))
        inputs = [_plain(x) for x in inputs]
        with np.errstate(all="ignore"):
            if method == "__call__" and ufunc is np.matmul and not options:
                result = arithmetic.matmul(*inputs)
            elif method == "reduce" and ufunc is np.add and inputs[0].dtype == np.float32:
                result = arithmetic.sum(
                    *inputs, axis=options.get("axis", 0), keepdims=options.get("keepdims", False)
                )
            elif method == "at" and ufunc is np.add and inputs[1].dtype.kind in "iu":
                result = arithmetic.scatter_add(*inputs)
            elif method == "__call__":
                result = arithmetic.apply(ufunc, *inputs, **options)
            else:
                result = getattr(ufunc, method)(*inputs, **options)
        if out is None:
            return _tracked(result, arithmetic)
        # in place, by the same arithmetic: x *= y is x = x * y
        np.copyto(_plain(out[0]), result, where=options.get("where", True))
        return _tracked(out[0], arithmetic)

    def __array_function__(self, func, types, args, kwargs):
        return _tracked(super().__array_function__(func, types, args, kwargs), self.arithmetic)


def saturated(x, dtype):
    """x in a narrower dtype; eight-bit formats hold their largest value where x is beyond it."""
    dtype = np.dtype(dtype)
    if dtype.itemsize == 1:
        largest = float(ml_dtypes.finfo(dtype).max)
        x = np.clip(x, -largest, largest)
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(dtype)


def _exact(ufunc, result, *inputs):
    """Where a result is not rounded, so that nobody's is off. Float64 holds any float32 product."""
    if ufunc is np.multiply:
        return np.multiply(*inputs, dtype=np.float64) == result
    if ufunc is np.divide:
        return np.multiply(result, inputs[1], dtype=np.float64) == inputs[0]
    if ufunc is np.sqrt:
        return np.multiply(result, result, dtype=np.float64) == inputs[0]
    # exp and exp2 of 0; tanh and erf far out, where every library has 1
    return np.abs(result) == 1


def tf32(x, cut=False):
    """x with ten bits of mantissa, rounded to nearest or cut off."""
    bits = np.array(x, np.float32).view(np.uint32)
    if not cut:
        bits = np.where(np.isfinite(x), bits + np.uint32(1 << 12), bits)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _added_one_by_one(a, b, order):
    """a @ b with the terms of its sums added in this order."""
    if a.shape[-2] > b.shape[-1]:
        # the longer axis last: loops over it are fast
        swapped = _added_one_by_one(b.swapaxes(-1, -2), a.swapaxes(-1, -2), order)
        return np.ascontiguousarray(swapped.swapaxes(-1, -2))
    columns = np.ascontiguousarray(np.moveaxis(a, -1, 0))[..., None]
    rows = np.ascontiguousarray(np.moveaxis(b, -2, 0))[..., None, :]
    total = columns[order[0]] * rows[order[0]]
    term = np.empty_like(total)
    for i in order[1:]:
        np.multiply(columns[i], rows[i], out=term)
        total += term
    return total


def _plain(x):
    return x.view(np.ndarray) if isinstance(x, Rounded) else x


def _tracked(result, arithmetic):
    """Floating results go on under the same arithmetic, never wider than float32."""
    if isinstance(result, tuple):
        return tuple(_tracked(r, arithmetic) for r in result)
    if isinstance(result, (np.ndarray, np.floating)) and result.dtype.kind == "f":
        return arithmetic.array(result)
    return result


def _erf_by_rational(x):
    """erf to 1.5e-7. Source: Abramowitz and Stegun 1964, formula 7.1.26."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = 0.0
    for a in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + a) * t
    return np.copysign(1 - series * np.exp2(-x * x * _LOG2E), x)


def floats(*arrays):
    """The arrays in the arithmetic they bring: float64, or `Rounded` as it is. None passes.

    All are complex128 where one is complex: the step of a derivative without cancellation
    (`tests/proof`).
    """
    wide = np.complex128 if any(np.iscomplexobj(x) for x in arrays) else np.float64
    out = tuple(x if x is None or isinstance(x, Rounded) else np.asarray(x, wide) for x in arrays)
    return out if len(out) > 1 else out[0]


def stored(x, unit=None):
    """Mark a value that a kernel may keep in the storage dtype; the value itself in float64.

    With `unit`, x·unit is what may be rounded instead of x: softmax weights before they are
    divided by their sum.
    """
    if not isinstance(x, Rounded) or not x.arithmetic.rounds_next():
        return x
    whole = unit is None or x.arithmetic.normalised
    unit = 1.0 if whole else _plain(np.where(unit == 0, 1.0, unit))
    return x.arithmetic.array(x.arithmetic.round(_plain(x) * unit) / unit)


def rescaled(x):
    """Mark a float32 value that a kernel may keep in another unit, as with log2(e) folded in."""
    if not isinstance(x, Rounded):
        return x
    unit = np.float32(x.arithmetic.draw_unit())
    return x * unit / unit


def chained(sums, terms):
    """Sums over blocks of so many terms each, added up as one sum over all of them may be."""
    first = sums[0]
    if not isinstance(first, Rounded):
        return sum(sums)
    arithmetic = first.arithmetic
    links = max(terms // arithmetic.chunk - 1, 0) if arithmetic.chunk else 0
    return arithmetic.array(arithmetic.chain(map(_plain, sums), links))


def refinement(x):
    """Mark a correction that is 0 in exact arithmetic, so that a kernel may leave it out."""
    return x * 0 if isinstance(x, Rounded) and x.arithmetic.roads else x


def otherwise(x, other):
    """Mark a value that a kernel may compute by another formula, equal in exact arithmetic.

    other: a function of nothing that computes it so.
    """
    return other() if isinstance(x, Rounded) and x.arithmetic.takes_another() else x


def sharper(x, exact, legal):
    """`exact()`, or `legal()` where x is `Rounded`: two formulas equal in exact arithmetic.

    The legal one cancels, as it may in a kernel; the exact one keeps the digits of a small result.
    """
    return legal() if isinstance(x, Rounded) else exact()
