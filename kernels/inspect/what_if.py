"""What another launch would hold: twice the warps, one stage fewer, fewer registers, less memory.

Warps and stages change the code, so those are compiled anew. How few registers, or how little
shared memory, make room for one more program is reckoned by `occupancy` for the code as it is.
"""

from __future__ import annotations

from bisect import bisect_left

from ..occupancy import occupancy
from .tables import Table, name, percent, text

# Triton's own, where a launch names none; a program has at most 1,024 threads
_WARPS, _STAGES, _MOST_WARPS = 4, 3, 32
_FIGURES = ("registers", "spills", "shared_bytes")


def more_warps(options):
    """Launch options with twice the warps: Triton's are powers of two."""
    warps = options.get("num_warps", _WARPS)
    return options | {"num_warps": min(2 * warps, _MOST_WARPS)}


def fewer_stages(options):
    """Launch options with one stage of a pipelined loop fewer."""
    return options | {"num_stages": max(options.get("num_stages", _STAGES) - 1, 1)}


_RECOMPILED = {"twice the warps": more_warps, "one stage fewer": fewer_stages}


def add(launches, compile_with):
    """Give each launch's row its "what_if": [{"change", figures, "occupancy", "reason"}].

    compile_with: a change of launch options -> the same launches, compiled so. Rows without
    occupancy (AMD's, or of a kernel that does not compile) get None.
    """
    changed = {
        change: [launch.row for launch in compile_with(options)]
        for change, options in _RECOMPILED.items()
    }
    for number, launch in enumerate(launches):
        if launch.row["occupancy"] is None:
            launch.row["what_if"] = None
            continue
        config = launch.row["config"]
        launch.row["what_if"] = [
            {"change": change}
            | {key: rows[number][key] for key in (*_FIGURES, "occupancy", "reason")}
            for change, rows in changed.items()
            # where there is no more, or no less
            if _RECOMPILED[change](config) != config
        ] + _reckoned(launch)


def _reckoned(launch):
    """The most registers, and the most shared memory, with which one more program fits."""
    columns, found = launch.compiled.metadata.tmem_size, []
    words = {"registers": "registers", "shared_bytes": "bytes of shared memory"}
    for key, word in words.items():
        most, held = room(launch.row, key, columns)
        if held:
            given = {k: launch.row[k] for k in words} | {key: most}
            found.append(
                {"change": f"{most:,} {word}", "spills": None, **given, "occupancy": held,
                 "reason": ""}
            )  # fmt: skip
    return found


def room(row, key, columns=0):
    """(the most of "registers" or "shared_bytes" with which one more program fits, its occupancy).

    (None, None) where less of it alone makes no room. columns: of tensor memory.
    """

    def held(value):
        given = {k: row[k] for k in ("registers", "shared_bytes")} | {key: value}
        return occupancy(
            row["target"], given["registers"], given["shared_bytes"], row["threads"], columns
        )

    # the fewer, the more programs: the first of the falling values that has one more
    falling = range(row[key] - 1, -1, -1)
    programs = row["occupancy"]["programs"]
    place = bisect_left(falling, True, key=lambda value: held(value)["programs"] > programs)
    if place == len(falling):
        return None, None
    return falling[place], held(falling[place])


def table(rows):
    """The launch as it is, and under it each change."""
    lines = []
    for row in rows:
        if not row.get("what_if"):
            continue
        as_it_is = {"change": "as it is", **{k: row[k] for k in (*_FIGURES, "occupancy", "reason")}}
        for each in (as_it_is, *row["what_if"]):
            held = each["occupancy"] or {}
            lines.append(
                (*name(row), row["target"], each["change"], *(text(each[k]) for k in _FIGURES),
                 text(held.get("programs")), percent(held.get("share")),
                 held.get("limiter", "–"), each["reason"])
            )  # fmt: skip
    head = ("kernel", "case", "tile", "target", "what if", "registers", "spills", "shared",
            "programs", "occupancy", "limited by", "fails")  # fmt: skip
    return Table(
        "what if: warps and stages compiled anew, registers and memory reckoned", head, lines
    )
