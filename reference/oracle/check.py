"""Checking a candidate: draw inputs, run it, hold every output and gradient against its budget."""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
from dataclasses import replace

from .adapters import LAYOUTS, adapter
from .budget import precision
from .memory import cut_batch, examine
from .op import Op
from .result import Report
from .sampled import expectation_of, fits
from .shrink import SECONDS, shrunk

# checked only in functions that declare them
_OPTIONAL = {"return_lse", "dropout", "score", "stride"}
_COVERED = tuple(layout for layout in LAYOUTS if layout not in ("contiguous", "bthd"))


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
    layouts=None,
    expression=None,
    deterministic=False,
    batch_invariant=False,
    timeout=None,
    shrink=False,
    memory=True,
    watch=None,
):
    """Check `fn`, which has the op's public signature, against the op's reference.

    op:         a name from the catalog, or an `Op`.
    backward:   True for autograd, False for the forward alone, or
                backward(do, *inputs, **options) -> gradients.
    dtypes:     of float32, tf32, float16, bfloat16, e4m3, e5m2; the last two have no gradients.
    cases:      "quick" or "full"; "bench" for the shapes that are timed, where parts of each
                tensor are compared and cases past the memory at hand are left out. `expression`
                narrows them by tag ("causal and not window").
    layouts:    of contiguous, transposed, sliced, expanded, offset, broadcast_grad, bthd. By
                default contiguous and, turn about, one of the others, in "full" all of them. With
                bthd the candidate takes and gives (B, T, H, D).
    framework:  "torch", "numpy", "jax" or "cupy".
    deterministic, batch_invariant: what the candidate claims; its bits are held to it.
    timeout:    seconds that one call may take. Python code is interrupted; only a process of its
                own (the command line) stops a call that hangs in native code.
    shrink:     look for the smallest shape that still fails, 30 s in all.
    memory:     look also for damage, stale results and unwritten memory, which takes four calls.
    watch:      context manager entered around every call of the candidate.
    Raises ValueError for a name, dtype, device or expression that selects nothing.
    """
    checker = Checker(
        op, fn, backward=backward, dtypes=dtypes, device=device, cases=cases, seed=seed,
        framework=framework, layouts=layouts, expression=expression, deterministic=deterministic,
        batch_invariant=batch_invariant, memory=memory,
        watch=watch or (lambda: time_limit(timeout)),
    )  # fmt: skip
    report = checker.report()
    for unit in checker.units:
        report.results += checker.examine(unit)
    if shrink:
        shrink_failures(report, checker.shrink)
    return report


