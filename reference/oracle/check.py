"""Checking a candidate: draw inputs, run it, hold every output and gradient against its budget."""

from __future__ import annotations

import inspect
import json
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .adapters import LAYOUTS, NumpyAdapter, TorchAdapter, WrongForm
from .budget import DTYPES, budget, evaluate, legal_arithmetics
from .op import Op

# checked only in functions that declare them
_OPTIONAL = {"return_lse", "dropout"}


@dataclass(frozen=True)
class Result:
    """One tensor of one case: its worst element against the budget there, and its RMS error.

    kind is "" where it passed, else exception, form, shape, dtype, nonfinite, row or rms.
    """

    op: str
    case: str
    dtype: str
    layout: str
    output: str
    passed: bool
    kind: str = ""
    index: tuple | None = None
    got: float | None = None
    want: float | None = None
    error: float | None = None
    budget: float | None = None
    rms_error: float | None = None
    rms_budget: float | None = None
    discrimination: float | None = None
    hint: str = ""

    @property
    def ratio(self):
        """Error over budget, the larger of element and RMS: at most 1 where it passed."""
        if self.error is None:
            return 0.0 if self.passed else np.inf
        return max(_ratio(self.error, self.budget), _ratio(self.rms_error, self.rms_budget))


@dataclass
class Report:
    """What a check found."""

    op: str
    candidate: str
    device: str
    seed: int
    results: list[Result] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @property
    def passed(self):
        return bool(self.results) and not self.failures

    @property
    def failures(self):
        return [r for r in self.results if not r.passed]

    def save(self, path):
        """Write the report as JSON."""
        path = expect_json(path)
        document = {**asdict(self), "passed": self.passed}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_plain(document), indent=1) + "\n")


def expect_json(path):
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"report: path must end in .json, got {path}")
    return path


def check(
    op,
    fn,
    *,
    backward=True,
    dtypes=("float32",),
    device="cpu",
    cases="quick",
    seed=0,
    framework="torch",
    layouts=("contiguous",),
    expression=None,
):
    """Check `fn`, which has the op's public signature, against the op's reference.

    op:         a name from the catalog, or an `Op`.
    backward:   True for autograd, False for the forward alone, or
                backward(do, *inputs, **options) -> gradients.
    dtypes:     of float32, float16, bfloat16.
    cases:      "quick" or "full"; `expression` narrows them by tag ("causal and not window").
    layouts:    of contiguous, transposed, sliced, broadcast_grad.
    framework:  "torch" or "numpy".
    Raises ValueError for a name, dtype, device or expression that selects nothing.
    """
    if isinstance(op, str):
        from ..catalog import find

        op = find(op)
    elif not isinstance(op, Op):
        raise TypeError(f"check: op must be a catalog name or an Op, got {type(op).__name__}")
    _expect_known("dtype", dtypes, DTYPES)
    _expect_known("layout", layouts, LAYOUTS)
    adapter = _adapter(framework, device, backward)
    report = Report(op.name, _name(fn), str(device), seed)
    for case in op.select(cases, expression):
        undeclared = _OPTIONAL & set(op.options(case)) - _declared(fn)
        if undeclared:
            names = ", ".join(sorted(undeclared))
            report.not_checked.append(f"{case.name}: the candidate does not declare {names}")
            continue
        for dtype in dtypes:
            exact = Expectation(op, case, dtype, seed, backward is not False)
            for layout in layouts:
                report.results += exact.judge(adapter, fn, layout)
    return report


