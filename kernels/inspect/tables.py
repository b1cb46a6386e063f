"""What inspect prints, as tables of text: on the terminal and in Markdown."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..sass import place
from .bounds import PIPES


@dataclass(frozen=True)
class Table:
    """A title, the heads of the columns, rows of text."""

    title: str
    head: tuple
    rows: list

    def markdown(self):
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        cells = [[cell.replace("|", "\\|").replace("\n", "") for cell in line] for line in lines]
        title = f"**{self.title}**\n\n" if self.title else ""
        return title + "".join(f"| {' | '.join(line)} |\n" for line in cells)


_FIGURES = {
    "registers": lambda row: text(row["registers"]),
    "spills": lambda row: text(row["spills"]),
    "shared": lambda row: text(row["shared_bytes"]),
    "programs": lambda row: text((row["occupancy"] or {}).get("programs")),
    "occupancy": lambda row: percent(row["occupancy"]["share"]) if row["occupancy"] else "–",
    "limited by": lambda row: (row["occupancy"] or {}).get("limiter", "–"),
}


def figures(parts, targets):
    """One line a launch; the same figure of several targets stands side by side."""
    rows = []
    for launch in side_by_side(parts):
        first = next(row for row in launch if row)
        failed = [f"{r['target']} {r['reason']}" for r in launch if r and not r["passed"]]
        shown = (
            " / ".join(show(row) if row else "–" for row in launch) for show in _FIGURES.values()
        )
        rows.append((*name(first), *shown, "; ".join(failed)))
    versions = dict.fromkeys(row["triton"] for part in parts for row in part)
    title = f"{' / '.join(targets)}, Triton {' '.join(versions)}"
    return Table(title, ("kernel", "case", "tile", *_FIGURES, "fails"), rows)


def mix(parts):
    """Counts of instructions; the targets of a launch stand one above the other."""
    rows = [row for row in in_order(parts) if row["instructions"]]
    names = sorted({n: None for row in rows for n in row["instructions"]}, key=place)
    return Table(
        "instructions in the code",
        ("kernel", "case", "tile", "target", *(n.replace(".", "\n.") for n in names)),
        [
            (*name(r), r["target"], *(text(r["instructions"].get(n, "")) for n in names))
            for r in rows
        ],
    )


def bounds(parts):
    """The cycles at least of loops and of the whole code."""
    return Table(
        "cycles of a program at least, without stalls, counted in the code",
        ("kernel", "case", "tile", "target", "code", "instructions", *PIPES, "at least", "pipe"),
        [
            (
                *name(row), row["target"], part["source"] if part["section"] == "loop" else "all",
                text(part["instructions"]),
                *(text(None if c is None else round(c)) for c in part["cycles"].values()),
                text(round(part["least"])), part["limit"],
            )
            for row in in_order(parts)
            for part in row["bounds"] or ()
        ],
    )  # fmt: skip


def differences(found, ref):
    """One line a launch: a figure, or before → now (by how much) where it differs."""
    rows = [
        (
            *name(each), each["target"], each["change"],
            *(_step(each, key) for key in _COMPARED),
            "; ".join(f"{key} {_change(key, pair)}" for key, pair in _others(each)),
        )
        for each in found
    ]  # fmt: skip
    same = sum(each["change"] == "same" for each in found)
    return Table(
        f"against {ref}: {same} of {len(found)} launches are the same",
        ("kernel", "case", "tile", "target", "", *_COMPARED.values(), "instructions and the rest"),
        rows,
    )


_COMPARED = {
    "registers": "registers", "spills": "spills", "shared_bytes": "shared",
    "programs": "programs", "occupancy": "occupancy", "limited by": "limited by",
}  # fmt: skip


def _step(each, key):
    before, now = each["figures"][key]
    if each["change"] in ("new", "gone"):
        return _shown(key, before if each["change"] == "gone" else now)
    return _shown(key, now) if before == now else _change(key, (before, now))


def _others(each):
    """The pairs that differ and have no column of their own."""
    if each["change"] != "changed":
        return []
    rest = {k: pair for k, pair in each["figures"].items() if k not in _COMPARED}
    return [(k, p) for k, p in (rest | each["instructions"]).items() if p[0] != p[1]]


def _change(key, pair):
    before, now = pair
    numbers = all(isinstance(x, int) for x in pair)
    by = f" ({now - before:+,})" if numbers else ""
    return f"{_shown(key, before)} → {_shown(key, now)}{by}"


def _shown(key, value):
    return (percent if key == "occupancy" else text)(value) or "–"


def name(row):
    """(kernel, case, tile) of a row; of a user's kernel, the name that a gate file gives it."""
    kernel = row["kernel"].strip("_")
    if row["dtype"]:
        return kernel, row["case"], tile(row["config"])
    config = row["config"]
    fixed = [f"{k}={v}" for k, v in config.items() if type(v) is int and k not in _LAUNCH]
    words = tile(config) or " ".join(fixed[:_NAMED])
    # what does not compile has no more than it was given
    launch = " ".join(f"{config[k]} {word}" for k, word in _LAUNCH.items() if k in config)
    return kernel, row.get("name", ""), f"{words} {launch}".strip()


# of a user's kernel: how many numbers stand for a tile, and what the launch adds
_NAMED = 4
_LAUNCH = {"num_warps": "warps", "num_stages": "stages"}


def tile(config):
    sizes = "×".join(str(v) for k, v in config.items() if k.startswith("BLOCK"))
    return f"{sizes} {config.get('EPILOGUE', '')}".strip()


def side_by_side(parts):
    """[the rows of one launch, by target], None where a target has no such launch."""
    launches = {}
    for number, rows in enumerate(parts):
        met = Counter()
        for row in rows:
            key = row["op"], row["case"], row["kernel"]
            met[key] += 1
            launches.setdefault((*key, met[key]), [None] * len(parts))[number] = row
    return list(launches.values())


def in_order(parts):
    """The rows of all targets, those of a launch one behind the other."""
    return [row for launch in side_by_side(parts) for row in launch if row]


def text(value):
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def percent(share):
    return "–" if share is None else f"{100 * share:.3g}%"
