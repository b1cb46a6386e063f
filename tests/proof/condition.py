"""The reference's error in units of what its inputs' own rounding does to the exact result.

    ratio = |computed − exact| / (ε·(Σ_j |∂exact/∂x_j·x_j| + |exact|)),   ε = 2⁻⁵²

x_j runs over all floating inputs, floating options and, for a gradient, the output gradients. The
sum over |exact| is the componentwise condition number: by how many ulp the exact result moves when
every input moves by one. So a ratio of a few says: as exact as a float64 function can be asked to
be, short of computing in more digits. (Higham 2002, sections 1.6 and 3.1.)

Derivatives are forward differences with a relative step of 10⁻⁵⁰ in 400 digits: their own error
is about 10⁻⁵⁰ of the condition number, and the second differences that gradients' condition
numbers take lose 100 of the digits, GELU at −30 another 200.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mpmath import mp

from .exact import FORMULAS
from .points import outputs

DIGITS, STEP = 400, "1e-50"
# Float64 rounds each operation by half an ε, and the inputs' share of that is in the condition
# number. What is not there: the roundings of the few operations after the last cancellation, and
# sums of at most eight terms. Measured, no op comes beyond 2.
BOUND = 4.0
# where a threshold decides, its derivative is 0 or none
_THRESHOLDS = ("top_p", "min_p")
_EPS = 2.0**-52
# results below the normal range are off by parts of the smallest number, and so are their factors
_TINIEST = 2.0**-1074


# A projection: what is left of g without its parts along 1 and x̂. Where nearly nothing is left, as
# of the one element that is far from all others, its row's roundings are, so that it is measured by
# its row. With two columns nothing at all is left but ε's share: see `TWO_COLUMNS` in the page.
BY_ROW = {("layer_norm", "dx"), ("residual_layer_norm", "dx"), ("residual_layer_norm", "dr")}


# Sums over keys of ds ⊙ f(t), where Σ ds = 0: where tanh is nearly the same for all keys nearly
# nothing is left, and no rounding of an input says so. Measured by the largest of all gradients.
BY_POINT = {("additive_attention", f"d{name}") for name in ("q", "k", "w_q", "w_k", "w")}


@dataclass(frozen=True)
class Error:
    """The largest of a tensor, by ratio; ulp and condition are that element's."""

    tensor: str
    ratio: float
    ulp: float
    condition: float


class Problem:
    """The exact op as a function of one flat vector: inputs first, then options."""

    def __init__(self, point):
        self.point = point
        self.formula = FORMULAS[point.op.name]
        self.names = point.floating()
        self.scalars = [
            k
            for k, v in point.options.items()
            if isinstance(v, float) and v not in (0.0, 1.0) and k not in _THRESHOLDS
        ]
        arrays = [np.asarray(point.inputs[n]) for n in self.names]
        self.shapes = [a.shape for a in arrays]
        self.x = [mp.mpf(float(v)) for a in arrays for v in a.flat]
        self.inputs = len(self.x)
        self.x += [mp.mpf(point.options[k]) for k in self.scalars]
        # an infinite input stays where it is
        self.sizes = [abs(v) if mp.isfinite(v) else mp.mpf(0) for v in self.x]
        self.steps = [mp.mpf(STEP) * (size or 1) for size in self.sizes]

    def __call__(self, *moved):
        """All outputs, one list; the inputs in `moved` one step further each time they occur."""
        x = list(self.x)
        for j in moved:
            x[j] += self.steps[j]
        arrays, start = dict(self.point.inputs), 0
        for name, shape in zip(self.names, self.shapes):
            size = int(np.prod(shape))
            arrays[name] = np.empty(shape, object)
            arrays[name].flat = x[start : start + size]
            start += size
        options = self.point.options | dict(zip(self.scalars, x[start:]))
        ys = self.point.op.called(self.formula)(*arrays.values(), **options)
        return [mp.mpf(v) if mp.isfinite(v) else mp.mpf(0) for y in ys for v in y.flat]


def errors(point):
    """[Error] of every output and gradient of a point."""
    with mp.workdps(DIGITS):
        found = []
        for names, computed, flat in _results(point):
            found += _compared(point.op, names, computed, *flat)
        return found


def wanted(point):
    """[(exact result, how far off it may be)] of every output and gradient, as float64 arrays."""
    with mp.workdps(DIGITS):
        found = []
        for names, computed, (want, condition, _) in _results(point):
            start, most = 0, max(map(sum, zip(condition, map(abs, want))))
            for name, array in zip(names, computed):
                here = slice(start, start + np.size(array))
                sizes = _sizes(point.op, name, array, want[here], condition[here], most)
                room = [float(BOUND * _EPS * s) + 4 * _TINIEST for s in sizes]
                exact = [float(v) for v in want[here]]
                shaped = [np.reshape(np.array(v), np.shape(array)) for v in (exact, room)]
                # −∞ by definition stands as 0 in `want`
                shaped[0] = np.where(np.isneginf(array), -np.inf, shaped[0])
                found.append(tuple(shaped))
                start = here.stop
        return found


