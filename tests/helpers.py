"""What several test files need."""

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def python(*arguments, cwd=CHECKOUT, **environment):
    """Run this Python in a process of its own; variables set to None are removed."""
    threads = {"OMP_NUM_THREADS": "1"}  # the workers share the cores
    env = {**os.environ, **threads, "TRITON_INTERPRET": None, "PYTHONPATH": str(CHECKOUT)}
    env |= environment
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={k: v for k, v in env.items() if v is not None},
        capture_output=True,
        text=True,
    )


def gaugeblock(*arguments, **options):
    """Run the command line in a process of its own."""
    return python("-m", "gaugeblock", *arguments, **options)
