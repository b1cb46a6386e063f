"""Who is ahead in each case of a record.

Ratios are of median times: the best peer's over ours, above 1 where ours is faster. Where ours did
not run, the fastest provider stands in its place and the next one in the peer's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .providers import OURS
from .words import DIRECTIONS, shape_words


@dataclass
class Group:
    """The entries of one op, dtype and direction: {case: {provider: entry}}."""

    op: str
    dtype: str
    direction: str
    cases: dict[str, dict[str, dict]] = field(default_factory=dict)

    @property
    def title(self):
        return f"{self.op}, {self.dtype}, {DIRECTIONS[self.direction]}"

    @property
    def providers(self):
        """Those that ran a case, ours first."""
        found = {name for entries in self.cases.values() for name in entries}
        return sorted(found, key=lambda name: (name != OURS, name))

    def words(self, case):
        """The case's shape, with its name where it has none or another case's looks the same."""
        shapes = {c: shape_words(next(iter(e.values()))["shape"]) for c, e in self.cases.items()}
        own = shapes.pop(case)
        if not own:
            return case
        return f"{own} ({case})" if own in shapes.values() else own


def groups(record):
    """The record's entries by op, dtype and direction in the record's order, each op's together."""
    found = {}
    for entry in record["entries"]:
        key = (entry["op"], entry["dtype"], entry["direction"])
        group = found.setdefault(key, Group(*key))
        group.cases.setdefault(entry["case"], {})[entry["provider"]] = entry
    ops = list(dict.fromkeys(group.op for group in found.values()))
    return sorted(found.values(), key=lambda group: ops.index(group.op))


def has_ours(record):
    return any(entry["provider"] == OURS for entry in record["entries"])


def median(entry):
    return entry["time_ms"]["p50"]


def opponents(entries, ours):
    """(who is looked at, the best of the others) of a case's {provider: entry}; None for nobody."""
    order = sorted(entries.values(), key=median)
    if ours:
        order = [e for e in order if e["provider"] != OURS]
        return entries.get(OURS), order[0] if order else None
    return order[0], order[1] if len(order) > 1 else None


def verdict(entry, peer):
    """(the peer's median over the entry's, whether the entry is "faster", "even" or "slower")."""
    ratio = median(peer) / median(entry)
    (low, high), (peer_low, peer_high) = _range(entry), _range(peer)
    if low <= peer_high and peer_low <= high:
        return ratio, "even"
    return ratio, "faster" if ratio > 1 else "slower"


def _range(entry):
    time, half = entry["time_ms"], entry["interval"] or 0
    return min(time["p20"], time["p50"] * (1 - half)), max(time["p80"], time["p50"] * (1 + half))


def tally(record):
    """{"faster", "even", "slower", "alone": cases}; dtypes and directions are counted apart."""
    found = Counter()
    for group in groups(record):
        for entries in group.cases.values():
            entry, peer = opponents(entries, True)
            found[verdict(entry, peer)[1] if entry and peer else "alone"] += 1
    return found
