"""`gaugeblock inspect`."""

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer()


@app.command()
def inspect(
    ops: list[str] = typer.Argument(None, help="Ops of the catalog; all by default."),
    target: list[str] = typer.Option(["sm_90"], help="sm_80, sm_90, sm_100 or gfx942."),
    dtype: str = typer.Option("bfloat16", help="float32, float16 or bfloat16."),
    json: Path = typer.Option(None, help="Write the rows here as JSON."),
):
    """Compile the kernels for a GPU that need not be there, and read what the compiler made.

    Exit 1 when a kernel spills registers or needs more shared memory than the chip has.
    """
    from .inspect import inspect as run
    from .inspect import save

    rows = [row for name in target for row in run(ops or (), name, dtype)]
    if json:
        save(rows, json)
    table = Table(
        "kernel", "case", "tile", "target", "registers", "spills", "shared", "matrix and TMA", ""
    )
    for row in rows:
        table.add_row(
            row["kernel"].strip("_"),
            row["case"],
            _tile(row["config"]),
            row["target"],
            _text(row["registers"]),
            _text(row["spills"]),
            f"{row['shared_bytes']:,}",
            ", ".join(f"{n} {name}" for name, n in row["instructions"].items()),
            "" if row["passed"] else f"[bold red]{row['reason']}[/]",
        )
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    raise typer.Exit(0 if all(row["passed"] for row in rows) else 1)


def _tile(config):
    sizes = "×".join(str(v) for k, v in config.items() if k.startswith("BLOCK_"))
    note = config.get("EPILOGUE", "")
    return f"{sizes} {note}".strip()


def _text(value):
    return "–" if value is None else str(value)