def _results(point):
    """(names, computed, (exact, condition, floor) flat), of the outputs and of the gradients."""
    problem = Problem(point)
    condition, y, moved, jacobian = forward_conditions(problem)
    yield outputs(point.op), point.at(), (y, condition, [0] * len(y))
    if point.differentiable():
        names = [f"d{n}" for n in problem.names]
        yield names, point.gradients(), _gradient(problem, y, moved, jacobian)


def forward_conditions(problem):
    """(Σ_j |∂y_k/∂x_j·x_j| of each output, y, y at each step, jacobian)."""
    y = problem()
    moved = [problem(j) for j in range(len(problem.x))]
    jacobian = [[(a - b) / h for a, b in zip(m, y)] for m, h in zip(moved, problem.steps)]
    condition = [
        mp.fsum(abs(d[k] * x) for d, x in zip(jacobian, problem.sizes)) for k in range(len(y))
    ]
    return condition, y, moved, jacobian


def _gradient(problem, y, moved, jacobian):
    """(gradient, condition, floor) of the inputs, flat."""
    point = problem.point
    # NaN stands where nobody reads
    dy = [mp.mpf(float(v)) for part in point.dys for v in np.nan_to_num(part).flat]

    def loss(ys):
        return mp.fsum(a * b for a, b in zip(dy, ys))

    n, h, x = len(problem.x), problem.steps, problem.sizes
    base, once = loss(y), [loss(m) for m in moved]
    gradient = [mp.fsum(a * b for a, b in zip(dy, jacobian[i])) for i in range(problem.inputs)]
    condition = [
        mp.fsum(abs(a * b) for a, b in zip(dy, jacobian[i])) for i in range(problem.inputs)
    ]
    for i in range(problem.inputs):
        for j in range(i, n):
            twice = loss(problem(i, j)) - once[i] - once[j] + base
            slope = abs(twice / (h[i] * h[j]))
            condition[i] += slope * x[j]
            if i < j < problem.inputs:
                condition[j] += slope * x[i]
    # what the differences leave of a gradient that is 0
    scale = mp.fsum(abs(a * b) for a, b in zip(dy, y))
    floor = [mp.mpf("1e-250") * scale / (v or 1) for v in x[: problem.inputs]]
    return gradient, condition, floor


def _compared(op, names, computed, want, condition, floor):
    """[Error], one a tensor: computed arrays against flat lists."""
    found, start, most = [], 0, max(map(sum, zip(condition, map(abs, want))))
    for name, array in zip(names, computed):
        here = slice(start, start + np.size(array))
        sizes = _sizes(op, name, array, want[here], condition[here], most)
        numbers = zip(np.ravel(array), want[here], condition[here], sizes, floor[here])
        errors = [_error(name, *each) for each in numbers]
        found.append(max(errors, key=lambda e: e.ratio))
        start = here.stop
    return found


def _sizes(op, name, array, want, condition, most):
    """Σ_j |∂exact/∂x_j·x_j| + |exact| of each element, or the largest in its row."""
    if name == "token":
        # a choice is right or wrong
        return [mp.mpf(0)] * len(want)
    sizes = [c + abs(v) for c, v in zip(condition, want)]
    if (op.name, name) in BY_POINT:
        return [most] * len(sizes)
    if (op.name, name) not in BY_ROW:
        return sizes
    n = np.shape(array)[-1]
    return [max(sizes[k // n * n : k // n * n + n]) for k in range(len(sizes))]


def _error(name, value, want, condition, size, floor):
    if not np.isfinite(value):
        # −∞ by definition stands as 0 in `want`
        ratio = 0.0 if np.isneginf(value) and want == 0 else np.inf
        return Error(name, ratio, ratio, 0.0)
    error = abs(mp.mpf(float(value)) - want) - floor
    relative = float(condition / abs(want)) if abs(want) > np.finfo(float).tiny else 0.0
    if error <= 0:
        return Error(name, 0.0, 0.0, relative)
    # a result that should be 0, or nearly, has no ulp to count in
    normal = abs(want) > np.finfo(float).tiny
    ulp = float(error / np.spacing(abs(float(want)))) if normal else 0.0
    return Error(name, float(error / (_EPS * size + _TINIEST)), ulp, relative)
