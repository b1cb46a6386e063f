"""`make gpu`: one command for a machine with a CUDA GPU, done in nine minutes.

    machine.txt   what it is
    parity.json   every kernel on some cases, against the reference
    record.json   ceilings and the quick suite, as `gaugeblock bench` writes it
    summary.md    each case against its best peer

All of it in one folder, written as it goes: a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import check
from gaugeblock.reference.oracle.result import describe

from gaugeblock import kernels

from .markdown import markdown_summary
from .record import load_record

_ALL_S, _PARITY_S, _LATE_S = 500, 100, 25
_PARITY_DTYPES = ("bfloat16", "float32")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder; one under runs/ by default")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: there must be a CUDA device, torch sees none; make test needs none")
        sys.exit(2)
    start = time.monotonic()
    out = arguments.out or Path("runs") / time.strftime("gpu-%Y%m%d-%H%M%S")
    out.mkdir(parents=True, exist_ok=True)
    machine = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    )
    (out / "machine.txt").write_text(machine + "\n")
    _say(machine)
    wrong = parity(out / "parity.json", "cuda", _PARITY_S)
    torch.cuda.empty_cache()
    code = measure(out, _ALL_S - (time.monotonic() - start))
    summary = markdown_summary(load_record(out))
    (out / "summary.md").write_text(summary)
    _say(summary)
    _say(f"everything is in {out}")
    sys.exit(1 if wrong or code else 0)


def measure(out, seconds):
    """The exit code of `gaugeblock bench`, in a process that may crash or hang; it writes `out`."""
    command = [sys.executable, "-m", "gaugeblock", "bench", "--out", out, "--budget-s", seconds]
    # many legal runs at a time, each with few threads
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "2")
    try:
        return subprocess.run(
            list(map(str, command)), env={**os.environ, **threads}, timeout=seconds + _LATE_S
        ).returncode
    except subprocess.TimeoutExpired:
        _say(f"bench: stopped {_LATE_S} s after its time; the record holds what was done")
        return 1


def parity(path, device, seconds, rounds=4):
    """The number of wrong tensors; a kernel's first cases, one op after the other, as time allows.

    The file holds what was compared, what was wrong and what was left out.
    """
    end = time.monotonic() + seconds
    rows = [op for op in CATALOG.values() if op.kernel is None]
    compared, failures, left_out, record = 0, [], [], {"compared": 0, "failures": []}
    for op, number in ((op, number) for number in range(rounds) for op in rows):
        case = op.select("quick", op.supported)[number]
        if time.monotonic() > end:
            left_out.append(f"{op.name} {case.name}")
            continue
        kernel = functools.partial(getattr(kernels, op.name), impl="triton")
        results = check(
            op, kernel, dtypes=_PARITY_DTYPES, device=device, expression=case.name,
            layouts=("contiguous",), memory=False,
        ).results  # fmt: skip
        compared += len(results)
        failures += [r for r in results if not r.passed]
        record = {
            "compared": compared,
            "failures": [asdict(r) for r in failures],
            "left_out": left_out,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
    for r in failures:
        _say(f"wrong {describe(r)}")
    _say(f"{compared} tensors compared, {len(failures)} wrong, {len(left_out)} cases left out")
    path.write_text(json.dumps(record | {"left_out": left_out}, indent=1) + "\n")
    return len(failures)


def _say(line):
    print(line, flush=True)


if __name__ == "__main__":
    main()
