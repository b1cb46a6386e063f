"""What a benchmark record says, as tables of text that a terminal, Markdown and HTML all show."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from .providers import OURS
from .roofline import DRIFT_LIMIT
from .standings import groups, has_ours, median, opponents, tally, verdict
from .words import (
    NOTHING,
    bytes_words,
    copy_words,
    duration,
    figure,
    percent,
    rate,
    ratio_words,
)

SIGNS = {"faster": "▲", "even": "≈", "slower": "▼"}
# columns of words, set to the left; figures stand to the right
_WORDS = {
    "op", "case", "dtype", "fastest", "best peer", "next", "provider", "version",
    "remark", "ceiling", "history", "record",
}  # fmt: skip
RULES = (
    f"Ratio: the best peer's median time over {OURS}'s. {SIGNS['faster']} above 1: {OURS} is "
    f"faster; {SIGNS['slower']} below 1: it is slower. The best peer is the fastest other provider "
    f"in the same run, case, dtype and direction. Where {OURS} did not run, the fastest provider "
    "stands in its place, and the next one in the peer's.",
    f"{SIGNS['even']}: the two ranges overlap, so that the difference may be noise. A range "
    "reaches, on either side of the median, to p20 and p80 or to the ends of the median's 95% "
    "interval, whichever is further.",
    "Of roof: the time that the ceilings measured in the same run allow for the case's flops and "
    "compulsory bytes, over the median time. The word names the ceiling that binds: copy "
    "(bandwidth), matrix (arithmetic) or latency. Rates count the same flops and bytes.",
    f"{NOTHING}: not measured or not known; a footnote gives the reason where there is one.",
)


@dataclass(frozen=True)
class Cell:
    """A figure or a word; `sub` is its small print, `notes` the numbers of its footnotes."""

    text: str
    sub: str = ""
    notes: tuple[int, ...] = ()
    look: str = ""  # best, faster, even, slower or ""


_NONE = Cell(NOTHING)


@dataclass
class Table:
    title: str
    head: list[str]
    # what is said of the whole run and needs no footnote
    known: frozenset[str] = frozenset()
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def left(self, column):
        """Whether a column holds words."""
        return self.head[column] in _WORDS

    def note(self, *texts):
        """The numbers of footnotes, each text written once."""
        texts = [t for t in texts if t not in self.known]
        self.notes += [t for t in dict.fromkeys(texts) if t not in self.notes]
        return tuple(sorted({self.notes.index(t) + 1 for t in texts}))

    def without_empty_columns(self):
        kept = [i for i in range(len(self.head)) if any(r[i].text != NOTHING for r in self.rows)]
        self.head = [self.head[i] for i in kept]
        self.rows = [[row[i] for i in kept] for row in self.rows]
        return self


def summary_table(record):
    """One line a case: the ratio to the best peer, or of the next one to the fastest."""
    ours = has_ours(record)
    dtypes = list(dict.fromkeys(entry["dtype"] for entry in record["entries"]))
    title = "Ratio to the best peer" if ours else "The fastest and the next"
    head = ["op", "dtype", "case", *_duel_head(ours, ["of roof"])]
    table = Table(f"{title}, {' and '.join(dtypes)}", head, _shared_marks(record))
    for group in groups(record):
        for case in group.cases:
            dtype = group.dtype if len(dtypes) > 1 else NOTHING
            texts = (f"{group.op} {group.direction}", dtype, group.words(case))
            duel = _duel(record, table, group, case, ours, [_roof])
            table.rows.append([*map(Cell, texts), *duel])
    return table.without_empty_columns()


def best_table(record, group):
    """One line a case: ours with its spread, roof and energy against the best peer."""
    ours = OURS in group.providers
    extra = {
        "p20–p80 ms": _spread, "95% interval": _interval, "of roof": _roof, "rate": _rate,
        "energy mJ": _energy,
    }  # fmt: skip
    who = f"{OURS} against the best peer" if ours else "the fastest against the next"
    head = ["case", *_duel_head(ours, list(extra))]
    table = Table(f"{group.title}: {who}", head, _shared_marks(record))
    for case in group.cases:
        duel = _duel(record, table, group, case, ours, list(extra.values()))
        table.rows.append([_case(group, case), *duel])
    return table.without_empty_columns()


def times_table(record, group):
    """The median times of every provider, the fastest of each case marked."""
    title = f"{group.title}: every provider, median ms"
    table = Table(title, ["case", *group.providers], _shared_marks(record))
    for case, entries in group.cases.items():
        fastest = min(map(median, entries.values()))
        row = [_case(group, case)]
        for name in group.providers:
            if name in entries:
                look = "best" if median(entries[name]) == fastest else ""
                row.append(_time(table, entries[name], look))
            else:
                row.append(_missing(record, table, group, case, name))
        table.rows.append(row)
    return table


def detail_table(record, group):
    """Every measurement of a group with what the record holds of it, the fastest first."""
    columns = {
        "p20–p80 ms": _spread, "95% interval": _interval, "samples": lambda e: str(e["samples"]),
        "of roof": _roof,
        "flop/s": lambda e: rate(1e12 * e["tflop_s"]) if e["flops"] else NOTHING,
        "byte/s": lambda e: rate(1e9 * e["gb_s"]), "energy mJ": _energy, "clock MHz": _clock,
        "°C": _temperature,
        "graph": lambda e: {True: "yes", False: "no"}.get(e.get("graph"), NOTHING),
        "error / budget": _parity,
    }  # fmt: skip
    head = ["case", "provider", "median ms", *columns]
    table = Table(f"{group.title}: every measurement", head, _shared_marks(record))
    for case, entries in group.cases.items():
        for entry in sorted(entries.values(), key=median):
            row = [_case(group, case), Cell(entry["provider"]), _time(table, entry)]
            table.rows.append([*row, *(Cell(text(entry)) for text in columns.values())])
    return table.without_empty_columns()


def _duel_head(ours, extra):
    if ours:
        return ["ratio", f"{OURS} ms", "best peer", "its ms", *extra]
    return ["next / fastest", "fastest", "ms", "next", "its ms", *extra]


def _duel(record, table, group, case, ours, extra):
    """The cells under `_duel_head`."""
    entry, peer = opponents(group.cases[case], ours)
    cells = [_ratio(entry, peer)]
    if entry:
        cells += [Cell(entry["provider"])] if not ours else []
        cells.append(_time(table, entry))
    else:
        cells.append(_missing(record, table, group, case, OURS))
    cells += [Cell(peer["provider"]), _time(table, peer)] if peer else [_NONE, _NONE]
    return cells + [Cell(text(entry)) if entry else _NONE for text in extra]


def _ratio(entry, peer):
    if not (entry and peer):
        return _NONE
    ratio, look = verdict(entry, peer)
    text = f"{SIGNS[look]} {ratio_words(ratio, rounded_to_one=look == 'even')}"
    return Cell(text, look=look)


def _case(group, case):
    return Cell(group.words(case), sub=case)


def _time(table, entry, look=""):
    """A median time, with what casts doubt on it as footnotes."""
    doubts = list(entry.get("marks", ()))
    if slowed := _telemetry(entry).get("slowed_by"):
        doubts.append(f"slowed by {', '.join(slowed)}")
    return Cell(figure(median(entry)), notes=table.note(*doubts), look=look)


def _missing(record, table, group, case, provider):
    """A dash with the reason why a provider has no time."""
    asked = {"op": group.op, "case": case, "dtype": group.dtype, "direction": group.direction}
    reasons = [
        item["reason"]
        for item in record["left_out"]
        if item["provider"] in (provider, None) and all(item[k] == v for k, v in asked.items())
    ]
    reason = reasons[0] if reasons else "the record holds no time and no reason"
    return Cell(NOTHING, notes=table.note(reason))


def _shared_marks(record):
    """The marks that every measurement of a run carries."""
    marks = [frozenset(entry.get("marks", ())) for entry in record["entries"]]
    return frozenset.intersection(*marks) if len(marks) > 1 else frozenset()


def _telemetry(entry):
    return entry.get("telemetry", {})


def _spread(entry):
    return f"{figure(entry['time_ms']['p20'])}–{figure(entry['time_ms']['p80'])}"


def _interval(entry):
    return NOTHING if entry["interval"] is None else f"±{percent(entry['interval'])}"


def _roof(entry):
    if entry["percent_of_roof"] is None:
        return NOTHING
    return f"{percent(entry['percent_of_roof'] / 100)} {entry['roof'] or ''}".strip()


def _rate(entry):
    flops, traffic = rate(1e12 * entry["tflop_s"], "FLOP/s"), rate(1e9 * entry["gb_s"], "B/s")
    if entry["roof"] == "matrix":
        return flops
    return traffic if entry["roof"] or not entry["flops"] else f"{flops}, {traffic}"


def _energy(entry):
    return NOTHING if entry["energy_j"] is None else figure(1e3 * entry["energy_j"])


def _clock(entry):
    clocks = _telemetry(entry).get("sm_mhz", ())
    return "–".join(dict.fromkeys(f"{x:.0f}" for x in clocks)) or NOTHING


def _temperature(entry):
    celsius = _telemetry(entry).get("temperature_c")
    return NOTHING if celsius is None else f"{celsius:.0f}"


def _parity(entry):
    ratio = entry["parity"]["ratio"]
    return NOTHING if ratio is None else percent(ratio)


def tally_words(record):
    """In how many cases ours is faster, even or slower, in a sentence."""
    if not record["entries"]:
        return "The record holds no measurement."
    if not has_ours(record):
        return f"{OURS} did not run: the fastest provider stands against the next one."
    found = tally(record)
    judged = sum(found[look] for look in SIGNS)
    said = ", ".join(f"{look} in {found[look]} ({sign})" for look, sign in SIGNS.items())
    alone = f" {found['alone']} more without a time of both." if found["alone"] else ""
    return (
        f"{OURS} against the best peer, in {judged} {'case' if judged == 1 else 'cases'}, dtypes "
        f"and directions counted apart: {said}.{alone}"
    )


def name_of(record):
    """What tells one record from another: device and date."""
    return f"{record['device']}, {_date(record)}"


def facts(record):
    """[(name, value)] of the run."""
    machine = {k: v for k, v in record["machine"].items() if v is not None}
    known = [
        ("device", record["device"]),
        ("driver", record["driver"]),
        ("torch", record["torch"]),
        ("triton", record["triton"]),
        ("commit", _commit(record)),
        ("started", _date(record)),
        ("run time", duration(record["seconds"])),
        ("complete", "yes" if record["complete"] else "no"),
        ("drift of the ceilings", _drift(record)),
        ("machine", ", ".join(_fact(k, v) for k, v in machine.items()) or None),
        ("command", record["command"]),
    ]
    return [(name, value or NOTHING) for name, value in known]


def doubts(record):
    """What the whole run is to be distrusted for, in sentences."""
    found, ceilings = [], record["ceilings"]
    if not record["complete"]:
        found.append("The run was cut short, or is still going on: cases are missing.")
    if record["dirty"]:
        found.append("Files differed from the commit, which does not say what was measured.")
    if ceilings is None:
        found.append("No ceilings were measured: there is no percent of roof.")
    elif ceilings["drift"] is None:
        found.append("The ceilings were not measured again at the end: their drift is unknown.")
    elif ceilings["drift"] > DRIFT_LIMIT:
        found.append(
            f"The ceilings drifted by {percent(ceilings['drift'])} during the run, more than "
            f"{percent(DRIFT_LIMIT)}: its first and its last times are not alike."
        )
    # the drift is said already, and in whose figures it is
    said = sorted(mark for mark in _shared_marks(record) if "drift" not in mark)
    return found + [f"Every measurement is marked: {mark}." for mark in said]


def ceilings_table(record):
    """The ceilings before and after the run, or None."""
    ceilings = record["ceilings"]
    if ceilings is None:
        return None
    table = Table("Ceilings, measured in this run", ["ceiling", "before", "after", "change"])
    after = _flat(ceilings["after"])
    for name, (before, unit) in _flat(ceilings["before"]).items():
        row = [Cell(name), Cell(rate(before, unit)), _NONE, _NONE]
        if name in after:
            change = after[name][0] / before - 1
            notes = table.note(f"over {percent(DRIFT_LIMIT)}") if abs(change) > DRIFT_LIMIT else ()
            row[2:] = Cell(rate(*after[name])), Cell(f"{100 * change:+.1f}%", notes=notes)
        table.rows.append(row)
    return table


def _flat(ceilings):
    """{name: (rate a second, unit)}."""
    if ceilings is None:
        return {}
    copies = sorted(ceilings["copy_gb_s"].items(), key=lambda item: int(item[0]))
    matrix = ceilings["matrix_tflop_s"].items()
    return (
        {copy_words(size): (1e9 * x, "B/s") for size, x in copies}
        | {f"matrix product, {dtype}": (1e12 * x, "FLOP/s") for dtype, x in matrix}
        | {"exponentials": (1e12 * ceilings["exp_t_s"], "exp/s")}
    )


def providers_table(record):
    """Versions and remarks, and why a provider did not run."""
    table = Table("Providers", ["provider", "version", "remark"])
    for name, about in record["providers"].items():
        reason = f"not available: {about['reason']}" if about["reason"] else None
        remark = "; ".join(x for x in (reason, about.get("note")) if x)
        texts = (name, about["version"] or NOTHING, remark or NOTHING)
        table.rows.append([Cell(text) for text in texts])
    return table


def left_out_lines(record):
    """[(whose and why, which cases)]: what was not measured, by reason."""
    found = {}
    for item in record["left_out"]:
        cases = found.setdefault(f"{item['provider'] or 'every provider'}: {item['reason']}", {})
        case = f"{item['op']} {item['case']} {item['dtype']}"
        cases.setdefault(case, []).append(item["direction"])
    return [
        (why, ", ".join(f"{case} {' '.join(directions)}" for case, directions in cases.items()))
        for why, cases in found.items()
    ]


def _drift(record):
    drift = (record["ceilings"] or {}).get("drift")
    if drift is None:
        return None
    over = f", over {percent(DRIFT_LIMIT)}" if drift > DRIFT_LIMIT else ""
    return percent(drift) + over


def _commit(record):
    if record["commit"] is None:
        return None
    return record["commit"][:12] + (", with changes" if record["dirty"] else "")


def _date(record):
    return datetime.fromisoformat(record["started"]).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _fact(name, value):
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{name.removesuffix('_bytes')} {bytes_words(value)}"
    return f"{name} {value}"
