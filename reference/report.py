"""Reports for a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .oracle.result import describe

# where nothing tells the width, as in a log, a table must not be folded at 80 columns
_LOG_WIDTH = 140


def console():
    """A console as wide as the terminal, and wide enough in a log."""
    out = Console()
    return out if out.is_terminal else Console(width=_LOG_WIDTH)


def worst_of(results, keys):
    """The result closest to or furthest past its budget, for each value of the keys."""
    worst = {}
    for r in results:
        key = tuple(getattr(r, k) for k in keys)
        if key not in worst or r.ratio > worst[key].ratio:
            worst[key] = r
    return list(worst.values())


def worst_table(results, keys=("op", "case"), title=None):
    """One line for each value of the keys: its worst tensor, error against budget."""
    table = Table(
        "kernel", "case", "worst dtype", "layout", "tensor", "error", "budget", "of it", title=title
    )
    for r in worst_of(results, keys):
        verdict = f"{100 * r.ratio:.0f}%" if r.passed else f"[bold red]WRONG: {r.kind}[/]"
        error, budget = binding(r)
        table.add_row(
            r.op, r.case, r.dtype, r.layout, r.output, _figure(error), _figure(budget), verdict
        )
    return table


def binding(r):
    """(error, budget) of the criterion that comes closest: the worst element's, or the RMS."""
    if r.error is not None and r.ratio * r.budget > r.error:
        return r.rms_error, r.rms_budget
    return r.error, r.budget


def print_report(report):
    """The table of a report, its failures in words, and the verdict."""
    out = console()
    title = escape(f"{report.op}: {report.candidate}")
    out.print(worst_table(report.results, ("case", "dtype", "layout"), title))
    for r in report.failures:
        out.print(f"[bold red]wrong[/] {escape(describe(r))}", highlight=False)
    for line in report.not_checked:
        out.print(f"not checked: {escape(line)}", highlight=False)
    wrong = len(report.failures)
    verdict = "right" if report.passed else f"WRONG in {wrong} of {len(report.results)}"
    out.print(
        f"{report.op}: {verdict} ({len(report.results)} tensors compared, seed {report.seed})"
    )


def _figure(x):
    return "" if x is None else f"{x:.2e}"
