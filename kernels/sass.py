"""What is in a compiled kernel: its resources, its instructions, how it computes addresses.

Read with the tools that Triton ships (cuobjdump, nvdisasm) and from Triton's own first
representation. Nothing is run.
"""

import re
import subprocess
import tempfile
from collections import Counter
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from .inspect.bounds import bounds
from .inspect.listing import parse
from .occupancy import CHIPS, occupancy

# products of tiles on the matrix units
MATRIX = (
    "HMMA", "QMMA", "IMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA",
    "v_mfma",
)  # fmt: skip
# bulk copies by the tensor memory accelerator
TMA = ("UTMALDG", "UTMASTG", "UTMAREDG")
# what instruction_mix counts
COUNTED = (
    *MATRIX, *TMA, "FFMA", "FFMA2", "MUFU", "LDG", "STG", "LDGSTS", "LDS", "LDSM", "STS", "STSM",
    "BAR", "LDL", "STL",
)  # fmt: skip
# bits that one thread loads or stores with an instruction
WIDTHS = (8, 16, 32, 64, 128, 256)
_WIDTH = re.compile(rf"[US]?({'|'.join(map(str, WIDTHS))})")
# a product of tiles in Triton's first representation: its options, rows and type
_PRODUCT = re.compile(r"tt\.dot (.*) : tensor<(\d+)x\d+x(\w+)>")
# Bytes that may wait on the stack from before a loop until after it: four registers, each stored
# and loaded once a program, by which ptxas frees registers for the loop.
_PARKED = 16


def read_artefact(compiled, target, *, wide_offsets=False):
    """What the compiler made, and the verdict on it.

    -> {"target", "triton", "registers", "spills", "spills_in_loops", "shared_bytes", "occupancy",
    "threads", "product_units", "instructions", "bounds", "narrow_offsets", "passed", "reason"}.
    Registers, spills, occupancy, threads and bounds are None on AMD chips; bounds, too, where warps
    differ in what they run. product_units: what `products` says. wide_offsets: an address computed
    in 32 bits fails the kernel.
    """
    row = {
        "target": target, "triton": compiled.metadata.triton_version, "registers": None,
        "spills": None, "spills_in_loops": None, "shared_bytes": compiled.metadata.shared,
        "occupancy": None, "threads": None,
    }  # fmt: skip
    if "cubin" in compiled.asm:
        usage, code = disassemble(compiled.asm["cubin"])
        own = re.search(rf"Function {compiled.metadata.name}:\s+REG:(\d+) STACK:(\d+)", usage)
        row["registers"] = int(own[1])
        row["instructions"] = instruction_mix(code)
        # a stack frame that nothing is stored in is no spill; cuobjdump's LOCAL stays 0 beside one
        touched = row["instructions"].keys() & {"LDL", "STL"}
        row["spills"] = int(own[2]) if touched else 0
        row["spills_in_loops"] = spills_in_loops(code)
        # warps beside num_warps (warp specialisation) are in the PTX alone; of the shared memory
        # that cuobjdump reports, 1,024 bytes on sm_90, all is the system's
        row["threads"] = int(re.search(r"\.(?:req|max)ntid (\d+)", compiled.asm["ptx"])[1])
        row["occupancy"] = occupancy(
            target, row["registers"], row["shared_bytes"], row["threads"],
            compiled.metadata.tmem_size,
        )  # fmt: skip
        warps = compiled.metadata.num_warps
        row["bounds"] = bounds(code, target, warps) if row["threads"] == 32 * warps else None
    else:
        found = compiled.asm["amdgcn"].count("v_mfma")
        row["instructions"] = {"v_mfma": found} if found else {}
        row["bounds"] = None
    # Gluon's kernels have no first representation to follow
    ttir = compiled.asm.get("ttir")
    row["narrow_offsets"] = None if ttir is None else narrow_offsets(ttir)
    row["product_units"] = products(ttir or "", target, compiled.metadata.num_warps)
    reasons = _reasons(row)
    if wide_offsets and row["narrow_offsets"]:
        reasons.append(f"computes {row['narrow_offsets']} addresses in 32 bits")
    return row | {"passed": not reasons, "reason": "; ".join(reasons)}


def _reasons(row):
    """Why the machine code fails its gate; other chips than sm_80 and sm_90 have none."""
    target = row["target"]
    if target not in ("sm_80", "sm_90"):
        return []
    reasons = [
        f"runs products without {name}"
        for name in row["product_units"]
        if name not in row["instructions"]
    ]
    if row["spills_in_loops"] or row["spills"] > _PARKED:
        reasons.append(
            f"spills {row['spills']} bytes, {row['spills_in_loops']} instructions in loops"
        )
    most = CHIPS[target].program_shared_bytes
    if row["shared_bytes"] > most:
        reasons.append(f"needs more than {most} bytes of shared memory")
    return reasons


