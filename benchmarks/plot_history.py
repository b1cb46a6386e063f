"""The history of cases as plots: medians over records, with bands from p20 to p80."""

from __future__ import annotations

from itertools import groupby

import matplotlib
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from .history import SIGNS, label, signs
from .plot_parts import filled, hollow, key, legend, looks, panels
from .providers import OURS
from .record import slug
from .words import plain

_PANELS_ON_A_PAGE = 12
# two panels side by side have room for the labels of so many records, one alone for more
_RECORDS_OF_HALF, _LABELS_OF_HALF, _LABELS_OF_WHOLE = 14, 20, 45
# from this ratio of the slowest to the fastest on, the axis is logarithmic
_WIDE = 2.5
_TICKS = (1, 1.5, 2, 3, 5, 7)
_CHANGED = dict(ls=":", lw=1.1)


def figures(history):
    """(name, alternative text, figure) of each op and dtype, on several pages where needed."""
    for (op, dtype), found in groupby(
        sorted(history.panels, key=lambda p: p.dtype), lambda p: (p.op, p.dtype)
    ):
        found = list(found)
        starts = range(0, len(found), _PANELS_ON_A_PAGE)
        for number, start in enumerate(starts, 1):
            page = f"-{number}" if len(starts) > 1 else ""
            yield (
                f"history-{slug(history.device)}-{slug(op)}-{slug(dtype)}{page}",
                f"Median time of {op} over the records, oldest at the left, a line for each "
                f"provider, with bands from p20 to p80. {history.device}, {dtype}.",
                _page(history, found[start : start + _PANELS_ON_A_PAGE], f"{op}, {dtype}"),
            )


def _page(history, shown, what):
    half = len(history.records) <= _RECORDS_OF_HALF
    figure, grid = panels(len(shown), 2 if half else 1, height_in=2.2, below_in=2.2)
    look_of = looks({"entries": [e for r in history.records for e in r["entries"]]})
    columns = 2 if half and len(shown) > 1 else 1
    for i, (axes, panel) in enumerate(zip(grid, shown)):
        for name, line in panel.lines.items():
            _draw(axes, history, line, look_of[name], name == OURS)
        for x in history.changes():
            axes.axvline(x - 0.5, color=matplotlib.rcParams["text.color"], **_CHANGED)
        _scale(axes, [e["time_ms"] for line in panel.lines.values() for e in line if e])
        axes.set_title(panel.title, loc="left", fontsize=10)
        _label(axes, history, columns, last=i + columns >= len(shown))
    figure.suptitle(f"{history.device}, {what}", fontsize=11, x=0.01, ha="left")
    legend(figure, _keys(history, shown, look_of))
    return figure


def _draw(axes, history, line, look, ours):
    """A line with its band; hollow points where the record is in doubt."""
    order = dict(zorder=4 if ours else 3)
    low, middle, high = (
        [e["time_ms"][name] if e else float("nan") for e in line] for name in ("p20", "p50", "p80")
    )
    xs = range(len(line))
    axes.fill_between(xs, low, high, color=look["color"], alpha=0.25 if ours else 0.13, lw=0)
    weight = dict(lw=2.6 if ours else 1.2, color=look["color"], ls=look["ls"])
    axes.plot(xs, middle, **weight, **order)
    size = dict(ms=6 if ours else 4.5, ls="none")
    paper = dict(mfc=matplotlib.rcParams["axes.facecolor"])
    for doubted, made in ((False, filled(look)), (True, hollow(look) | paper)):
        chosen = [x for x in xs if line[x] and bool(signs(history.records[x])) == doubted]
        if chosen:
            axes.plot(chosen, [middle[x] for x in chosen], **made | size | order)


def _scale(axes, times):
    """Milliseconds; logarithmic where providers are far apart, else what changed fills it."""
    low, high = min(t["p20"] for t in times), max(t["p80"] for t in times)
    axes.set_ylabel("ms")
    if high / low > _WIDE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(
            LogLocator(subs=_TICKS if high / low < 12 else (1, 2, 5) if high / low < 300 else (1,))
        )
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: plain(y) if y > 0 else "0"))


def _label(axes, history, columns, last):
    """Commit and day under the lowest panels, a few of them where there are too many."""
    count = len(history.records)
    step = -(-count // (_LABELS_OF_HALF if columns == 2 else _LABELS_OF_WHOLE))
    # from the newest backwards: the end of a history is what is looked at
    chosen = range(count - 1, -1, -step)
    axes.set_xlim(-0.5, count - 0.5)
    axes.xaxis.set_major_locator(FixedLocator(list(chosen)))
    names = [label(history.records[x]) for x in chosen] if last else []
    axes.set_xticklabels(names or [""] * len(chosen), rotation=90, fontsize=8)
    axes.tick_params(axis="x", length=3)


def _keys(history, shown, look_of):
    seen = {name for panel in shown for name in panel.lines}
    found = []
    for name, look in look_of.items():
        if name in seen:
            weight = dict(lw=2.6 if name == OURS else 1.2)
            found.append(key(name, filled(look) | weight, line=True))
    ink = dict(color=matplotlib.rcParams["text.color"])
    if history.changes():
        found.append(key("versions changed", _CHANGED | ink))
    said = "".join(map(signs, history.records))
    doubted = dict(color="#808080", marker="o", ls="none")
    found += [
        key(f"{sign} {short}", hollow(doubted))
        for sign, (short, _) in SIGNS.items()
        if sign in said
    ]
    return found
