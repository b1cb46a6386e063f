"""What the compiler made of a kernel, on a machine without a GPU.

The catalog's kernels: the real launchers run on fake CUDA tensors, and `JITFunction.run` compiles
each launch for the target instead of running it. A user's kernel is compiled by its signature.
The artefact is then read: registers and the stack that holds spills, shared memory, how many
programs a multiprocessor holds, and the instructions (`sass`, `occupancy`).

Needs a process of its own in which Triton's interpreter is off.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace

import torch
import triton
from gaugeblock.reference.catalog import CATALOG, find
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from .. import user_kernel
from .._launch import INTERPRETED
from ..sass import disassemble, read_artefact
from .listing import shown

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

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


@dataclass(frozen=True)
class Launch:
    """A row, and Triton's compiled kernel that it was read from, or the error in its place."""

    row: dict
    compiled: object

    @property
    def failed(self):
        """Whether the compiler refused it; the row's reason is then the compiler's."""
        return isinstance(self.compiled, Exception)

    @property
    def code(self):
        """Its SASS with the lines that it is of, None where there is none."""
        asm = getattr(self.compiled, "asm", {})
        return disassemble(asm["cubin"])[1] if "cubin" in asm else None


@contextlib.contextmanager
def _compiling(target, change=dict):
    """Inside, every kernel launch is compiled for `target` and kept; yields the list of them.

    What does not compile is kept as its error. change: launch options -> those to compile with.
    """
    kept = []
    run = triton.runtime.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        options = change(options)
        try:
            compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            compiled = error
        config = {k: v for k, v in options.items() if isinstance(v, (int, bool, str))}
        kept.append((kernel, config, math.prod(grid), compiled))
        return compiled

    # the stand-in stays active afterwards: Triton has no driver to go back to without a GPU
    triton.runtime.driver.set_active(_Driver(target))
    triton.runtime.JITFunction.run = compile_only
    try:
        yield kept
    finally:
        triton.runtime.JITFunction.run = run


def aot_cases(configurations=True):
    """[(op, case)] that are compiled; some of them for a row of a table of configurations alone."""
    return [
        (op, case)
        for op in CATALOG.values()
        for case in op.cases
        if op.kernel is None and "aot" in case.tags
        if configurations or "configuration" not in case.tags
    ]


def known(ops, cases):
    """Those of the ops and cases, by name, that there are: what another revision may lack."""
    ops = [name for name in ops if name in CATALOG and CATALOG[name].kernel is None]
    names = {case.name for op, case in aot_cases() if not ops or op.name in ops}
    return ops, [name for name in cases if name in names]


def inspect(ops=(), target="sm_90", dtype="bfloat16", cases=()):
    """Compile the catalog's "aot" cases of `ops` (all by default) for a target.

    cases: names of cases; all "aot" ones by default.
    Returns a list of {"op", "case", "dtype", "kernel", "source", "config", "launched", "target",
    "triton", "registers", "spills", "spills_in_loops", "shared_bytes", "occupancy", "threads",
    "product_units", "instructions", "bounds", "narrow_offsets", "passed", "reason", "work"}. A row
    passes when it
    compiles, does not spill, fits the chip's shared memory, runs its products on the units that it
    should and computes its addresses in 64 bits. launched is how many programs the case has; work
    is that of the whole op, {direction: {"flop", "read_bytes", "written_bytes"}}.
    Raises ValueError for an unknown op, target or case, or where the interpreter is on.
    """
    return [launch.row for launch in catalog_launches(ops, target, dtype, cases)]


