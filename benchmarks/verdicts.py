"""What a comparison found, case by case, and its exit code; JSON, JUnit, Markdown, a terminal."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from gaugeblock.reference.report import console
from rich.markup import escape
from rich.table import Table

from .markdown import escape as plain
from .significance import FASTER, SAME, SLOWER, UNKNOWN
from .words import NOTHING, figure, percent

MISSING, NEW, CUT, WRONG = "missing", "new", "cut short", "wrong"
# the worst first
_ORDER = (WRONG, SLOWER, MISSING, NEW, CUT, UNKNOWN, FASTER, SAME)
_COLOURS = {WRONG: "bold red", SLOWER: "bold red", MISSING: "bold red", NEW: "bold red",
            CUT: "yellow", UNKNOWN: "yellow", FASTER: "bold blue"}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One case in one direction.

    ratio: B's time over A's, between low and high; None where there is none, or no such end.
    a, b:     the sides' times, in the comparison's unit.
    accepted: whether a missing or new case was acknowledged.
    """

    op: str
    case: str
    dtype: str
    direction: str
    verdict: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    a: float | None = None
    b: float | None = None
    runs: tuple[int, int] = (0, 0)
    reason: str = ""
    accepted: bool = False
    log_ratios: list[float] = field(default_factory=list)

    @property
    def name(self):
        return f"{self.op} {self.case} {self.dtype} {self.direction}"

    @property
    def code(self):
        """What this line alone would make of the exit code."""
        if self.accepted or self.verdict in (SAME, FASTER):
            return 0
        return 2 if self.verdict in (UNKNOWN, CUT) else 1


@dataclass(frozen=True)
class Comparison:
    """A against B on one machine.

    change: the smallest change looked for; false_alarm: how often a comparison of equals may call
    any of its cases faster or slower. about: facts, as {"A": "…", "device": "…"}. unit: of times.
    """

    lines: list[Line]
    change: float
    false_alarm: float
    about: dict[str, str]
    unit: str = "ms"

    @property
    def exit_code(self):
        """1 for a case that is slower, wrong, missing or new; else 2 for one that cannot be told.

        2 also where there is nothing to compare.
        """
        codes = {line.code for line in self.lines}
        return 1 if 1 in codes else 2 if 2 in codes or not self.lines else 0

    def summary(self):
        """ "2 slower, 20 same of 22 cases"."""
        counts = Counter(line.verdict for line in self.lines)
        said = ", ".join(f"{counts[v]} {v}" for v in _ORDER if counts[v]) or "nothing compared"
        return f"{said} of {len(self.lines)} cases: exit code {self.exit_code}"

    def rule(self):
        """How the verdicts are made, in one paragraph."""
        return (
            f"Changes of {percent(self.change)} or more are looked for; equals are called faster "
            f"or slower in any case at most {percent(self.false_alarm)} of the time. Slower: the "
            "whole interval is above 1 and the ratio at least half the change. Same: the whole "
            "interval is within the change. Intervals hold together, for all cases."
        )

    def ordered(self):
        return sorted(self.lines, key=lambda line: (_ORDER.index(line.verdict), line.name))

    def head(self):
        sides = f"A {self.unit}", f"B {self.unit}"
        return ("op", "case", "dtype", "direction", *sides, "B / A", "interval", "runs", "verdict")

    def json(self):
        lines = [asdict(line) for line in self.ordered()]
        whole = {
            "schema": 1, "exit_code": self.exit_code, "change": self.change,
            "false_alarm": self.false_alarm, "about": self.about, "unit": self.unit,
            "lines": lines,
        }  # fmt: skip
        return json.dumps(whole, indent=1, allow_nan=False) + "\n"

    def junit(self):
        """A failure where the exit code is 1, an error where nothing can be told."""
        kinds = {1: "failure", 2: "error"}
        counted = Counter(line.code for line in self.lines)
        suite = ElementTree.Element(
            "testsuite", name="gaugeblock compare", tests=str(len(self.lines)),
            failures=str(counted[1]), errors=str(counted[2]),
        )  # fmt: skip
        for line in self.ordered():
            name = _printable(f"{line.case} {line.dtype} {line.direction}")
            case = ElementTree.SubElement(
                suite, "testcase", classname=_printable(line.op), name=name
            )
            if line.code:
                kind = ElementTree.SubElement(case, kinds[line.code], message=_words(line))
                kind.text = self.rule()
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"

    def markdown(self):
        lines = [list(map(plain, _cells(line))) for line in self.ordered()]
        rows = [self.head(), ["---"] * 4 + ["---:"] * 5 + ["---"], *lines]
        table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        about = "".join(
            f"- {name}: {plain(_printable(value))}\n" for name, value in self.about.items()
        )
        return f"## Compared: {self.summary()}\n\n{about}\n{table}\n<sub>{self.rule()}</sub>\n"

    def show(self):
        """Print it."""
        out, table = console(), Table(*self.head())
        for line in self.ordered():
            colour = _COLOURS.get(line.verdict)
            *cells, verdict = map(escape, _cells(line))
            table.add_row(*cells, f"[{colour}]{verdict}[/]" if colour else verdict)
        for name, value in self.about.items():
            out.print(f"{name}: {escape(_printable(value))}", highlight=False)
        out.print(table)
        out.print(f"[dim]{self.rule()}[/]", highlight=False)
        out.print(self.summary(), highlight=False)

    def write(self, json=None, junit=None, markdown=None):
        """Into the files that are named; Markdown also into $GITHUB_STEP_SUMMARY if it is set."""
        for path, text in ((json, self.json), (junit, self.junit), (markdown, self.markdown)):
            if path:
                path = Path(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text(), encoding="utf-8")
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(self.markdown())


def _cells(line):
    between = NOTHING
    if line.low is not None or line.high is not None:
        low, high = (NOTHING if x is None else f"{x:.3f}" for x in (line.low, line.high))
        between = f"{low} … {high}"
    runs = str(line.runs[0]) if line.runs[0] == line.runs[1] else "/".join(map(str, line.runs))
    names = map(_printable, (line.op, line.case, line.dtype, line.direction))
    ratio = NOTHING if line.ratio is None else f"{line.ratio:.3f}"
    return [*names, figure(line.a), figure(line.b), ratio, between, runs, _words(line)]


def _words(line):
    note = "; ".join(filter(None, [line.reason, "acknowledged" if line.accepted else ""]))
    return _printable(f"{line.verdict} ({note})" if note else line.verdict)


def _printable(text):
    """Text without the characters that steer a terminal, which XML does not allow either."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
