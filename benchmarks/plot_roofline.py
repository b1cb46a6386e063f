"""Rooflines: arithmetic rate over flops per byte, under the ceilings of the record."""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .plot_parts import (
    GREY,
    WIDTH_IN,
    copies,
    filled,
    hollow,
    key,
    legend,
    look,
    looks,
    matrix_rate,
    panels,
    roof_look,
    unit_of,
)
from .providers import OURS
from .standings import has_ours, opponents
from .words import DIRECTIONS, copy_words, plain, rate

# sideways from one point to the next, so that points of one intensity are seen apart
_STEP = 1.05
# an axis over more than this is ticked at powers of ten alone
_LONG_AXIS = 200


def of_all_ops(record, dtype, chosen):
    """Every op in one picture: ours, or the fastest, filled, and the best of the others hollow."""
    ours = has_ours(record)
    points = {}
    for group in chosen:
        for entries in group.cases.values():
            for entry, draw in zip(opponents(entries, ours), (filled, hollow)):
                if entry and _intensity(entry):
                    points.setdefault(group.direction, []).append((entry, draw))
    if not points:
        return
    every = [entry for found in points.values() for entry, _ in found]
    ops = list(dict.fromkeys(entry["op"] for entry in every))
    scale, unit = unit_of(every)
    figure = Figure(figsize=(WIDTH_IN, 6))
    grid = figure.subplots(1, len(points), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (direction, found) in zip(grid, points.items()):
        roofs = _draw_roofs(axes, record, dtype, every, scale)
        for entry, draw in found:
            step = -0.5 if draw is filled else 0.5
            _draw_point(axes, entry, scale, draw(look(ops.index(entry["op"]))), step)
        _label(axes)
        axes.set_title(DIRECTIONS[direction])
    grid[0].set_ylabel(unit)
    who = (OURS, "best peer") if ours else ("the fastest", "the next")
    handles = [key(op, filled(look(i))) for i, op in enumerate(ops)]
    handles += [key(f"filled: {who[0]}", filled(GREY)), key(f"hollow: {who[1]}", hollow(GREY))]
    legend(figure, handles + roofs)
    yield (
        "roofline",
        f"Roofline of every op under the measured ceilings: {who[0]} filled, {who[1]} hollow.",
        figure,
    )


def of_each_op(record, dtype, chosen):
    """For each op one case with every provider: forward filled, backward hollow."""
    ops = dict.fromkeys(group.op for group in chosen)
    found = {op: case for op in ops if (case := richest_case(chosen, op))[1]}
    if not found:
        return
    look_of = looks(record)
    figure, grid = panels(len(found), 3, height_in=3.2, below_in=1.5)
    for axes, (op, (words, entries)) in zip(grid, found.items()):
        scale, unit = unit_of(entries)
        roofs = _draw_roofs(axes, record, dtype, entries, scale)
        here = sorted({entry["provider"] for entry in entries}, key=list(look_of).index)
        for entry in entries:
            draw = filled if entry["direction"] == "fwd" else hollow
            step = here.index(entry["provider"]) - (len(here) - 1) / 2
            _draw_point(axes, entry, scale, draw(look_of[entry["provider"]]), step)
        _label(axes)
        axes.set_ylabel(unit)
        axes.set_title(f"{op}\n{textwrap.fill(words, 40)}", fontsize=9.5)
    seen = {entry["provider"] for _, entries in found.values() for entry in entries}
    handles = [key(name, filled(x)) for name, x in look_of.items() if name in seen]
    directions = {entry["direction"] for _, entries in found.values() for entry in entries}
    meaning = (("fwd", "filled: forward", filled), ("bwd", "hollow: backward", hollow))
    handles += [key(words, draw(GREY)) for d, words, draw in meaning if d in directions]
    legend(figure, handles + roofs)
    yield (
        "rooflines_by_op",
        "Rooflines of one case of each op with every provider, forward filled, backward hollow, "
        "set a little aside of each other.",
        figure,
    )


def _intensity(entry):
    """Flops per byte; None where a roofline has no place for the entry."""
    return entry["flops"] / entry["bytes"] if entry["flops"] and entry["bytes"] else None


def richest_case(chosen, op):
    """(shape in words, entries) of the case of an op that most ran; of such, the most flops."""
    cases = {}
    for group in chosen:
        if group.op == op:
            for case, entries in group.cases.items():
                found = cases.setdefault(case, (group.words(case), []))[1]
                found += [entry for entry in entries.values() if _intensity(entry)]
    return max(cases.values(), key=lambda c: (len(c[1]), sum(entry["flops"] for entry in c[1])))


def _draw_point(axes, entry, scale, look, step):
    x = _intensity(entry) * _STEP**step
    axes.plot(x, 1e12 * entry["tflop_s"] / scale, **look | dict(ls="none"))


def _draw_roofs(axes, record, dtype, entries, scale):
    """Draw the ceilings over the entries' intensities and set the limits; the legend's handles."""
    xs = [_intensity(entry) for entry in entries]
    ys = [1e12 * entry["tflop_s"] / scale for entry in entries]
    # at least a decade: a single intensity stands in the middle
    reach = max(2.0, (10 * min(xs) / max(xs)) ** 0.5)
    low, high = min(xs) / reach, max(xs) * reach
    handles, tops = [], []
    matrix = matrix_rate(record, dtype)
    flat = matrix / scale if matrix else float("inf")
    for size, bandwidth, ls in copies(record):
        slope, line = bandwidth / scale, roof_look(ls)
        bend = min(flat / slope, high)
        if bend > low:
            axes.plot([low, bend], [slope * low, slope * bend], **line)
        tops.append(min(slope * high, flat))
        handles.append(key(f"{copy_words(size)}: {rate(bandwidth, 'B/s')}", line))
    if matrix:
        axes.plot([low, high], [flat, flat], **roof_look("--"))
        handles.append(key(f"matrix product: {rate(matrix, 'FLOP/s')}", roof_look("--")))
    # a matrix ceiling that no copy reaches here stays outside, else it would squeeze the points
    top = max([*ys, *tops, *([flat] if matrix and not tops else [])])
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(ys) / 2, top * 1.6))
    return handles


def _label(axes):
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1,) if high / low > _LONG_AXIS else (1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda x, _: plain(x)))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("flops / byte")
