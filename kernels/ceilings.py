"""What a chip reaches, as a JSON file or a datasheet says, and how long work takes at least on it.

    time = max(bytes / copy rate at that many bytes, flops / matrix rate, exponentials / their rate)

or a latency where that is more. Ceilings are {"copy_gb_s": {bytes: rate}, "matrix_tflop_s":
{dtype: rate}, "exp_t_s": rate}, as `gaugeblock ceilings --json` writes them.
"""

import json
from bisect import bisect_left
from dataclasses import dataclass
from math import log2
from pathlib import Path

# (bandwidth in GB/s, dense matrix rate in TFLOP/s by dtype), from the makers' datasheets: NVIDIA
# B200, H200, H100 and A100 Tensor Core GPU datasheets, L40S and RTX 4090 product pages
NOMINAL = {
    "B200": (8000, {"bfloat16": 2250, "float16": 2250, "float32": 75}),
    "H200": (4800, {"bfloat16": 989, "float16": 989, "float32": 67}),
    "H100 80GB HBM3": (3350, {"bfloat16": 989, "float16": 989, "float32": 67}),
    "H100 PCIe": (2000, {"bfloat16": 756, "float16": 756, "float32": 51}),
    "A100-SXM4-80GB": (2039, {"bfloat16": 312, "float16": 312, "float32": 19.5}),
    "A100-SXM4-40GB": (1555, {"bfloat16": 312, "float16": 312, "float32": 19.5}),
    "L40S": (864, {"bfloat16": 362, "float16": 362, "float32": 91.6}),
    "RTX 4090": (1008, {"bfloat16": 165, "float16": 165, "float32": 82.6}),
}


@dataclass(frozen=True)
class Chip:
    """What stands for a target: a name in NOMINAL, its multiprocessors, and how many multiply-adds
    take as long as an exponential (128 or 64 lanes against 16)."""

    name: str
    multiprocessors: int
    adds_per_exp: int


CHIPS = {
    "sm_80": Chip("A100-SXM4-80GB", 108, 4),
    "sm_90": Chip("H200", 132, 8),
    "sm_100": Chip("B200", 148, 8),
}


def nominal(target):
    """The ceilings of a target's chip by its datasheet."""
    chip = CHIPS[target]
    bandwidth_gb_s, rates = NOMINAL[chip.name]
    return {
        "copy_gb_s": {str(1 << 30): float(bandwidth_gb_s)},
        "matrix_tflop_s": rates,
        "exp_t_s": rates["float32"] / 2 / chip.adds_per_exp,
    }


def read(path):
    """(ceilings, latency in ms or None) of a JSON file: ceilings alone, or a record of a bench.

    Raises ValueError for a file that holds none, OSError where there is none.
    """
    try:
        found = json.loads(Path(path).read_text())
        ceilings, latency_ms = found, None
        if isinstance(found.get("ceilings"), dict):
            ceilings = found["ceilings"]["before"]
            latency_ms = found["machine"].get("clock_overhead_ms")
        sizes, rates = ceilings["copy_gb_s"], ceilings["matrix_tflop_s"]
        good = all(v > 0 for v in (*sizes.values(), *rates.values(), ceilings["exp_t_s"]))
        good = good and sizes and all(map(int, sizes))
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(
            f"ceilings: {path} must hold copy_gb_s, matrix_tflop_s and exp_t_s, as gaugeblock "
            "ceilings --json writes them, or a record with them; it does not"
        )
    return ceilings, latency_ms


def times_ms(ceilings, dtype, bytes_moved, flops, latency_ms=0.0, exponentials=0):
    """{"copy", "matrix", "latency", "exp"}: the time of each in ms, as if there were no other."""
    return {
        "copy": bytes_moved / copy_gb_s(ceilings, bytes_moved) / 1e6,
        "matrix": flops / ceilings["matrix_tflop_s"][dtype] / 1e9,
        "latency": latency_ms,
        "exp": exponentials / ceilings["exp_t_s"] / 1e9,
    }


def copy_gb_s(ceilings, bytes_moved):
    """The rate of a copy that moves as many bytes, from those that were measured.

    Between two sizes it follows the logarithm of the size; beyond them it stays.
    """
    sizes = sorted(map(int, ceilings["copy_gb_s"]))
    rates = [float(ceilings["copy_gb_s"][str(size)]) for size in sizes]
    right = bisect_left(sizes, bytes_moved)
    if right in (0, len(sizes)):
        return rates[min(right, len(sizes) - 1)]
    low, high = log2(sizes[right - 1]), log2(sizes[right])
    share = (log2(bytes_moved) - low) / (high - low)
    return rates[right - 1] + share * (rates[right] - rates[right - 1])
