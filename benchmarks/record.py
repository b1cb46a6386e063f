"""A benchmark record: one JSON file, written as the run goes, so that a cut run leaves a valid one.

The form is `record.schema.json`. Records worth keeping lie in `results/<device>/`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from gaugeblock.kernels.worktree import state_of

from . import telemetry
from .providers import installed

SCHEMA = 1
NAME = "record.json"
CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
_NEEDED = (
    "device", "driver", "torch", "triton", "commit", "dirty", "command", "started", "seconds",
    "complete", "machine", "providers", "ceilings", "entries", "left_out",
)  # fmt: skip


def new_record(device):
    """A record with nothing in it yet, for "cpu" or "cuda"."""
    commit, dirty = state_of(__file__)
    return {
        "schema": SCHEMA,
        "device": device_name(device),
        "driver": telemetry.driver() if device == "cuda" else None,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": commit,
        "dirty": dirty,
        "command": " ".join(["gaugeblock", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "complete": False,
        "machine": _machine(device),
        "providers": {},
        "ceilings": None,
        "entries": [],
        "left_out": [],
    }


class Writer:
    """Keeps a record's file up to date; what is on disk is valid at any moment."""

    def __init__(self, folder, record):
        self.path = Path(folder) / NAME
        self.record, self.started = record, time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self, complete=False):
        self.record["seconds"] = round(time.monotonic() - self.started, 3)
        self.record["complete"] = complete
        beside = self.path.with_suffix(".part")
        beside.write_text(text_of(self.record))
        os.replace(beside, self.path)


def text_of(record):
    """A record as JSON, each list of numbers on one line."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    return re.sub(r"\[[\s\d.,eE+-]+\]", lambda m: " ".join(m[0].split()), text)


def load_record(path):
    """The record in a file, or in a folder that `bench --out` named.

    Raises ValueError in one line for what is no record.
    """
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    try:
        record = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"record: {file} must be readable, {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"record: {file} must hold JSON, {error}") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        got = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"record: {file} must have schema {SCHEMA}, got {got!r}; measure again")
    missing = [key for key in _NEEDED if key not in record]
    if missing:
        raise ValueError(f"record: {file} must hold {', '.join(missing)}; it was not written whole")
    _expect_content(file, record)
    return record


def _expect_content(file, record):
    """What every reader of records relies on."""
    try:
        aware = datetime.fromisoformat(record["started"]).tzinfo
    except (TypeError, ValueError):
        aware = None
    if aware is None:
        raise ValueError(
            f"record: {file} must say when it started, with a time zone, got {record['started']!r}"
        )
    seen = set()
    for entry in record["entries"]:
        try:
            what = tuple(entry[name] for name in ("op", "case", "dtype", "direction", "provider"))
            ms = entry["time_ms"]["p50"]
        except (KeyError, TypeError):
            raise ValueError(f"record: {file} must hold entries of bench, got {entry!r}") from None
        if not (isinstance(ms, int | float) and 0 < ms < math.inf):
            raise ValueError(f"record: {file} must hold times of more than 0 ms, got {ms!r}")
        if what in seen:
            raise ValueError(f"record: {file} must hold a case once, got {' '.join(what)} twice")
        seen.add(what)


def device_name(device):
    """The chip's name, as in "NVIDIA H200" or a processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return _processor() or platform.machine()


def slug(name):
    """A device's name as a folder's: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return re.sub(r"\((R|TM)\)", "", names[0]) if names else platform.processor()


def _machine(device):
    found = {
        "python": platform.python_version(),
        "system": platform.system(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        chip = torch.cuda.get_device_properties(0)
        found |= {
            "cuda": torch.version.cuda,
            "memory_bytes": chip.total_memory,
            "multiprocessors": chip.multi_processor_count,
            "l2_bytes": chip.L2_cache_size,
            "capability": f"{chip.major}.{chip.minor}",
        }
    return found
