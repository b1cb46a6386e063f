"""`gaugeblock bench`, `gaugeblock ceilings` and `gaugeblock report`."""

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
        None, help="Records, or folders that hold one; the newest under runs/ by default."
    ),
    markdown: Path = typer.Option(None, help="Write it here as Markdown."),
    png: Path = typer.Option(None, help="Write the plots into this folder."),
    html: Path = typer.Option(None, help="Write it here as one HTML file."),
):
    """Show records: ratios to the best peer, percent of roof, plots.

    Without --markdown, --png and --html the summary is printed. Exit 2: there is no such record.
    """
    from .report import report as write

    for path in write(files or (), markdown=markdown, png=png, html=html):
        print(path)
