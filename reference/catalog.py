"""The op catalog, one row an op: parity, error tests, compilation and benchmarks follow from it.

Adding an op is a reference module, a kernel module and a row in `rows/`: CONTRIBUTING.md.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from .oracle.op import Op


def _rows():
    """{name: Op} of all modules in `rows`, in the order of their names."""
    found = {}
    for path in sorted((Path(__file__).parent / "rows").glob("*.py")):
        if path.stem != "__init__":
            module = import_module(f".rows.{path.stem}", __package__)
            found |= {op.name: op for op in vars(module).values() if isinstance(op, Op)}
    return found


CATALOG = _rows()


def find(name):
    """The row of an op, of the catalog or of a package that names its ops under `gaugeblock.ops`.

    An entry point of that group is an `Op` or a list of them. ValueError for an unknown name.
    """
    if name in CATALOG:
        return CATALOG[name]
    others = third_party()
    if name not in others:
        raise ValueError(f"op must be one of {', '.join([*CATALOG, *others])}, got {name!r}")
    return others[name]


def third_party():
    """{name: Op} of the installed packages' entry points."""
    found = {}
    for point in entry_points(group="gaugeblock.ops"):
        ops = point.load()
        for op in [ops] if isinstance(ops, Op) else ops:
            found[op.name] = op
    return found
