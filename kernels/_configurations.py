"""Launch configurations: tables that are shipped as data and read by pure functions.

A table is configurations/OP.json: a list of rows, one a line. What a row is for (kernel,
architecture, head dimension, …) is its key; the other fields say how to launch. `gaugeblock tune`
measures and rewrites a table; nothing is tuned on a user's first call.
"""

import contextlib
import functools
import json
import os
from pathlib import Path

import triton

from ._launch import INTERPRETED

FOLDER = Path(__file__).parent / "configurations"


def architecture():
    """The tables' name of the chip that kernels are compiled for; "sm_90" where interpreted.

    Chips that have no rows use those of the nearest one that can do the same: data-centre Blackwell
    has Hopper's, every other chip sm_80's, which keep to the shared memory of the smallest.
    """
    if INTERPRETED:
        return "sm_90"
    target = triton.runtime.driver.active.get_current_target()
    hopper = target.backend == "cuda" and 90 <= target.arch < 120
    return "sm_90" if hopper else "sm_80"


@functools.cache
def rows(op):
    """The rows of an op's table."""
    return tuple(json.loads((FOLDER / f"{op}.json").read_text()))


def write(op, rows, folder=FOLDER):
    """Write an op's table, one row a line: all of it or nothing."""
    lines = ",\n".join(" " + json.dumps(row) for row in rows)
    aside = folder / f"{op}.new"
    aside.write_text(f"[\n{lines}\n]\n")
    os.replace(aside, folder / f"{op}.json")


def find(op, **key):
    """The row of the table that has this key; one that is on trial goes before."""
    on_trial = _TRIALS.get(op)
    return on_trial(key) if on_trial else _find(op, **key)


@functools.cache
def _find(op, **key):
    found = [row for row in rows(op) if all(row[name] == value for name, value in key.items())]
    if len(found) != 1:
        raise LookupError(f"{op}: the table must have one row for {key}, has {len(found)}")
    return found[0]


_TRIALS = {}


@contextlib.contextmanager
def trial(op, choose):
    """Inside, choose(key) -> row takes the place of the op's table."""
    _TRIALS[op] = choose
    try:
        yield
    finally:
        del _TRIALS[op]
