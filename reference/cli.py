"""`gaugeblock check` and `gaugeblock golden`."""

import os
from dataclasses import replace
from pathlib import Path

import typer

from .catalog import CATALOG, find

app = typer.Typer()


@app.command()
def check(
    op: str = typer.Argument(
        help=f"An op of the catalog ({', '.join(CATALOG)}), gpt, or your own Op, as module:name."
    ),
    candidate: str = typer.Argument(
        help="Your function, as module:function; for gpt, what loads your model from a directory."
    ),
    dtype: list[str] = typer.Option(
        ["float32"], help="float32, tf32, float16, bfloat16, e4m3, e5m2; give it again for more."
    ),
    device: str = typer.Option("cpu", help="Where the tensors lie: cpu, cuda, …"),
    cases: str = typer.Option(
        "quick", help="quick, full, or bench: the shapes that are timed, some of each result."
    ),
    expression: str = typer.Option(
        None, "-k", help='Cases by tag, name or option: "causal and not window".'
    ),
    layout: list[str] = typer.Option(
        None,
        help="contiguous, transposed, sliced, expanded, offset, broadcast_grad; or bthd, for a "
        "function of (B, T, H, D). By default contiguous and one other for each case.",
    ),
    framework: str = typer.Option("torch", help="torch, numpy, jax or cupy."),
    backward: bool = typer.Option(True, help="Check the gradients too."),
    gradient: str = typer.Option(
        None,
        help="Your backward(do, *inputs, **options), as module:function, in place of autograd.",
    ),
    deterministic: bool = typer.Option(False, help="Hold it to the same bits on every run."),
    batch_invariant: bool = typer.Option(
        False, help="Hold a row of the batch to the same bits with and without the others."
    ),
    timeout: float = typer.Option(None, help="Seconds that one call may take."),
    shrink: bool = typer.Option(True, help="Look for the smallest failing shape, 30 s in all."),
    seed: int = typer.Option(0, help="Seed of the inputs."),
    json: Path = typer.Option(None, help="Write the report here as JSON."),
    junit: Path = typer.Option(None, help="Write the report here as JUnit XML."),
    markdown: Path = typer.Option(None, help="Write a summary here as Markdown."),
    repro: Path = typer.Option(
        None, help="Write each failure to this folder, as a file that runs."
    ),
):
    """Check a kernel against the float64 reference.

    Every output and gradient of every case is held against an error budget that is derived from the
    dtype and the formula. The candidate runs in a process of its own: a hang or a crash is a
    failure of its case. Where $GITHUB_STEP_SUMMARY is set, the summary is added there. Exit 0:
    right. 1: wrong. 2: no verdict.
    """
    from .oracle.result import expect_report_path

    forms = {".json": json, ".xml": junit, ".md": markdown}
    for suffix, path in forms.items():
        if path:
            expect_report_path(path, suffix)
    if gradient and not backward:
        raise ValueError("check: gradient must come with backward, got --no-backward; leave one")
    settings = {
        "dtypes": tuple(dtype),
        "device": device,
        "seed": seed,
        "backward": gradient or backward,
        "timeout": timeout,
    }
    if op == "gpt":
        from .oracle.worker import check_apart

        for name, value in (
            ("layout", layout), ("framework", framework != "torch"), ("gradient", gradient),
            ("deterministic", deterministic), ("batch-invariant", batch_invariant),
            ("repro", repro),
        ):  # fmt: skip
            if value:
                raise ValueError(
                    f"check: {name} must be left out for gpt: a model has no such check"
                )
        report = check_apart(op, candidate, **settings, expression=expression)
    else:
        settings |= {
            "cases": cases,
            "framework": framework,
            "layouts": tuple(layout) if layout else None,
            "expression": expression,
            "deterministic": deterministic,
            "batch_invariant": batch_invariant,
            "shrink": shrink,
            "memory": True,
        }
        report = _check_op(op, candidate, settings, repro)
    _write(report, forms)
    raise typer.Exit(0 if report.passed else 1)


def _check_op(op, candidate, settings, repro):
    from .oracle.repro import write_repro
    from .oracle.worker import check_apart, load, search_working_folder

    report = check_apart(op, candidate, **settings)
    search_working_folder()
    if repro and settings["framework"] in ("torch", "numpy"):
        row = load(op, "op") if ":" in op else find(op)
        seen = set()
        for i, r in enumerate(report.results):
            # a case of the timed sizes is no file
            whole = settings["cases"] == "bench" and not r.smallest
            if r.passed or whole or (r.case, r.dtype) in seen:
                continue
            seen.add((r.case, r.dtype))
            path = write_repro(
                repro,
                row,
                r,
                candidate,
                framework=settings["framework"],
                device=settings["device"],
                backward=settings["backward"],
                seed=settings["seed"],
            )
            report.results[i] = replace(r, repro=str(path))
    return report


def _write(report, forms):
    from .report import print_report

    for path in filter(None, forms.values()):
        report.save(path)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with open(summary, "a") as file:
            file.write(report.markdown())
    print_report(report)


@app.command()
def golden(
    folder: Path = typer.Argument(help="Where the files go."),
    ops: list[str] = typer.Argument(None, help="Ops of the catalog; all by default."),
    dtype: list[str] = typer.Option(["float32"], help="Dtypes, as for check."),
    cases: str = typer.Option("quick", help="quick or full."),
    expression: str = typer.Option(None, "-k", help="Cases, as for check."),
    seed: int = typer.Option(0, help="Seed of the inputs."),
):
    """Write golden vectors: inputs, exact outputs and gradients, and error budgets.

    One safetensors file for each case and dtype, and a manifest with options and SHA-256 sums.
    """
    from .oracle.golden import write_golden

    rows = [find(name) for name in ops] if ops else list(CATALOG.values())
    manifest = write_golden(folder, rows, tuple(dtype), cases, expression, seed)
    print(f"{len(manifest['entries'])} files and manifest.json in {folder}")