class Expectation:
    """A case in a dtype: rounded inputs, exact results, and the results of the legal runs."""

    def __init__(self, op, case, dtype, seed=0, backward=True):
        self.op, self.case, self.dtype, self.backward = op, case, dtype, backward
        self.storage = DTYPES[dtype]
        # the draw depends on the case alone, whatever else is checked beside it
        self.rng = np.random.default_rng([seed, *f"{op.name}/{case.name}".encode()])
        drawn = op.draw(case, self.rng)
        self.inputs = {
            k: x.astype(self.storage) if k in op.floating() else x for k, x in drawn.items()
        }
        self.wide = {
            k: x.astype(np.float64) if k in op.floating() else x for k, x in self.inputs.items()
        }
        self.options = op.options(case)
        self._exact = {}

    def seeds(self, broadcast):
        """Output gradients, rounded to the storage dtype; all equal where they are broadcast."""
        outputs, _ = evaluate(self.op, self.wide, self.options, None)
        rng = np.random.default_rng(self.rng.bit_generator.seed_seq)
        dys = []
        for y in outputs:
            dy = rng.standard_normal(np.shape(y))
            dy = np.broadcast_to(dy.flat[0] if dy.size else dy, dy.shape) if broadcast else dy
            dys.append(dy.astype(self.storage).astype(np.float64))
        return tuple(dys)

    def results(self, broadcast):
        """(seeds, exact (outputs, gradients), [legal (outputs, gradients)])."""
        if broadcast not in self._exact:
            dys = self.seeds(broadcast) if self.backward else None
            exact = evaluate(self.op, self.wide, self.options, dys)
            legal = [
                self._legal(arithmetic, dys, exact)
                for arithmetic in legal_arithmetics(self.storage)
            ]
            self._exact[broadcast] = dys, exact, legal
        return self._exact[broadcast]

    def _legal(self, arithmetic, dys, exact):
        """(outputs, gradients) of a legal run."""
        if dys is None or self.op.backward is not None:
            return evaluate(self.op, self.wide, self.options, dys, arithmetic)
        # central differences see no roundings: the gradients get the relative error of the outputs
        outputs, _ = evaluate(self.op, self.wide, self.options, None, arithmetic)
        share = max(map(_relative_error, outputs, exact[0]))
        draw = np.random.default_rng(int(arithmetic.unit * 2**20))
        return outputs, [
            g + share * np.abs(g).max(-1, initial=0.0, keepdims=True) * draw.uniform(-1, 1, g.shape)
            for g in map(np.atleast_1d, exact[1])
        ]

    def judge(self, adapter, fn, layout="contiguous"):
        """Run the candidate; a list of `Result`, one for each output and gradient."""
        dys, exact, legal = self.results(layout == "broadcast_grad")
        where = (self.op.name, self.case.name, self.dtype, layout)
        try:
            answers = adapter.run(fn, self.inputs, self.options, dys, layout)
        except WrongForm as error:
            return [Result(*where, "outputs", False, "form", hint=str(error))]
        except (Exception, SystemExit) as error:
            hint = "".join(traceback.format_exception_only(error)).strip()
            return [Result(*where, "outputs", False, "exception", hint=hint)]
        names = list(self.op.outputs)[: len(exact[0])], [f"d{n}" for n in self.op.floating()]
        results = []
        for part in (0, 1):
            wants, got = exact[part], answers[part]
            if len(wants) != len(got):
                hint = f"must return {len(wants)} tensors, returned {len(got)}"
                return [*results, Result(*where, "outputs", False, "form", hint=hint)]
            for i, (name, want, answer) in enumerate(zip(names[part], wants, got)):
                runs = [run[part][i] for run in legal]
                allowed = (self.dtype,) if part else (self.dtype, "float32")
                results.append(_compare((*where, name), answer, want, runs, allowed))
        return results


def _compare(where, answer, want, legal, allowed):
    want = np.asarray(want, np.float64)
    if answer.values.shape != want.shape:
        hint = f"must have shape {want.shape}, has {answer.values.shape}"
        return Result(*where, False, "shape", hint=hint)
    if answer.dtype not in allowed:
        hint = f"must be {' or '.join(allowed)}, is {answer.dtype}"
        return Result(*where, False, "dtype", hint=hint)
    bound = budget(want, legal, DTYPES[answer.dtype])
    got, finite = answer.values, np.isfinite(want)
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(got - np.where(finite, want, 0.0)), 0.0)
    same = np.where(finite, np.isfinite(got), (got == want) | (np.isnan(got) & np.isnan(want)))
    rms_error = float(np.sqrt(np.mean(np.square(error)))) if error.size else 0.0
    kind = ""
    if not same.all():
        kind, worst = "nonfinite", np.unravel_index(np.argmin(same), same.shape)
    else:
        excess = error / np.where(bound.rows > 0, bound.rows, 1.0)
        worst = np.unravel_index(np.argmax(excess), excess.shape) if error.size else ()
        if error.size and excess[worst] > 1:
            kind = "row"
        elif rms_error > bound.rms:
            kind = "rms"
    if not error.size:
        return Result(*where, True, error=0.0, budget=0.0, rms_error=0.0, rms_budget=0.0)
    return Result(
        *where,
        not kind,
        kind,
        tuple(map(int, worst)),
        float(got[worst]),
        float(want[worst]),
        float(error[worst]),
        float(bound.rows[worst]),
        rms_error,
        bound.rms,
        bound.discrimination,
    )


def _declared(fn):
    """The parameters of a function; `_OPTIONAL` whole where it takes any or cannot be asked."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return _OPTIONAL
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return _OPTIONAL
    return {p.name for p in parameters}


def _relative_error(got, want):
    """The largest error over a row's largest value, over all rows."""
    got, want = np.atleast_1d(got).astype(np.float64), np.atleast_1d(want)
    if not np.isfinite(want).all() or not want.size:
        return 0.0
    scale = np.abs(want).max(-1, keepdims=True)
    return float((np.abs(got - want) / np.where(scale == 0, 1.0, scale)).max())


def _adapter(framework, device, backward):
    own = backward if callable(backward) else None
    if framework == "torch":
        return TorchAdapter(device, own)
    if framework != "numpy":
        raise ValueError(f"check: framework must be torch or numpy, got {framework!r}")
    if backward is True:
        raise ValueError(
            "check: backward must be a function or False for numpy, got True; "
            "give backward=callable(do, *inputs, **options)"
        )
    return NumpyAdapter(own)


def _expect_known(what, given, known):
    for name in given:
        if name not in known:
            raise ValueError(f"check: {what} must be one of {', '.join(known)}, got {name!r}")


def _name(fn):
    return f"{getattr(fn, '__module__', '')}:{getattr(fn, '__qualname__', repr(fn))}"


def _ratio(error, bound):
    return error / bound if bound else (0.0 if error == 0 else np.inf)


def _plain(value):
    """JSON has no NaN or infinity: they are written as strings."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value
