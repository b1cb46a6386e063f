"""Kernels held against the limits of a user's file, and the file brought up to date.

Every configuration of an autotuner has to keep the limits.
"""

from __future__ import annotations

from . import gate_file
from .gate_file import FIGURES, INSTRUCTIONS
from .tables import Table, name, percent, text


def check(entries):
    """([(entry, target, Launch, [what is over its limit])], the Table of it).

    What has no limits at all is held to the gate of `inspect`. What does not compile fails.
    """
    found = []
    for entry in entries:
        for target in entry.targets:
            for launch in entry.launches(target):
                launch.row["name"] = entry.table.get("name", "")
                found.append((entry, target, launch, _over(launch, entry.limits(target))))
    return found, _table(found)


def _over(launch, limits):
    """What a launch has more of than its limits allow, or less."""
    row = launch.row
    if launch.failed or not limits:
        return [row["reason"]] if row["reason"] else []
    figures, reasons = present(row), []
    for key, worst in FIGURES.items():
        if key in limits and worst(figures[key], limits[key]) != limits[key]:
            said, word = (percent, "at least") if key == "occupancy" else (text, "at most")
            reasons.append(f"{key} {said(figures[key])}, {word} {said(limits[key])}")
    there = {name for full in row["instructions"] for name in (full, full.split(".")[0])}
    reasons += [f"{name} must be there" for name in limits.get("must", ()) if name not in there]
    return reasons + [
        f"{name} must not be there" for name in limits.get("must_not", ()) if name in there
    ]


def present(row):
    """{figure: its value} of a row, None where the chip does not tell."""
    held = row["occupancy"]
    return {k: row[k] for k in FIGURES} | {"occupancy": held["share"] if held else None}


def _table(found):
    rows = []
    for entry, target, launch, reasons in found:
        _, said, tile = name(launch.row)
        figures, limits = present(launch.row), entry.limits(target)
        cells = (_cell(key, value, limits) for key, value in figures.items())
        rows.append((entry.table["kernel"], said, tile, target, *cells, "; ".join(reasons)))
    broken = sum(bool(reasons) for *_, reasons in found)
    versions = {launch.row["triton"]: None for *_, launch, _ in found}
    title = f"{len(found)} launches, {broken} over a limit; figure of limit"
    title = "; ".join([title, *(f"Triton {version}" for version in versions)])
    return Table(title, ("kernel", "", "tile", "target", *FIGURES, "over"), rows)


def _cell(key, value, limits):
    show = percent if key == "occupancy" else text
    return f"{show(value)} of {show(limits[key])}" if key in limits else show(value)


def update(path, entries, found):
    """Write the file anew, with the present figures as limits.

    What must and must not be there stays as it was, and so does a comment at the head of the file.
    Raises ValueError where a kernel does not compile, and leaves the file alone.
    """
    for entry, target, launch, reasons in found:
        if launch.failed:
            kernel = entry.table["kernel"]
            raise ValueError(f"inspect: --update needs {kernel} for {target}, it {reasons[0]}")
    tables = []
    for entry in entries:
        limits = entry.table.get("limits", {})
        kept = {k: v for k, v in limits.items() if k in INSTRUCTIONS}
        for target in entry.targets:
            rows = [x.row for e, t, x, _ in found if (e, t) == (entry, target)]
            figures = {
                key: worst(present(row)[key] for row in rows)
                for key, worst in FIGURES.items()
                if present(rows[0])[key] is not None
            }
            own = {k: v for k, v in limits.get(target, {}).items() if k in INSTRUCTIONS}
            kept[target] = figures | own
        tables.append(entry.table | {"limits": kept})
    gate_file.write(path, tables)
