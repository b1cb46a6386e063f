"""Error budgets derived from the spread of legal computations; no hand-set tolerance.

The op's own formula is run in float32 with the summation orders and the roundings that a good
kernel may choose (`gaugeblock.reference._rounding`). For each output or gradient, with ref the
float64 result on the same rounded inputs and rows running along the last axis:

    own(row)  = max over legal runs and over the row of |legal − ref|
    typical   = median over rows of own(row) / max|ref(row)|
    yardstick = max(own(row), typical·max|ref(row)|)
    budget    = 2·yardstick(row) + ulp(ref)                         for each element
    budget    = 2·max over legal runs rms(legal − ref) + rms(ulp)/√n  for the tensor's RMS error

`typical` keeps a short row from a tight budget that it owes to luck. A row whose exact value is 0
keeps what the legal runs leave there, often exactly 0. The RMS allowance for the final rounding
shrinks with √n, as the error of a mean does.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .._rounding import Arithmetic
from .op import numeric_gradient

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def legal_arithmetics(storage):
    """The legal computations that span the yardstick: order of sums, roundings, functions.

    The first leaves everything to NumPy; the others are drawn, the same ones every time.
    """
    draw = np.random.default_rng(0)
    return [Arithmetic(storage)] + [
        Arithmetic(
            storage,
            chunk=int(draw.choice((1, 4, 8, 16, 32, 64, 128))),
            stores=tuple(draw.random(5) < 0.75),
            unit=draw.uniform(1, 2),
            roads=bool(draw.integers(2)),
        )
        for _ in range(31)
    ]


def evaluate(op, inputs, options, dys, arithmetic=None):
    """Outputs, and gradients where `dys` is given, in float64 or under a legal arithmetic."""
    arrays = {
        name: arithmetic.array(x) if arithmetic is not None and name in op.floating() else x
        for name, x in inputs.items()
    }
    y = op.reference(*arrays.values(), **options)
    outputs = y if isinstance(y, tuple) else (y,)
    if dys is None:
        return outputs, ()
    if op.backward is None:
        return outputs, numeric_gradient(op, dys, arrays, options)
    if arithmetic is not None:
        dys = tuple(map(arithmetic.array, dys))
    return outputs, op.backward(dys if len(dys) > 1 else dys[0], *arrays.values(), **options)


@dataclass(frozen=True)
class Budget:
    """How far a result of one dtype may lie from `want`."""

    want: np.ndarray  # float64
    rows: np.ndarray  # elementwise bound
    rms: float

    @property
    def discrimination(self):
        """max|want| over the bound there: how plainly a wrong answer stands out."""
        finite = np.isfinite(self.want) & (self.rows > 0)
        if not finite.any():
            return np.inf
        return float(np.max(np.abs(self.want[finite]) / self.rows[finite]))


def budget(want, legal, dtype):
    """The budget of a tensor from its exact values and the float32 results of the legal runs."""
    want = np.asarray(want, np.float64)
    shape, want = want.shape, np.atleast_1d(want)
    finite = np.isfinite(want)
    exact = np.where(finite, want, 0.0)
    errors = []
    for result in legal:
        with np.errstate(over="ignore"):
            rounded = np.asarray(result).astype(dtype).astype(np.float64).reshape(want.shape)
        # a run that overflows where the exact value does not is no legal computation of it
        if np.isfinite(rounded[finite]).all():
            errors.append(np.abs(np.where(finite, rounded, 0.0) - exact))
    if not errors:
        raise ValueError(
            f"budget: a legal computation in {dtype} must stay finite where the result is, none "
            "does; give the case smaller values"
        )
    own = np.max(errors, axis=0).max(-1, initial=0.0, keepdims=True)
    magnitude = np.abs(exact).max(-1, initial=0.0, keepdims=True)
    live = magnitude > 0
    typical = np.median(own[live] / magnitude[live]) if live.any() else 0.0
    step = ulp(exact, dtype)
    rows = 2 * np.maximum(own, typical * magnitude) + step
    rms = 2 * max(map(_rms, errors)) + _rms(step) / max(want.size, 1) ** 0.5
    return Budget(want.reshape(shape), rows.reshape(shape), float(rms))


def ulp(x, dtype):
    """Spacing of the dtype's values at |x|."""
    info = ml_dtypes.finfo(dtype)
    exponent = np.where(x == 0, info.minexp, np.frexp(x)[1] - 1)
    return np.ldexp(1.0, np.maximum(exponent, info.minexp) - info.nmant)


def _rms(x):
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0
