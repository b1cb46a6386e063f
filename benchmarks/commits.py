"""`gaugeblock compare --gate REF`: two commits, interleaved on this machine.

Each commit is checked out into a worktree. A run starts one process a side; case by case they take
turns at blocks of calls, in random order, and the run gives one number a case: the median over
blocks of log(B's median / A's). New processes with other addresses make the next run, since where
memory and code happen to lie moves times by percents, for all calls of a process alike. There are
five looks at the runs: a case that can be told is finished, the others go on.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from gaugeblock.kernels.worktree import commit_of, git, top, worktree
from gaugeblock.reference.oracle.worker import broke_device

from . import side
from .compare import CHANGE, FALSE_ALARM, expect_rates, line_of
from .plan import planned, settled
from .providers import OURS, installed
from .record import CHECKOUT, device_name
from .significance import UNKNOWN, least_pairs, paired
from .verdicts import CUT, MISSING, NEW, WRONG, Comparison, Line

# runs at which cases are judged, in the fewest that can judge
LOOKS = (1.0, 1.5, 2.25, 3.5, 5.0)
# blocks of a case in a run and calls of a block; where calls are long, as many as fit into the
# seconds of a block, and no fewer blocks than the least
BLOCKS, LEAST_BLOCKS, CALLS, BLOCK_S = 12, 5, 4, 0.04
# read by libraries when a process starts
_ENVIRONMENT = {
    # idle threads that spin would be timed with the other side's
    "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0",
    # glibc keeps what was freed: by default it is an accident of sizes whether every call waits for
    # the system to clear pages
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
}  # fmt: skip
# the share of the time that checks may take
CHECKS = 0.5
# a side that does not answer for so long is given up
_PATIENCE_S = 300
_SPENT = "the time budget was spent"
# whose errors these are
_GATE = "compare: gate"


def compare_commits(
    ref, ops=(), *, suite="quick", provider=OURS, dtypes=None, direction="both", cases=(),
    change=CHANGE, false_alarm=FALSE_ALARM, budget_s=None, check=True, accept_new=False,
    accept_missing=False, seed=None, say=print,
):  # fmt: skip
    """The comparison of a commit, A, with the files of the checkout as they are, B.

    ref:      A, any name that git knows. B holds changes that are not committed, of files that git
              knows.
    provider: ours, from Gaugeblock's own checkout; or `module:object`, a Provider in the working
              folder's repository.
    cases:    names; all of the suite by default.
    budget_s: seconds; 300 on a CPU and 480 on a GPU by default. A case that does not fit is cut.
    check:    whether both sides must be right before they are timed.
    The other arguments are those of `compare` and `bench`. Raises ValueError for what cannot be
    compared.
    """
    expect_rates(change, false_alarm)
    if provider != OURS and ":" not in provider:
        raise ValueError(f"{_GATE}: provider must be {OURS} or module:object, got {provider!r}")
    rng, begun = np.random.default_rng(seed), time.monotonic()
    repository = CHECKOUT if provider == OURS else top(Path.cwd(), _GATE)
    with _worktrees(repository, ref) as (folders, commits):
        sides = _Sides(folders, repository, provider)
        dtypes, directions = settled(dtypes, direction, budget_s, sides.device)
        keys = _keys(ops, suite, sides.device, dtypes, directions, cases)
        accepted = {NEW: accept_new, MISSING: accept_missing}
        left_s = (budget_s or (480 if sides.device == "cuda" else 300)) + begun - time.monotonic()
        gate = _Gate(sides, rng, change, false_alarm, accepted, left_s, say)
        lines = gate.run(keys, check)
        about = {
            "A": f"{ref}, {commits[0][:12]}", "B": commits[1],
            "device": device_name(sides.device),
            "versions": f"torch {installed('torch')}, triton {installed('triton')}",
            "checked": "what is timed is right on both sides" if check else "no",
        }  # fmt: skip
    return Comparison(lines, change, false_alarm, about)


class _Gate:
    def __init__(self, sides, rng, change, false_alarm, accepted, left_s, say):
        self.sides, self.rng, self.say = sides, rng, say
        self.change, self.false_alarm, self.accepted = change, false_alarm, accepted
        self.begun, self.budget_s = time.monotonic(), left_s
        self.ratios, self.times, self.failed = {}, {}, {}

    @property
    def left_s(self):
        return self.begun + self.budget_s - time.monotonic()

    def run(self, keys, check):
        """The lines of all cases that one side or both can do."""
        with self.sides.open(self.rng) as pair:
            keys, lines = self._both(pair, keys)
        if check:
            keys, not_timed = self._right(keys)
            lines += not_timed
        if not keys:
            return lines
        self.level = self.false_alarm / (len(keys) * len(LOOKS))
        fewest = least_pairs(self.level)
        looks, left = [math.ceil(share * fewest) for share in LOOKS], list(keys)
        self.ratios, self.times = ({key: [] for key in keys} for _ in range(2))
        # kernels that were not checked compile in the first run
        typical = 1 if check else 2
        for number in range(1, looks[-1] + 1):
            begun = time.monotonic()
            self._run(left)
            took = time.monotonic() - begun
            left = [key for key in left if key not in self.failed]
            if number == typical:
                left = self._that_fit(left, took, fewest - number)
            if number in looks:
                left = [key for key in left if self._line(key).verdict in (UNKNOWN, CUT)]
                told = sum(self._line(key).verdict not in (UNKNOWN, CUT) for key in keys)
                self.say(f"{number} runs: {told} of {len(keys)} cases told")
            if not left or took > self.left_s:
                break
        return lines + [self._line(key) for key in keys]

    def _both(self, pair, keys):
        """(keys that both sides do, lines of those that one does)."""
        cannot = [worker.ask("cannot", keys) for worker in pair]
        kept, lines = [], []
        for key in keys:
            a, b = (found[key] for found in cannot)
            if a and not b:
                lines.append(self._absent(key, NEW, f"A {a}"))
            elif b and not a:
                lines.append(self._absent(key, MISSING, f"B {b}"))
            elif not a:
                kept.append(key)
        if not kept and not lines:
            a, b = (found[keys[0]] for found in cannot)
            raise ValueError(f"{_GATE}: one side must do one of the cases, A {a} and B {b}")
        return kept, lines

    def _absent(self, key, verdict, reason):
        return Line(*key, verdict, reason=reason, accepted=self.accepted[verdict])

    def _right(self, keys):
        """(keys of cases in which both sides are right, lines of the others)."""
        lines = {}
        for op, case, dtype in dict.fromkeys(key[:3] for key in keys):
            of_case = [key for key in keys if key[:3] == (op, case, dtype)]
            if self.left_s < (1 - CHECKS) * self.budget_s:
                lines |= {key: Line(*key, CUT, reason=_SPENT) for key in of_case}
                continue
            # in processes of their own: one may die of it
            with self.sides.open(self.rng) as pair:
                backward = any(key[3] == "bwd" for key in of_case)
                error = _of_both(pair, "check", of_case[0], backward)
            if error:
                lines |= {key: self._failure(key, error) for key in of_case}
        return [key for key in keys if key not in lines], list(lines.values())

    def _failure(self, key, error):
        """The line of a case that has no times, since a side failed in it."""
        if error.late:
            return Line(*key, CUT, reason=str(error))
        if error.letter == "A":
            return self._absent(key, NEW, str(error))
        return Line(*key, WRONG, reason=str(error))

    def _run(self, keys):
        """One pair of new processes: a log ratio more for each case."""
        with self.sides.open(self.rng) as pair:
            for key in (keys[i] for i in self.rng.permutation(len(keys))):
                try:
                    a, b = self._turns(pair, key)
                except SideError as error:
                    self.failed[key] = error
                    if error.died:
                        # the other cases go on in the next run
                        return
                    continue
                self.ratios[key].append(float(np.median(np.log(b / a))))
                self.times[key].append((float(np.median(a)), float(np.median(b))))

    def _turns(self, pair, key):
        """(A's, B's) median of each block, in milliseconds."""
        try:
            # what comes first may find more room, or less
            if error := _of_both([pair[i] for i in self.rng.permutation(2)], "prepare", key):
                raise error
            blocks, end = [], time.monotonic() + 2 * BLOCKS * BLOCK_S
            while len(blocks) < BLOCKS:
                if len(blocks) >= LEAST_BLOCKS and time.monotonic() > end:
                    break
                block = np.empty(2)
                for i in self.rng.permutation(2):
                    block[i] = np.median(pair[i].ask("time", CALLS, BLOCK_S))
                blocks.append(block)
        finally:
            for worker in pair:
                if not worker.died:
                    worker.ask("release")
        return np.transpose(blocks)

    def _that_fit(self, keys, took, runs):
        """The first keys of which so many runs fit into the time."""
        share = self.left_s / max(took * runs, 1e-9)
        return keys[: max(1, math.floor(len(keys) * share))]

    def _line(self, key):
        if key in self.failed:
            return self._failure(key, self.failed[key])
        ratios = self.ratios[key]
        if not ratios:
            return Line(*key, CUT, reason=_SPENT)
        a, b = np.median(self.times[key], axis=0)
        found = {"a": float(a), "b": float(b), "runs": (len(ratios),) * 2, "log_ratios": ratios}
        if len(ratios) < least_pairs(self.level):
            return Line(*key, CUT, ratio=math.exp(np.median(ratios)), reason=_SPENT, **found)
        return line_of(key, paired(ratios, self.level), self.change, **found)


def _of_both(pair, method, *arguments):
    """Ask both; None, or the error of one, B's if there is one."""
    for worker in pair:
        worker.send(method, *arguments)
    errors = []
    for worker in pair:
        try:
            worker.answer()
        except SideError as error:
            errors.append(error)
    return max(errors, key=lambda error: error.letter, default=None)


