"""The reference: NumPy in float64, on a CPU."""

from __future__ import annotations

import functools

import numpy as np
import torch
from gaugeblock.reference.catalog import CATALOG

from gaugeblock import reference

from . import Provider, Unavailable
from ._limits import forward_only

NAMES = ("numpy_reference",)


def load(device):
    if device != "cpu":
        raise Unavailable("runs on a CPU only: it is NumPy")
    ops = {name: _crossing(op, getattr(reference, name)) for name, op in CATALOG.items()}
    note = "float64; tensors are widened before it and rounded after it, both counted"
    return [Provider("numpy_reference", np.__version__, ops, _limits, note)]


def _limits(op, case, dtype, direction):
    if dtype != "float32":
        return f"is timed once, for float32, not for {dtype}"
    return forward_only(direction)


def _crossing(op, forward):
    """An op's reference, from torch tensors to torch tensors."""

    # with the signature of the reference
    @functools.wraps(forward)
    def call(*tensors, **options):
        arrays = (t if t is None else _wide(t) for t in tensors)
        options = {k: _wide(v) if torch.is_tensor(v) else v for k, v in options.items()}
        found = op.reference(*arrays, **options)
        return tuple(map(_narrow, found)) if isinstance(found, tuple) else _narrow(found)

    return call


def _wide(t):
    return t.detach().numpy().astype(np.float64) if t.is_floating_point() else t.numpy()


def _narrow(x):
    t = torch.from_numpy(np.asarray(x))
    return t.float() if t.is_floating_point() else t
