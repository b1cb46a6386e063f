"""`make gpu`: one command for a machine with a CUDA GPU, done in nine minutes.

    machine.txt   what it is
    parity.json   every kernel on some cases, against the reference
    record.json   ceilings and the quick suite, as `gaugeblock bench` writes it
    summary.md    each case against its best peer

All of it in one folder, written as it goes: a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
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
from gaugeblock.reference.oracle.result import describe

from .markdown import markdown_summary
from .parity import kernel_results
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
    try:
        wrong = smoke(out / "parity.json", "cuda", _PARITY_S)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        # a kernel has broken the device for this process; the next one has a device of its own
        _say(f"parity: ended by {error}")
        wrong = 1
    code = measure(out, _ALL_S - (time.monotonic() - start))
    try:
        summary = markdown_summary(load_record(out))
        (out / "summary.md").write_text(summary)
        _say(summary)
    except ValueError as error:
        _say(str(error))
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


def smoke(path, device, seconds, rounds=4):
    """The number of wrong tensors; a kernel's first cases, one op after the other, as time allows.

    The file holds what was compared, what was wrong and what was left out; it grows with each case.
    """
    end = time.monotonic() + seconds
    rows = [op for op in CATALOG.values() if op.kernel is None]
    record, failures = {"compared": 0, "failures": [], "left_out": []}, []
    for op, number in ((op, number) for number in range(rounds) for op in rows):
        case = op.select("quick", op.supported)[number]
        if time.monotonic() > end:
            record["left_out"].append(f"{op.name} {case.name}")
        else:
            results = kernel_results(op, _PARITY_DTYPES, device, case.name)
            failures += [r for r in results if not r.passed]
            record["compared"] += len(results)
            record["failures"] = [asdict(r) for r in failures]
        path.write_text(json.dumps(record, indent=1) + "\n")
    for r in failures:
        _say(f"wrong {describe(r)}")
    left = len(record["left_out"])
    _say(f"{record['compared']} tensors compared, {len(failures)} wrong, {left} cases left out")
    return len(failures)


def _say(line):
    print(line, flush=True)


if __name__ == "__main__":
    main()
