"""Which Python line each instruction comes from, and what each line costs."""

from __future__ import annotations

import linecache
from collections import Counter

from .bounds import PIPES, pipe
from .listing import located, parse, shown
from .tables import Table, name, text

# pipes that an instruction belongs to, and the rest
CLASSES = (*PIPES[:-1], "other")
# how many lines of a launch are printed
_MOST = 12


def annotate(code):
    """SASS with `// file:line  what stands there` behind each instruction."""
    said = code.splitlines()
    for instruction in parse(code).instructions:
        if instruction.file is not None:
            row, place = said[instruction.row], f"{shown(instruction.file)}:{instruction.line}"
            said[instruction.row] = f"{row:<90} // {place}  {_python(instruction)}".rstrip()
    # what the annotations were made of
    return "\n".join(line for line in said if not line.lstrip().startswith("//## File")) + "\n"


def cost(code):
    """[{"source", "python", "instructions", "matrix", "exp", "fp32", "load/store", "other"}].

    One for each line of Python, "file:line" and what stands there: how many instructions in the
    code come from it, of which class. The most first; those of no line at last.
    """
    counts, python = {}, {}
    for instruction in parse(code).instructions:
        source = instruction.file and f"{shown(instruction.file)}:{instruction.line}"
        counts.setdefault(source, Counter())[pipe(instruction) or "other"] += 1
        python[source] = _python(instruction)
    order = sorted(counts, key=lambda source: (source is None, -counts[source].total()))
    return [
        {"source": source, "python": python[source], "instructions": counts[source].total()}
        | {each: counts[source][each] for each in CLASSES}
        for source in order
    ]


def _python(instruction):
    if instruction.file is None:
        return ""
    return linecache.getline(str(located(instruction.file)), instruction.line).strip()


def table(launches, most=_MOST):
    """The lines that most instructions of each launch come from; most=None: all of them."""
    rows = [
        (
            *name(x.row), x.row["target"], each["source"] or "–", text(each["instructions"]),
            *(text(each[c] or "") for c in CLASSES), each["python"],
        )
        for x in launches
        if x.code
        for each in cost(x.code)[:most]
    ]  # fmt: skip
    head = ("kernel", "case", "tile", "target", "line", "instructions", *CLASSES, "Python")
    title = "instructions by line of Python" + (f", the first {most} of a launch" if most else "")
    return Table(title, head, rows)
