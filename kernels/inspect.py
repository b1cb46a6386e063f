"""What the compiler made of the kernels, on a machine without a GPU.

The real launchers run on fake CUDA tensors; `JITFunction.run` compiles each launch for the target
instead of running it. The artefact is then read with the tools that Triton ships: registers and the
stack that holds spills, shared memory, matrix and TMA instructions.

Needs a process of its own in which Triton's interpreter is off.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from gaugeblock.reference.catalog import CATALOG, find
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from ._launch import INTERPRETED

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# the most shared memory one program may have, in bytes
_SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
# what counts as a matrix or bulk-copy instruction, by mnemonic
_COUNTED = re.compile(r"\b(HGMMA|QGMMA|UTCHMMA|UTCQMMA|HMMA|DMMA|UTMALDG|UTMASTG|UTMAREDG|v_mfma)")
# a product of 16-bit tiles in Triton's first representation, and its rows
_HALF_PRODUCT = re.compile(r"tt\.dot .* : tensor<(\d+)x\d+x(?:b?f16)>")
# stack that the compiler keeps without a spill: alignment, and 3.9's frame on sm_80
_STACK_FREE = 48

_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _Driver:
    """Stands in for a CUDA driver: says which target to compile for, and runs nothing."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # Triton keeps compiled kernels by device: one for each target keeps them apart
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device=0):
        return 0

    def set_current_device(self, device):
        pass

    def get_device_properties(self, device=0):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return SimpleNamespace(current_device=lambda: 0, synchronize=lambda: None)


@contextlib.contextmanager
def _compiling(target):
    """Inside, every kernel launch is compiled for `target` and kept; yields the list of them."""
    kept = []
    run = triton.runtime.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        config = {k: v for k, v in options.items() if isinstance(v, (int, bool, str))}
        kept.append((kernel.fn.__name__, config, compiled))
        return compiled

    # the stand-in stays active afterwards: Triton has no driver to go back to without a GPU
    triton.runtime.driver.set_active(_Driver(target))
    triton.runtime.JITFunction.run = compile_only
    try:
        yield kept
    finally:
        triton.runtime.JITFunction.run = run


def inspect(ops=(), target="sm_90", dtype="bfloat16"):
    """Compile the catalog's "aot" cases of `ops` (all by default) for a target.

    Returns a list of {"op", "case", "kernel", "config", "target", "triton", "registers", "spills",
    "shared_bytes", "instructions", "passed", "reason"}. A row passes when it compiles, does not
    spill, fits the chip's shared memory and runs 16-bit products on the matrix units.
    Raises ValueError for an unknown op or target, or where the interpreter is on.
    """
    if target not in TARGETS:
        raise ValueError(f"inspect: target must be one of {', '.join(TARGETS)}, got {target!r}")
    if dtype not in _TORCH:
        raise ValueError(f"inspect: dtype must be one of {', '.join(_TORCH)}, got {dtype!r}")
    if INTERPRETED:
        raise ValueError("inspect: TRITON_INTERPRET must be off, got 1; unset it")
    chosen = [find(name) for name in ops] or list(CATALOG.values())
    for op in chosen:
        if ops and op.kernel:
            raise ValueError(f"inspect: {op.name} must have a kernel, got none ({op.kernel})")
    rows = []
    for op in chosen:
        for case in op.cases:
            if op.kernel or "aot" not in case.tags:
                continue
            for name, config, compiled in _launches(op, case, target, dtype):
                rows.append(
                    {"op": op.name, "case": case.name, "kernel": name, "config": config}
                    | read_artefact(compiled, target)
                )
    return rows


def _launches(op, case, target, dtype):
    """(kernel name, configuration, compiled kernel) of one forward and backward call."""
    dims = op.dims(case)
    module = import_module(f"._{op.name}", __package__)
    with FakeTensorMode(), _compiling(TARGETS[target]) as kept:
        inputs = [
            torch.empty(
                op.shape(op.spec(case, name), dims),
                dtype=_TORCH[dtype] if name in op.floating() else getattr(torch, spec.dtype),
                device="cuda",
            )
            for name, spec in op.inputs.items()
        ]
        with warnings.catch_warnings():
            # Triton asks a fake tensor for its address: 0, which is as aligned as any
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            # the registered operators would run their fakes and launch nothing
            module._launch_all(*inputs, **op.options(case))
    return kept


def read_artefact(compiled, target):
    """Registers, spills, shared memory and instructions of a compiled kernel, and the verdict."""
    row = {
        "target": target,
        "triton": triton.__version__,
        "registers": None,
        "spills": None,
        "shared_bytes": compiled.metadata.shared,
    }
    if "cubin" in compiled.asm:
        usage, code = _disassemble(compiled.asm["cubin"])
        row["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        # spilled registers live on the stack; LOCAL stays 0 beside them
        stack = int(re.search(r"STACK:(\d+)", usage)[1])
        row["spills"] = stack if stack > _STACK_FREE else 0
    else:
        code = compiled.asm["amdgcn"]
    row["instructions"] = dict(Counter(m[1] for m in _COUNTED.finditer(code)))
    reasons = []
    wanted = _matrix_instruction(compiled.asm["ttir"], target)
    if wanted and wanted not in row["instructions"]:
        reasons.append(f"runs its products without {wanted}")
    if row["spills"]:
        reasons.append(f"spills {row['spills']} bytes")
    if row["shared_bytes"] > _SHARED_LIMIT.get(target, row["shared_bytes"]):
        reasons.append(f"needs more than {_SHARED_LIMIT[target]} bytes of shared memory")
    return row | {"passed": not reasons, "reason": "; ".join(reasons)}


def _matrix_instruction(ttir, target):
    """The instruction that the kernel's 16-bit products must become on this target, or None."""
    rows = [int(m[1]) for m in _HALF_PRODUCT.finditer(ttir)]
    if not rows or target not in ("sm_80", "sm_90"):
        return None
    # Hopper's warpgroup products start at 64 rows
    return "HGMMA" if target == "sm_90" and max(rows) >= 64 else "HMMA"


def _disassemble(cubin):
    """(resource usage, SASS) as cuobjdump prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return tuple(
            subprocess.run(
                [tool / program, *flags, path], capture_output=True, text=True, check=True
            ).stdout
            for program, *flags in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )


def save(rows, path):
    """Write the rows as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
