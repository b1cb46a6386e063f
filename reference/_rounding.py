"""The arithmetic the reference runs in: float64, or the roundings that a legal kernel may make.

A reference function is one formula. Given plain arrays it computes in float64. Given `Rounded`
arrays it computes the same formula in float32 with a chosen summation order, and rounds to the
storage dtype wherever the formula says `stored(...)`. The oracle derives its error budgets from the
spread of such runs, so an op needs no second model of itself.

Source of the model: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapters 3-4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LOG2E = np.float32(np.log2(np.e))


@dataclass(frozen=True)
class Arithmetic:
    """One legal way to compute: where values are rounded, and in which order sums are taken.

    storage: dtype that intermediates are stored in (float32, float16, bfloat16, ...).
    chunk:   length of the partial sums, which are then added one after the other; 0 leaves the
             order to NumPy (pairwise sums, BLAS products).
    reverse: partial sums are added from the far end.
    stores:  "wide" keeps `stored` values in float32, "plain" rounds them, "scaled" rounds them in
             the unit the formula names (softmax weights before they are normalised).
    exp2:    exp(x) is taken as 2^(x log2 e), tanh through exp.
    """

    storage: np.dtype
    chunk: int = 0
    reverse: bool = False
    stores: str = "plain"
    exp2: bool = False

    def array(self, values):
        """The values as an array that computes under this arithmetic."""
        out = np.asarray(values, dtype=np.float32).view(Rounded)
        out.arithmetic = self
        return out

    def round(self, x):
        """The nearest values of the storage dtype, in float32."""
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(self.storage).astype(np.float32)

    def chunks(self, length):
        """The slices that partial sums run over, in the order in which they are added."""
        # more than 256 links in the chain change the error little and cost Python time
        step = max(self.chunk, -(-length // 256))
        starts = range(0, length, step)
        return [slice(s, s + step) for s in (reversed(starts) if self.reverse else starts)]

    def matmul(self, a, b):
        if not self.chunk or a.shape[-1] <= self.chunk or a.ndim < 2 or b.ndim < 2:
            return np.matmul(a, b)
        total = None
        for part in self.chunks(a.shape[-1]):
            product = np.matmul(a[..., part], b[..., part, :])
            total = product if total is None else total + product
        return total

    def sum(self, x, axis=0, keepdims=False):
        if not self.chunk or x.size == 0:
            return np.add.reduce(x, axis=axis, keepdims=keepdims)
        axes = tuple(range(x.ndim)) if axis is None else np.atleast_1d(axis) % x.ndim
        rest = [a for a in range(x.ndim) if a not in axes]
        columns = x.transpose(*axes, *rest).reshape(-1, *(x.shape[a] for a in rest))
        total = np.zeros(columns.shape[1:], np.float32)
        for part in self.chunks(len(columns)):
            total = total + np.add.reduce(columns[part], axis=0)
        return np.expand_dims(total, tuple(axes)) if keepdims else total

    def apply(self, ufunc, *inputs, **options):
        """A ufunc, with the elementary functions that kernels take another road to."""
        if self.exp2 and not options:
            if ufunc is np.exp:
                return np.exp2(inputs[0] * _LOG2E)
            if ufunc is np.tanh:
                e = np.exp2(np.float32(-2) * _LOG2E * np.abs(inputs[0]))
                return np.copysign((1 - e) / (1 + e), inputs[0])
        return ufunc(*inputs, **options)


class Rounded(np.ndarray):
    """A float32 array whose products and sums follow an `Arithmetic`."""

    arithmetic: Arithmetic | None = None

    def __array_finalize__(self, source):
        self.arithmetic = getattr(source, "arithmetic", None)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        arithmetic = next(
            x.arithmetic for x in (*inputs, *(out or ())) if isinstance(x, Rounded)
        )
        inputs = [_plain(x) for x in inputs]
        if out is not None:
            options["out"] = tuple(_plain(x) for x in out)
        with np.errstate(all="ignore"):
            if method == "__call__" and ufunc is np.matmul and not options:
                result = arithmetic.matmul(*inputs)
            elif method == "reduce" and ufunc is np.add and inputs[0].dtype == np.float32:
                result = arithmetic.sum(
                    *inputs, axis=options.get("axis", 0), keepdims=options.get("keepdims", False)
                )
            elif method == "__call__":
                result = arithmetic.apply(ufunc, *inputs, **options)
            else:
                result = getattr(ufunc, method)(*inputs, **options)
        return _tracked(result, arithmetic)

    def __array_function__(self, func, types, args, kwargs):
        return _tracked(super().__array_function__(func, types, args, kwargs), self.arithmetic)


def _plain(x):
    return x.view(np.ndarray) if isinstance(x, Rounded) else x


def _tracked(result, arithmetic):
    """Floating results go on under the same arithmetic, never wider than float32."""
    if isinstance(result, tuple):
        return tuple(_tracked(r, arithmetic) for r in result)
    if isinstance(result, (np.ndarray, np.floating)) and result.dtype.kind == "f":
        return arithmetic.array(result)
    return result


def floats(*arrays):
    """The arrays in the arithmetic they bring: float64, or `Rounded` as it is. None passes."""
    out = tuple(
        x if x is None or isinstance(x, Rounded) else np.asarray(x, dtype=np.float64)
        for x in arrays
    )
    return out if len(out) > 1 else out[0]


def stored(x, unit=None):
    """Mark a value that a kernel may keep in the storage dtype; the value itself in float64.

    With `unit`, x·unit is what may be rounded instead of x: softmax weights before they are
    divided by their sum.
    """
    if not isinstance(x, Rounded):
        return x
    arithmetic = x.arithmetic
    if arithmetic.stores == "wide":
        return x
    if unit is not None and arithmetic.stores == "scaled":
        safe = np.where(unit == 0, np.float32(1), unit)
        return arithmetic.array(arithmetic.round(_plain(x * safe))) / safe
    return arithmetic.array(arithmetic.round(_plain(x)))
