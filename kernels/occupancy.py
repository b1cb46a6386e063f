"""How many programs one multiprocessor holds at a time, and what keeps it from holding more.

    registers:      each of the four partitions holds ⌊16,384 / r⌋ warps, r = 32 × registers a
                    thread, rounded up to 256
    shared memory:  ⌊S / s⌋ programs, s = the program's bytes + 1,024 reserved, rounded up to 128
    warps:          ⌊64 / warps of a program⌋
    programs:       32
    tensor memory:  ⌊512 / columns of a program⌋, on sm_100

The smallest counts. Programs in clusters are counted one by one.
Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the units of
allocation are those of `cuda_occupancy.h` in the CUDA toolkit.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor; bytes where not said otherwise."""

    shared_bytes: int
    # the most that one program may have
    program_shared_bytes: int
    registers: int = 65_536
    warps: int = 64
    programs: int = 32
    tensor_columns: int = 0


_KB = 1024
CHIPS = {
    "sm_80": Chip(164 * _KB, 163 * _KB),
    "sm_90": Chip(228 * _KB, 227 * _KB),
    "sm_100": Chip(228 * _KB, 227 * _KB, tensor_columns=512),
}
_PARTITIONS = 4
_REGISTER_UNIT = 256
_SHARED_UNIT = 128
_SHARED_RESERVED = 1024


def occupancy(target, registers, shared_bytes, threads, tensor_columns=0):
    """-> {"programs", "warps", "share", "limiter"} of one multiprocessor of `target`.

    registers: of one thread. shared_bytes, threads, tensor_columns: of one program.
    share is the part of the warps that the multiprocessor could hold. limiter names what is used up
    first: "warps", "programs", "registers", "shared memory" or "tensor memory"; two of the last
    three where both would have to shrink.
    """
    chip = CHIPS[target]
    warps = _up(threads, 32) // 32
    warp_registers = _up(max(registers, 1) * 32, _REGISTER_UNIT)
    program_shared = _up(shared_bytes + _SHARED_RESERVED, _SHARED_UNIT)
    partition_warps = chip.registers // _PARTITIONS // warp_registers
    limits = {
        "warps": chip.warps // warps,
        "programs": chip.programs,
        "registers": partition_warps * _PARTITIONS // warps,
        "shared memory": chip.shared_bytes // program_shared,
    }
    if shared_bytes > chip.program_shared_bytes:
        limits["shared memory"] = 0
    if tensor_columns:
        limits["tensor memory"] = chip.tensor_columns // tensor_columns
    programs = min(limits.values())
    tight = [name for name, limit in limits.items() if limit == programs]
    # where the chip itself is full, using less of the others would change nothing
    limiter = tight[0] if tight[0] in ("warps", "programs") else " and ".join(tight)
    return {
        "programs": programs,
        "warps": programs * warps,
        "share": programs * warps / chip.warps,
        "limiter": limiter,
    }


def _up(value, unit):
    return -(-value // unit) * unit
