"""Time on a device: cold cache, interleaved contenders, medians with an interval.

On a GPU the time between two events on the stream, around one call or one replay of its graph. The
cache is flushed before every call, which also gives the host time to queue the call: the events do
not see the launch. On a CPU the same path reads the host's clock.

Source of the interval: order statistics of the binomial distribution (Conover 1999, section 3.2).
"""

from __future__ import annotations

import contextlib
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

# bound here: what a candidate does to these names later is seen, and changes nothing
_now_ns = time.perf_counter_ns
_other_now_ns = time.monotonic_ns
_cpu_now_ns = time.process_time_ns
_elapsed_time = torch.cuda.Event.elapsed_time
_record = torch.cuda.Event.record
_synchronize = torch.cuda.synchronize

LEAST_SAMPLES = 10
MOST_SAMPLES = 1000
WARM_UPS = 3
# the median's 95% interval is at most this much of it, each way
INTERVAL = 0.01
# bytes written to empty the caches of a core; at least eight times that on a GPU
_LEAST_FLUSH = 32 << 20


def clocks_untouched():
    """Whether the clocks are still those that were there at the import."""
    return (
        time.perf_counter_ns is _now_ns
        and time.monotonic_ns is _other_now_ns
        and time.process_time_ns is _cpu_now_ns
        and torch.cuda.Event.elapsed_time is _elapsed_time
        and torch.cuda.Event.record is _record
        and torch.cuda.synchronize is _synchronize
    )


def _busy_ns():
    """Time that this process's threads were on a processor or in line for one, all together."""
    found = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        # a thread may end while it is looked at
        with contextlib.suppress(OSError):
            found += sum(map(int, path.read_text().split()[:2]))
    return found or _cpu_now_ns()


class HostClock:
    """Times calls that are over when they return."""

    device = "cpu"
    # of the smallest calls, how much is not theirs
    overhead_ms = 0.0

    def __init__(self):
        self.flushed = torch.empty(_LEAST_FLUSH // 4)

    def flush(self):
        """Put other data into the caches of the cores; a last one that all share is larger."""
        self.flushed.fill_(1.0)

    def time(self, call):
        start = _now_ns()
        call()
        return _now_ns() - start

    def milliseconds(self, tokens):
        """The times of what `time` returned, once they are known."""
        return [token / 1e6 for token in tokens]

    def stopwatch_ms(self, call, n):
        """Milliseconds of a call in a row of n, by another clock, with everything it started."""
        start = _other_now_ns()
        for _ in range(n):
            call()
        return (_other_now_ns() - start) / 1e6 / n

    def busy_share(self, call, n):
        """For how much of a row of n calls this process works, or waits for a processor."""
        wall, busy = _other_now_ns(), _busy_ns()
        for _ in range(n):
            call()
        return (_busy_ns() - busy) / (_other_now_ns() - wall)

    def synchronize(self):
        pass


class DeviceClock:
    """Times work on the current CUDA stream by events."""

    device = "cuda"

    def __init__(self):
        chip = torch.cuda.get_device_properties(torch.cuda.current_device())
        # writing it takes longer than the host needs to queue events and a graph
        size = max(4 * chip.L2_cache_size, 8 * _LEAST_FLUSH)
        self.flushed = torch.empty(size // 4, device="cuda")
        self.overhead_ms = self._overhead()

    def flush(self):
        self.flushed.fill_(1.0)

    def time(self, call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _record(start)
        call()
        _record(end)
        return start, end

    def milliseconds(self, tokens):
        _synchronize()
        return [_elapsed_time(start, end) for start, end in tokens]

    def stopwatch_ms(self, call, n):
        _synchronize()
        start = _other_now_ns()
        for _ in range(n):
            call()
        # whatever stream it used
        _synchronize()
        return (_other_now_ns() - start) / 1e6 / n

    def synchronize(self):
        _synchronize()

    def _overhead(self):
        """What the events around a call that does nothing of note measure."""
        cell, graph, tokens = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            cell.zero_()
        for _ in range(2 * LEAST_SAMPLES):
            self.flush()
            tokens.append(self.time(graph.replay))
        return float(np.median(self.milliseconds(tokens)[LEAST_SAMPLES:]))


def clock(device):
    return DeviceClock() if device == "cuda" else HostClock()


class Samples:
    """The times of one contender in milliseconds, in order; `error` is what it raised."""

    def __init__(self):
        self.ms, self.error = [], None

    def attempt(self, call):
        """What the call returns; None once one has raised."""
        if self.error is None:
            try:
                return call()
            except Exception as error:
                self.error = error
        return None

    def __len__(self):
        return len(self.ms)

    def quantiles(self):
        p20, p50, p80 = np.quantile(self.ms, (0.2, 0.5, 0.8))
        return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}

    @property
    def median(self):
        return float(np.median(self.ms))

    @property
    def interval(self):
        """Half the width of the median's 95% interval, over the median. None for few samples."""
        n = len(self.ms)
        # the 97.5% quantile of the binomial distribution, by the normal one
        low = math.floor(n / 2 - 1.96 * math.sqrt(n) / 2)
        if low < 1:
            return None
        ordered = np.sort(self.ms)
        return float((ordered[n - low] - ordered[low - 1]) / 2 / max(self.median, 1e-12))

    @property
    def settled(self):
        if len(self) < LEAST_SAMPLES:
            return False
        return len(self) >= MOST_SAMPLES or (self.interval is not None and self.interval < INTERVAL)


def interleave(clock, calls, budget_s, rng, watch=lambda number: None):
    """{name: Samples} of {name: call(round)}, timed turn about in random order.

    Ends when every median is settled or the budget is spent; three rounds are timed in any case.
    One that raises is timed no more; its `error` says why. watch: called with the round's number
    after each.
    """
    samples, start, number = {name: Samples() for name in calls}, _now_ns(), 0
    for name in calls:
        for i in range(WARM_UPS):
            samples[name].attempt(partial(calls[name], i))
    clock.synchronize()
    while names := [name for name in calls if not samples[name].error]:
        tokens = {}
        for name in (names[i] for i in rng.permutation(len(names))):
            clock.flush()
            tokens[name] = samples[name].attempt(partial(clock.time, partial(calls[name], number)))
        timed = {name: token for name, token in tokens.items() if not samples[name].error}
        for name, ms in zip(timed, clock.milliseconds(timed.values())):
            samples[name].ms.append(ms)
        watch(number)
        number += 1
        if all(samples[name].settled for name in timed):
            break
        if number >= 3 and (_now_ns() - start) / 1e9 > budget_s:
            break
    return samples
