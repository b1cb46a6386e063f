"""`gaugeblock inspect`."""

from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def inspect(
    ops: list[str] = typer.Argument(
        None, help="Ops of the catalog, all by default; or one kernel of yours, module:function."
    ),
    target: list[str] = typer.Option(
        None,
        help="sm_80, sm_90 (the default), sm_100 or gfx942; several stand side by side.",
    ),
    dtype: str = typer.Option(
        None, help="For ops: float32, float16 or bfloat16, which is the default."
    ),
    case: list[str] = typer.Option(None, help="Only these cases of the ops."),
    signature: str = typer.Option(
        None, help='For your kernel: types of its parameters in order, "*bf16:16,i32,fp32".'
    ),
    constexpr: list[str] = typer.Option(None, help="For your kernel: NAME=VALUE."),
    num_warps: int = typer.Option(None, help="For your kernel."),
    num_stages: int = typer.Option(None, help="For your kernel."),
    against: str = typer.Option(
        None, help="A git revision: its launches, compiled in a worktree, beside those of now."
    ),
    ceilings: Path = typer.Option(
        None,
        help="For ops: what gaugeblock ceilings --json wrote, or a record; by default the "
        "datasheet's.",
    ),
    what_if: bool = typer.Option(
        False, "--what-if", help="Occupancy with more warps, fewer stages, fewer registers."
    ),
    gate: Path = typer.Option(
        None, help="A TOML or JSON file of your kernels and their limits, instead of all the above."
    ),
    update: bool = typer.Option(
        False, "--update", help="With --gate: write the present figures as limits."
    ),
    lines: bool = typer.Option(
        False, "--lines", help="Say how many instructions come from each line of Python."
    ),
    save: Path = typer.Option(
        None, help="A folder for TTIR, TTGIR, PTX and SASS with its Python lines, one a launch."
    ),
    json: Path = typer.Option(None, help="Write the rows here as JSON."),
    markdown: Path = typer.Option(None, help="Write the tables here as Markdown."),
):
    """Compile kernels for a GPU that need not be there, and read what the compiler made.

    Exit 1 when a kernel does not compile, spills registers in a loop, needs more shared memory than
    the chip has or runs its products beside the matrix units; with --gate, when one is over a limit
    of the file.
    """
    from .run import Asked, hold, run

    if update and not gate:
        raise ValueError("inspect: --update goes with --gate FILE, got none")
    words = {
        "ops": ops, "targets": target, "dtype": dtype, "cases": case, "signature": signature,
        "constexprs": constexpr, "num_warps": num_warps, "num_stages": num_stages,
        "against": against, "ceilings": ceilings, "what_if": what_if or None,
    }  # fmt: skip
    words = {name: given for name, given in words.items() if given not in (None, [])}
    if gate and words:
        raise ValueError(
            f"inspect: --gate names its own kernels, got {next(iter(words))} beside it"
        )
    found = hold(gate, renew=update) if gate else run(Asked(**words))
    if lines:
        found.by_line()
    _finish(found, save, json, markdown)


def _finish(found, save, json, markdown):
    """Print, write, and exit with the verdict."""
    if save:
        found.save_artefacts(save)
    if json:
        found.save(json)
    if markdown:
        found.save_markdown(markdown)
    console = Console()
    # where lines may be as long as they like, none is broken
    console = console if console.is_terminal else Console(width=250)
    for table in (table for table in found.tables if table.rows):
        shown = Table(*map(escape, table.head), title=escape(table.title))
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
    raise typer.Exit(0 if found.passed else 1)
