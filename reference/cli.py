"""`gaugeblock check`."""

import importlib
import os
import sys
from pathlib import Path

import typer

from .catalog import CATALOG

app = typer.Typer()


@app.command()
def check(
    op: str = typer.Argument(help=f"An op of the catalog: {', '.join(CATALOG)}."),
    candidate: str = typer.Argument(help="Your function, as module:function."),
    dtype: list[str] = typer.Option(
        ["float32"], help="float32, float16 or bfloat16; give it again for more."
    ),
    device: str = typer.Option("cpu", help="Where the tensors lie: cpu, cuda, …"),
    cases: str = typer.Option("quick", help="quick or full."),
    expression: str = typer.Option(
        None, "-k", help='Cases by tag, name or option: "causal and not lse".'
    ),
    layout: list[str] = typer.Option(
        ["contiguous"], help="contiguous, transposed, sliced or broadcast_grad."
    ),
    framework: str = typer.Option("torch", help="torch or numpy."),
    backward: bool = typer.Option(True, help="Check the gradients too."),
    seed: int = typer.Option(0, help="Seed of the inputs."),
    json: Path = typer.Option(None, help="Write the report here as JSON."),
):
    """Check a kernel against the float64 reference.

    Every output and gradient of every case is held against an error budget that is derived from the
    dtype and the formula. Exit 0: right. 1: wrong. 2: no verdict.
    """
    from .oracle import check as run
    from .oracle.check import expect_json
    from .report import print_report

    if json:
        expect_json(json)
    report = run(
        op,
        _load(candidate),
        backward=backward,
        dtypes=tuple(dtype),
        device=device,
        cases=cases,
        seed=seed,
        framework=framework,
        layouts=tuple(layout),
        expression=expression,
    )
    if json:
        report.save(json)
    print_report(report)
    raise typer.Exit(0 if report.passed else 1)


def _load(name):
    """The function that `module:function` names; the working folder is searched first."""
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ValueError(f"check: candidate must be module:function, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"check: candidate {module} must import, it does not: {said}") from None
    for part in function.split("."):
        if not hasattr(found, part):
            raise ValueError(f"check: {module} must define {function}, it does not")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"check: {name} must be callable, got {type(found).__name__}")
    return found
