"""What the plots share: colours, markers, panels, legends, ceilings.

Colours are Okabe and Ito's, which colour-blind people tell apart; every provider has a marker and a
line style besides.
"""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .providers import OURS
from .words import prefix_of

WIDTH_IN = 10
BLUE, ORANGE = "#0072B2", "#E69F00"
# without yellow, which a white page swallows
_COLOURS = (ORANGE, "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
_MARKERS = "sD^v<>Xp*Pdh"
_LINES = ("--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
# the key to filled and hollow, whatever their colours
GREY = dict(color="#808080", marker="o", ls="none")


def style(dark):
    """Settings of matplotlib for a light or a dark page."""
    ink, paper, grid = "#1a1a1a", "#ffffff", "#dcdcdc"
    if dark:
        ink, paper, grid = "#e6e6e6", "#15181c", "#3a4047"
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return dict.fromkeys(inked, ink) | {
        "figure.facecolor": paper, "axes.facecolor": paper, "savefig.facecolor": paper,
        "axes.grid": True, "grid.color": grid, "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True,
        "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9.5,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "lines.markersize": 6.5, "lines.linewidth": 1.5,
        # names come from the record: a dollar is a dollar
        "text.parse_math": False,
        # the names inside of an SVG file, else of chance
        "svg.hashsalt": "gaugeblock",
    }  # fmt: skip


def looks(record):
    """{provider: how its points and lines are drawn}, the same in every plot of a record."""
    peers = sorted({entry["provider"] for entry in record["entries"]} - {OURS})
    return {OURS: look(0)} | {name: look(i) for i, name in enumerate(peers, 1)}


def look(i):
    """The i-th of many looks: a filled blue circle first."""
    if i == 0:
        return dict(color=BLUE, marker="o", ls="-")
    cycles = dict(color=_COLOURS, marker=_MARKERS, ls=_LINES)
    return {name: cycle[(i - 1) % len(cycle)] for name, cycle in cycles.items()}


def hollow(look):
    return look | dict(mfc="none", mew=1.4)


def filled(look):
    return look | dict(mec=matplotlib.rcParams["text.color"], mew=0.5)


def panels(count, columns, height_in, below_in):
    """(figure, axes) of so many panels in at most so many columns."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH_IN, height_in * rows + below_in))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def unit_of(entries):
    """(divisor, unit) of the arithmetic rates of some entries."""
    scale, prefix = prefix_of(max(1e12 * entry["tflop_s"] for entry in entries))
    return scale, f"{prefix}FLOP/s"


def copies(record):
    """[(size, bytes a second, line style)]: of the largest copy, and of a faster one, a cache's."""
    rates = record["ceilings"]["before"]["copy_gb_s"] if record["ceilings"] else {}
    sizes = dict.fromkeys([max(rates, key=int), max(rates, key=rates.get)]) if rates else ()
    return [(size, 1e9 * rates[size], ls) for size, ls in zip(sizes, ("-", ":"))]


def matrix_rate(record, dtype):
    """Flops a second; None where that dtype's ceiling was not measured."""
    rates = record["ceilings"]["before"]["matrix_tflop_s"] if record["ceilings"] else {}
    return 1e12 * rates[dtype] if dtype in rates else None


def roof_look(ls):
    return dict(color=matplotlib.rcParams["text.color"], ls=ls, lw=1.2)


def key(label, look, line=False):
    """A legend's handle: a point, or a line where the look has no marker."""
    ls = look["ls"] if line or "marker" not in look else "none"
    return Line2D([], [], label=label, **look | dict(ls=ls))


def legend(figure, handles):
    """Below the panels, in as many columns as the longest name allows."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, int(0.95 * WIDTH_IN / (0.08 * longest + 0.55)))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))