class SideError(ValueError):
    """What a side said instead of an answer.

    letter: A or B. died: whether it will say no more. late: whether it may only be slow.
    """

    def __init__(self, letter, message, died=False, late=False):
        super().__init__(message)
        self.letter, self.died, self.late = letter, died, late


class _Sides:
    """Starts the processes of the two worktrees, forks of one that has imported what they need."""

    def __init__(self, folders, repository, provider):
        inside = "." if provider == OURS else os.path.relpath(Path.cwd().resolve(), repository)
        of_both = str(repository), inside, provider
        self.settings = [(str(folder), *of_both) for folder in folders]
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([side.__name__])
        # the server that forks starts with the first process, and keeps its environment
        added = {k: v for k, v in _ENVIRONMENT.items() if k not in os.environ}
        os.environ.update(added)
        try:
            with self.context.Pool(1) as pool:
                self.device = pool.apply(side.device)
        finally:
            for name in added:
                del os.environ[name]

    @contextlib.contextmanager
    def open(self, rng):
        """(worker of A, worker of B), started in random order."""
        with contextlib.ExitStack() as stack:
            try:
                workers = self._start(rng, stack)
            except SideError as error:
                if not error.died:
                    raise
                # of hundreds of processes one may die before it is asked anything
                workers = self._start(rng, stack)
            yield workers

    def _start(self, rng, stack):
        workers = [None, None]
        for i in rng.permutation(2):
            setting = side.Setting(*self.settings[i], self.device)
            workers[i] = _Worker(self.context, setting, "AB"[i])
            stack.callback(workers[i].close)
        for worker in workers:
            worker.answer()
        return workers


