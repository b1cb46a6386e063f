"""Who is timed: one small file for each implementation, ours among them.

A file of this folder defines `NAMES`, the names of its providers, and

    load(device) -> [Provider]      for "cpu" or "cuda"

which raises `Unavailable` with the reason where its library is missing or has nothing for that
device. Adding a peer is adding such a file; those that begin with an underscore are shared.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pkgutil import iter_modules

import torch
from gaugeblock.reference.oracle import worker

OURS = "gaugeblock"


class Unavailable(Exception):
    """Why a provider cannot run here, in one line."""


def everything(op, case, dtype, direction):
    """The limits of a provider that has none."""
    return None


@dataclass(frozen=True, eq=False)
class Provider:
    """One implementation of some ops.

    name:    what a record calls it; `gaugeblock` is ours and no other name holds that word.
    version: of the library.
    ops:     {op: function with the op's public signature}: tensors by position, options by keyword.
             An option that the function does not declare is one that it cannot do.
    limits:  limits(op, case, dtype, direction) -> why it cannot do that, or None; op is the
             catalog's row, dtype a name such as "bfloat16". What a library finds out by itself
             it may leave to an exception.
    note:    what the name does not say, for the report.
    slow_start: whether it compiles or searches for many seconds before its first answer.
    file:    where it was imported from, if from elsewhere; `load` fills it in.
    """

    name: str
    version: str
    ops: dict[str, Callable]
    limits: Callable = everything
    note: str = ""
    slow_start: bool = False
    file: str | None = None

    def cannot(self, op, case, dtype, direction):
        """Why this provider is not asked for a case, or None."""
        if op.name not in self.ops:
            return f"has no {op.name}"
        undeclared = {*op.options(case), *case.keywords} - _declared(self.ops[op.name])
        if undeclared:
            return f"does not take {', '.join(sorted(undeclared))}"
        return self.limits(op, case, dtype, direction)


def load(device, names=None):
    """([Provider], {name: why it is not available}) on "cpu" or "cuda".

    names: those that are wanted, `module:object` for a `Provider` from elsewhere; by default all of
    this folder. Ours is first. Raises ValueError for an unknown device or name.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda, got {device!r}")
    modules = _modules()
    known = [name for module in modules for name in module.NAMES]
    names = list(names or known)
    found = [_from_elsewhere(name, known) for name in names if ":" in name]
    wanted, missing = {name for name in names if ":" not in name}, {}
    for name in sorted(wanted - set(known)):
        raise ValueError(
            f"bench: provider must be one of {', '.join(sorted(known))} or module:object, "
            f"got {name!r}"
        )
    if device == "cuda" and not torch.cuda.is_available():
        return [], dict.fromkeys(names, "needs a CUDA device, and there is none")
    for module in modules:
        if not wanted & set(module.NAMES):
            continue
        try:
            found += [p for p in module.load(device) if p.name in wanted]
        except Unavailable as reason:
            missing |= {name: str(reason) for name in module.NAMES if name in wanted}
    absent = wanted - {p.name for p in found} - set(missing)
    missing |= dict.fromkeys(sorted(absent), f"has nothing for {device}")
    return sorted(found, key=lambda p: p.name != OURS), missing


def _from_elsewhere(name, known):
    """The provider that `module:object` names. ValueError where it is none, or takes a name."""
    provider = worker.load(name, "provider")
    if not isinstance(provider, Provider):
        raise ValueError(f"bench: {name} must be a Provider, got {type(provider).__name__}")
    if provider.name in known or OURS in provider.name:
        raise ValueError(f"bench: {name} must have a name of its own, got {provider.name!r}")
    return replace(provider, file=sys.modules[name.partition(":")[0]].__file__)


def installed(package):
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def library(module, package):
    """(a module of a package that may not be here, the package's version), or `Unavailable`."""
    try:
        return import_module(module), version(package)
    except Exception as error:
        # a broken installation may raise anything
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        said = str(error).strip().split("\n")[0] or type(error).__name__
        why = "is not installed" if absent else f"cannot be imported: {said}"
        raise Unavailable(f"needs {package}, which {why}") from None


def _modules():
    return [
        import_module(f".{m.name}", __package__)
        for m in iter_modules(__path__)
        if not m.name.startswith("_")
    ]


def _declared(fn):
    return set(inspect.signature(fn).parameters)
