"""Plots of a record: rooflines, speed against length, percent of roof; and of a history.

No global state of matplotlib takes part: the same record gives the same bytes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from . import plot_history, plot_roofline
from .plot_parts import (
    BLUE,
    ORANGE,
    WIDTH_IN,
    filled,
    key,
    legend,
    looks,
    matrix_rate,
    panels,
    roof_look,
    style,
    unit_of,
)
from .providers import OURS
from .record import slug
from .standings import groups, has_ours, opponents
from .words import DIRECTIONS, percent, rate, shape_words

_DPI = 160
# what matplotlib would write into a file, and what would differ from run to run
_UNSAID = {"png": {"Software": None}, "svg": {"Creator": None, "Date": None}}
_BARS_ON_A_PAGE = 40
_LONGEST_LABEL = 66
# characters of a bar's label that one percent of the axis has room for
_LETTERS_A_PERCENT = 0.5


@dataclass(frozen=True)
class Plot:
    """name: of its file, without suffix; alt: what it shows, in a sentence; data: the file."""

    name: str
    alt: str
    data: bytes


def plots(record, form="png", dark=False):
    """The plots that the record has points for, a set for each dtype, as "png" or "svg"."""
    found = []
    drawn = (plot_roofline.of_all_ops, plot_roofline.of_each_op, _speed, _bars)
    for dtype in dict.fromkeys(entry["dtype"] for entry in record["entries"]):
        chosen = [group for group in groups(record) if group.dtype == dtype]
        where = f"{record['device']}, {dtype}"
        with matplotlib.style.context(["default", style(dark)]):
            for draw in drawn:
                for name, alt, figure in draw(record, dtype, chosen):
                    figure.suptitle(where, fontsize=11, x=0.01, ha="left")
                    data = _file(figure, form)
                    found.append(Plot(f"{name}-{slug(dtype)}", f"{alt} {where}.", data))
    return found


def history_plots(history, form="png", dark=False):
    """The plots of a history, one or more for each op and dtype, as "png" or "svg"."""
    found = []
    with matplotlib.style.context(["default", style(dark)]):
        for name, alt, figure in plot_history.figures(history):
            found.append(Plot(name, alt, _file(figure, form)))
    return found


def _file(figure, form):
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=_DPI, metadata=_UNSAID[form])
    return buffer.getvalue()


def _speed(record, dtype, chosen):
    """Attention's speed against its length: a panel for each head, mask and direction."""
    found = {}
    for group in chosen:
        if group.op == "attention":
            for entries in group.cases.values():
                for entry in entries.values():
                    _put_by_length(found, entry)
    # one length makes no line; panels of one shape stand side by side
    shapes = list(dict.fromkeys(words for words, _ in found))
    found = dict(sorted(found.items(), key=lambda item: shapes.index(item[0][0])))
    found = {panel: lines for panel, lines in found.items() if max(map(len, lines.values())) > 1}
    if not found:
        return
    look_of = looks(record)
    every = [e for lines in found.values() for line in lines.values() for e in line.values()]
    scale, unit = unit_of(every)
    figure, grid = panels(len(found), 2, height_in=3.4, below_in=1.3)
    for axes, ((words, direction), lines) in zip(grid, found.items()):
        for name in sorted(lines, key=list(look_of).index):
            _draw_line(axes, lines[name], scale, filled(look_of[name]))
        roofs = _draw_matrix_rate(axes, record, dtype, scale)
        _label_lengths(axes, {length for line in lines.values() for length in line})
        axes.set(ylabel=unit, title=f"{DIRECTIONS[direction]}, {words}")
        axes.set_ylim(bottom=0)
    seen = {entry["provider"] for entry in every}
    handles = [key(n, filled(look), line=True) for n, look in look_of.items() if n in seen]
    legend(figure, handles + roofs)
    yield (
        "speed_against_length",
        "Attention's arithmetic rate against the length T, a line for each provider, with bars "
        "from p20 to p80.",
        figure,
    )


def _put_by_length(found, entry):
    """Add an entry to {(shape, direction): {provider: {length: entry}}}, the largest batch's."""
    shape = dict(entry["shape"])
    length, keys, _ = (shape.pop(name, None) for name in ("Tq", "Tk", "B"))
    if not length or length != keys or not entry["flops"]:
        return
    lines = found.setdefault((shape_words(shape), entry["direction"]), {})
    line = lines.setdefault(entry["provider"], {})
    if length not in line or line[length]["flops"] < entry["flops"]:
        line[length] = entry