class _Worker:
    def __init__(self, context, setting, letter):
        self.letter, self.died = letter, False
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=side.serve, args=(theirs, setting), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method, *arguments):
        self.send(method, *arguments)
        return self.answer()

    def send(self, method, *arguments):
        # a process that died has nothing to say: `answer` finds that out
        with contextlib.suppress(OSError):
            self.connection.send((method, arguments))

    def answer(self):
        try:
            if not self.connection.poll(_PATIENCE_S):
                raise self._lost(f"{self.letter} has not answered for {_PATIENCE_S} s", late=True)
            kind, result = self.connection.recv()
        except (EOFError, OSError):
            raise self._lost(f"the process of {self.letter} died") from None
        if kind == "elsewhere":
            raise ValueError(f"{_GATE}: {result}")
        if kind == "error" and broke_device(result):
            raise self._lost(f"{self.letter}: {result}")
        if kind == "error":
            raise SideError(self.letter, f"{self.letter}: {result}")
        return result

    def _lost(self, message, late=False):
        self.died = True
        return SideError(self.letter, message, died=True, late=late)

    def close(self):
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(1)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _keys(ops, suite, device, dtypes, directions, cases):
    """[(op, case, dtype, direction)], the most valuable first."""
    plan = planned(ops, suite, device)
    known = {case.name for _, case in plan}
    for name in cases:
        if name not in known:
            raise ValueError(
                f"compare: case must be one of {', '.join(sorted(known))}, got {name!r}"
            )
    keys = [
        (op.name, case.name, dtype, d)
        for op, case in plan
        if not cases or case.name in cases
        for dtype in dtypes
        for d in directions
        if d == "fwd" or op.differentiable()
    ]
    if not keys:
        raise ValueError(f"compare: ops must have cases of suite {suite} on {device}, got none")
    return keys


@contextlib.contextmanager
def _worktrees(repository, ref):
    """(folders, (A's commit, B in words)) of two worktrees whose paths are equally long."""
    a = commit_of(repository, ref, _GATE)
    me = ("-c", "user.name=gaugeblock", "-c", "user.email=gaugeblock@localhost")
    head = git(repository, "rev-parse", "HEAD")
    # a commit of what has changed, which moves no branch; nothing where nothing has
    changed = git(repository, *me, "stash", "create")
    said = f"{head[:12]}{' with changes' if changed else ''}"
    with tempfile.TemporaryDirectory(prefix="gaugeblock-compare-") as folder:
        folders = [Path(folder) / name for name in "ab"]
        with (
            worktree(repository, folders[0], a),
            worktree(repository, folders[1], changed or head),
        ):
            yield folders, (a, said)
