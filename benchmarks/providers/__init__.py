"""Who is timed: one small file for each implementation, ours among them.

A file of this folder defines `NAMES`, the names of its providers, and

    load(device) -> [Provider]      for "cpu" or "cuda"

which raises `Unavailable` with the reason where its library is missing or has nothing for that
device. Adding a peer is adding such a file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

OURS = "gaugeblock"


class Unavailable(Exception):
    """Why a provider cannot run here, in one line."""


def everything(op, case, dtype, direction):
    """The limits of a provider that has none."""
    return None


@dataclass(frozen=True)
class Provider:
    """One implementation of some ops.

    name:    what a record calls it; `gaugeblock` is ours and no other name holds that word.
    version: of the library.
    ops:     {op: function with the op's public signature}: tensors by position, options by keyword.
             An option that the function does not declare is one that it cannot do.
    limits:  limits(op, case, dtype, direction) -> why it cannot do that, or None; op is the
             catalog's row.
    note:    what the name does not say, for the report.
    """

    name: str
    version: str
    ops: dict[str, Callable]
    limits: Callable = everything
    note: str = ""

    def cannot(self, op, case, dtype, direction):
        """Why this provider is not asked for a case, or None."""
        if op.name not in self.ops:
            return f"has no {op.name}"
        undeclared = set(op.options(case)) - _declared(self.ops[op.name])
        if undeclared:
            return f"does not take {', '.join(sorted(undeclared))}"
        return self.limits(op, case, dtype, direction)


def load(device, names=None):
    """([Provider], {name: why it is not available}) on "cpu" or "cuda".

    names: those that are wanted; ours first in any case. Raises ValueError for an unknown name.
    """
    modules = [import_module(f".{m.name}", __package__) for m in iter_modules(__path__)]
    known = [name for module in modules for name in module.NAMES]
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"bench: provider must be one of {', '.join(sorted(known))}, got {name!r}"
            )
    wanted, found, missing = set(names or known), [], {}
    for module in modules:
        if not wanted & set(module.NAMES):
            continue
        try:
            found += [p for p in module.load(device) if p.name in wanted]
        except Unavailable as reason:
            missing |= {name: str(reason) for name in module.NAMES if name in wanted}
    absent = wanted - {p.name for p in found} - set(missing)
    missing |= dict.fromkeys(absent, f"has nothing for {device}")
    return sorted(found, key=lambda p: p.name != OURS), missing


def _declared(fn):
    return set(inspect.signature(fn).parameters)
