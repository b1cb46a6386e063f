"""Golden vectors: inputs, outputs, gradients and budgets as files for any language."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from .expectation import Expectation


def write_golden(folder, ops, dtypes=("float32",), cases="quick", expression=None, seed=0):
    """Write one safetensors file for each case and dtype, and manifest.json; the manifest.

    A file holds `input.NAME` as the candidate gets it, `grad_output.NAME`, and for each output
    `output.NAME` and gradient `grad.NAME` the exact float64 values with the bound of each element,
    `budget.NAME`. The manifest holds options, RMS budgets and each file's SHA-256.
    """
    if cases not in ("quick", "full"):
        raise ValueError(f"golden: cases must be quick or full, got {cases!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for op in ops:
        for case in op.select(cases, expression):
            for dtype in dtypes:
                expectation = Expectation(op, case, dtype, seed)
                if expectation.vanishes():
                    continue
                path = folder / f"{op.name}-{case.name}-{expectation.dtype}.safetensors"
                tensors, rms = _tensors(expectation)
                save_file(tensors, path)
                entries.append(
                    {
                        "op": op.name,
                        "case": case.name,
                        "dtype": expectation.dtype,
                        "options": expectation.options,
                        "inputs": list(op.inputs),
                        "rms_budget": rms,
                        "file": path.name,
                        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                    }
                )
    manifest = {"schema": 1, "seed": seed, "entries": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _tensors(expectation):
    """({name: array}, {output or gradient: RMS budget}) of a case."""
    content, op = expectation.content(), expectation.op
    tensors = {f"input.{n}": x for n, x in content.inputs.items() if x is not None}
    if content.dys is not None:
        tensors |= {f"grad_output.{n}": dy for n, dy in zip(op.outputs, content.dys)}
    rms = {}
    for part in (0, 1):
        for i, (name, want) in enumerate(zip(content.names(part), content.exact[part])):
            key = f"grad.{name[1:]}" if part else f"output.{name}"
            if op.accepts:
                tensors[key] = np.asarray(want)
                continue
            bound = content.bound(part, i, expectation.precision.results[0])
            tensors[key] = bound.want
            tensors[f"budget.{name}"] = np.where(bound.skip, np.inf, bound.budget.rows)
            rms[name] = bound.budget.rms
    return {name: np.ascontiguousarray(x) for name, x in tensors.items()}, rms