def inspect_kernel(
    kernel, signature, constants=None, *, target="sm_90", num_warps=None, num_stages=None
):
    """Compile a user's `@triton.jit` kernel for a target.

    kernel:    "module:function", the working folder searched first, or the kernel itself;
               `triton.autotune` and `triton.heuristics` may stand around it.
    signature: the types of its parameters that are neither constexpr nor in `constants`, in order,
               in Triton's words: "*bf16,*bf16,i32:16,fp32". ":16" promises a multiple of 16 (every
               pointer and most strides are one), ":1" the number 1, as a launch would find.
    constants: {parameter: value}, for every constexpr without a default. What is not given comes
               from the autotuner's configurations, each of which makes a row.
    Returns rows as `inspect` does, with the kernel's name for the op, the signature for the case
    and no dtype, launched and work; addresses in 32 bits are counted and fail nothing.
    A row of what does not compile has nothing but its reason.
    Raises ValueError for what cannot be found, or a signature that does not fit.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return [x.row for x in kernel_launches(kernel, signature, constants, target=target, **options)]


def catalog_launches(ops=(), target="sm_90", dtype="bfloat16", cases=(), change=dict):
    """The Launches of `inspect`. change: launch options -> those to compile with."""
    _expect("target", target, TARGETS)
    _expect("dtype", dtype, _TORCH)
    _expect_compiler()
    chosen = [find(name) for name in ops] or [op for op in CATALOG.values() if op.kernel is None]
    for op in chosen:
        if op.kernel:
            raise ValueError(f"inspect: {op.name} must have a kernel, got none ({op.kernel})")
    known = [(op, case) for op, case in aot_cases() if op in chosen]
    for name in cases:
        _expect("case", name, dict.fromkeys(case.name for _, case in known))
    return [
        Launch(
            {"op": op.name, "case": case.name, "dtype": dtype, "kernel": kernel.fn.__name__}
            | {"source": _source(kernel), "config": config, "launched": programs}
            | _read(compiled, target, wide_offsets=True)
            | {"work": _work(op, case, dtype)},
            compiled,
        )
        for op, case in known
        if not cases or case.name in cases
        for kernel, config, programs, compiled in _launches(op, case, target, dtype, change)
    ]


def kernel_launches(
    kernel, signature, constants=None, *, target="sm_90", num_warps=None, num_stages=None,
    change=dict,
):  # fmt: skip
    """The Launches of `inspect_kernel`. change: launch options -> those to compile with."""
    _expect("target", target, TARGETS)
    _expect_compiler()
    if isinstance(kernel, str):
        name = kernel
        kernel, configs = user_kernel.load(name)
    else:
        name = getattr(kernel, "__name__", type(kernel).__name__)
        kernel, configs = user_kernel.unwrap(kernel, name)
    triton.runtime.driver.set_active(_Driver(TARGETS[target]))
    options = {"num_warps": num_warps, "num_stages": num_stages}
    options = {k: v for k, v in options.items() if v is not None}
    launches = []
    for source, fixed, launch in user_kernel.variants(
        kernel, configs, signature, constants or {}, options
    ):
        try:
            compiled = triton.compile(source, target=TARGETS[target], options=change(launch))
            launch = {k: getattr(compiled.metadata, k) for k in ("num_warps", "num_stages")}
        except Exception as error:
            compiled = error
        config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in fixed.items()}
        config |= launch
        row = {"op": name, "case": signature, "dtype": None, "kernel": kernel.__name__}
        row |= {"source": _source(kernel), "config": config, "launched": None}
        row |= _read(compiled, target, wide_offsets=False) | {"work": None}
        launches.append(Launch(row, compiled))
    return launches


def _work(op, case, dtype):
    """{direction: {"flop", "read_bytes", "written_bytes"}} of a case: each tensor once."""
    work = {}
    for direction in ("fwd", "bwd") if op.differentiable() else ("fwd",):
        read, written = op.traffic(case, _TORCH[dtype].itemsize, direction)
        flop = op.flop_count(case, direction)
        work[direction] = {"flop": flop, "read_bytes": read, "written_bytes": written}
    return work


def _source(kernel):
    """Where a kernel begins, "file:line"."""
    code = kernel.fn.__code__
    return f"{shown(code.co_filename)}:{code.co_firstlineno}"


def _expect(what, value, choices):
    if value not in choices:
        raise ValueError(f"inspect: {what} must be one of {', '.join(choices)}, got {value!r}")


def _expect_compiler():
    if INTERPRETED:
        raise ValueError("inspect: TRITON_INTERPRET must be off, got 1; unset it")


def _launches(op, case, target, dtype, change=dict):
    """(kernel, configuration, programs, compiled kernel) of one forward and backward call."""
    dims = op.dims(case)
    module = import_module(f".._{op.name}", __package__)
    with FakeTensorMode(), _compiling(TARGETS[target], change) as kept:
        inputs = [
            torch.empty(
                op.shape(op.spec(case, name), dims),
                dtype=_TORCH[dtype] if name in op.floating() else getattr(torch, spec.dtype),
                device="cuda",
            )
            for name, spec in op.inputs.items()
            if name in op.given(case)
        ]
        with warnings.catch_warnings():
            # Triton asks a fake tensor for its address: 0, which is as aligned as any
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            # the registered operators would run their fakes and launch nothing
            module._launch_all(*inputs, **op.options(case))
    return kept


def _read(compiled, target, wide_offsets):
    """The artefact's part of a row; a kernel that did not compile has nothing but its reason."""
    if not isinstance(compiled, Exception):
        return read_artefact(compiled, target, wide_offsets=wide_offsets)
    unknown = (
        "registers", "spills", "spills_in_loops", "shared_bytes", "occupancy", "threads", "bounds",
    )  # fmt: skip
    return (
        {"target": target, "triton": triton.__version__}
        | dict.fromkeys(unknown)
        | {"product_units": [], "instructions": {}, "narrow_offsets": None, "passed": False}
        | {"reason": f"does not compile: {user_kernel.explain(compiled)}"}
    )
