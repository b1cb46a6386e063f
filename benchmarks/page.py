"""Reports as one HTML file that asks the network for nothing and runs nothing.

Every word of a record is escaped; a content security policy in the page forbids scripts and
requests besides.
"""

from __future__ import annotations

import base64
from html import escape
from itertools import groupby

from .plots import plots
from .record import slug
from .standings import groups
from .tables import (
    RULES,
    best_table,
    ceilings_table,
    detail_table,
    doubts,
    facts,
    left_out_lines,
    name_of,
    providers_table,
    summary_table,
    tally_words,
    times_table,
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{heading}</h1></header>
<nav aria-label="Contents">
{contents}</nav>
<main>
{body}<section id="rules" aria-labelledby="rules-title">
<h2 id="rules-title">How to read this</h2>
<ul>
{rules}</ul>
</section>
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --paper: #ffffff; --ink: #1a1a1a; --soft: #555b62; --line: #d5d9dd; --band: #f4f6f8;
  --link: #005a9c; --good: #00588c; --bad: #a63c00; --warn: #fff4d6; --warn-line: #c98a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e6e6e6; --soft: #a3abb3; --line: #3a4047; --band: #1d2126;
    --link: #7cc0f5; --good: #7cc0f5; --bad: #ffa268; --warn: #33290f; --warn-line: #c98a00;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.7rem; margin: 0.5rem 0; }
h2 { font-size: 1.4rem; margin: 2.5rem 0 0.75rem; padding-top: 1rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
nav ul { margin: 0; padding: 0; list-style: none; }
nav ul ul { display: flex; flex-wrap: wrap; gap: 0 1.2rem; padding-left: 1.2rem; }
nav a { display: inline-block; padding: 0.15rem 0; }
dl { display: grid; grid-template-columns: fit-content(40%) minmax(0, 1fr); gap: 0.15rem 1rem;
  margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; }
.doubt { margin: 0.75rem 0; padding: 0.5rem 0.75rem; background: var(--warn);
  border-left: 4px solid var(--warn-line); }
.tally { font-size: 1.1rem; }
.box { overflow-x: auto; width: fit-content; max-width: 100%; margin: 0.75rem 0 0.25rem;
  border: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 0.9rem; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
caption { position: sticky; left: 0; padding: 0.4rem 0.6rem; text-align: left; font-weight: 600;
  max-width: calc(100vw - 2.2rem); }
th, td { padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap; vertical-align: top;
  border-top: 1px solid var(--line); }
th { font-weight: 600; }
tbody th { font-weight: 400; }
thead th { background: var(--band); vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--band); }
.left { text-align: left; }
.wrap { white-space: normal; min-width: 16rem; }
@media (max-width: 40rem) {
  th, td { padding: 0.3rem 0.4rem; }
  .narrow { white-space: normal; min-width: 7.5rem; }
}
.sub { display: block; color: var(--soft); font-size: 0.85em; }
.best, .faster, .slower { font-weight: 700; }
.faster { color: var(--good); }
.slower { color: var(--bad); }
ol.notes { margin: 0 0 1rem; padding-left: 2rem; color: var(--soft); font-size: 0.85rem; }
ol.notes li:target { color: var(--ink); font-weight: 700; }
sup { line-height: 0; margin-left: 0.15em; }
figure { margin: 1rem 0; }
figure .box { width: 100%; }
figure img { display: block; width: 100%; min-width: 44rem; height: auto; }
figcaption { color: var(--soft); font-size: 0.9rem; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; padding: 0.3rem 0; color: var(--link); }
@media print { .box { overflow: visible; } }
"""
# columns whose words may be folded: always, and on a phone
_FOLDED = {"remark": "wrap", "op": "narrow", "case": "narrow"}


def page(records):
    """The report of some records, as the text of one HTML file."""
    sections = [_Record(i, record) for i, record in enumerate(records, 1)]
    names = " and ".join(name_of(record) for record in records)
    return document("Benchmark", names, sections, RULES)


def document(heading, names, sections, rules):
    """One HTML file of some sections, with the rules of how to read them."""
    return _PAGE.format(
        title=escape(f"Gaugeblock: {names}"),
        heading=escape(heading),
        style=_STYLE,
        contents=listed(
            "".join(s.contents() for s in sections) + link("rules", "How to read this")
        ),
        body="".join(s.body() for s in sections),
        rules="".join(f"<li>{escape(rule)}</li>\n" for rule in rules),
    )


class Section:
    """A part of a page; the names of its places begin with its number."""

    def __init__(self, number):
        self.number, self.tables = number, 0

    def id(self, name):
        return f"record-{self.number}-{slug(name)}"

    def heading(self, name):
        return f'<h3 id="{self.id(name)}">{escape(name)}</h3>\n'

    def figures(self, light, dark):
        """Plots as SVG, for a light and for a dark page."""
        for bright, dim in zip(light, dark):
            yield (
                f'<figure>\n<div class="box" role="region" tabindex="0" '
                f'aria-label="{escape(bright.name)}"><picture>\n'
                f'<source media="(prefers-color-scheme: dark)" srcset="{_data(dim.data)}">\n'
                f'<img alt="{escape(bright.alt)}" src="{_data(bright.data)}">\n'
                f"</picture></div>\n<figcaption>{escape(bright.alt)}</figcaption>\n</figure>\n"
            )

    def table(self, table):
        self.tables += 1
        place = f"table-{self.number}-{self.tables}"
        head = "".join(
            f'<th scope="col"{_class(table, i)}>{escape(name)}</th>'
            for i, name in enumerate(table.head)
        )
        rows = "".join(f"<tr>{''.join(self.cells(table, row, place))}</tr>\n" for row in table.rows)
        notes = "".join(
            f'<li id="{place}-{i}">{escape(note)}</li>\n' for i, note in enumerate(table.notes, 1)
        )
        return (
            f'<div class="box" role="region" tabindex="0" aria-label="{escape(table.title)}">'
            f"<table><caption>{escape(table.title)}</caption>\n"
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
            + (f'<ol class="notes">\n{notes}</ol>\n' if notes else "")
        )

    def cells(self, table, row, place):
        for i, cell in enumerate(row):
            tag = 'th scope="row"' if i == 0 else "td"
            text = escape(cell.text)
            if cell.notes:
                links = (
                    f'<a href="#{place}-{n}" aria-label="note {n}">{n}</a>' for n in cell.notes
                )
                text += f"<sup>{', '.join(links)}</sup>"
            if cell.sub and cell.sub not in cell.text:
                text += f'<span class="sub">{escape(cell.sub)}</span>'
            yield f"<{tag}{_class(table, i, cell.look)}>{text}</{tag.split()[0]}>"


class _Record(Section):
    """One record."""

    def __init__(self, number, record):
        super().__init__(number)
        self.record = record
        self.ops = [(op, list(found)) for op, found in groupby(groups(record), lambda g: g.op)]

    def contents(self):
        names = ["The run", "Plots"] if self.record["entries"] else ["The run"]
        names += [op for op, _ in self.ops] + ["Not measured"] * bool(self.record["left_out"])
        inner = listed("".join(link(self.id(name), name) for name in names))
        name = f'<a href="#{self.id("top")}">{escape(name_of(self.record))}</a>'
        return f"<li>{name}\n{inner}</li>\n"

    def body(self):
        head = f'<section id="{self.id("top")}" aria-labelledby="{self.id("title")}">\n'
        head += f'<h2 id="{self.id("title")}">{escape(name_of(self.record))}</h2>\n'
        parts = [head, *(f'<p class="doubt">{escape(d)}</p>\n' for d in doubts(self.record))]
        parts.append(f'<p class="tally">{escape(tally_words(self.record))}</p>\n')
        if self.record["entries"]:
            parts.append(self.table(summary_table(self.record)))
        parts.append(self.run())
        if self.record["entries"]:
            drawn = (plots(self.record, "svg", dark=dark) for dark in (False, True))
            parts += [self.heading("Plots"), *self.figures(*drawn)]
        for op, found in self.ops:
            parts += [self.heading(op), *map(self.group, found)]
        if self.record["left_out"]:
            parts += [self.heading("Not measured"), self.left_out()]
        return "".join(parts) + "</section>\n"

    def run(self):
        rows = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n"
            for name, value in facts(self.record)
        )
        tables = (ceilings_table(self.record), providers_table(self.record))
        return f"{self.heading('The run')}<dl>\n{rows}</dl>\n" + "".join(
            self.table(table) for table in tables if table and table.rows
        )

    def group(self, group):
        return (
            self.table(best_table(self.record, group))
            + self.table(times_table(self.record, group))
            + f"<details><summary>{escape(group.title)}: every measurement</summary>\n"
            + self.table(detail_table(self.record, group))
            + "</details>\n"
        )

    def left_out(self):
        lines = "".join(
            f'<li>{escape(why)}<span class="sub">{escape(cases)}</span></li>\n'
            for why, cases in left_out_lines(self.record)
        )
        return f"<ul>\n{lines}</ul>\n"


def _class(table, column, look=""):
    names = [look] if look else []
    names += ["left"] if table.left(column) else []
    names += [_FOLDED[table.head[column]]] if table.head[column] in _FOLDED else []
    return f' class="{" ".join(names)}"' if names else ""


def link(place, name):
    """An item of a list that leads to a place."""
    return f'<li><a href="#{place}">{escape(name)}</a></li>\n'


def listed(items):
    """Items as a list."""
    return f"<ul>\n{items}</ul>\n"


def _data(svg):
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
