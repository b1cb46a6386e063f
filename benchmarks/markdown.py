"""Reports in GitHub's Markdown: the summary in sight, the rest folded."""

from __future__ import annotations

import html
import re

from .standings import groups
from .tables import (
    RULES,
    best_table,
    ceilings_table,
    doubts,
    facts,
    left_out_lines,
    name_of,
    providers_table,
    summary_table,
    tally_words,
    times_table,
)

# what Markdown would take for markup; an underscore inside of a word is none
_MARKUP = re.compile(r"[\\`*~|\[\]$@#!]|(?<!\w)_|_(?!\w)")


def markdown(records, images=None):
    """The whole report; `images` holds for each record [(alternative text, path)]."""
    pages = []
    for i, record in enumerate(records):
        pages.append("\n".join(_page(record, images[i] if images else [])))
    return "# Benchmark\n\n" + "\n".join(pages)


def markdown_summary(record):
    """The ratio to the best peer of each case: where it was measured, a table and its rule."""
    versions = [("torch", record["torch"]), ("triton", record["triton"])]
    where = [
        record["device"],
        *(f"{name} {version}" for name, version in versions if version),
        f"commit {dict(facts(record))['commit']}",
        dict(facts(record))["started"],
    ]
    parts = [f"{escape(', '.join(where))}.\n", *_doubts(record), f"{escape(tally_words(record))}\n"]
    if record["entries"]:
        parts += [table_text(summary_table(record)), f"<sub>{escape(' '.join(RULES[:3]))}</sub>\n"]
    return "\n".join(parts)


def table_text(table):
    """A table with its footnotes."""
    rule = ["---" if table.left(i) else "---:" for i in range(len(table.head))]
    lines = [list(map(escape, table.head)), rule, *([_cell(c) for c in r] for r in table.rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = [f"<sup>{i}</sup> {escape(note)}  \n" for i, note in enumerate(table.notes, 1)]
    return text + ("\n" + "".join(notes) if notes else "")


def escape(text):
    """Text that shows as it is, on one line."""
    text = " ".join(html.escape(text, quote=False).split())
    return _MARKUP.sub(lambda m: f"&#{ord(m[0])};", text)


def _page(record, images):
    yield f"## {escape(name_of(record))}\n"
    yield markdown_summary(record)
    for alt, path in images:
        yield f"![{escape(alt)}](<{path}>)\n"
    yield folded("The run", "\n".join(_run(record)))
    op = None
    for group in groups(record):
        if group.op != op:
            op = group.op
            body = [t for g in groups(record) if g.op == op for t in _group(record, g)]
            yield folded(op, "\n".join(body))
    if left := left_out_lines(record):
        lines = [f"- {escape(key)} ({escape(cases)})\n" for key, cases in left]
        yield folded("Not measured", "".join(lines))


def _group(record, group):
    for table in (best_table(record, group), times_table(record, group)):
        yield f"**{escape(table.title)}**\n"
        yield table_text(table)


def _run(record):
    yield "| | |\n| --- | --- |\n" + "".join(
        f"| {name} | {escape(value)} |\n" for name, value in facts(record)
    )
    for table in (ceilings_table(record), providers_table(record)):
        if table and table.rows:
            yield f"**{escape(table.title)}**\n"
            yield table_text(table)


def _doubts(record):
    return [f"> **Doubt:** {escape(doubt)}\n" for doubt in doubts(record)]


def folded(title, body):
    """A part that unfolds on a click."""
    return f"<details><summary>{escape(title)}</summary>\n\n{body}\n</details>\n"


def _cell(cell):
    text = escape(cell.text)
    if cell.look in ("best", "faster"):
        text = f"**{text}**"
    if cell.sub and cell.sub not in cell.text:
        text += f" <sub>{escape(cell.sub)}</sub>"
    return text + (f" <sup>{', '.join(map(str, cell.notes))}</sup>" if cell.notes else "")
