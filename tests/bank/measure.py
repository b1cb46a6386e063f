"""How often does the oracle blame a legal kernel, and how loose are its budgets?

    python -m tests.bank.measure --seeds 4 --out record.json

The exit code is 1 if a legal kernel is blamed or a call could not be run.

Every variant of `legal.VARIANTS` runs on every case of its op, in every dtype and with every seed,
against one set of exact and legal results. The record holds, for each op, case, dtype and output:

    compared, blamed    tensors
    row, rms            largest error/budget of an element, and of the tensor's RMS
    looseness           1 over the 99th percentile of the rows' largest error/budget
    discrimination      max|want|/budget of the case's best output, the smallest over seeds

and the blamed variants with their ratios. An output that comes in float32 from 16-bit inputs has a
name of its own; `ops` sums up each op and dtype. The rate is given in seconds of this process,
whatever else runs beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.expectation import Expectation
from rich.console import Console
from rich.table import Table

from . import legal

# rows kept of each tensor, for the percentile
_SAMPLED = 32
# how often a ratio lies above these shows how the tail falls
_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_LOOSE = (5, 10, 20, 50)


@dataclass
class Tally:
    """What was seen of one output of one case in one dtype."""

    compared: int = 0
    blamed: dict = field(default_factory=dict)
    row: float = 0.0
    rms: float = 0.0
    discrimination: float = np.inf
    ratios: list = field(default_factory=list)
    shares: list = field(default_factory=list)

    def add(self, result, shares, variant, seed):
        self.compared += 1
        if not result.passed:
            self.blamed[f"{variant}#{seed}"] = [result.kind, result.ratio]
        if result.error is None:
            return
        self.row = max(self.row, _ratio(result.error, result.budget))
        self.rms = max(self.rms, _ratio(result.rms_error, result.rms_budget))
        self.ratios.append(result.ratio)
        self.shares.append(shares)
        if result.discrimination is not None:
            self.discrimination = min(self.discrimination, result.discrimination)

    def summary(self):
        shares = np.concatenate(self.shares) if self.shares else np.zeros(0)
        p99 = float(np.quantile(shares, 0.99)) if shares.size else 0.0
        ratios = np.asarray(self.ratios)
        return {
            "compared": self.compared,
            "blamed": len(self.blamed),
            "row": self.row,
            "rms": self.rms,
            "looseness": 1 / p99 if p99 else None,
            "above": {str(x): int((ratios > x).sum()) for x in _LEVELS},
            "discrimination": self.discrimination if np.isfinite(self.discrimination) else None,
            "variants": dict(self.blamed),
        }


def measure(seeds, ops, dtypes, *, cases="quick", slow_seeds=1, only="", seconds=None):
    """{(op, case, dtype, output): Tally}, [what could not be run]."""
    tallies, broken = defaultdict(Tally), []
    adapter, rng = TorchAdapter(), np.random.default_rng(0)
    end = time.monotonic() + seconds if seconds else np.inf
    for seed in seeds:
        for name in ops:
            op = CATALOG[name]
            variants = [v for v in legal.VARIANTS if v.op == name and only in v.name]
            allowed = {v.name: _names(op, cases, v.expression) for v in variants}
            for case in op.select(cases):
                for dtype in dtypes:
                    if time.monotonic() > end:
                        return tallies, broken
                    expectation = Expectation(op, case, dtype, seed)
                    for variant in variants:
                        if dtype not in variant.dtypes or case.name not in allowed[variant.name]:
                            continue
                        if variant.slow and seed not in seeds[:slow_seeds]:
                            continue
                        _judge(expectation, adapter, variant, seed, tallies, broken, rng)
    return tallies, broken


def _names(op, cases, expression):
    """The names of the cases that an expression selects, if any."""
    try:
        return {case.name for case in op.select(cases, expression)}
    except ValueError:
        return set()


def _judge(expectation, adapter, variant, seed, tallies, broken, rng):
    where = (expectation.op.name, expectation.case.name, expectation.dtype)
    answers = expectation.call(expectation.open(adapter), variant.fn)
    results = expectation.compare(answers)
    if isinstance(answers[0], str):
        broken.append([*where, variant.name, answers[1]])
        return
    content, op = expectation.content(), expectation.op
    tensors = [(part, i, a) for part in (0, 1) for i, a in enumerate(answers[part])]
    for result, (part, i, answer) in zip(results, tensors):
        shares = np.zeros(0)
        # a choice has no budget
        if not op.accepts and answer.values.size:
            bound = content.bound(part, i, answer.dtype)
            with np.errstate(invalid="ignore", divide="ignore"):
                error = np.abs(answer.values - bound.want)
                shares = np.where(error == 0, 0.0, error / bound.budget.rows)
            shares = np.where(np.isfinite(shares) & ~bound.skip, shares, 0.0)
            # the budget is a row's: so is the error
            shares = np.atleast_1d(shares).max(-1).ravel()
        if shares.size > _SAMPLED:
            shares = shares[rng.integers(0, shares.size, _SAMPLED)]
        wider = "" if answer.dtype == expectation.dtype else f":{answer.dtype}"
        key = (*where, result.output + wider)
        tallies[key].add(result, shares.astype(np.float32), variant.name, seed)


def _ratio(error, budget):
    return error / budget if budget else (0.0 if error == 0 else np.inf)


def table(summaries, worst=60):
    """The outputs that are blamed, and those nearest to it."""
    out = Table("op", "case", "dtype", "output", "compared", "blamed", "row", "rms", "looseness",
                "discrimination")  # fmt: skip
    ranked = sorted(summaries.items(), key=lambda kv: -max(kv[1]["row"], kv[1]["rms"]))
    for key, s in ranked[:worst]:
        numbers = [f"{s[k]:.3g}" if s[k] is not None else "-" for k in
                   ("row", "rms", "looseness", "discrimination")]  # fmt: skip
        out.add_row(*key.split("/"), str(s["compared"]), str(s["blamed"]), *numbers)
    return out


def by_op(summaries):
    """What the record says of each op and dtype as a whole."""
    groups = defaultdict(list)
    for key, s in summaries.items():
        op, case, dtype, _ = key.split("/")
        groups[op, dtype].append((case, s))
    rows = []
    for (op, dtype), found in groups.items():
        best = defaultdict(float)
        for case, s in found:
            best[case] = max(best[case], s["discrimination"] or 0.0)
        looseness = [s["looseness"] for _, s in found if s["looseness"]]
        best = [d for d in best.values() if d]
        rows.append({
            "op": op,
            "dtype": dtype,
            "compared": sum(s["compared"] for _, s in found),
            "blamed": sum(s["blamed"] for _, s in found),
            "row": max(s["row"] for _, s in found),
            "rms": max(s["rms"] for _, s in found),
            "looseness": float(np.median(looseness)) if looseness else None,
            "loosest": max(looseness, default=None),
            "discrimination": min(best, default=None),
        })  # fmt: skip
    return rows


def totals(rows):
    """A table of `by_op`."""
    out = Table("op", "dtype", "compared", "blamed", "worst row", "worst rms", "looseness median",
                "loosest", "discrimination min")  # fmt: skip
    for row in rows:
        out.add_row(*("-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)
                      for x in row.values()))  # fmt: skip
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--slow-seeds", type=int, default=0, help="seeds for interpreted kernels")
    parser.add_argument("--ops", nargs="*", default=None)
    parser.add_argument("--dtypes", nargs="*", default=list(legal.ALL))
    parser.add_argument("--cases", default="quick", choices=("quick", "full"))
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so many")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--brief", action="store_true", help="of the outputs, the blamed ones")
    given = parser.parse_args()
    torch.set_num_threads(1)
    covered = [op for op in CATALOG if any(v.op == op for v in legal.VARIANTS)]
    start = time.process_time()
    tallies, broken = measure(
        range(given.first_seed, given.first_seed + given.seeds), given.ops or covered,
        given.dtypes, cases=given.cases, slow_seeds=given.slow_seeds, only=given.only,
        seconds=given.minutes and 60 * given.minutes,
    )  # fmt: skip
    seconds = time.process_time() - start
    summaries = {"/".join(key): tally.summary() for key, tally in tallies.items()}
    compared = sum(s["compared"] for s in summaries.values())
    blamed = sum(s["blamed"] for s in summaries.values())
    console = Console(width=160)
    rows = by_op(summaries)
    console.print(table(summaries), totals(rows))
    for op, case, dtype, variant, hint in broken[:20]:
        console.print(f"could not run {variant} on {op} {case} {dtype}: {hint}", markup=False)
    console.print(
        f"{compared} tensors compared, {blamed} blamed ({blamed / max(compared, 1):.2g}), "
        f"{seconds:.0f} s, {compared / seconds:.0f} a second; {len(broken)} calls could not be run"
    )
    above = {x: sum(s["above"][x] for s in summaries.values()) for x in map(str, _LEVELS)}
    console.print("error/budget above " + ", ".join(f"{x}: {n}" for x, n in above.items()))
    figures = [s["looseness"] for s in summaries.values() if s["looseness"]]
    loose = {x: sum(f > x for f in figures) for x in _LOOSE} | {"outputs": len(figures)}
    console.print("looseness above " + ", ".join(f"{x}: {n}" for x, n in loose.items()))
    if given.out:
        if given.brief:
            summaries = {key: s for key, s in summaries.items() if s["blamed"]}
        record = {
            "compared": compared, "blamed": blamed, "above": above, "seconds": seconds,
            "broken": broken, "seeds": given.seeds, "variants": len(legal.VARIANTS),
            "loose": {str(x): n for x, n in loose.items()},
            "ops": rows, "outputs": summaries,
        }  # fmt: skip
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if blamed or broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
