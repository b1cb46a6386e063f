"""How far from exact the reference is, and what its tests see: `python -m tests.proof`.

--only OP …     these ops of the catalog alone; the record keeps the others'
--skip PART …   parts that the record keeps: exact, steps, sources, mutants, speed
--out FILE      the record; docs/reference/proof.json without it

--models        the models beside transformers and torch alone
--page          write docs/reference.md from the record as it is, and measure nothing
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch and NumPy are timed on one thread each
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import numpy as np
from gaugeblock.reference.catalog import CATALOG
from rich.console import Console

from . import adversarial, condition, independent, models, mutants, page, speed, step
from .exact import proved
from .page import RECORD
from .points import catalog_points, point

# cases of an op that JAX, which compiles each shape, is compared on
_JAX_CASES = 3


def exact(op):
    """The worst forward and gradient over the adversarial cases, each with its place."""
    found = {"forward": [], "gradient": []}
    cases = list(adversarial.cases(CATALOG[op]))
    for case in cases:
        p = point(CATALOG[op], case)
        for i, error in enumerate(condition.errors(p)):
            part = "forward" if i < len(p.dys) else "gradient"
            found[part].append((error.ratio, case.name, error))
    worst = {part: max(errors, key=lambda e: e[0]) for part, errors in found.items() if errors}
    numbers = [e for errors in found.values() for _, _, e in errors]
    return {
        "cases": len(cases),
        "tensors": len(numbers),
        "ulp": max(e.ulp for e in numbers),
        "condition": max(e.condition for e in numbers),
        **{
            part: {"ratio": ratio, "case": case, "tensor": e.tensor}
            for part, (ratio, case, e) in worst.items()
        },
    }


def steps(op):
    """The largest error of a gradient against the complex step, and how often differences agree."""
    found = {"complex": 0.0, "complex_cases": 0, "central": 0, "left_out": []}
    for row, case in catalog_points(gradients=True):
        if row.name != op:
            continue
        if not step.smooth(row, case):
            found["left_out"].append([case.name, step.NOT_DIFFERENTIABLE[op, case.name]])
            continue
        p = point(row, case)
        error, allowance, _ = step.central(p, np.random.default_rng(0))
        found["central"] += int(error <= allowance)
        if step.analytic(row, case):
            error, scale = step.complex_step(p, np.random.default_rng(0))
            found["complex"] = max(found["complex"], float(error / (scale or 1)))
            found["complex_cases"] += 1
        else:
            found["left_out"].append([case.name, step.NOT_CARRIED[op, case.name]])
    return found


def sources(op):
    """{source: worst relative error, its case, number of cases}."""
    found = {}
    for source in independent.SOURCES:
        cases = [
            case
            for row, case in catalog_points()
            if row.name == op and independent.covers(source, row, case)
        ]
        cases = cases[: _JAX_CASES if source == "jax" else None]
        errors = [(independent.worst(source, point(CATALOG[op], c))[0], c.name) for c in cases]
        if errors:
            error, case = max(errors)
            found[source] = {"error": error, "case": case, "cases": len(errors)}
    return found


PARTS = {
    "exact": exact,
    "steps": steps,
    "sources": sources,
    "mutants": mutants.measured,
    "speed": speed.ratio,
}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.proof", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=proved(), default=proved())
    parser.add_argument("--skip", nargs="+", choices=list(PARTS), default=())
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args(arguments)
    if options.page:
        page.write()
        return 0
    console = Console(stderr=True)
    record = json.loads(options.out.read_text()) if options.out.exists() else {"ops": {}}
    record["ops"] = {op: entry for op, entry in record["ops"].items() if op in CATALOG}
    record["versions"] = {p: version(p) for p in ("numpy", "torch", "onnx", "jax", "transformers")}
    record["bound"], record["cores"] = condition.BOUND, len(os.sched_getaffinity(0))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record["models"] = models.measured()
    for op in [] if options.models else options.only:
        entry = record["ops"].setdefault(op, {})
        for part, measure in PARTS.items():
            if part not in options.skip:
                entry[part] = measure(op)
                said = {k: v for k, v in entry[part].items() if k != "survivors"}
                console.print(op, part, json.dumps(said), soft_wrap=True)
        # kept op by op: a long run may be cut
        _keep(record, options.out)
    _keep(record, options.out)
    if options.out == RECORD:
        page.write()
    return verdict(record)


def _keep(record, path):
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def verdict(record):
    """1 where an op is beyond the bound or a mutant survives without a reason, else 0."""
    for entry in record["ops"].values():
        parts = [entry["exact"].get(part, {}) for part in ("forward", "gradient")]
        if any(part.get("ratio", 0.0) > record["bound"] for part in parts):
            return 1
        if any(s["reason"] is None for s in entry["mutants"]["survivors"]):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
