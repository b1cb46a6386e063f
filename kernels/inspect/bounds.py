"""The cycles that a piece of machine code takes at least, if nothing ever waits.

    matrix      multiply-adds of the products of tiles / those of the matrix units in a cycle
    exp         32 lanes · MUFU instructions / 16
    fp32        32 lanes · FADD, FMUL, FFMA / 64 or 128
    load/store  bytes of loads and stores / 128, and no less than a cycle each
    issue       instructions / 4

of all warps of one program on one multiprocessor that it has for itself. The pipes work side by
side, so the largest of them is the bound. It is counted in the code: of a loop, what every pass
runs and none jumps over; each instruction once, as if its predicate were true, and lanes that load
the same word counted as if they did not. Latencies, conflicts of banks, caches and memory only add
to it.

Source: CUDA C++ Programming Guide: "Arithmetic Instructions" (results per clock cycle and
multiprocessor of single precision and of exp2), "Hardware Multithreading" (four schedulers, an
instruction each) and "Shared Memory" (32 banks of 32 bits). Matrix units: the dense 16-bit rates of
NVIDIA's datasheets of A100, H100 and B200 over multiprocessors and boost clock (312 TFLOP/s / 108 /
1.41 GHz, 989 / 132 / 1.83, 2250 / 148 / 1.85), rounded to the power of two that they are next to.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .listing import parse, shown


@dataclass(frozen=True)
class Rates:
    """What a multiprocessor does in a cycle: 16-bit multiply-adds of tiles, float32 lanes."""

    matrix: int
    fp32: int
    exp: int = 16
    issue: int = 4
    shared_bytes: int = 128


RATES = {"sm_80": Rates(1024, 64), "sm_90": Rates(2048, 128), "sm_100": Rates(4096, 128)}
PIPES = ("matrix", "exp", "fp32", "load/store", "issue")
# lanes' float32 results of an instruction
_FP32 = {"FADD": 1, "FMUL": 1, "FFMA": 1, "FADD2": 2, "FMUL2": 2, "FFMA2": 2}
_MOVES = (
    "LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDL", "STL", "LD", "ST", "ATOM", "ATOMG",
    "ATOMS", "RED", "REDG",
)  # fmt: skip
_READS = ("LDG", "LDGSTS")
_GROUP_TILE = re.compile(r"(\d+)x(\d+)x(\d+)")
_WARP_TILE = re.compile(r"(16|8)(8)(4|8|16|32|64)")
_WIDTH = re.compile(r"[USBF]?(8|16|32|64|128|256)")
# how many times the rate of 16-bit products; those of 8 bits are twice as fast, TF32 half
_SPEED = {"HMMA": 1, "HGMMA": 1, "IMMA": 2, "IGMMA": 2, "QMMA": 2, "QGMMA": 2, "DMMA": 1 / 16}


def bounds(code, target, warps):
    """[{"section", "source", "instructions", "cycles", "least", "limit", "work"}] of a kernel.

    section: "loop", the body of a loop that holds no other loop, and at last "kernel", all of the
    code once, as if every branch were taken. source: "file:first-last" of the Python that most of
    it is of. instructions: all of the section's. cycles: {pipe: at least}, None for products of
    tiles whose shape the code does not show (sm_100's). work: {"flop": of tiles, "read_bytes": from
    global memory, "exponentials"}, those of one pass if it jumps over nothing, and the exponentials
    that every pass takes.
    """
    listing = parse(code)
    everything = range(len(listing.instructions))
    pieces = [("loop", loop, listing.always(loop)) for loop in listing.inner_loops(pipe)]
    pieces.append(("kernel", everything, everything))
    return [
        _bound(name, *([listing.instructions[n] for n in part] for part in parts), target, warps)
        for name, *parts in pieces
    ]


def pipe(instruction):
    """The pipe that an instruction is counted on, None where it is an issue slot alone."""
    word = instruction.word
    if _is_product(word):
        return "matrix"
    if word == "MUFU":
        return "exp"
    return "fp32" if word in _FP32 else "load/store" if word in _MOVES else None


def _is_product(word):
    return word in _SPEED or (word.startswith("UTC") and word.endswith("MMA"))


def _bound(name, code, always, target, warps):
    """always: what of the code is counted for cycles and exponentials."""
    rates = RATES[target]
    whole, count = (Counter(i.mnemonic for i in part) for part in (code, always))
    slots = _products(count, warps)[1]
    moves = sum(n * max(1, _bytes(m) // rates.shared_bytes) for m, n in count.items() if _moves(m))
    mufu = sum(n for m, n in count.items() if m.startswith("MUFU"))
    fp32 = sum(n * _FP32.get(m.split(".")[0], 0) for m, n in count.items())
    cycles = {
        "matrix": None if slots is None else slots / rates.matrix,
        "exp": 32 * warps * mufu / rates.exp,
        "fp32": 32 * warps * fp32 / rates.fp32,
        "load/store": float(warps * moves),
        "issue": warps * len(always) / rates.issue,
    }
    limit = max(PIPES, key=lambda name: cycles[name] or 0)
    return {
        "section": name,
        "source": _source(code),
        "instructions": len(code),
        "cycles": cycles,
        "least": cycles[limit],
        "limit": limit,
        "work": {
            "flop": _products(whole, warps)[0],
            "exponentials": 32 * warps * sum(n for m, n in count.items() if m == "MUFU.EX2"),
            "read_bytes": warps * sum(n * _bytes(m) for m, n in whole.items() if _reads(m)),
        },
    }


def _products(count, warps):
    """(operations, 16-bit multiply-adds that take as long); None where the code has no shapes."""
    flop, slots = 0, 0.0
    for mnemonic, n in count.items():
        word, *modifiers = mnemonic.split(".")
        if not _is_product(word):
            continue
        shapes = [m for m in map(_tile, modifiers) if m]
        if not shapes:
            return None, None
        # a tile of a warpgroup is that of four warps
        groups = n * warps / (4 if "G" in word[:3] else 1)
        speed = _SPEED[word] * (0.5 if "TF32" in modifiers else 1)
        flop += 2 * groups * shapes[0]
        slots += groups * shapes[0] / speed
    return int(flop), slots


def _tile(modifier):
    """The multiply-adds of a tile 64x128x16, or 16816; None for what is no tile."""
    found = _GROUP_TILE.fullmatch(modifier) or _WARP_TILE.fullmatch(modifier)
    if not found:
        return None
    rows, columns, inner = map(int, found.groups())
    return rows * columns * inner


def _moves(mnemonic):
    return mnemonic.split(".")[0] in _MOVES


def _reads(mnemonic):
    return mnemonic.split(".")[0] in _READS


def _bytes(mnemonic):
    """What a warp moves with a load or a store."""
    word, *modifiers = mnemonic.split(".")
    if word in ("LDSM", "STSM"):
        # matrices of 8 × 8 times 16 bits, one, two or four
        return 128 * next((int(m) for m in modifiers if m in ("2", "4")), 1)
    widths = [int(m[1]) for m in map(_WIDTH.fullmatch, modifiers) if m]
    return 4 * (widths[0] if widths else 32)


def _source(code):
    """Where most of the instructions come from: "file:first-last"."""
    files = Counter(instruction.file for instruction in code if instruction.file)
    if not files:
        return None
    file = files.most_common(1)[0][0]
    lines = [instruction.line for instruction in code if instruction.file == file]
    return f"{shown(file)}:{min(lines)}-{max(lines)}"
