"""A timer for pytest-benchmark that is advanced by what a `timing` clock measures.

pytest-benchmark reads its timer before and after a call. Read as host time that would be the launch
on a GPU; here the call itself is timed by events, behind a flushed cache, and the timer goes on by
that much.
"""

from __future__ import annotations

from .timing import clock


class AdvancingTimer:
    """Seconds of all calls so far."""

    def __init__(self, device):
        self.device, self.clock, self.seconds = device, None, 0.0

    def __call__(self):
        return self.seconds

    def timed(self, call):
        """A function that makes the call and advances the timer."""
        self.clock = self.clock or clock(self.device)

        def run():
            self.clock.flush()
            token = self.clock.time(call)
            self.seconds += self.clock.milliseconds([token])[0] / 1e3

        return run