@lru_cache(maxsize=64)
def disassemble(cubin):
    """(resource usage, SASS with the lines it is of) as cuobjdump and nvdisasm print them."""
    tool = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return tuple(
            subprocess.run(
                [tool / program, *flags, path], capture_output=True, text=True, check=True
            ).stdout
            for program, *flags in (
                ("cuobjdump", "--dump-resource-usage"),
                ("nvdisasm", "-c", "-g"),
            )
        )


def instruction_mix(code):
    """{name: count in the code} of the instructions that say how a kernel works.

    Global loads and stores are counted by the bits that each thread moves (LDG.128), MUFU by its
    function (MUFU.EX2), the others by their first word.
    """
    counts = Counter(_name(instruction.mnemonic) for instruction in parse(code).instructions)
    counts.pop(None, None)
    return {name: counts[name] for name in sorted(counts, key=place)}


def place(name):
    """Where an instruction stands in a list: products first, then arithmetic, memory, the stack."""
    return COUNTED.index(_word(name)), name


def _name(mnemonic):
    word, *modifiers = mnemonic.split(".")
    if word not in COUNTED:
        return None
    if word in ("LDG", "STG"):
        widths = [m[1] for m in map(_WIDTH.fullmatch, modifiers) if m]
        return f"{word}.{widths[0] if widths else 32}"
    return ".".join([word, *modifiers[:1]]) if word == "MUFU" else word


def _word(name):
    return name.split(".")[0]


def spills_in_loops(code):
    """How many loads and stores of the stack stand between a label and a jump back to it."""
    listing = parse(code)
    return sum(
        any(first <= number <= last for first, last in listing.spans)
        for number, instruction in enumerate(listing.instructions)
        if instruction.word in ("LDL", "STL")
    )


def products(ttir, target, warps):
    """The instructions that the kernel's products of tiles must become, sorted.

    Known for sm_80 and sm_90; FFMA, the ordinary units', everywhere. On sm_90 a product of 64 rows
    or more in warps by fours is a warpgroup's. float32 products run on the ordinary units, unless
    they may be rounded to TF32.
    """
    names = set()
    for options, rows, dtype in _PRODUCT.findall(ttir):
        group = target == "sm_90" and int(rows) >= 64 and warps % 4 == 0
        if dtype == "f64":
            continue
        if dtype == "f32" and "inputPrecision" not in options:
            names.add("FFMA")
        elif dtype == "i8":
            names.add("IGMMA" if group else "IMMA")
        elif dtype.startswith("f8"):
            names.add("QGMMA" if group else "HMMA")
        else:
            names.add("HGMMA" if group else "HMMA")
    return sorted(names)


# a value's definition in Triton's first representation, and a loop's first value of a variable
_DEFINITION = re.compile(r"^\s*(%[\w$.\-]+)(?::\d+)? = \"?([\w.]+)\"?(.*?)(?: loc\(.*)?$", re.M)
_CARRIED = re.compile(r"(%[\w$.\-]+) = (%[\w$.\-]+)(?:#\d+)?[,)]")
_VALUE = re.compile(r"%[\w$.\-]+")
_ADDRESS = re.compile(r"tt\.addptr %[^,]+, (%[\w$.\-]+)")
# what these give is not as large as what they take, or not computed from it
_BOUNDED = {
    "arith.divsi", "arith.divui", "arith.remsi", "arith.remui", "arith.cmpi", "tt.load",
    "tt.get_program_id", "tt.get_num_programs",
}  # fmt: skip
_FIXED = {"arith.constant", "tt.make_range"}


def narrow_offsets(ttir):
    """How many addresses hold a 32-bit product of two numbers that are known at run time alone.

    Such a product, a row times a stride, may pass 2^31. Numbers that were divided, compared or
    loaded are taken as they are. What a loop adds to its own variables is not followed, and a
    product with a constant (a flat index of program × block) is not counted.
    """
    values = {}
    for name, operation, rest in _DEFINITION.findall(ttir):
        values[name] = operation, _VALUE.findall(rest), rest
        if operation == "scf.for":
            values |= {inner: ("", [first], "") for inner, first in _CARRIED.findall(rest)}
    return sum(
        any(_narrow_product(values, name) for name in _computed_from(values, offset))
        for offset in _ADDRESS.findall(ttir)
    )


def _computed_from(values, name):
    """The value and all that it is computed from, up to bounded values."""
    seen, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        operation, operands, _ = values.get(name, (None, (), ""))
        if operation not in _BOUNDED and operation != "scf.for":
            todo += operands
    return seen


def _narrow_product(values, name):
    operation, operands, rest = values.get(name, (None, (), ""))
    if operation != "arith.muli" or not rest.rstrip().endswith(("i32", "xi32>")):
        return False
    return all(
        any(_varies(values, source) for source in _computed_from(values, operand))
        for operand in operands
    )


def _varies(values, name):
    """True of a source that is no constant: an argument, a program's number, a quotient, a load."""
    operation, operands, _ = values.get(name, (None, (), ""))
    return operation not in _FIXED and (operation in _BOUNDED or not operands)
