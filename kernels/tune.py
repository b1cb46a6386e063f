"""Measured launch configurations: a table's rows against other ways to launch the same kernel.

For every row of the table that is this GPU's: each candidate first has to be right on a small odd
shape, where it may err from float64 twice as much as the op's plain torch twin does, and one ulp;
then it is timed at a representative shape. The fastest is checked once more, on the op's harder
problem where it has one, and timed once more beside the row itself: it takes the row's place where
it is faster by more than 1% both times. The table is written after each row, so that what was found
stays when a session is cut off; rows that nobody has measured yet come first.

What is tried, and what is timed, an op's module in `candidates` says. The candidates of a row are
compiled in several threads before the first of them runs.
"""

import contextlib
import functools
import inspect
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import torch
import triton
import triton.testing

from . import _configurations
from ._checks import expect_choice

# ops whose tables can be measured
OPS = tuple(sorted(p.stem for p in Path(__file__).parent.glob("candidates/[a-z]*.py")))
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# a candidate that is faster by less may be noise
_NOISE = 0.01
# a part of each compilation holds Python's lock: more threads would wait for each other
_THREADS = min(8, os.cpu_count() or 1)


def device_time_ms(fn):
    """Median device time of a call, L2 flushed before each."""
    return triton.testing.do_bench(fn, return_mode="median")


def module(op):
    """The op's module of candidates. Raises ValueError for an op without one."""
    expect_choice("tune", "op", op, OPS)
    return import_module(f".candidates.{op}", __package__)


def plan(op, *, dtype="bfloat16", only=None, architecture=None, folder=_configurations.FOLDER):
    """(table, its rows to be measured): those of the architecture and dtype that `only` leaves.

    only:         {field of the key: values}, each a value of the table or its text: "64", "true".
    architecture: this machine's by default.
    Raises ValueError for an op without a table, or a filter that no row of it can meet.
    """
    key = module(op).KEY
    expect_choice("tune", "dtype", dtype, DTYPES)
    for name in only or ():
        expect_choice("tune", "only", name, key)
    if architecture is None:
        _expect_gpu("with --architecture, --dry-run needs none", _configurations.INTERPRETED)
        architecture = _configurations.architecture()
    table = json.loads((folder / f"{op}.json").read_text())
    given = {"architecture": architecture, "bits": 8 * DTYPES[dtype].itemsize, "dtype": dtype}
    filters = [(name, [value]) for name, value in given.items() if name in key]
    rows = table
    for name, values in [*filters, *(only or {}).items()]:
        choices = list(dict.fromkeys(text(row[name]) for row in rows))
        for value in values:
            expect_choice("tune", name, text(value), choices)
        rows = [row for row in rows if text(row[name]) in map(text, values)]
    return table, sorted(rows, key=lambda row: row.get("measured") is not None)


def text(value):
    """A value of a key as it is written on the command line."""
    return str(value).lower()


def _expect_gpu(remedy, otherwise=False):
    if not (torch.cuda.is_available() or otherwise):
        raise ValueError(f"tune: needs a CUDA device, got none; {remedy}")


def tune(
    op, *, dtype="bfloat16", only=None, budget_s=None, measure=device_time_ms,
    folder=_configurations.FOLDER, log=None,
):  # fmt: skip
    """Measure the rows of an op's table that `plan` names, and rewrite the table with the best.

    budget_s: once it is spent nothing further is begun; a row that is not finished stays as it is.
    measure:  fn -> milliseconds of a call.
    log:      a JSON file of every attempt: {"key", "candidate", "checked", "time_ms", "reason"}.
    Returns {"key", "configuration", "shipped_ms", "best_ms", "replaced", "reason"} for each row;
    times are None where reason says why there are none. A row that was measured says where, and its
    time, in "measured" and "time_ms".
    Raises ValueError as `plan` does, and where there is no CUDA device to measure on.
    """
    deadline = math.inf if budget_s is None else time.monotonic() + budget_s
    chosen = module(op)
    _expect_gpu("run it on the GPU whose table is to be measured", measure is not device_time_ms)
    table, rows = plan(op, dtype=dtype, only=only, folder=folder)
    outcomes, attempts = [], []
    for row in rows:
        bench = _Bench(op, chosen, table, row, DTYPES[dtype], measure, attempts)
        outcome = _best(bench, deadline)
        outcomes.append(outcome)
        if log and attempts:
            Path(log).parent.mkdir(parents=True, exist_ok=True)
            Path(log).write_text(json.dumps(attempts, indent=1) + "\n")
        if outcome["reason"] is None:
            row |= outcome["configuration"]
            row |= {"measured": _machine(), "time_ms": float(f"{outcome['best_ms']:.4g}")}
            _configurations.write(op, table, folder)
            _configurations.rows.cache_clear()
            _configurations._find.cache_clear()
    return outcomes


def _machine():
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, triton {triton.__version__}"