def _draw_line(axes, line, scale, look):
    xs = sorted(line)
    ys = [1e12 * line[x]["tflop_s"] / scale for x in xs]
    times = [line[x]["time_ms"] for x in xs]
    spread = [
        [y * (1 - t["p50"] / t["p80"]) for y, t in zip(ys, times)],
        [y * (t["p50"] / t["p20"] - 1) for y, t in zip(ys, times)],
    ]
    axes.errorbar(xs, ys, spread, elinewidth=1, capsize=2, **look)


def _draw_matrix_rate(axes, record, dtype, scale):
    """The matrix ceiling across a panel of rates; the legend's handles."""
    matrix = matrix_rate(record, dtype)
    if not matrix:
        return []
    axes.axhline(matrix / scale, **roof_look("--"))
    return [key(f"matrix product: {rate(matrix, 'FLOP/s')}", roof_look("--"))]


def _label_lengths(axes, lengths):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_apart(sorted(lengths))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("length T")


def _apart(lengths):
    """The lengths whose labels do not touch on a logarithmic axis."""
    kept = lengths[:1]
    for length in lengths[1:]:
        if length / kept[-1] > (lengths[-1] / lengths[0]) ** 0.09:
            kept.append(length)
    return kept


def _bars(record, dtype, chosen):
    """Percent of roof of each case: ours, or the fastest, as a bar, the best other as a mark."""
    ours = has_ours(record)
    rows = []
    for group in chosen:
        for case, entries in group.cases.items():
            entry, peer = opponents(entries, ours)
            if entry and entry["percent_of_roof"] is not None:
                rows.append((f"{group.op} {group.direction}  {group.words(case)}", entry, peer))
    pages = [rows[i : i + _BARS_ON_A_PAGE] for i in range(0, len(rows), _BARS_ON_A_PAGE)]
    for number, page in enumerate(pages, 1):
        yield (
            "percent_of_roof" + (f"-{number}" if len(pages) > 1 else ""),
            f"Percent of roof of each case: {OURS if ours else 'the fastest provider'} as a bar, "
            f"the {'best peer' if ours else 'next one'} as a diamond.",
            _page_of_bars(page, ours),
        )


def _page_of_bars(page, ours):
    figure = Figure(figsize=(WIDTH_IN, 0.27 * len(page) + 1.7))
    axes = figure.subplots()
    diamond = dict(color=ORANGE, marker="D", ls="none", ms=5.5)
    for y, (_, entry, peer) in enumerate(page):
        there = (peer or {}).get("percent_of_roof")
        axes.barh(y, entry["percent_of_roof"], height=0.72, color=BLUE)
        _label_bar(axes, y, entry, there or 0)
        if there is not None:
            axes.plot(there, y, **filled(diamond))
    highest = max(e["percent_of_roof"] or 0 for _, *both in page for e in both if e)
    axes.axvline(100, **roof_look("-"))
    axes.set_yticks(range(len(page)), [_shorter(label) for label, *_ in page])
    axes.set(xlabel="% of roof", xlim=(0, 1.03 * max(100, highest)), ylim=(len(page) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")
    names = [(peer or {}).get("provider", "") if ours else e["provider"] for _, e, peer in page]
    _label_right(axes, names, "best peer" if ours else "the fastest")
    who = (OURS, "best peer") if ours else ("the fastest", "the next")
    bar = dict(color=BLUE, lw=7, ls="-")
    legend(figure, [key(who[0], bar), key(who[1], filled(diamond))])
    return figure


def _label_bar(axes, y, entry, there):
    """The percentage inside the bar, or behind bar and mark where the bar is too short for it."""
    reached = entry["percent_of_roof"]
    words = f"{percent(reached / 100)} {entry['roof'] or ''}"
    room = len(words) / _LETTERS_A_PERCENT
    look = dict(va="center", fontsize=9, textcoords="offset points")
    if reached > room and not 0 < there < room:
        axes.annotate(words, (0, y), (6, 0), color="white", **look)
    else:
        axes.annotate(words, (max(reached, there), y), (8, 0), **look)


def _label_right(axes, names, title):
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(names)), names)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    axes.set_title(title, loc="right", fontsize=9.5)


def _shorter(label):
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"
