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

from . import side
from .compare import CHANGE, FALSE_ALARM, expect_rates, line_of
from .gate import DIRECTIONS
from .plan import planned
from .providers import OURS
from .record import CHECKOUT, device_name, installed
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
# a side that does not answer for so long has died
_PATIENCE_S = 300
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
    rng, begun = np.random.default_rng(seed), time.monotonic()
    repository = CHECKOUT if provider == OURS else top(Path.cwd(), _GATE)
    with _worktrees(repository, ref) as (folders, commits):
        sides = _Sides(folders, provider)
        keys = _keys(ops, suite, sides.device, dtypes, direction, cases)
        gate = _Gate(sides, rng, change, false_alarm, say)
        gate.end = begun + (budget_s or (480 if sides.device == "cuda" else 300))
        lines = gate.run(keys, check, {NEW: accept_new, MISSING: accept_missing})
        about = {
            "A": f"{ref}, {commits[0][:12]}", "B": commits[1],
            "device": device_name(sides.device),
            "versions": f"torch {installed('torch')}, triton {installed('triton')}",
            "checked": "what is timed is right on both sides" if check else "no",
        }  # fmt: skip
    return Comparison(lines, change, false_alarm, about)


class _Gate:
    def __init__(self, sides, rng, change, false_alarm, say):
        self.sides, self.rng, self.say = sides, rng, say
        self.change, self.false_alarm = change, false_alarm
        self.ratios, self.times, self.failed = {}, {}, {}

    def run(self, keys, check, accepted):
        """The lines of all cases that one side or both can do."""
        with self.sides.open(self.rng) as pair:
            keys, lines = self._both(pair, keys, accepted)
        if check:
            keys, wrong = self._right(keys)
            lines += wrong
        if not keys:
            return lines
        self.level = self.false_alarm / (len(keys) * len(LOOKS))
        fewest = least_pairs(self.level)
        looks, left = [math.ceil(share * fewest) for share in LOOKS], list(keys)
        self.ratios, self.times = ({key: [] for key in keys} for _ in range(2))
        for number in range(1, looks[-1] + 1):
            begun = time.monotonic()
            self._run(left)
            took = time.monotonic() - begun
            left = [key for key in left if key not in self.failed]
            if number == 1:
                left = self._that_fit(left, took, fewest)
            if number in looks:
                left = [key for key in left if self._line(key).verdict == UNKNOWN]
                self.say(f"{number} runs: {len(keys) - len(left)} of {len(keys)} cases told")
            if not left or time.monotonic() + took > self.end:
                break
        return lines + [self._line(key) for key in keys]

    def _both(self, pair, keys, accepted):
        """(keys that both sides do, lines of those that one does)."""
        cannot = [worker.ask("cannot", keys) for worker in pair]
        kept, lines = [], []
        for key in keys:
            a, b = (found[key] for found in cannot)
            if a and not b:
                lines.append(Line(*key, NEW, reason=f"A {a}", accepted=accepted[NEW]))
            elif b and not a:
                lines.append(Line(*key, MISSING, reason=f"B {b}", accepted=accepted[MISSING]))
            elif not a:
                kept.append(key)
        return kept, lines

    def _right(self, keys):
        """(keys of cases in which both sides are right, lines of those in which one is not)."""
        wrong = {}
        for op, case, dtype in dict.fromkeys(key[:3] for key in keys):
            of_case = [key for key in keys if key[:3] == (op, case, dtype)]
            # in processes of their own: one may die of it
            with self.sides.open(self.rng) as pair:
                for worker in pair:
                    worker.send("check", of_case[0], any(key[3] == "bwd" for key in of_case))
                for worker in pair:
                    try:
                        worker.answer()
                    except SideError as error:
                        wrong |= dict.fromkeys(of_case, str(error))
        kept = [key for key in keys if key not in wrong]
        return kept, [Line(*key, WRONG, reason=reason) for key, reason in wrong.items()]

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
            for i in self.rng.permutation(2):
                pair[i].ask("prepare", key)
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
                worker.ask("release")
        return np.transpose(blocks)

    def _that_fit(self, keys, took, fewest):
        """The first keys of which the fewest runs that can tell anything fit into the time."""
        share = (self.end - time.monotonic()) / max(took * (fewest - 1), 1e-9)
        return keys[: max(1, math.floor(len(keys) * share))]

    def _line(self, key):
        if key in self.failed:
            return Line(*key, WRONG, reason=str(self.failed[key]))
        ratios, (a, b) = self.ratios[key], np.median(self.times[key], axis=0)
        found = {"a_ms": float(a), "b_ms": float(b), "runs": (len(ratios),) * 2}
        if len(ratios) < least_pairs(self.level):
            reason = "the time budget was spent"
            ratio = math.exp(np.median(ratios))
            return Line(*key, CUT, ratio=ratio, reason=reason, log_ratios=ratios, **found)
        return line_of(key, paired(ratios, self.level), self.change, log_ratios=ratios, **found)


class SideError(ValueError):
    """What a side said instead of an answer; died: whether it will say no more."""

    def __init__(self, message, died=False):
        super().__init__(message)
        self.died = died


class _Sides:
    """Starts the processes of the two worktrees, forks of one that has imported what they need."""

    def __init__(self, folders, provider):
        inside = "."
        if provider != OURS:
            inside = os.path.relpath(Path.cwd().resolve(), top(Path.cwd(), _GATE))
        self.settings = [(str(folder), inside, provider) for folder in folders]
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
        self.letter = letter
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=side.serve, args=(theirs, setting), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method, *arguments):
        self.send(method, *arguments)
        return self.answer()

    def send(self, method, *arguments):
        try:
            self.connection.send((method, arguments))
        except OSError:
            raise SideError(f"the process of {self.letter} died", died=True) from None

    def answer(self):
        try:
            if not self.connection.poll(_PATIENCE_S):
                said = f"{self.letter} has not answered for {_PATIENCE_S} s"
                raise SideError(said, died=True)
            kind, result = self.connection.recv()
        except (EOFError, OSError):
            raise SideError(f"the process of {self.letter} died", died=True) from None
        if kind == "error":
            raise SideError(f"{self.letter}: {result}")
        return result

    def close(self):
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(1)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _keys(ops, suite, device, dtypes, direction, cases):
    """[(op, case, dtype, direction)], the most valuable first."""
    dtypes = tuple(dtypes or (("bfloat16",) if device == "cuda" else ("float32",)))
    if direction not in (*DIRECTIONS, "both"):
        raise ValueError(f"compare: direction must be fwd, bwd or both, got {direction!r}")
    directions = DIRECTIONS if direction == "both" else (direction,)
    plan = planned(ops, suite, device)
    known = {case.name for _, case in plan}
    for name in cases:
        if name not in known:
            raise ValueError(
                f"compare: case must be one of {', '.join(sorted(known))}, got {name!r}"
            )
    return [
        (op.name, case.name, dtype, d)
        for op, case in plan
        if not cases or case.name in cases
        for dtype in dtypes
        for d in directions
        if d == "fwd" or op.differentiable()
    ]


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
