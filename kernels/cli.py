"""`gaugeblock inspect` and `gaugeblock tune`."""

from collections import Counter
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .sass import place

app = typer.Typer()


@app.command()
def inspect(
    ops: list[str] = typer.Argument(
        None, help="Ops of the catalog, all by default; or one kernel of yours, module:function."
    ),
    target: list[str] = typer.Option(
        ["sm_90"], help="sm_80, sm_90, sm_100 or gfx942; several stand side by side."
    ),
    dtype: str = typer.Option("bfloat16", help="float32, float16 or bfloat16, for ops."),
    case: list[str] = typer.Option(None, help="Only these cases of the ops."),
    signature: str = typer.Option(
        None, help='For your kernel: types of its parameters in order, "*bf16:16,i32,fp32".'
    ),
    constexpr: list[str] = typer.Option(None, help="For your kernel: NAME=VALUE."),
    num_warps: int = typer.Option(None, help="For your kernel."),
    num_stages: int = typer.Option(None, help="For your kernel."),
    json: Path = typer.Option(None, help="Write the rows here as JSON."),
):
    """Compile kernels for a GPU that need not be there, and read what the compiler made.

    Exit 1 when a kernel does not compile, spills registers in a loop, needs more shared memory than
    the chip has or runs its products beside the matrix units.
    """
    from .inspect import inspect as run
    from .inspect import inspect_kernel, save

    options = {"num_warps": num_warps, "num_stages": num_stages}
    _expect_together(ops or (), {"signature": signature, "constexpr": constexpr, **options}, case)
    if signature is not None:
        constants = dict(_constant(text) for text in constexpr or ())
        parts = [inspect_kernel(ops[0], signature, constants, target=t, **options) for t in target]
    else:
        parts = [run(ops or (), t, dtype, case or ()) for t in target]
    rows = [row for part in parts for row in part]
    if json:
        save(rows, json)
    console = Console()
    # where lines may be as long as they like, none is broken
    console = console if console.is_terminal else Console(width=250)
    console.print(_figures(parts, target))
    console.print(_mix(rows, parts))
    raise typer.Exit(0 if all(row["passed"] for row in rows) else 1)


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


def _expect_together(ops, own, case):
    """A user's kernel stands alone with its signature; ops have cases and none of its options."""
    mine = [name for name in ops if ":" in name]
    if mine and (len(ops) > 1 or own["signature"] is None):
        raise ValueError(f"inspect: {mine[0]} must come alone, with its --signature")
    if mine and case:
        raise ValueError(f"inspect: --case goes with ops of the catalog, got {mine[0]}")
    for name, given in own.items():
        if given not in (None, []) and not mine:
            option = name.replace("_", "-")
            raise ValueError(f"inspect: --{option} goes with a kernel module:function, got none")


def _constant(text):
    """(name, value) of NAME=VALUE."""
    from .user_kernel import constant

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"inspect: constexpr must be NAME=VALUE, got {text!r}")
    return name, constant(value)


_FIGURES = {
    "registers": lambda row: _text(row["registers"]),
    "spills": lambda row: _text(row["spills"]),
    "shared": lambda row: _text(row["shared_bytes"]),
    "programs": lambda row: _text((row["occupancy"] or {}).get("programs")),
    "occupancy": lambda row: f"{100 * row['occupancy']['share']:.3g}%" if row["occupancy"] else "–",
    "limited by": lambda row: (row["occupancy"] or {}).get("limiter", "–"),
}


def _figures(parts, targets):
    """One line a launch; the same figure of several targets stands side by side."""
    table = Table("kernel", "case", "tile", *_FIGURES, "", title=" / ".join(targets))
    for launch in _side_by_side(parts):
        first = next(row for row in launch if row)
        failed = [f"{r['target']} {r['reason']}" for r in launch if r and not r["passed"]]
        table.add_row(
            first["kernel"].strip("_"),
            first["case"] if first["dtype"] else "",
            _tile(first["config"]),
            *(
                " / ".join(show(row) if row else "–" for row in launch)
                for show in _FIGURES.values()
            ),
            f"[bold red]{escape('; '.join(failed))}[/]",
        )
    return table


def _side_by_side(parts):
    """[the rows of one launch, by target], None where a target has no such launch."""
    launches = {}
    for number, rows in enumerate(parts):
        met = Counter()
        for row in rows:
            name = row["op"], row["case"], row["kernel"]
            met[name] += 1
            launches.setdefault((*name, met[name]), [None] * len(parts))[number] = row
    return list(launches.values())


def _mix(rows, parts):
    """Counts of instructions; the targets of a launch stand one above the other."""
    names = sorted({name: None for row in rows for name in row["instructions"]}, key=place)
    table = Table("kernel", "case", "tile", "target", *(name.replace(".", "\n.") for name in names))
    for row in (row for launch in _side_by_side(parts) for row in launch if row):
        table.add_row(
            row["kernel"].strip("_"),
            row["case"] if row["dtype"] else "",
            _tile(row["config"]),
            row["target"],
            *(_text(row["instructions"].get(name, "")) for name in names),
        )
    return table


def _tile(config):
    sizes = "×".join(str(v) for k, v in config.items() if k.startswith("BLOCK"))
    note = config.get("EPILOGUE", "")
    return f"{sizes} {note}".strip()


def _text(value):
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else value
