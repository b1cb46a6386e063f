"""Invented records for the tests of what is reported, each valid by the schema."""

import functools
import json

import jsonschema
from gaugeblock.benchmarks.page import page

from tests.helpers import CHECKOUT

SCHEMA = json.loads((CHECKOUT / "benchmarks" / "record.schema.json").read_text())
CEILINGS = {
    "copy_gb_s": {str(1 << 24): 90.0, str(1 << 28): 60.0},
    "matrix_tflop_s": {"float32": 2.0},
    "exp_t_s": 0.01,
}
HOSTILE = '<script src="https://evil.invalid/x.js">document.title=`$\\a|b_c*d$`</script>'


def entry(provider, p50=1.0, op="layer_norm", case="wide", direction="fwd", **changes):
    """An invented measurement that took p50 ms, known to a hundredth."""
    shape, flops, moved = {"M": 64, "N": 768}, 4_000_000, 8_000_000
    return {
        "op": op, "case": case, "dtype": "float32", "direction": direction, "provider": provider,
        "shape": shape, "time_ms": {"p20": 0.99 * p50, "p50": p50, "p80": 1.01 * p50},
        "samples": 50, "interval": 0.004, "gb_s": moved / p50 / 1e6, "tflop_s": flops / p50 / 1e9,
        "bytes": moved, "flops": flops, "roof_ms": 0.5, "roof": "copy",
        "percent_of_roof": 50 / p50, "energy_j": 0.02 * p50, "marks": [],
        "parity": {"compared": 3, "ratio": 0.25},
    } | changes  # fmt: skip


def attention(provider, p50, T, direction="fwd", **changes):
    shape = {"B": 2, "H": 3, "Hkv": 3, "Tq": T, "Tk": T, "D": 64, "causal": True, "window": None}
    return entry(
        provider, p50, "attention", f"causal_{T}", direction,
        shape=shape, flops=100_000 * T * T, bytes=10_000 * T,
        tflop_s=100_000 * T * T / p50 / 1e9, roof="matrix", **changes,
    )  # fmt: skip


def left_out(provider, reason, op="layer_norm", case="wide", direction="fwd"):
    return {
        "op": op, "case": case, "dtype": "float32", "direction": direction, "provider": provider,
        "reason": reason,
    }  # fmt: skip


def record(entries, **changes):
    """An invented record of some entries, valid by the schema."""
    made = {
        "schema": 1, "device": "Invented", "driver": "1.2", "torch": "2.11.0", "triton": "3.6.0",
        "commit": "abcdef0123456789", "dirty": False, "command": "gaugeblock bench",
        "started": "2026-01-02T03:04:05+00:00", "seconds": 75.0, "complete": True,
        "machine": {"cores": 2, "l2_bytes": 1 << 20},
        "providers": {
            "gaugeblock": {"version": "0.1.0", "reason": None},
            "absent": {"version": None, "reason": "is not installed"},
        },
        "ceilings": {"before": CEILINGS, "after": CEILINGS, "drift": 0.0},
        "entries": entries, "left_out": [],
    } | changes  # fmt: skip
    jsonschema.validate(made, SCHEMA)
    return made


def full():
    """Several ops, directions and providers, ours among them; one case that not everybody ran."""
    entries = [
        attention(name, factor * T * T / 1e6, T, direction)
        for T in (256, 512, 1024)
        for direction in ("fwd", "bwd")
        for name, factor in (("gaugeblock", 1.0), ("flash", 0.8), ("eager", 3.0))
        if (name, T) != ("eager", 1024)
    ]
    entries += [entry("gaugeblock", 0.9), entry("eager", 1.5), entry("compiled", 1.0)]
    reasons = [
        left_out("eager", "its scores do not fit", "attention", "causal_1024", direction)
        for direction in ("fwd", "bwd")
    ]
    return record(entries, left_out=[*reasons, left_out(None, "no time was left", case="huge")])


def peers_only():
    made = full()
    made["entries"] = [e for e in made["entries"] if e["provider"] != "gaugeblock"]
    return made


def empty():
    return record([])


def hostile():
    """A record in which every word that can be is hostile."""
    entries = [
        entry(HOSTILE, 2.0, op=HOSTILE, case=HOSTILE, marks=[HOSTILE], shape={HOSTILE: HOSTILE}),
        entry("gaugeblock", op=HOSTILE, case=HOSTILE, roof=None),
        entry("gaugeblock", op=HOSTILE, case="other"),
        attention(HOSTILE, 1.0, 64),
        attention(HOSTILE, 4.0, 128),
    ]
    return record(
        entries, device=HOSTILE, driver=HOSTILE, torch=HOSTILE, triton=HOSTILE, command=HOSTILE,
        commit=HOSTILE, machine={HOSTILE: HOSTILE},
        providers={HOSTILE: {"version": HOSTILE, "reason": HOSTILE, "note": HOSTILE}},
        left_out=[left_out(HOSTILE, HOSTILE, HOSTILE, "other")],
    )  # fmt: skip


_MADE = {"full": full, "peers_only": peers_only, "empty": empty, "hostile": hostile}


@functools.cache
def page_of(*names):
    """The page of some of the records above, by name; drawn once."""
    return page([_MADE[name]() for name in names])
