"""Measured launch configurations: a table's rows against other ways to launch the same kernel.

For every row of the table that is this GPU's: each candidate first has to be right on a small odd
shape, where it may err from float64 twice as much as the row does, and one ulp; then it is timed at
a representative shape. The fastest is checked once more, with masks, dropout, shared and padded
heads, and timed once more beside the row itself: it takes the row's place where it is faster by
more than 1% both times. The table is written after each row, so that what was found stays when a
session is cut off; rows that nobody has measured yet come first.

The times of "forward" are those of the forward pass; of "dkdv" and "dq" those of the whole
backward pass, the other kernels launched as the table says.
"""

import functools
import json
import math
import time
from pathlib import Path

import torch
import triton
import triton.testing

from . import _configurations
from ._attention import eager, launchers
from ._attention.candidates import LAUNCH, candidates, odd_shape, representative_shape
from ._checks import expect_choice

# ops whose tables can be measured
OPS = ("attention",)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KEY = ("kernel", "architecture", "head_dim", "bits", "causal", "queries")
# a candidate that is faster by less may be noise
_NOISE = 0.01
_OUTPUTS = ("o", "lse", "dq", "dk", "dv")


def device_time_ms(fn):
    """Median device time of a call, L2 flushed before each."""
    return triton.testing.do_bench(fn, return_mode="median")


def plan(
    op, *, dtype="bfloat16", head_dims=None, causal=None, queries=None, kernels=None,
    architecture=None, folder=_configurations.FOLDER,
):  # fmt: skip
    """(table, its rows to be measured): those of the architecture, dtype's width and filters.

    architecture: this machine's by default. A filter that is None (or empty) leaves all rows.
    Raises ValueError for an op without a table, or a filter that no row of it can meet.
    """
    expect_choice("tune", "op", op, OPS)
    expect_choice("tune", "dtype", dtype, DTYPES)
    if architecture is None:
        _expect_gpu("with --architecture, --dry-run needs none", _configurations.INTERPRETED)
        architecture = _configurations.architecture()
    table = json.loads((folder / f"{op}.json").read_text())
    rows = table
    for name, values in {
        "architecture": [architecture],
        "bits": [8 * DTYPES[dtype].itemsize],
        "kernel": kernels,
        "head_dim": head_dims,
        "causal": None if causal is None else [causal],
        "queries": queries and [queries],
    }.items():
        choices = sorted({row[name] for row in rows})
        for value in values or ():
            if value not in choices:
                known = ", ".join(map(str, choices))
                raise ValueError(f"tune: {name} must be one of {known}, got {value!r}")
        rows = [row for row in rows if not values or row[name] in values]
    return table, sorted(rows, key=lambda row: row.get("measured") is not None)


def _expect_gpu(remedy, otherwise=False):
    if not (torch.cuda.is_available() or otherwise):
        raise ValueError(f"tune: needs a CUDA device, got none; {remedy}")


def tune(
    op, *, dtype="bfloat16", head_dims=None, causal=None, queries=None, kernels=None,
    budget_s=None, measure=device_time_ms, folder=_configurations.FOLDER, log=None,
):  # fmt: skip
    """Measure the rows of an op's table that `plan` names, and rewrite the table with the best.

    budget_s: once it is spent no further candidate is begun; a row in progress keeps the best of
              what was measured, those not reached stay as they are.
    measure:  fn -> milliseconds of a call.
    log:      a JSON file of every attempt: {"key", "candidate", "checked", "time_ms", "reason"}.
    Returns {"key", "configuration", "shipped_ms", "best_ms", "replaced", "reason"} for each row;
    times are None where reason says why there are none. A row that was measured says where, and its
    time, in "measured" and "time_ms".
    Raises ValueError as `plan` does, and where there is no CUDA device to measure on.
    """
    deadline = math.inf if budget_s is None else time.monotonic() + budget_s
    expect_choice("tune", "op", op, OPS)
    _expect_gpu("run it on the GPU whose table is to be measured", measure is not device_time_ms)
    table, rows = plan(
        op, dtype=dtype, head_dims=head_dims, causal=causal, queries=queries, kernels=kernels,
        folder=folder,
    )  # fmt: skip
    outcomes, attempts = [], []
    for row in rows:
        bench = _Bench(op, table, row, DTYPES[dtype], measure, attempts)
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
    own, *others = candidates(bench.row)
    if time.monotonic() >= deadline:
        return bench.outcome(own, reason="not reached within the budget")
    own_ms = bench.attempt(own)
    if own_ms is None:
        return bench.outcome(own, reason=f"the table's own row: {bench.attempts[-1]['reason']}")
    faster = []
    for candidate in others:
        if time.monotonic() >= deadline:
            break
        time_ms = bench.attempt(candidate)
        if time_ms is not None and time_ms < (1 - _NOISE) * own_ms:
            faster.append((time_ms, candidate))
    for _, candidate in sorted(faster, key=lambda found: found[0]):
        # the fastest of many is partly the luckiest, and the row was timed long ago
        again_ms, best_ms = (bench.attempt(x, every_option=True) for x in (own, candidate))
        if None not in (again_ms, best_ms) and best_ms < (1 - _NOISE) * again_ms:
            return bench.outcome(candidate, again_ms, best_ms)
    return bench.outcome(own, own_ms, own_ms)


