"""The benchmarks' commands."""

import typer

app = typer.Typer()
