"""No time without parity: a provider is checked before it is timed, at the shape that is timed.

It must be right at a smaller shape too, so that nothing is timed which knows one shape alone.
"""

from __future__ import annotations

import gc

import numpy as np
import torch
from gaugeblock.reference.oracle import Case
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.result import describe
from gaugeblock.reference.oracle.sampled import expectation_of

from .plan import DIRECTIONS


class Refused(Exception):
    """Why a provider gets no time, in one line.

    wrong: whether it answered; one that raised may lack the case or the memory.
    """

    def __init__(self, reason, wrong=True):
        super().__init__(reason)
        self.wrong = wrong


class Gate:
    """The reference's answers to a case in a dtype, and what providers make of it."""

    def __init__(self, op, case, dtype, device, backward=True, seed=0):
        self.op, self.device = op, device
        self.timed = _Point(op, case, dtype, device, backward, seed)
        smaller = sibling(op, case)
        self.smaller = smaller and _Point(op, smaller, dtype, device, backward, seed)
        self.expectation = self.timed.expectation

    def check(self, fn, backward=True):
        """The results of the check. Raises `Refused` where the function is wrong.

        backward: False for a function that has none.
        """
        results = self.timed.check(fn, backward)
        passed(results)
        if self.smaller:
            passed(self.smaller.check(fn, backward), "at another shape, ")
        return results

    def compare(self, direction, tensors):
        """Results of outputs ("fwd") or gradients ("bwd") that came from the first inputs."""
        part = DIRECTIONS.index(direction)
        return self.expectation.compare_part(part, self.timed.session.answers(tensors, part))

    def rms(self, direction):
        """What the RMS error of each output or gradient may be; none for an output that chooses."""
        if self.op.accepts:
            return []
        part, content = DIRECTIONS.index(direction), self.expectation.content()
        dtype = self.expectation.storage.name
        return [content.bound(part, i, dtype).budget.rms for i in range(len(content.names(part)))]


class _Point:
    """A case in a dtype with its arguments in memory."""

    def __init__(self, op, case, dtype, device, backward, seed):
        self.expectation = expectation_of(op, case, dtype, seed, backward)
        self.session = self.expectation.open(TorchAdapter(device))

    def check(self, fn, backward):
        content = self.expectation.content()
        self.session.refill(content.inputs, content.dys if backward else None)
        answers = self.expectation.call(self.session, fn)
        if backward or isinstance(answers[0], str):
            return self.expectation.results(self.session, answers)
        return self.expectation.compare_part(0, answers[0]) + self.expectation.damage(self.session)


def passed(results, where=""):
    """Raise `Refused` with the first failure, if there is one."""
    failures = [r for r in results if not r.passed]
    if failures and failures[0].kind == "exception" and not where:
        raise Refused(failures[0].hint, wrong=False)
    if failures:
        raise Refused(f"wrong {where}{describe(failures[0])}")


def sibling(op, case):
    """The case with its large dimensions a quarter, or with all of them half; None if it has none.

    A quarter stays a multiple of 64, which some kernels need.
    """
    sizes = sorted(op.dims(case).items(), key=lambda item: -item[1])
    quarter = {name: max(64, n // 4 // 64 * 64) for name, n in sizes if n > 64}
    return _resized(op, case, quarter) or _resized(
        op, case, {name: n // 2 for name, n in sizes if n > 16}
    )


def _resized(op, case, smaller):
    while smaller:
        settings = {**case.settings, **smaller}
        found = Case(
            case.name, tags=case.tags, values=case.values, shapes=case.shapes,
            keywords=case.keywords, **settings,
        )  # fmt: skip
        try:
            op.draw(found, np.random.default_rng(0), lambda name, shape, scale: np.zeros(shape))
        except ValueError:
            # a size that follows from others, as a pool's from the pages in it
            del smaller[next(iter(smaller))]
        else:
            return found
    return None


def free_memory(device):
    """Give memory that nobody uses back to the device."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
