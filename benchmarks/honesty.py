"""What a time must not be: of a kept answer, by a bent clock, of work that comes later.

Each check raises `Refused` with the reason; the provider then gets no time for that case.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from gaugeblock.reference.oracle.adapters import TorchAdapter

from . import timing
from .gate import Refused, passed

# a call in a row may take longer than one by itself by this much: it is launched by the host
_LAUNCH_MS = 0.05
_STOPWATCH_CALLS = 5
_STOPWATCH_TRIES = 3
# a call that computes is on a processor, or in line for one, for more of its time than this
_LEAST_SHARE = 0.3
_LEAST_WAIT_MS = 1.0


def before(contender, sets):
    """Before the timing: every call gives memory of its own, and other inputs other answers."""
    if sets.op.updates:
        return
    tensors = sets.fresh()
    call = contender.eager(tensors)
    one, two = call(), call()
    if _shared(one, two):
        raise Refused("reuses the memory of its last answer for the next one")
    other = contender.eager(sets.fresh(0.5), 0.5)()
    if all(torch.equal(a, b) for a, b in zip(one, other)):
        raise Refused("gives the same answer for other inputs")


def clocks():
    """At any time: the clocks are those that were imported."""
    if not timing.clocks_untouched():
        raise Refused("changed a clock")


def after(contender, sets, gate, clock, samples):
    """After the timing: the answers are right, and the clock has seen all of the work."""
    _timed_answer(contender, sets, gate, clock)
    _new_content(contender, sets, gate)
    _stopwatch(contender, clock, samples)
    if clock.device == "cpu":
        _waiting(contender, clock, samples)
    sets.restore()


def _timed_answer(contender, sets, gate, clock):
    """What is there the moment the clock stops, from memory that held NaN before."""
    sets.restore()
    contender.poison()
    poisoned = TorchAdapter(gate.device).poisoned if clock.device == "cpu" else nullcontext
    try:
        with poisoned():
            answers = _caught(contender, clock)
    except RuntimeError as error:
        # torch fills memory in its deterministic mode alone, where a backward that was compiled
        # outside of it does not run
        if "deterministic" not in str(error):
            raise
        answers = _caught(contender, clock)
    try:
        passed(gate.compare(contender.direction, answers), "in what was timed, ")
    finally:
        clock.synchronize()
    changed = sets.changed()
    if changed:
        raise Refused(f"wrote to its inputs: {', '.join(changed)}")


def _caught(contender, clock):
    """Copies of what a timed call gave, taken on its stream the moment the clock stops."""
    found = []
    clock.flush()
    clock.time(lambda: found.append(contender.run(0)))
    return [t.detach().clone() for t in found[0]]


def _new_content(contender, sets, gate):
    """Other values at the addresses that were timed; for a backward, other output gradients."""
    if contender.direction == "fwd":
        sets.restore(0.25)
        answers = [t.detach().clone() for t in contender.run(0)]
        fresh = contender.eager(sets.fresh(0.25))()
    else:
        sets.restore()
        contender.scale(0.25)
        answers = [t.detach().clone() for t in contender.run(0)]
        contender.scale(4.0)
        fresh = contender.eager(sets.fresh(), 0.25)()
    for got, want, budget in zip(answers, fresh, gate.rms(contender.direction)):
        both = torch.isfinite(got) & torch.isfinite(want)
        error = torch.where(both, got.double() - want.double(), 0.0)
        # two runs, each within its budget
        if error.square().mean().sqrt().item() > 2 * budget:
            raise Refused("gives another answer for new values at the same addresses")


def _stopwatch(contender, clock, samples):
    """Several calls by another clock, until all that they started is over."""
    rows = [
        clock.stopwatch_ms(lambda: contender.run(0), _STOPWATCH_CALLS)
        for _ in range(_STOPWATCH_TRIES)
    ]
    slowest = max(samples.ms)
    if min(rows) > 1.5 * slowest + _LAUNCH_MS:
        raise Refused(
            f"takes {min(rows):.3g} ms by a stopwatch, the clock says {slowest:.3g} ms at most: "
            "work is left when it returns"
        )


def _waiting(contender, clock, samples):
    """A peer that sleeps makes others look fast."""
    if samples.median < _LEAST_WAIT_MS:
        return
    share = max(
        clock.busy_share(lambda: contender.run(0), _STOPWATCH_CALLS)
        for _ in range(_STOPWATCH_TRIES)
    )
    if share < _LEAST_SHARE:
        raise Refused(f"works for {share:.0%} of its time: it waits")


def floor(samples, floor_ms):
    """No call is over before its inputs can have been read and its products been done."""
    if floor_ms is not None and samples.median < floor_ms:
        raise Refused(
            f"takes {samples.median:.3g} ms, which is under the chip's floor of {floor_ms:.3g} ms"
        )


def _shared(one, two):
    def addresses(tensors):
        return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}

    return addresses(one) & addresses(two)
