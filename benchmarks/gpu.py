"""`make gpu`: on a CUDA device, parity of every kernel and the benchmark, all under one folder."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

CHECKOUT = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder; one under runs/ by default")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: there must be a CUDA device, torch sees none; make test needs none")
        sys.exit(2)
    out = arguments.out or Path("runs") / time.strftime("gpu-%Y%m%d-%H%M%S")
    out.mkdir(parents=True, exist_ok=True)
    machine = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    )
    (out / "machine.txt").write_text(machine + "\n")
    print(machine, flush=True)
    steps = {
        "parity": ("tests/test_parity.py", "-m", "gpu"),
        "kernels": ("tests/test_kernels.py",),
        "benchmark": ("benchmarks", f"--benchmark-json={(out / 'benchmark.json').resolve()}"),
    }
    codes = {name: _pytest(name, flags, out) for name, flags in steps.items()}
    for name, code in codes.items():
        print(f"{name}: {'passed' if code == 0 else f'failed, see {out / name}.log'}")
    print(f"everything is in {out}")
    sys.exit(1 if any(codes.values()) else 0)


def _pytest(name, flags, out):
    """Run pytest on the checkout, showing and keeping what it prints; its exit code."""
    command = [
        sys.executable, "-m", "pytest", "-q", *flags,
        f"--junit-xml={(out / f'{name}.xml').resolve()}",
    ]  # fmt: skip
    with open(out / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
    return process.wait()


if __name__ == "__main__":
    main()