class Checker:
    """A candidate and what is to be checked of it, in units of (case, dtype, layout).

    The arguments are those of `check`.
    """

    def __init__(
        self, op, fn, *, backward, dtypes, device, cases, seed, framework, layouts, expression,
        deterministic, batch_invariant, memory, watch,
    ):  # fmt: skip
        self.op, self.fn, self.device, self.seed = expect_op(op), fn, str(device), seed
        self.backward, self.memory = backward is not False, memory
        self.claims = (deterministic, batch_invariant)
        precisions = [precision(name) for name in dtypes]
        for layout in layouts or ():
            if layout not in LAYOUTS:
                known = ", ".join(LAYOUTS)
                raise ValueError(f"check: layout must be one of {known}, got {layout!r}")
        own = self.op.called(backward, before=1) if callable(backward) else backward
        self.adapter = adapter(framework, device, own if self.op.differentiable() else False)
        self.adapter.watch = watch
        self.not_checked = list(self.adapter.not_checked if memory else ())
        self.units = []
        self._expectation = None
        for case in self.op.select(cases, expression):
            optional = self._optional(case)
            undeclared = optional - declared(fn, optional)
            if undeclared:
                self._note_undeclared(case, undeclared)
                continue
            if cases == "bench" and not fits(self.op, case):
                self.not_checked.append(f"{case.name}: needs more memory than there is")
                continue
            for p in precisions:
                for layout in layouts or self._covering(case, cases, p):
                    self.units.append((case, p.name, layout))

    def _covering(self, case, cases, p):
        if self.adapter.layouts is not None:
            return self.adapter.layouts
        return covering_layouts(self.op, case, cases, self.backward and p.gradients)

    def report(self):
        return Report(self.op.name, name_of(self.fn), self.device, self.seed, [], self.not_checked)

    def expectation(self, case, dtype):
        """What a case must give; the last one is kept, for its other layouts."""
        kept = self._expectation
        if kept is None or kept.case is not case or kept.dtype != dtype:
            self._expectation = None
            kept = expectation_of(self.op, case, dtype, self.seed, self.backward)
            self._expectation = kept
            for line in self._left_out(kept):
                if line not in self.not_checked:
                    self.not_checked.append(line)
        return kept

    def examine(self, unit):
        """The results of one unit."""
        case, dtype, layout = unit
        expectation = self.expectation(case, dtype)
        if expectation.vanishes():
            return []
        if not self.memory:
            results = expectation.judge(self.adapter, self.fn, layout)
        else:
            results = examine(expectation, self.adapter, self.fn, layout, *self.claims)
        refused = refused_options(results, self._optional(case))
        if refused:
            self._note_undeclared(case, refused)
            return []
        return results

    def _optional(self, case):
        """What a case sets of that which a candidate need not have."""
        return _OPTIONAL & set(self.op.options(case)) | set(case.keywords)

    def _note_undeclared(self, case, names):
        line = f"{case.name}: the candidate does not declare {', '.join(sorted(names))}"
        if line not in self.not_checked:
            self.not_checked.append(line)

    def shrink(self, result, seconds):
        """(the smallest case that fails like `result`, seconds spent)."""
        return shrunk(self.op, result, self.fn, self.adapter, self.seed, seconds, self.backward)

    def _left_out(self, expectation):
        """What the check of a case cannot look into, one line each."""
        op, dtype, name = self.op, expectation.dtype, expectation.case.name
        if self.backward and not expectation.precision.gradients and op.differentiable():
            yield f"gradients in {dtype}: eight-bit gradients need scales of their own"
        if not expectation.whole:
            yield f"{name}: unwritten memory, stale results and batch invariance at its shape"
            return
        if expectation.vanishes():
            yield f"{name}: all its values round to 0 in {dtype}"
        if self.claims[1] and cut_batch(expectation, "contiguous") is None:
            yield f"{name}: batch invariance, the case has no batch to take apart"
        if expectation.leaves_float32:
            yield (
                f"roundings inside {op.name}: its reference turns its inputs into float64, so the "
                "budget holds the effect of inputs that are off by a float32 ulp alone"
            )


def covering_layouts(op, case, cases="quick", gradients=True):
    """The layouts of a case: all in "full", contiguous and, turn about, one more in "quick"."""
    if cases == "bench":
        return ("contiguous",)
    gradients = gradients and op.differentiable()
    covered = [x for x in _COVERED if x != "broadcast_grad" or gradients]
    if op.updates:
        # one memory cell cannot hold several new values
        covered.remove("expanded")
    if cases == "quick":
        # its place among all cases: what else is selected changes nothing
        covered = [covered[op.cases.index(case) % len(covered)]]
    return ("contiguous", *covered)


def expect_op(op):
    if isinstance(op, str):
        from ..catalog import find

        return find(op)
    if not isinstance(op, Op):
        raise TypeError(f"check: op must be a catalog name or an Op, got {type(op).__name__}")
    return op


def shrink_failures(report, shrink):
    """Add the smallest failing shape to the first failure of every case."""
    left, seen = SECONDS, set()
    for i, r in enumerate(report.results):
        key = (r.case, r.dtype)
        if r.passed or key in seen or left <= 0:
            continue
        seen.add(key)
        smallest, spent = shrink(r, left)
        left -= spent
        if smallest is not None:
            report.results[i] = replace(r, smallest=smallest.settings)


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeoutError in the main thread after so many seconds."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f"did not return within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def declared(fn, asked):
    """The parameters of a function; all that are asked where it takes any or cannot be asked."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return asked
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return asked
    return {p.name for p in parameters}


def refused_options(results, names):
    """Those of the names that the candidate, which takes any, hands on to a function without."""
    said = [r.hint for r in results if r.kind == "exception"]
    return {n for n in names if any(f"unexpected keyword argument '{n}'" in x for x in said)}


def name_of(fn):
    """module:function."""
    return f"{getattr(fn, '__module__', '')}:{getattr(fn, '__qualname__', repr(fn))}"
