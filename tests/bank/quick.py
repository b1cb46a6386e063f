"""How long does a quick check take? `python -m tests.bank.quick --out FILE`

Each op of the catalog is checked with a plain torch candidate, outputs and gradients, with all that
`check` looks into by default, in float32 and in the three common dtypes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import check

from . import legal, models

_DTYPES = {"float32": ("float32",), "three": legal.ALL}


def candidates():
    """{op: its model with no knob turned}."""
    found = {}
    for v in legal.VARIANTS:
        model = type(v.fn)
        if v.op not in found and model.__module__ == models.__name__:
            found[v.op] = replace(v, name=v.op, fn=model())
    return found


def seconds(variant, dtypes):
    """(seconds, tensors compared, tensors blamed) of a quick check."""
    start = time.perf_counter()
    report = check(variant.op, variant.fn, dtypes=dtypes, backward=variant.backward)
    return time.perf_counter() - start, len(report.results), len(report.failures)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.bank.quick", description=__doc__)
    parser.add_argument("--out", type=Path, help="the record")
    options = parser.parse_args(arguments)
    record = {"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "ops": {}}
    for op, variant in candidates().items():
        found = record["ops"][op] = {"cases": len(CATALOG[op].select())}
        for name, dtypes in _DTYPES.items():
            spent, compared, blamed = seconds(variant, dtypes)
            found[name] = {"seconds": round(spent, 2), "compared": compared, "blamed": blamed}
        print(op, json.dumps(found), flush=True)
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
