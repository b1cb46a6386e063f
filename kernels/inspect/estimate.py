"""What a case of the catalog takes at least on a chip, and why: work over ceilings.

    bandwidth   bytes of every input and output, each once / copy rate
    matrix      flops / matrix rate / share of the chip
    exp         exponentials / their rate / share of the chip
    latency     what a call takes that does nothing

The largest is the estimate, and the reason. Flops and bytes are the catalog's. Exponentials are
those that every pass of a loop takes, for each flop of its products, or, in a kernel without
products, for each byte that it reads. They are not known where no loop takes them in every pass, as
those after a product's last step, and where the code does not show its products: on sm_100, in
float32, and where warps differ in what they run. share of the chip: the programs of the largest
launch over the multiprocessors, at most 1. Nothing here is measured on the kernel: a good one comes
near.
"""

from __future__ import annotations

from ..ceilings import CHIPS, copy_gb_s, nominal, read, times_ms
from .tables import Table

# Assumed where no record says what an empty call takes: two microseconds.
LATENCY_MS = 0.002
_NAMES = {"copy": "bandwidth", "matrix": "matrix", "exp": "exp", "latency": "latency"}


def add(rows, file=None):
    """Give each row of a case its "estimate": {direction: {…}}, None where there is none.

    file: JSON of `gaugeblock ceilings` or a record; the datasheet of the target's chip by default.
    {…} is {"ceilings", "flop", "bytes", "intensity", "ridge", "exponentials", "share", "times_ms",
    "time_ms", "reason"}: intensity in flops a byte, ridge that at which the two ceilings meet;
    exponentials and their time None where they are not known.
    """
    given = read(file) if file else None
    cases = {}
    for row in rows:
        cases.setdefault((row["op"], row["case"], row["dtype"], row["target"]), []).append(row)
    for (_, _, dtype, target), launches in cases.items():
        ceilings, latency_ms, source = _ceilings(given, file, target)
        known = ceilings and dtype in ceilings["matrix_tflop_s"] and launches[0]["work"]
        for row in launches:
            row["estimate"] = {
                direction: {"ceilings": source}
                | _estimate(work, _of(launches, direction), dtype, target, ceilings, latency_ms)
                for direction, work in row["work"].items()
            } if known else None  # fmt: skip


def _ceilings(given, file, target):
    if given:
        return given[0], LATENCY_MS if given[1] is None else given[1], str(file)
    if target not in CHIPS:
        return None, None, None
    return nominal(target), LATENCY_MS, f"datasheet of {CHIPS[target].name}"


def _of(launches, direction):
    """The launches of a direction, by the kernels' names; those whose names tell none, in both."""
    own, other = ("_fwd_", "_bwd_") if direction == "fwd" else ("_bwd_", "_fwd_")
    return [row for row in launches if own in row["kernel"] or other not in row["kernel"]]


def _estimate(work, launches, dtype, target, ceilings, latency_ms):
    moved = work["read_bytes"] + work["written_bytes"]
    exponentials = _exponentials(work, launches)
    programs = max((row["launched"] for row in launches), default=1)
    share = min(1.0, programs / CHIPS[target].multiprocessors) if target in CHIPS else 1.0
    exp = (exponentials or 0) / share
    times = times_ms(ceilings, dtype, moved, work["flop"] / share, latency_ms, exp)
    times = {_NAMES[key]: time for key, time in times.items()}
    reason = max(times, key=times.get)
    if exponentials is None:
        times["exp"] = None
    rate = copy_gb_s(ceilings, moved)
    return {
        "flop": work["flop"],
        "bytes": moved,
        "intensity": work["flop"] / moved if moved else None,
        "ridge": ceilings["matrix_tflop_s"][dtype] * 1e3 / rate,
        "exponentials": None if exponentials is None else round(exponentials),
        "share": share,
        "times_ms": times,
        "time_ms": times[reason],
        "reason": reason,
    }


def _exponentials(work, launches):
    """As many as the loops show for the work, of the launch that shows most; None: not known."""
    shown = [_shown(work, row) for row in launches if "MUFU.EX2" in row["instructions"]]
    return None if None in shown else max(shown, default=0.0)


def _shown(work, row):
    """Those of a launch that has some."""
    bounds = row["bounds"] or []
    # all of the code, where there is no loop
    parts = [part["work"] for part in bounds[:-1] or bounds]
    if "FFMA" in row["product_units"] or any(done["flop"] is None for done in parts):
        return None
    unit = "flop" if any(done["flop"] for done in parts) else "read_bytes"
    most = max((done["exponentials"] / done[unit] for done in parts if done[unit]), default=0.0)
    return most * work[unit] or None


def _microseconds(ms):
    return "–" if ms is None else f"{1e3 * ms:.3g}"


def table(rows):
    """One line a case, target and direction."""
    lines, seen = [], set()
    for row in rows:
        key = row["op"], row["case"], row["target"]
        if key in seen or not row.get("estimate"):
            continue
        seen.add(key)
        for direction, found in row["estimate"].items():
            times = (_microseconds(found["times_ms"][k]) for k in _NAMES.values())
            intensity = "–" if found["intensity"] is None else f"{found['intensity']:.3g}"
            lines.append((
                *key, direction, f"{found['flop'] / 1e9:.3g}", f"{found['bytes'] / 1e6:.3g}",
                intensity, f"{found['ridge']:.3g}", f"{100 * found['share']:.3g}%", *times,
                _microseconds(found["time_ms"]), found["reason"],
            ))  # fmt: skip
    sources = dict.fromkeys(
        found["ceilings"] for row in rows for found in (row.get("estimate") or {}).values()
    )
    head = (
        "op", "case", "target", "", "GFLOP", "MB", "flop/byte", "ridge", "of the chip",
        *(f"{name} µs" for name in _NAMES.values()), "µs at least", "reason",
    )  # fmt: skip
    return Table(f"estimated from ceilings: {', '.join(sources)}", head, lines)
