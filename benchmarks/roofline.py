"""How far a time is from what the chip can do: roofs that were measured, floors that are nominal.

    roof  = max(bytes / copy rate at that many bytes, flops / matrix rate), or the time of an event
            pair around nothing where that is more
    floor = max(bytes read / nominal bandwidth, least flops / nominal matrix rate)

Nothing beats the floor honestly, so a time under it is an error. A chip that is not in the table
has no floor.
"""

from __future__ import annotations

from gaugeblock.kernels.ceilings import NOMINAL, times_ms

# ceilings that moved by more than this share mark a run
DRIFT_LIMIT = 0.02
# bytes
_LARGE = 1 << 26


def floor_ms(device, dtype, bytes_read, flops):
    """The time that no honest call is under; None for a chip that is not in the table."""
    for name, (bandwidth_gb_s, rates_tflop_s) in NOMINAL.items():
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
    found = times_ms(ceilings, dtype, bytes_moved, flops, latency_ms)
    name = max(found, key=found.get)
    return found[name], name


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
