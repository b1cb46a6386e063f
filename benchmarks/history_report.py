"""`gaugeblock report --history`: histories in a terminal, as Markdown, plots or a page."""

from __future__ import annotations

from html import escape as html_escape
from itertools import groupby
from pathlib import Path

from gaugeblock.reference.report import console
from rich.markup import escape as rich_escape

from .history import RULES, histories, records_table, summary_table, times_table
from .report import beside, print_table, save_plots, write


def report_history(files=(), *, ops=(), cases=(), markdown=None, png=None, html=None):
    """Write the history of each case over some records; the paths that were written.

    files:       records, or folders with records anywhere below; the committed ones by default.
    ops, cases:  only these.
    markdown, png, html: as `report` takes them; without any of the three a summary is printed.
    Raises ValueError where there is no record, or none with such an op and case.
    """
    found = histories(files, ops, cases)
    if not (markdown or png or html):
        for history in found:
            _print(history)
        for rule in RULES:
            console().print(f"[dim]{rich_escape(rule)}[/]", highlight=False)
        return []
    written, images = [], [[] for _ in found]
    if png:
        from .plots import history_plots

        images = [save_plots(history_plots(history), Path(png)) for history in found]
        written = [path for drawn in images for _, path in drawn]
    if markdown:
        shown = [beside(drawn, markdown) for drawn in images]
        written.append(write(markdown, history_markdown(found, shown)))
    if html:
        written.append(write(html, history_page(found)))
    return written


def _print(history):
    out = console()
    if history.alone:
        out.print(rich_escape(history.alone), highlight=False)
    print_table(out, summary_table(history))
    print_table(out, records_table(history))


def history_markdown(found, images=None):
    """Histories in GitHub's Markdown; `images` holds for each [(alternative text, path)]."""
    pages = [_markdown(h, images[i] if images else []) for i, h in enumerate(found)]
    return "# History\n\n" + "\n".join(line for page in pages for line in page)


def _markdown(history, images):
    from .markdown import escape, folded, table_text

    yield f"## {escape(history.device)}\n"
    if history.alone:
        yield f"{escape(history.alone)}\n"
    yield table_text(summary_table(history))
    yield f"<sub>{escape(' '.join(RULES))}</sub>\n"
    for alt, path in images:
        yield f"![{escape(alt)}](<{path}>)\n"
    yield folded("The records", table_text(records_table(history)))
    for op, panels in groupby(history.panels, lambda panel: panel.op):
        tables = (times_table(history, panel) for panel in panels)
        yield folded(op, "\n".join(f"**{escape(t.title)}**\n\n{table_text(t)}" for t in tables))


def history_page(found):
    """Histories as the text of one HTML file."""
    from .page import Section, document, link, listed
    from .plots import history_plots

    class Device(Section):
        def __init__(self, number, history):
            super().__init__(number)
            self.history = history

        def contents(self):
            ops = dict.fromkeys(panel.op for panel in self.history.panels)
            names = ["The records", "Plots", *ops]
            inner = listed("".join(link(self.id(name), name) for name in names))
            top = f'<a href="#{self.id("top")}">{html_escape(self.history.device)}</a>'
            return f"<li>{top}\n{inner}</li>\n"

        def body(self):
            return "".join(self.parts())

        def parts(self):
            history = self.history
            yield f'<section id="{self.id("top")}" aria-labelledby="{self.id("title")}">\n'
            yield f'<h2 id="{self.id("title")}">{html_escape(history.device)}</h2>\n'
            if history.alone:
                yield f'<p class="tally">{html_escape(history.alone)}</p>\n'
            yield self.table(summary_table(history))
            yield self.heading("Plots")
            yield from self.figures(
                *(history_plots(history, "svg", dark=dark) for dark in (False, True))
            )
            yield self.heading("The records") + self.table(records_table(history))
            for op, panels in groupby(history.panels, lambda panel: panel.op):
                yield self.heading(op)
                for panel in panels:
                    yield self.table(times_table(history, panel))
            yield "</section>\n"

    names = " and ".join(history.device for history in found)
    sections = [Device(i, history) for i, history in enumerate(found, 1)]
    return document("History", names, sections, RULES)
