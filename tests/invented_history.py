"""An invented history for the tests of what is reported: commits of some months, two devices."""

import hashlib
import math
from datetime import datetime, timedelta

from tests.invented_records import CEILINGS, attention, entry, record


def commits(count, device="Invented"):
    """So many records of a device, oldest first: ours falls in steps, one peer comes late."""
    return [_commit(i, count, device) for i in range(count)]


def _commit(i, count, device):
    # noise that is the same on every run
    noise = 1 + 0.02 * math.sin(2.3 * i)
    step = 1.3 if i < count // 3 else 1.05 if i < 2 * count // 3 else 1.0
    entries = []
    for T in (512, 1024):
        for direction, slower in (("fwd", 1.0), ("bwd", 2.6)):
            base = slower * (T / 1024) ** 2 * noise
            entries.append(attention("gaugeblock", 0.8 * step * base, T, direction))
            entries.append(attention("torch_eager", 9.0 * base, T, direction))
            if i >= count // 4:
                entries.append(attention("flash_attn", 0.78 * base, T, direction))
    entries += [entry("gaugeblock", 0.5 * step * noise), entry("liger", 0.52 * noise)]
    drift = 0.05 if i % 9 == 4 else 0.004
    return record(
        entries,
        device=device,
        commit=hashlib.sha1(f"{device}{i}".encode()).hexdigest(),
        dirty=i % 11 == 7,
        started=(
            datetime.fromisoformat("2026-01-02T03:04:05+00:00") + timedelta(5 * i)
        ).isoformat(),
        triton="3.6.0" if i < count // 2 else "3.7.1",
        ceilings={"before": CEILINGS, "after": CEILINGS, "drift": drift},
    )
