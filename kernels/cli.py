"""`gaugeblock inspect` and `gaugeblock tune`."""

from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .inspect.cli import inspect

app = typer.Typer()
app.command()(inspect)


@app.command()
def tune(
    op: str = typer.Argument(help="An op whose launch configurations are a table."),
    dtype: str = typer.Option("bfloat16", help="float32, float16 or bfloat16."),
    only: list[str] = typer.Option(
        None, help="Only these rows: head_dim=64. The same field twice: either; two fields: both."
    ),
    kernel: list[str] = typer.Option(None, help="--only kernel=…"),
    head_dim: list[str] = typer.Option(None, help="--only head_dim=…"),
    causal: bool = typer.Option(None, help="--only causal=true, or false."),
    queries: list[str] = typer.Option(None, help="--only queries=…"),
    budget_s: float = typer.Option(None, help="Seconds; until it is done by default."),
    log: Path = typer.Option(
        None, help="Every attempt, as JSON; runs/tune/OP.json by default.", show_default=False
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Say what would be measured; needs no GPU."
    ),
    architecture: str = typer.Option(
        None, help="With --dry-run: sm_80 or sm_90; this machine's by default."
    ),
):
    """Measure launch configurations on this GPU, and rewrite the table that the kernels use.

    Each row of the table is measured against other tiles, warps and stages, none of which is timed
    before its answers are right. One that is faster by more than 1% takes the row's place; the row
    then says on what it was measured, and its time. The table is written after each row, and rows
    that were never measured come first: a session that is cut off can be continued.
    """
    from .tune import module, plan
    from .tune import tune as run

    short = {"kernel": kernel, "head_dim": head_dim, "queries": queries}
    only = [*(only or ()), *(f"{name}={x}" for name, given in short.items() for x in given or ())]
    filters = {"dtype": dtype, "only": _fields(only)}
    if causal is not None:
        filters["only"].setdefault("causal", []).append(str(causal).lower())
    console = Console()
    console = console if console.is_terminal else Console(width=250)
    wrong = False
    if dry_run:
        rows = plan(op, architecture=architecture, **filters)[1]
        table = Table("row", "candidates", title=f"{op}: {len(rows)} rows")
        for row in rows:
            key = {name: row[name] for name in module(op).KEY}
            table.add_row(_row_name(key), str(len(module(op).candidates(row))))
    else:
        if architecture is not None:
            raise ValueError(f"tune: --architecture goes with --dry-run, got {architecture}")
        log = log or Path("runs") / "tune" / f"{op}.json"
        outcomes = run(op, budget_s=budget_s, log=log, **filters)
        table = _outcomes(outcomes)
        # a row that is wrong or does not run is what a user must hear of
        wrong = any("own row" in (outcome["reason"] or "") for outcome in outcomes)
    console.print(table)
    raise typer.Exit(1 if wrong else 0)


def _fields(only):
    """{field: [its values]} of FIELD=VALUE texts."""
    fields = {}
    for given in only:
        name, equals, value = given.partition("=")
        if not equals:
            raise ValueError(f"tune: only must be FIELD=VALUE, got {given!r}")
        fields.setdefault(name, []).append(value)
    return fields


def _row_name(key):
    """As --only takes it."""
    from .tune import text

    return " ".join(f"{name}={text(value)}" for name, value in key.items())


def _outcomes(outcomes):
    """One line a row of the table that was to be measured."""
    replaced = sum(outcome["replaced"] for outcome in outcomes)
    table = Table(
        "row", "shipped ms", "best ms", "ratio", "configuration",
        title=f"{replaced} of {len(outcomes)} rows replaced",
    )  # fmt: skip
    for outcome in outcomes:
        shipped, best = outcome["shipped_ms"], outcome["best_ms"]
        times = ("–",) * 3
        if best is not None:
            times = f"{shipped:.4g}", f"{best:.4g}", f"{best / shipped:.3f}"
        launch = " ".join(f"{k}={v}" for k, v in outcome["configuration"].items())
        table.add_row(_row_name(outcome["key"]), *times, escape(outcome["reason"] or launch))
    return table
