"""The history of each case over records, oldest first, one history for each device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from .providers import OURS
from .record import NAME, RESULTS, load_record
from .roofline import DRIFT_LIMIT
from .standings import median, verdict
from .tables import Cell, Table
from .words import DIRECTIONS, NOTHING, figure, percent, shape_words

DIRTY, DRIFTED = "*", "†"
SIGNS = {
    DIRTY: ("dirty", "files differed from the commit"),
    DRIFTED: (
        "drifted",
        f"the ceilings moved by more than {percent(DRIFT_LIMIT)} in the run, or were not measured",
    ),
}
RULES = (
    "A point is the median of one record; times of two points come from two runs, often of two "
    "days, and no test of significance stands behind their difference: ask gaugeblock compare.",
    "The change is of the median, from the record before and from the first one; faster and slower "
    "are said where the two ranges from p20 to p80, or of the median's 95% interval, are apart.",
    *(f"{sign} {short}: {words}." for sign, (short, words) in SIGNS.items()),
)
_VERSIONS = ("driver", "torch", "triton")
_BARS = "▁▂▃▄▅▆▇█"
# as many as a line of a terminal has room for; the newest are kept
_LONGEST_SPARK = 40


@dataclass(frozen=True)
class Panel:
    """One op, case, dtype and direction: {provider: [its entry in each record, or None]}."""

    op: str
    case: str
    dtype: str
    direction: str
    shape: str
    lines: dict[str, list[dict | None]]

    @property
    def title(self):
        name = f"{self.case}, {self.shape}" if self.shape else self.case
        return f"{DIRECTIONS[self.direction]}, {name}"

    @property
    def shown(self):
        """Ours; where it never ran, who was the fastest last."""
        if OURS in self.lines:
            return OURS
        newest = {name: [e for e in line if e][-1] for name, line in self.lines.items()}
        return min(newest, key=lambda name: median(newest[name]))


@dataclass(frozen=True)
class History:
    """The records of one device, oldest first."""

    device: str
    records: list[dict]
    ops: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()

    @property
    def alone(self):
        """What is to be said of a history of one record, or None."""
        if len(self.records) == 1:
            return f"{self.device}: one record so far, so nothing has changed yet."
        return None

    @cached_property
    def panels(self):
        """Each op's together, in the order in which the records first name them."""
        found = {}
        for i, record in enumerate(self.records):
            for e in record["entries"]:
                if (self.ops and e["op"] not in self.ops) or (
                    self.cases and e["case"] not in self.cases
                ):
                    continue
                # a name may come to mean another shape
                key = e["op"], e["case"], e["dtype"], e["direction"], shape_words(e["shape"])
                lines = found.setdefault(key, {})
                line = lines.setdefault(e["provider"], [None] * len(self.records))
                line[i] = e
        ops = list(dict.fromkeys(key[0] for key in found))
        keys = sorted(found, key=lambda key: ops.index(key[0]))
        return [Panel(*key, _ours_first(found[key])) for key in keys]

    def changes(self):
        """Where a record's driver, torch or triton is another than the one's before it."""
        told = [tuple(record[name] for name in _VERSIONS) for record in self.records]
        return [i for i in range(1, len(told)) if told[i] != told[i - 1]]


def histories(paths=(), ops=(), cases=()):
    """A history for each device over some records, or the committed ones.

    paths: records, or folders: all records below them.
    ops, cases: only these.
    Raises ValueError where there is no record, or none with such an op and case.
    """
    found = {}
    for path in _files([Path(path) for path in paths] or [RESULTS]):
        record = load_record(path)
        found.setdefault(record["device"], []).append(record)
    for records in found.values():
        records.sort(key=lambda record: datetime.fromisoformat(record["started"]))
    made = [History(device, found[device], tuple(ops), tuple(cases)) for device in sorted(found)]
    known = [panel for history in made for panel in history.panels]
    for name, asked in (("op", ops), ("case", cases)):
        missing = sorted(set(asked) - {getattr(panel, name) for panel in known})
        if missing:
            raise ValueError(f"report: {name} must be in a record, got {', '.join(missing)}")
    return [history for history in made if history.panels or not (ops or cases)]


