"""Figures, rates and shapes of a record in words, the same in every report."""

from __future__ import annotations

import math

NOTHING = "–"
DIRECTIONS = {"fwd": "forward", "bwd": "backward"}
# a list of more values than this is counted, not written out
_LONGEST_LIST = 4


def shape_words(shape):
    """B=32 H=12 T=1024 D=64 causal: dimensions, then the options that are set."""
    shape = dict(shape)
    if "Tq" in shape and shape["Tq"] == shape.get("Tk"):
        shape = {"T" if k == "Tq" else k: v for k, v in shape.items() if k != "Tk"}
    if shape.get("Hkv") == shape.get("H"):
        shape.pop("Hkv", None)
    return " ".join(_setting(k, v) for k, v in shape.items() if v is not None and v is not False)


def _setting(name, value):
    if value is True:
        return name
    if isinstance(value, list):
        short = len(value) <= _LONGEST_LIST
        value = ",".join(map(str, value)) if short else f"{len(value)} values"
    return f"{name}={value}"


def figure(x, digits=3):
    """A number in so many significant digits, thousands apart, never in powers of ten."""
    if x is None:
        return NOTHING
    if x == 0:
        return "0"
    # rounded first: 9.996 in three digits is 10.0
    x = float(f"{x:.{digits - 1}e}")
    return f"{x:,.{max(digits - 1 - math.floor(math.log10(abs(x))), 0)}f}"


def plain(x):
    """A number of at most three digits without zeros at its end: an axis' 0.5, 20, 1,000."""
    text = figure(x)
    return text.rstrip("0").rstrip(".") if "." in text else text


def rate(per_second, unit=""):
    """1.23 TFLOP/s, 45.6 GB/s: a rate with the prefix that suits it."""
    scale, prefix = prefix_of(per_second)
    return f"{figure(per_second / scale)} {prefix}{unit}"


def prefix_of(per_second):
    """(scale, prefix) of a rate: (1e12, "T"), (1e9, "G") or (1e6, "M")."""
    for scale, prefix in ((1e12, "T"), (1e9, "G")):
        if per_second >= scale:
            return scale, prefix
    return 1e6, "M"


def ratio_words(ratio, rounded_to_one=True):
    """1.23×; a difference from 1 that is one is not rounded away."""
    digits = 0 if ratio >= 100 else 1 if ratio >= 10 else 2
    text = f"{ratio:,.{digits}f}" if ratio >= 0.1 else figure(ratio, 2)
    return f"{f'{ratio:.4f}' if text == '1.00' and not rounded_to_one else text}×"


def percent(share):
    """105%, 12%, 2%, 0.35%."""
    x = 100 * share
    return f"{x:,.0f}%" if x >= 10 else f"{plain(float(f'{x:.1e}'))}%"


def bytes_words(count):
    """1 GiB, 16 MiB, 48.5 KiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{plain(count / scale)} {unit}"
    return f"{count} B"


def copy_words(size):
    """What a copy ceiling is called, from its key in a record."""
    return f"copy of {bytes_words(int(size))}"


def duration(seconds):
    """8 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{figure(seconds)} s"