class _Bench:
    """Where the candidates of one row are checked and timed."""

    def __init__(self, op, table, row, dtype, measure, attempts):
        self.op, self.table, self.row, self.dtype = op, table, row, dtype
        self.measure, self.attempts = measure, attempts
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.key = {name: row[name] for name in KEY}
        self.own = {name: row[name] for name in LAUNCH}
        self.yardsticks = {}

    def outcome(self, configuration, shipped_ms=None, best_ms=None, reason=None):
        return {
            "key": self.key, "configuration": configuration, "shipped_ms": shipped_ms,
            "best_ms": best_ms, "replaced": configuration != self.own, "reason": reason,
        }  # fmt: skip

    def attempt(self, candidate, every_option=False):
        """Milliseconds of a candidate that is right; None for one that is not or does not run."""
        time_ms = reason = None
        try:
            reason = self._wrong(candidate, every_option)
            if reason is None:
                call = self.call
                with self._trial(candidate):
                    time_ms = self.measure(call)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        checked = "every option" if every_option else "plain"
        self.attempts.append(
            {"key": self.key, "candidate": candidate, "checked": checked}
            | {"time_ms": time_ms, "reason": reason}
        )
        return time_ms

    def _trial(self, candidate):
        """Inside, the row is launched as the candidate says; all others as theirs say."""

        def choose(key):
            row = next(row for row in self.table if key.items() <= row.items())
            return row | candidate if row is self.row else row

        return _configurations.trial(self.op, choose)

    @functools.cached_property
    def call(self):
        """What is timed."""
        shape = representative_shape(self.row["head_dim"], self.row["queries"])
        q, k, v, do, _ = self._draw(shape)
        options = self._options(shape)
        if self.row["kernel"] == "forward":
            return functools.partial(launchers.forward, q, k, v, *options)
        with self._trial(self.own):
            o, lse = launchers.forward(q, k, v, *options)
        return functools.partial(launchers.backward, do, None, q, k, v, o, lse, *options)

    def _draw(self, shape):
        """q, k, v, do, dlse."""
        B, H, Hkv, Tq, Tk, D = shape
        generator = torch.Generator(self.device).manual_seed(0)
        draw = functools.partial(torch.randn, generator=generator, device=self.device)
        sizes = (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, D), (B, H, Tq, D)
        return *(draw(size, dtype=self.dtype) for size in sizes), draw((B, H, Tq))

    def _options(self, shape, every_option=False):
        *_, Tk, D = shape
        causal, scale = self.row["causal"], D**-0.5
        if not every_option:
            return None, None, causal, True, None, 0, scale, 0.0, 0, "ieee"
        # every query sees a key, so that nothing is infinite
        lengths = torch.tensor([Tk - 5], device=self.device)
        return lengths, None, causal, True, Tk // 3, 3, scale, 0.2, 1, "ieee"

    def _wrong(self, candidate, every_option):
        """What is wrong with its answers, None where nothing is."""
        shape = odd_shape(self.row["head_dim"], self.row["queries"], candidate, every_option)
        if (shape, every_option) not in self.yardsticks:
            self.yardsticks[shape, every_option] = self._yardstick(shape, every_option)
        exact, own_errors, ulps = self.yardsticks[shape, every_option]
        errors = _errors(self._answers(candidate, shape, every_option), exact)
        for name, error, own, ulp in zip(_OUTPUTS, errors, own_errors, ulps):
            # so written that NaN is wrong
            if not error <= 2 * (own + ulp):
                return f"wrong: {name} errs by {error:.3g}, the eager twin by {own:.3g}"
        return None

    def _yardstick(self, shape, every_option):
        """(exact answers, how far the eager twin errs, one ulp of each answer's largest value)."""
        exact = self._twin(torch.float64, shape, every_option)
        dtypes = self.dtype, torch.float32, *[self.dtype] * 3
        largest = (x.abs().max().item() for x in exact)
        ulps = [
            torch.finfo(t).eps * 2.0 ** math.floor(math.log2(m)) for t, m in zip(dtypes, largest)
        ]
        return exact, _errors(self._twin(self.dtype, shape, every_option), exact), ulps

    def _twin(self, dtype, shape, every_option):
        """The eager twin's o, lse and gradients for inputs of the row's dtype."""
        *inputs, do, dlse = self._draw(shape)
        inputs = [x.to(dtype).requires_grad_() for x in inputs]
        o, lse = eager.eager(*inputs, *self._options(shape, every_option))
        gradients = torch.autograd.grad((o, lse), inputs, (do.to(dtype), dlse.to(lse.dtype)))
        return o.detach(), lse.detach(), *gradients

    def _answers(self, candidate, shape, every_option):
        q, k, v, do, dlse = self._draw(shape)
        options = self._options(shape, every_option)
        with self._trial(candidate):
            o, lse = launchers.forward(q, k, v, *options)
            gradients = launchers.backward(do, dlse, q, k, v, o, lse, *options)
        return o, lse, *gradients


def _errors(answers, exact):
    """The largest error of each answer."""
    return [(x.double() - e).abs().max().item() for x, e in zip(answers, exact)]
