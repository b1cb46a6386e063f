"""Run the wrong kernels through the oracle: `python -m tests.bank`.

    --cases quick|full   the catalog's cases; full is for those that quick does not show
    --every              all cases, where otherwise a mutant is done once it has failed
    --only NAME …        mutants whose name holds one of these
    --out FILE           the record; docs/oracle/mutants.json where the whole bank is run

The record names the case and layout in which each mutant was first seen; the tests read it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import Op, check
from gaugeblock.reference.oracle.check import covering_layouts
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .bugs import BUGS
from .mutants import bank

RECORD = Path(__file__).parents[2] / "docs" / "oracle" / "mutants.json"


def op_of(mutant):
    """The op of a mutant; None where the catalog lacks it."""
    return mutant.op if isinstance(mutant.op, Op) else CATALOG.get(mutant.op)


def run(mutants, cases="quick", every=False, progress=lambda op, case: None):
    """{name: {dtype: [first failing Result of each case and layout]}} of the mutants.

    A mutant is done in a dtype once it has failed there, unless `every` case is asked for. Those
    whose values pass are looked at again with what lies behind the values; the full cases are for
    those that the quick ones do not show.
    """
    passes = [("quick", False), ("quick", True), ("full", True)]
    passes = passes[1 if every else 0 : 3 if cases == "full" else 2]
    found = {m.name: {dtype: [] for dtype in m.dtypes} for m in mutants}
    for suite, memory in passes:
        candidates = {(m.name, dtype): m.candidate() for m in mutants for dtype in m.dtypes}
        for op in dict.fromkeys(op_of(m) for m in mutants):
            for case in op.select(suite) if op else ():
                progress(op, case)
                left = [
                    (m, dtype)
                    for m in mutants
                    for dtype in m.dtypes
                    if op_of(m) is op and (every or not found[m.name][dtype])
                ]
                alone, layouts = replace(op, cases=(case,)), covering_layouts(op, case, suite)
                with _expectations_kept():
                    for m, dtype in left:
                        for layout in layouts:
                            # what it remembers of other calls would hide where it shows
                            candidate = candidates[m.name, dtype] if m.after else m.candidate()
                            arguments = {"dtypes": (dtype,), "layouts": (layout,)} | m.checks
                            report = check(
                                alone, candidate, cases=suite, memory=memory, **arguments
                            )
                            found[m.name][dtype] += report.failures[:1]
    return found


def _expectations_kept():
    """While it lasts, exact and legal results are computed once for all mutants."""
    module = import_module("gaugeblock.reference.oracle.check")
    return patch.object(module, "expectation_of", lru_cache(None)(module.expectation_of))


def record(mutants, found):
    """{name: what the oracle had to say}, plain data."""
    return {
        m.name: {
            "bug": m.bug,
            "seen": m.seen,
            "first": {d: _place(op_of(m), r[0]) for d, r in found[m.name].items() if r},
        }
        for m in mutants
    }


def _place(op, result):
    """Where it was seen, and whether a quick check looks there."""
    case = next(c for c in op.cases if c.name == result.case)
    quick = case in op.select("quick") and result.layout in covering_layouts(op, case)
    place = {k: getattr(result, k) for k in ("case", "layout", "output", "kind")}
    return place | {"quick": quick}


def table(mutants, found):
    """The mutants, where each was seen, and what the oracle said of it."""
    view = Table("mutant", "bug", "seen in", "kind", "dtypes", "hint", title="wrong kernels")
    for m in mutants:
        failures = [r for dtype in m.dtypes for r in found[m.name][dtype]]
        cases = list(dict.fromkeys(r.case for r in failures))
        missing = [d for d in m.dtypes if not found[m.name][d]]
        view.add_row(
            m.name,
            m.bug,
            f"{', '.join(cases[:2])}{f' and {len(cases) - 2} more' if len(cases) > 2 else ''}"
            or "[bold red]not seen",
            ", ".join(dict.fromkeys(r.kind for r in failures)),
            f"[bold red]not in {', '.join(missing)}" if missing else str(len(m.dtypes)),
            failures[0].hint[:80] if failures else "",
        )
    return view


def bug_table(mutants):
    """Every line of the bug bank with its mutants."""
    view = Table("bug", "mutants", title="the bug bank")
    for family, bugs in BUGS.items():
        view.add_row(f"[bold]{family}", "", style="cyan")
        for bug in bugs:
            view.add_row(bug, ", ".join(m.name for m in mutants if m.bug == bug) or "none")
    return view


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.bank", description=__doc__)
    parser.add_argument("--cases", choices=("quick", "full"), default="quick")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--only", nargs="+", default=())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    mutants = [m for m in bank().values() if not options.only or _named(m, options.only)]
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        found = run(
            mutants,
            options.cases,
            options.every,
            lambda op, case: bar.update(task, description=f"{op.name} {case.name}"),
        )
    console = Console()
    console.print(table(mutants, found))
    if not options.only:
        console.print(bug_table(mutants))
    seen = [m for m in mutants if all(found[m.name].values())]
    kinds = Counter(found[m.name][m.dtypes[0]][0].kind for m in seen)
    console.print(
        f"{len(seen)} of {len(mutants)} wrong kernels seen in every dtype they are wrong in, by "
        + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
    )
    out = options.out or (None if options.only else RECORD)
    if out:
        out.write_text(json.dumps(record(mutants, found), indent=1, ensure_ascii=False) + "\n")
    return 0 if len(seen) == len(mutants) else 1


def _named(mutant, names):
    return any(mutant.name.startswith(name) or f"/{name}" in mutant.name for name in names)


if __name__ == "__main__":
    sys.exit(main())
