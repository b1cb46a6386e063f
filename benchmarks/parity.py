"""Parity of every Triton kernel over the quick cases, as a table and a JSON record."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import check
from gaugeblock.reference.oracle.budget import DTYPES
from gaugeblock.reference.oracle.result import describe
from gaugeblock.reference.report import console, worst_of, worst_table

from gaugeblock import kernels


def parity(device):
    """The results of all kernels, dtypes and quick cases."""
    ours = [op for op in CATALOG.values() if op.kernel is None]
    return [r for op in ours for r in kernel_results(op, tuple(DTYPES), device, op.supported)]


def kernel_results(op, dtypes, device, expression):
    """The results of the op's Triton kernel on the quick cases of an expression."""
    kernel = functools.partial(getattr(kernels, op.name), impl="triton")
    return check(
        op, kernel, dtypes=dtypes, device=device, expression=expression,
        layouts=("contiguous",), memory=False,
    ).results  # fmt: skip


def main(path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    results = parity(device)
    out = console()
    out.print(worst_table(results, ("op", "dtype")))
    failures = [r for r in results if not r.passed]
    for r in failures:
        print(f"wrong {describe(r)}")
    verdict = f"{len(failures)} WRONG" if failures else "all within their budgets"
    print(f"{len(results)} tensors compared in {', '.join(DTYPES)}: {verdict}")
    record = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, interpreted",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "compared": len(results),
        "failures": len(failures),
        "worst": [asdict(r) for r in worst_of(results, ("op", "dtype"))],
    }
    Path(path).write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1])
