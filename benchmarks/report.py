"""`gaugeblock report`: a record as a terminal's table, Markdown, plots or a page."""

from __future__ import annotations

import os
from pathlib import Path

from gaugeblock.reference.report import console
from rich.markup import escape
from rich.table import Table as RichTable

from .record import NAME, load_record
from .tables import doubts, facts, name_of, summary_table, tally_words

RUNS = Path("runs")


def report(files=(), *, markdown=None, png=None, html=None):
    """Write the report of some records; the paths that were written.

    files:    records, or folders that hold one; by default the newest under runs/.
    markdown: a file; it shows the plots where `png` names a folder.
    png:      a folder for the plots.
    html:     a file that needs no other.
    Without any of the three the summary is printed. Raises ValueError for what is no record.
    """
    records = [load_record(file) for file in files or [newest()]]
    if not (markdown or png or html):
        for record in records:
            print_record(record)
        return []
    written = []
    images = [[] for _ in records]
    if png:
        several = len(records) > 1
        images = [
            save_plots(plots_of(record), Path(png), f"{i}-" if several else "")
            for i, record in enumerate(records, 1)
        ]
    written += [path for found in images for _, path in found]
    if markdown:
        from .markdown import markdown as text_of

        shown = [beside(found, markdown) for found in images]
        written.append(write(markdown, text_of(records, shown)))
    if html:
        from .page import page

        written.append(write(html, page(records)))
    return written


def newest(folder=RUNS):
    """The record that was written last, in any folder of a folder."""
    found = sorted(Path(folder).rglob(NAME), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(
            f"report: {folder} must hold a record, it holds none; run gaugeblock bench, or name one"
        )
    return found[-1]


def print_record(record):
    """The summary of a record in a terminal."""
    out = console()
    known = dict(facts(record))
    where = [f"{name} {known[name]}" for name in ("torch", "triton", "commit", "run time")]
    out.print(f"[bold]{escape(name_of(record))}[/] ({escape(', '.join(where))})", highlight=False)
    if record["entries"]:
        table = summary_table(record)
        print_table(out, table)
    for doubt in doubts(record):
        out.print(f"[bold yellow]doubt[/] {escape(doubt)}", highlight=False)
    if left := len(record["left_out"]):
        out.print(f"{left} not measured; the reasons are in --markdown and --html", highlight=False)
    out.print(escape(tally_words(record)), highlight=False)


_COLOURS = {"faster": "bold blue", "slower": "bold dark_orange"}


def print_table(out, table):
    """A table with its footnotes."""
    made = RichTable(title=escape(table.title))
    for i, name in enumerate(table.head):
        made.add_column(escape(name), justify="left" if table.left(i) else "right")
    for row in table.rows:
        made.add_row(*map(_rich_cell, row))
    out.print(made)
    for i, note in enumerate(table.notes, 1):
        out.print(f"[dim]{i}[/] {escape(note)}", highlight=False)


def _rich_cell(cell):
    text = escape(cell.text)
    if cell.look in _COLOURS:
        text = f"[{_COLOURS[cell.look]}]{text}[/]"
    return text + (f" [dim]({', '.join(map(str, cell.notes))})[/]" if cell.notes else "")


def plots_of(record):
    """The plots of a record; matplotlib is loaded for those who ask."""
    from .plots import plots

    return plots(record)


def save_plots(drawn, folder, prefix=""):
    """[(alternative text, path)] of some plots as PNG files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for plot in drawn:
        (folder / f"{prefix}{plot.name}.png").write_bytes(plot.data)
    return [(plot.alt, folder / f"{prefix}{plot.name}.png") for plot in drawn]


def beside(images, page):
    """[(alternative text, path as a page links it)]."""
    parent = Path(page).parent
    return [(alt, Path(os.path.relpath(path, parent)).as_posix()) for alt, path in images]


def write(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
