"""Error budgets derived from the spread of legal computations; no hand-set tolerance.

The op's own formula is run in float32 with the summation orders and the roundings that a good
kernel may choose (`gaugeblock.reference._rounding`). For each output or gradient, with ref the
float64 result on the same rounded inputs and rows running along the last axis:

    e(run, row) = max over the row of |legal − ref|
    own(row)  = max over runs of e, or rms + 3.5·deviation of e over the runs where that is more
    typical   = median over rows of own(row) / max|ref(row)|
    yardstick = max(own(row), min(typical·max|ref(row)|, largest own of all rows))
    budget    = 2·yardstick(row) + ulp(ref)                         for each element
    budget    = 2·own(rms(legal − ref)) + rms(ulp)/√n  for the tensor's RMS error

The largest of a few dozen draws says little where one error decides, as in a single number or in a
row with one common factor: there the second form of `own` makes a normal error's chance of passing
twice it less than 10⁻⁹. `typical` keeps a short row from a tight budget that it owes to luck; where
most rows are nearly 0, so that it says nothing, the largest error of all rows limits it. A row
whose exact value is 0 keeps what the legal runs leave there, often exactly 0. The RMS allowance for
the final rounding shrinks with √n, as the error of a mean does.
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


@dataclass(frozen=True)
class Precision:
    """What a kernel computes in: dtype of inputs and intermediates, of results, of operands."""

    name: str
    storage: np.dtype
    results: tuple[str, ...]
    operand: str = "float32"
    gradients: bool = True


_NARROW = ("bfloat16", "float16", "float32")
PRECISIONS = {
    name: Precision(name, dtype, tuple(dict.fromkeys((name, "float32"))))
    for name, dtype in DTYPES.items()
}
PRECISIONS |= {
    "tf32": Precision("tf32", DTYPES["float32"], ("float32",), operand="tf32"),
    # a gradient in eight bits needs a scale of its own, which is no part of any op here
    "e4m3": Precision("e4m3", np.dtype(ml_dtypes.float8_e4m3fn), _NARROW, gradients=False),
    "e5m2": Precision("e5m2", np.dtype(ml_dtypes.float8_e5m2), _NARROW, gradients=False),
}
_ALIASES = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


def precision(name):
    """The `Precision` of a dtype's name; ValueError for a name that is none."""
    name = _ALIASES.get(name, name)
    if name not in PRECISIONS:
        raise ValueError(f"check: dtype must be one of {', '.join(PRECISIONS)}, got {name!r}")
    return PRECISIONS[name]


def legal_arithmetics(precision):
    """The legal computations that span the yardstick: order of sums, roundings, functions.

    The first leaves everything to NumPy; the others are drawn, the same ones every time.
    """
    draw = np.random.default_rng(0)
    return [Arithmetic(precision.storage, operand=precision.operand)] + [
        Arithmetic(
            precision.storage,
            # serial sums are the noisiest and must be sampled well
            chunk=int(draw.choice((1, 1, 1, 4, 16, 64))),
            stores=tuple(draw.random(5) < 0.75),
            unit=draw.uniform(1, 2),
            roads=bool(draw.integers(2)),
            # a share of the whole is below what eight bits hold
            normalised=bool(draw.integers(2)) and precision.storage.itemsize > 1,
            operand=precision.operand,
        )
        for _ in range(31)
    ]


def evaluate(op, inputs, options, dys, arithmetic=None):
    """Outputs, and gradients where `dys` is given, in float64 or under a legal arithmetic."""
    arrays = {
        name: x
        if arithmetic is None or x is None or name not in op.floating()
        else arithmetic.array(x)
        for name, x in inputs.items()
    }
    y = op.reference(*arrays.values(), **options)
    outputs = tuple(y) if isinstance(y, (tuple, list)) else (y,)
    if dys is None:
        return outputs, ()
    if op.backward is None:
        return outputs, numeric_gradient(op, dys, arrays, options)
    if arithmetic is not None:
        dys = tuple(map(arithmetic.array, dys))
    gradients = op.backward(dys if len(dys) > 1 else dys[0], *arrays.values(), **options)
    gradients = gradients if isinstance(gradients, (tuple, list)) else (gradients,)
    return outputs, tuple(g for g in gradients if g is not None)


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


def budget(want, legal, dtype, skip=None):
    """The budget of a tensor from its exact values and the float32 results of the legal runs.

    skip: mask of the elements that are not compared.
    """
    want = np.asarray(want, np.float64)
    shape, want = want.shape, np.atleast_1d(want)
    finite = np.isfinite(want)
    if skip is not None:
        finite &= ~np.broadcast_to(skip, shape).reshape(want.shape)
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
    own = _largest(np.max(errors, axis=-1, initial=0.0, keepdims=True))
    magnitude = np.abs(exact).max(-1, initial=0.0, keepdims=True)
    live = magnitude > 0
    typical = np.median(own[live] / magnitude[live]) if live.any() else 0.0
    step = ulp(exact, dtype)
    typical = np.minimum(typical * magnitude, own.max(initial=0.0))
    rows = 2 * np.maximum(own, typical) + step
    rms = 2 * _largest(np.array([root_mean_square(e) for e in errors]))
    rms += root_mean_square(step) / max(want.size, 1) ** 0.5
    return Budget(want.reshape(shape), rows.reshape(shape), float(rms))


def _largest(draws):
    """The largest error to expect from draws of it along the first axis."""
    spread = root_mean_square(draws, axis=0) + 3.5 * np.std(draws, axis=0)
    return np.maximum(np.max(draws, axis=0), spread)


def ulp(x, dtype):
    """Spacing of the dtype's values at |x|."""
    info = ml_dtypes.finfo(dtype)
    exponent = np.where(x == 0, info.minexp, np.frexp(x)[1] - 1)
    return np.ldexp(1.0, np.maximum(exponent, info.minexp) - info.nmant)


def root_mean_square(x, axis=None):
    return np.sqrt(np.mean(np.square(x), axis=axis)) if x.size else np.float64(0)
