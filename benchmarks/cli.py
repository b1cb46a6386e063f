"""`gaugeblock bench`, `compare`, `ceilings` and `report`."""

import time
from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def bench(
    ops: list[str] = typer.Argument(None, help="Ops of the catalog; all by default."),
    suite: str = typer.Option(
        "quick", help="quick: the GPT family's shapes; full: large ones and sweeps too."
    ),
    providers: str = typer.Option(
        None, help="Names, joined by commas; all that are available by default."
    ),
    dtype: list[str] = typer.Option(
        None, help="float32, float16, bfloat16; bfloat16 on a GPU, float32 on a CPU by default."
    ),
    direction: str = typer.Option("both", help="fwd, bwd or both."),
    out: Path = typer.Option(None, help="A folder for record.json; one under runs/ by default."),
    budget_s: float = typer.Option(
        None, help="Seconds for everything; 480 on a GPU, 60 on a CPU by default."
    ),
    seed: int = typer.Option(0, help="Seed of the inputs and of the order."),
):
    """Time the kernels and their peers, on a GPU if there is one.

    Nothing is timed that is not right at the very shape. What did not fit into the time, and why a
    provider is missing, is in the record. Exit 1: one of Gaugeblock's own kernels was refused.
    """
    # the imports take seconds of it
    since = time.monotonic()
    from gaugeblock.reference.oracle.worker import search_working_folder

    from .bench import bench as run
    from .providers import OURS
    from .report import print_record

    search_working_folder()

    names = [name for name in providers.split(",") if name] if providers else None
    record = run(
        ops or (), suite=suite, providers=names, dtypes=dtype, direction=direction, out=out,
        budget_s=budget_s, seed=seed, since=since,
    )  # fmt: skip
    print_record(record)
    wrong = any(x["provider"] == OURS and x["refused"] for x in record["left_out"])
    raise typer.Exit(1 if wrong else 0)


# of `compare`, without a meaning for records
_GATE_ONLY = ("suite", "dtype", "direction", "case", "budget_s", "check", "seed")


@app.command()
def compare(
    context: typer.Context,
    sides: list[Path] = typer.Argument(
        None,
        metavar="A B",
        help="Records, or folders with those of several runs. With --gate: ops of the catalog.",
    ),
    gate: str = typer.Option(
        None, metavar="REF", help="Measure this commit, A, and the checkout as it is, B, here, now."
    ),
    change: float = typer.Option(0.03, help="The smallest change that matters."),
    false_alarm: float = typer.Option(
        0.01, help="How often equals may be called faster or slower, in any case."
    ),
    normalise: bool = typer.Option(
        False, "--normalise", help="Over each record's ceilings: for other devices or versions."
    ),
    accept_new: bool = typer.Option(False, "--accept-new", help="Cases of B alone are no failure."),
    accept_missing: bool = typer.Option(
        False, "--accept-missing", help="Cases of A alone are no failure."
    ),
    provider: str = typer.Option(
        "gaugeblock", help="Whose times; with --gate ours, or module:object of the working folder."
    ),
    suite: str = typer.Option("quick", help="With --gate: quick or full."),
    dtype: list[str] = typer.Option(None, help="With --gate: float32, float16, bfloat16."),
    direction: str = typer.Option("both", help="With --gate: fwd, bwd or both."),
    case: list[str] = typer.Option(None, help="With --gate: only these cases."),
    budget_s: float = typer.Option(
        None, help="With --gate: seconds; 480 on a GPU, 300 on a CPU by default."
    ),
    check: bool = typer.Option(
        True, help="With --gate: time nothing that is not right; --no-check where that is known."
    ),
    seed: int = typer.Option(None, help="With --gate: of the order."),
    json: Path = typer.Option(None, help="Write the comparison here as JSON."),
    junit: Path = typer.Option(None, help="Write it here as JUnit XML."),
    markdown: Path = typer.Option(
        None, help="Write it here as Markdown; $GITHUB_STEP_SUMMARY gets it in any case."
    ),
):
    """Is B slower than A? Same, faster, slower or cannot tell, with ratio and interval.

    Exit 0: same or faster; 1: a case is slower, wrong, missing or new; 2: cannot tell.
    """
    rates = {"change": change, "false_alarm": false_alarm, "provider": provider}
    accepted = {"accept_new": accept_new, "accept_missing": accept_missing}
    sides = sides or []
    if gate is not None:
        if normalise:
            raise ValueError("compare: --normalise goes with records, got --gate")
        from .commits import compare_commits

        found = compare_commits(
            gate, list(map(str, sides)), suite=suite, dtypes=dtype, direction=direction,
            cases=case or (), budget_s=budget_s, check=check, seed=seed, **rates, **accepted,
        )  # fmt: skip
    elif given := [name for name in _GATE_ONLY if _given(context, name)]:
        raise ValueError(f"compare: --{given[0].replace('_', '-')} goes with --gate, got records")
    elif len(sides) != 2:
        raise ValueError(f"compare: sides must be two records or folders, got {len(sides)}")
    else:
        from .compare import compare as run

        found = run(*sides, normalise=normalise, **rates, **accepted)
    found.show()
    found.write(json, junit, markdown)
    raise typer.Exit(found.exit_code)


def _given(context, name):
    return context.get_parameter_source(name).name != "DEFAULT"


@app.command()
def ceilings(
    json: Path = typer.Option(None, help="Write them here as JSON."),
    budget_s: float = typer.Option(20.0, help="Seconds."),
):
    """Measure what this device reaches: copies, matrix products, exponentials."""
    import torch

    from .ceilings import measure, save

    found = measure("cuda" if torch.cuda.is_available() else "cpu", budget_s)
    for size, rate in found["copy_gb_s"].items():
        print(f"copy of {int(size):>13,} bytes  {rate:10.1f} GB/s")
    for name, rate in found["matrix_tflop_s"].items():
        print(f"{name:>8} products          {rate:10.3f} TFLOP/s")
    print(f"exponentials               {found['exp_t_s']:10.4f} T/s")
    if json:
        save(found, json)


@app.command()
def report(
    files: list[Path] = typer.Argument(
        None,
        help="Records, or folders that hold one; the newest under runs/ by default. With "
        "--history: folders are searched to the bottom; the committed records by default.",
    ),
    history: bool = typer.Option(
        False, "--history", help="How each case's time went over the records, device by device."
    ),
    op: list[str] = typer.Option(None, help="With --history: only these ops."),
    case: list[str] = typer.Option(None, help="With --history: only these cases."),
    markdown: Path = typer.Option(None, help="Write it here as Markdown."),
    png: Path = typer.Option(None, help="Write the plots into this folder."),
    html: Path = typer.Option(None, help="Write it here as one HTML file."),
):
    """Show records: ratios to the best peer, percent of roof, plots; or their history.

    Without --markdown, --png and --html the summary is printed. Exit 2: there is no such record.
    """
    forms = {"markdown": markdown, "png": png, "html": html}
    if history:
        from .history_report import report_history

        written = report_history(files or (), ops=op or (), cases=case or (), **forms)
    else:
        from .report import report as write

        for name, given in (("--op", op), ("--case", case)):
            if given:
                raise ValueError(f"report: {name} goes with --history, got {given[0]} alone")
        written = write(files or (), **forms)
    for path in written:
        print(path)
