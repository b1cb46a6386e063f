"""Ours: the kernels on CUDA, their eager twins on a CPU."""

from __future__ import annotations

import functools
import inspect

from gaugeblock.reference.catalog import CATALOG

from gaugeblock import kernels

from . import OURS, Provider, installed

NAMES = (OURS,)


def load(device):
    # by name and not "auto", which takes the twin for some dtypes without a word
    impl = "triton" if device == "cuda" else "eager"
    ops = {
        name: _pinned(getattr(kernels, name), impl)
        for name, op in CATALOG.items()
        # the kernels may be of another commit than the catalog
        if op.kernel is None and name in dir(kernels)
    }
    note = "the compiled kernels" if device == "cuda" else "the eager twins of the kernels"
    return [Provider(OURS, installed("gaugeblock") or "checkout", ops, _limits, note)]


def _limits(op, case, dtype, direction):
    if op.lacks and op.matches(case, op.lacks):
        return f"has no kernel yet for {op.lacks}"
    return None


def _pinned(fn, impl):
    """fn without the choice of an implementation."""
    signature = inspect.signature(fn)
    kept = [p for p in signature.parameters.values() if p.name != "impl"]

    @functools.wraps(fn)
    def call(*tensors, **options):
        return fn(*tensors, impl=impl, **options)

    call.__signature__ = signature.replace(parameters=kept)
    return call
