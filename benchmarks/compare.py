"""`gaugeblock compare A B`: records of two states of the code, measured on one machine.

A side is a record, or a folder with the records of several runs below it. Only runs tell how much
the time of one and the same code moves from process to process, so both sides need five of them.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from .providers import OURS
from .record import NAME, load_record
from .significance import LEAST_RUNS, UNKNOWN, unpaired
from .verdicts import CUT, MISSING, NEW, Comparison, Line

CHANGE, FALSE_ALARM = 0.03, 0.01
# what must be equal for times to be comparable
_OF_THE_MACHINE = ("device", "driver", "torch", "triton")
_BUDGET = "time budget"


def compare(
    a, b, *, change=CHANGE, false_alarm=FALSE_ALARM, normalise=False,
    accept_new=False, accept_missing=False, provider=OURS,
):  # fmt: skip
    """The comparison of two sides, each a path.

    change:      the smallest change that matters, as 0.03.
    false_alarm: how often two equal sides may be called different in any case.
    normalise:   divide each time by what its own run's ceilings allow, so that sides of different
                 devices or versions can be compared.
    accept_new, accept_missing: cases that one side alone has are no failure.
    provider:    whose times.
    Raises ValueError for what is no record, and for sides that are not comparable.
    """
    expect_rates(change, false_alarm)
    sides = [_Side(path, provider, normalise) for path in (a, b)]
    if not normalise:
        _expect_one_machine(sides)
    keys = sorted({*sides[0].times, *sides[1].times})
    if not keys:
        raise ValueError(f"compare: records must hold times of {provider}, they hold none")
    level = false_alarm / len(keys)
    lines = [_line(key, sides, level, change, accept_new, accept_missing) for key in keys]
    about = {f"{letter}": side.words() for letter, side in zip("AB", sides)}
    return Comparison(lines, change, false_alarm, about | _where(sides, normalise))


def expect_rates(change, false_alarm):
    for name, value in (("change", change), ("false-alarm", false_alarm)):
        if not 0 < value < 1:
            raise ValueError(f"compare: {name} must lie between 0 and 1, got {value}")


class _Side:
    """The runs of one side: {(op, case, dtype, direction): [median of each run that has it]}."""

    def __init__(self, path, provider, normalise):
        self.path, self.records = Path(path), [load_record(file) for file in _files(Path(path))]
        self.states = [_state(record, provider) for record in self.records]
        commits = {state["commit"] for state in self.states}
        if len(commits) > 1:
            raise ValueError(
                f"compare: {path} must hold runs of one commit, got {len(commits)}; give a folder "
                "of each"
            )
        self.times, self.reasons = defaultdict(list), {}
        for record in self.records:
            for entry in record["entries"]:
                if entry["provider"] == provider:
                    self.times[_key(entry)].append(_time(entry, normalise, path))
            for left in record["left_out"]:
                if left["provider"] in (None, provider):
                    self.reasons[_key(left)] = left["reason"]

    @property
    def whole(self):
        return all(record["complete"] for record in self.records)

    def words(self):
        commit = (self.states[0]["commit"] or "unknown commit")[:12]
        dirty = " with changes" if any(state["dirty"] for state in self.states) else ""
        runs = len(self.records)
        return f"{self.path}, {runs} run{'s' if runs > 1 else ''} of {commit}{dirty}"


def _state(record, provider):
    """What holds "commit" and "dirty" of a provider: what is said of it, or else the record."""
    own = record["providers"].get(provider, {})
    return own if "commit" in own else record


def _files(path):
    """A record, or all below a folder."""
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob(NAME))
    if not found:
        raise ValueError(f"compare: {path} must hold a {NAME}, it holds none; see bench --out")
    return found


def _key(entry):
    return entry["op"], entry["case"], entry["dtype"], entry["direction"]


def _time(entry, normalise, path):
    if not normalise:
        return entry["time_ms"]["p50"]
    if not entry["roof_ms"]:
        raise ValueError(f"compare: {path} must hold ceilings to be normalised by, it holds none")
    return entry["time_ms"]["p50"] / entry["roof_ms"]


def _expect_one_machine(sides):
    records = [record for side in sides for record in side.records]
    for name in _OF_THE_MACHINE:
        _expect_one(name, {record[name] for record in records})
    for name in ("cores", "threads"):
        _expect_one(name, {record["machine"].get(name) for record in records})


def _expect_one(name, values):
    if len(values) > 1:
        said = " and ".join(sorted(map(str, values)))
        raise ValueError(
            f"compare: {name} must be one, got {said}; measure both sides on one machine, or give "
            "--normalise"
        )


def _where(sides, normalise):
    record = sides[0].records[0]
    about = {"device": record["device"]} if not normalise else {"times": "over their ceilings'"}
    versions = [f"{name} {record[name]}" for name in ("torch", "triton") if record[name]]
    return about if normalise else about | {"versions": ", ".join(versions)}


def _line(key, sides, level, change, accept_new, accept_missing):
    a, b = (side.times.get(key, []) for side in sides)
    if not a or not b:
        return _one_sided(key, sides, bool(a), accept_missing if a else accept_new)
    found = {
        "a_ms": float(np.median(a)), "b_ms": float(np.median(b)), "runs": (len(a), len(b)),
        "ratio": float(np.exp(np.mean(np.log(b)) - np.mean(np.log(a)))),
    }  # fmt: skip
    if min(len(a), len(b)) < LEAST_RUNS:
        reason = f"needs {LEAST_RUNS} runs a side; bench --out DIR/1, DIR/2 …, then compare folders"
        return Line(*key, UNKNOWN, **found, reason=reason)
    interval = unpaired(a, b, level)
    return line_of(key, interval, change, **found | {"ratio": interval.ratio})


def line_of(key, interval, change, **found):
    """A line with the verdict of an interval; an end that is none is None."""
    verdict = interval.verdict(change)
    low, high = interval.low or None, None if np.isinf(interval.high) else interval.high
    found["ratio"] = interval.ratio
    if verdict == UNKNOWN:
        found.setdefault("reason", "the interval is too wide: more runs, or a quieter machine")
    return Line(*key, verdict, low=low, high=high, **found)


def _one_sided(key, sides, missing, accepted):
    """A case that one side alone has."""
    side = sides[1] if missing else sides[0]
    reason = side.reasons.get(key, "" if side.whole else "the record is not complete")
    if _BUDGET in reason or (not side.whole and key not in side.reasons):
        return Line(*key, CUT, reason=reason)
    where = "B" if missing else "A"
    reason = f"not in {where}" + (f": {reason}" if reason else "")
    return Line(*key, MISSING if missing else NEW, reason=reason, accepted=accepted)
