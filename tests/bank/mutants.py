"""The registry of wrong kernels: each has exactly one bug and is otherwise legal.

A mutant has its op's public signature. One that keeps state between calls is a class; every check
gets a fresh instance. The modules `mutants_*.py` hold them by family.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

FAMILIES = (
    "attention", "decode", "norm", "ffn", "loss", "optimiser", "memory", "cheats",
)  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel.

    bug:    the bug bank's words.
    seen:   the values or shapes that reveal it.
    dtypes: where it is wrong by more than legal rounding.
    checks: further arguments of `check` that it takes to see it.
    cheat:  an answer that does not come from computing the op.
    after:  what it does depends on the case before, which has to be run as well.
    """

    name: str
    op: object  # a catalog name, or an Op
    fn: Callable
    bug: str
    seen: str
    dtypes: tuple = DTYPES
    checks: dict = field(default_factory=dict)
    cheat: bool = False
    after: bool = False

    def candidate(self):
        """The function to check, without memory of earlier checks."""
        return self.fn() if isinstance(self.fn, type) else self.fn


MUTANTS: dict[str, Mutant] = {}


def mutant(*ops, bug, seen, dtypes=DTYPES, checks=None, cheat=False, after=False):
    """Register a function, or a class whose instances are called, for each of the ops."""

    def register(fn):
        for op in ops:
            # CamelCase to snake_case
            own = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", fn.__name__).lower()
            name = f"{getattr(op, 'name', op)}/{own}"
            if name in MUTANTS:
                raise ValueError(f"mutant: names must be unique, got {name} twice")
            MUTANTS[name] = Mutant(name, op, fn, bug, seen, dtypes, checks or {}, cheat, after)
        return fn

    return register


def bank():
    """{name: Mutant} of every family."""
    for family in FAMILIES:
        import_module(f".mutants_{family}", __package__)
    return MUTANTS
