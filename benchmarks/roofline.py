"""How far a time is from what the chip can do: roofs that were measured, floors that are nominal.

    roof  = max(bytes / copy rate at that many bytes, flops / matrix rate), or the time of an event
            pair around nothing where that is more
    floor = max(bytes read / nominal bandwidth, least flops / nominal matrix rate)

Nothing beats the floor honestly, so a time under it is an error. A chip that is not in the table
has no floor.
"""

from __future__ import annotations

import numpy as np

# ceilings that moved by more than this share mark a run
DRIFT_LIMIT = 0.02
# bytes
_LARGE = 1 << 26
# (bandwidth in GB/s, dense matrix rate in TFLOP/s by dtype), from the makers' datasheets: NVIDIA
# H200, H100 and A100 Tensor Core GPU datasheets, L40S and RTX 4090 product pages
_NOMINAL = {
    "H200": (4800, {"bfloat16": 989, "float16": 989, "float32": 67}),
    "H100 80GB HBM3": (3350, {"bfloat16": 989, "float16": 989, "float32": 67}),
    "H100 PCIe": (2000, {"bfloat16": 756, "float16": 756, "float32": 51}),
    "A100-SXM4-80GB": (2039, {"bfloat16": 312, "float16": 312, "float32": 19.5}),
    "A100-SXM4-40GB": (1555, {"bfloat16": 312, "float16": 312, "float32": 19.5}),
    "L40S": (864, {"bfloat16": 362, "float16": 362, "float32": 91.6}),
    "RTX 4090": (1008, {"bfloat16": 165, "float16": 165, "float32": 82.6}),
}


def floor_ms(device, dtype, bytes_read, flops):
    """The time that no honest call is under; None for a chip that is not in the table."""
    for name, (bandwidth_gb_s, rates_tflop_s) in _NOMINAL.items():
        if name in device:
            read_ms = bytes_read / bandwidth_gb_s / 1e6
            return max(read_ms, flops / rates_tflop_s[dtype] / 1e9)
    return None


def roof(ceilings, dtype, bytes_moved, flops, latency_ms=0.0):
    """(time in ms, "copy", "matrix" or "latency") at the measured ceilings; (None, None) without.

    ceilings: as in a record; latency_ms: what the clock shows for a call that does nothing.
    """
    if not ceilings or dtype not in ceilings["matrix_tflop_s"]:
        return None, None
    found = {
        "copy": bytes_moved / copy_gb_s(ceilings, bytes_moved) / 1e6,
        "matrix": flops / ceilings["matrix_tflop_s"][dtype] / 1e9,
        "latency": latency_ms,
    }
    name = max(found, key=found.get)
    return found[name], name


def copy_gb_s(ceilings, bytes_moved):
    """The rate of a copy that moves as many bytes, from those that were measured."""
    sizes = sorted(map(int, ceilings["copy_gb_s"]))
    rates = [ceilings["copy_gb_s"][str(size)] for size in sizes]
    return float(np.interp(np.log2(max(bytes_moved, 1)), np.log2(sizes), rates))


def drift(before, after):
    """The largest relative change of a ceiling."""
    pairs = [(before["exp_t_s"], after["exp_t_s"])]
    pairs += [(x, after["matrix_tflop_s"][key]) for key, x in before["matrix_tflop_s"].items()]
    # small copies take as long as the clock's own noise
    pairs += [
        (x, after["copy_gb_s"][key])
        for key, x in before["copy_gb_s"].items()
        if key in after["copy_gb_s"] and int(key) >= _LARGE
    ]
    return max(abs(b / a - 1) for a, b in pairs)