def _files(paths):
    """The records below some paths, each once."""
    found = []
    for path in paths:
        files = [path]
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*.json")) if _is_record(file)]
            if not files:
                raise ValueError(
                    f"report: {path} must hold a record, it holds none; bench makes it"
                )
        found += files
    return list({file.resolve(): file for file in found}.values())


def _is_record(file):
    """Other JSON may lie beside records; what is called as one has to be one."""
    if file.name == NAME:
        return True
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"schema", "entries", "ceilings"} <= set(found)


def _ours_first(lines):
    return {name: lines[name] for name in sorted(lines, key=lambda name: (name != OURS, name))}


def signs(record):
    """The signs of what casts doubt on a whole record."""
    drift = (record["ceilings"] or {}).get("drift")
    sure = drift is not None and drift <= DRIFT_LIMIT
    return DIRTY * bool(record["dirty"]) + DRIFTED * (not sure)


def label(record):
    """9acfb7d 2026-11-22, and the record's signs."""
    commit = (record["commit"] or "no commit")[: 7 if record["commit"] else None]
    day = datetime.fromisoformat(record["started"]).astimezone(UTC).strftime("%Y-%m-%d")
    return f"{commit} {day}{signs(record)}"


def summary_table(history):
    """One line a case: its sparkline, its last times and by how much they changed."""
    head = ["op", "case", "dtype", "provider", "history", "last ms", "change", "from the first"]
    title = f"{history.device}: {OURS}, or the fastest where it never ran"
    table = Table(title, head)
    for panel in history.panels:
        line = panel.lines[panel.shown]
        there = [e for e in line if e]
        texts = [
            f"{panel.op} {panel.direction}", panel.case, panel.dtype,
            panel.shown, sparkline(line),
        ]  # fmt: skip
        last = Cell(figure(median(there[-1])), notes=_absent(table, line))
        before = there[-2] if len(there) > 1 else None
        first = there[0] if len(there) > 1 else None
        row = [*map(Cell, texts), last, _change(there[-1], before), _change(there[-1], first)]
        table.rows.append(row)
    return table.without_empty_columns()


def _absent(table, line):
    return () if line[-1] else table.note("not in the newest record; the newest that has it")


def _change(entry, earlier):
    if earlier is None:
        return Cell(NOTHING)
    look = verdict(entry, earlier)[1]
    return Cell(f"{100 * (median(entry) / median(earlier) - 1):+.1f}%", look=look)


def sparkline(line):
    """A bar for each median, the lowest for the fastest; a dot where there is none."""
    line = line[-_LONGEST_SPARK:]
    times = [median(e) for e in line if e]
    if not times:
        return NOTHING
    low, span = min(times), max(times) - min(times)

    def bar(e):
        return _BARS[round((len(_BARS) - 1) * (median(e) - low) / span) if span else 0]

    return "".join(bar(e) if e else "·" for e in line)


def records_table(history):
    """The records, newest first, with the versions that were at work."""
    head = ["record", *_VERSIONS, "drift", "measurements"]
    table = Table(f"{history.device}: records, newest first", head)
    for record in reversed(history.records):
        drift = (record["ceilings"] or {}).get("drift")
        texts = [label(record), *(record[name] or NOTHING for name in _VERSIONS)]
        texts += [NOTHING if drift is None else percent(drift), str(len(record["entries"]))]
        table.rows.append([Cell(text) for text in texts])
    return table.without_empty_columns()


def times_table(history, panel):
    """Every provider's median in every record that has the case, newest first."""
    table = Table(f"{panel.op}, {panel.dtype}, {panel.title}: median ms", ["record", *panel.lines])
    for i in reversed(range(len(history.records))):
        entries = [line[i] for line in panel.lines.values()]
        if any(entries):
            cells = [_time(table, e) for e in entries]
            table.rows.append([Cell(label(history.records[i])), *cells])
    return table


def _time(table, entry):
    if entry is None:
        return Cell(NOTHING)
    marks = [mark for mark in entry.get("marks", ()) if "drift" not in mark]
    return Cell(figure(median(entry)), notes=table.note(*marks))