def _best(bench, deadline):
    """The row's outcome."""
    own, *others = bench.module.candidates(bench.row)

    def late():
        return time.monotonic() >= deadline

    if late():
        return bench.outcome(own, reason="not reached within the budget")
    if torch.cuda.is_available():
        bench.compile_ahead([own, *others], late)
    own_ms = bench.attempt(own)
    if own_ms is None:
        return bench.outcome(own, reason=f"the table's own row: {bench.attempts[-1]['reason']}")
    faster = []
    for candidate in others:
        if late():
            return bench.outcome(own, reason="not finished within the budget")
        time_ms = bench.attempt(candidate)
        if time_ms is not None and time_ms < (1 - _NOISE) * own_ms:
            faster.append((time_ms, candidate))
    for _, candidate in sorted(faster, key=lambda found: found[0]):
        if late():
            return bench.outcome(own, reason="not finished within the budget")
        # the fastest of many is partly the luckiest, and the row was timed long ago
        again_ms, best_ms = (bench.attempt(x, harder=True) for x in (own, candidate))
        if None not in (again_ms, best_ms) and best_ms < (1 - _NOISE) * again_ms:
            return bench.outcome(candidate, again_ms, best_ms)
    return bench.outcome(own, own_ms, own_ms)


class _Bench:
    """Where the candidates of one row are checked and timed."""

    def __init__(self, op, module, table, row, dtype, measure, attempts):
        self.op, self.module, self.table, self.row, self.dtype = op, module, table, row, dtype
        self.measure, self.attempts = measure, attempts
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.key = {name: row[name] for name in module.KEY}
        self.own = {name: row[name] for name in module.LAUNCH}
        self.has_harder = "harder" in inspect.signature(module.problem).parameters

    def outcome(self, configuration, shipped_ms=None, best_ms=None, reason=None):
        return {
            "key": self.key, "configuration": configuration, "shipped_ms": shipped_ms,
            "best_ms": best_ms, "replaced": configuration != self.own, "reason": reason,
        }  # fmt: skip

    def attempt(self, candidate, harder=False):
        """Milliseconds of a candidate that is right; None for one that is not or does not run."""
        time_ms = reason = None
        harder = harder and self.has_harder
        try:
            reason = self._wrong(candidate, harder)
            if reason is None:
                call = self.call
                with self._trial(candidate) as asked:
                    time_ms = self.measure(call)
                if asked == {False}:
                    time_ms, reason = None, "what is timed launches other rows"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self.attempts.append(
            {"key": self.key, "candidate": candidate, "checked": "harder" if harder else "plain"}
            | {"time_ms": time_ms, "reason": reason}
        )
        return time_ms

    @contextlib.contextmanager
    def _trial(self, candidate):
        """Inside, the row is launched as the candidate says; all others as theirs say.

        Yields a set that comes to hold whether the row was asked for, and whether others were.
        """
        asked = set()

        @functools.cache
        def find(items):
            key = dict(items)
            row = next(row for row in self.table if key.items() <= row.items())
            return row | candidate if row is self.row else row, row is self.row

        def choose(key):
            # launches ask while they are timed
            row, own = find(tuple(key.items()))
            asked.add(own)
            return row

        with _configurations.trial(self.op, choose):
            yield asked

    @functools.cached_property
    def call(self):
        """What is timed."""
        with self._trial(self.own):
            return self._problem(None).timed

    def _problem(self, candidate, harder=False):
        options = {"harder": True} if harder else {}
        return self.module.problem(self.row, self.dtype, self.device, candidate, **options)

    def _wrong(self, candidate, harder):
        """What is wrong with its answers, None where nothing is."""
        with self._trial(candidate) as asked:
            problem = self._problem(candidate, harder)
            # before kernels that write in place
            exact = problem.twin(*(x.double() if x.is_floating_point() else x
                                   for x in problem.inputs))  # fmt: skip
            twin = problem.twin(*problem.inputs)
            answers = problem.answers()
        if True not in asked:
            return "what is checked launches other rows"
        for name, x, own, e in zip(problem.names, answers, twin, exact, strict=True):
            if x.shape != e.shape:
                return f"wrong: {name} has shape {tuple(x.shape)}, the twin's {tuple(e.shape)}"
            error, own_error = _error(x, e), _error(own, e)
            # so written that NaN is wrong
            if not error <= 2 * (own_error + _ulp(own, e)):
                return f"wrong: {name} errs by {error:.3g}, the twin by {own_error:.3g}"
        return None

    def compile_ahead(self, candidates, late):
        """Compile in several threads all that the candidates' attempts will launch.

        What does not compile, or cannot even be prepared, fails when it is attempted.
        """
        with contextlib.suppress(Exception):
            # what it launches beforehand must run: its results are what is timed
            call = self.call
            with ThreadPoolExecutor(_THREADS) as pool, _compiling_only(pool):
                for candidate in candidates:
                    if late():
                        break
                    with contextlib.suppress(Exception), self._trial(candidate):
                        call()
                        self._problem(candidate).answers()


@contextlib.contextmanager
def _compiling_only(pool):
    """Inside, kernels that are launched are compiled in the pool and do not run."""
    run = triton.runtime.JITFunction.run

    def compile_only(kernel, *args, warmup, **options):
        return run(kernel, *args, warmup=True, **options)

    triton.runtime.JITFunction.run = compile_only
    try:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        triton.runtime.JITFunction.run = run


def _error(x, exact):
    """The largest error; NaN where there is one."""
    x = x.detach().double()
    # the same infinity is no error
    return torch.where(x == exact, 0.0, (x - exact).abs()).max().item()


def _ulp(x, exact):
    """One ulp of x's dtype at the largest exact value; 0 for integers and for nothing but zeros."""
    largest = exact.abs().max().item()
    if not (x.is_floating_point() and largest):
        return 0.0
    return torch.finfo(x.dtype).eps * 2.0 ** (math.frexp(largest)[1] - 1)
