"""One side of `compare --gate`: a process that times the kernels of one worktree when told to.

What measures is the code that runs the comparison; only what is measured comes from the worktree,
so that a change of the bench is not taken for one of a kernel.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.sampled import expectation_of

import gaugeblock

from . import timing
from .calls import Contender, InputSets
from .gate import Gate, free_memory
from .providers import OURS
from .providers import load as load_providers


@dataclass(frozen=True)
class Setting:
    """
    folder:     the worktree.
    repository: what it is a worktree of.
    inside:     the working folder in it.
    provider:   ours, or module:object.
    """

    folder: str
    repository: str
    inside: str
    provider: str
    device: str

    @property
    def module(self):
        return "gaugeblock.kernels" if self.provider == OURS else self.provider.partition(":")[0]


def serve(connection, setting):
    """Answer requests (method, arguments) with ("ok", result) or ("error", one line); None ends.

    ("elsewhere", one line): nothing that this side says would be of its commit.
    """
    try:
        side = Side(setting)
    except Exception as error:
        connection.send(("error", _said(error)))
        return
    connection.send(("ok", None))
    while (request := connection.recv()) is not None:
        method, arguments = request
        try:
            connection.send(("ok", getattr(side, method)(*arguments)))
        except Elsewhere as error:
            connection.send(("elsewhere", str(error)))
        except Exception as error:
            connection.send(("error", _said(error)))


def device():
    """Asked of a process that may start CUDA: one that has started it cannot be forked."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Side:
    """A worktree's provider, and the case that is timed. A key is (op, case, dtype, direction)."""

    def __init__(self, setting):
        self.setting = setting
        self.room = _room()
        self.provider = _provider(setting)
        self.clock, self.contender = timing.clock(setting.device), None

    def cannot(self, keys):
        """{key: why the provider does not do it}, None where it does."""
        found = {}
        for key in keys:
            op, case = _case(key)
            if self.provider is None:
                found[key] = f"has no {self.setting.module}"
                continue
            lacks = op.kernel if self.setting.provider == OURS else None
            found[key] = lacks or self.provider.cannot(op, case, *key[2:])
        return found

    def check(self, key, backward):
        """Raise `Refused` where the provider is wrong."""
        op, case = _case(key)
        gate = Gate(op, case, key[2], self.setting.device, backward)
        try:
            gate.check(self.provider.ops[op.name], backward)
        finally:
            # the calls may have imported more
            _expect_from_worktree(self.setting)

    def prepare(self, key):
        """Inputs and calls of a case, warm."""
        op, case = _case(key)
        expectation = expectation_of(op, case, key[2], backward=key[3] == "bwd")
        sets = InputSets(expectation, self.setting.device)
        self.contender = Contender(self.provider.name, self.provider.ops[op.name], sets, key[3])
        self.number = 0
        for _ in range(timing.WARM_UPS):
            self._call()
        self.clock.synchronize()
        _expect_from_worktree(self.setting)

    def time(self, calls, budget_s):
        """Milliseconds of so many calls, fewer where they take long; on a GPU with a cold cache.

        A processor's stays as the last call left it: what emptying it adds to the noise hides a
        change of a few percent.
        """
        tokens, end = [], time.monotonic() + budget_s
        while len(tokens) < calls and (not tokens or time.monotonic() < end):
            if self.setting.device != "cpu":
                self.clock.flush()
            tokens.append(self.clock.time(self._call))
        return self.clock.milliseconds(tokens)

    def release(self):
        self.contender = None
        free_memory(self.setting.device)

    def _call(self):
        self.contender.run(self.number)
        self.number += 1


def _room():
    """Memory of random sizes that nobody uses.

    Processes that are forked from one have its addresses. What is allocated after this does not.
    """
    rng = np.random.default_rng()
    kept = [bytearray(int(n)) for n in rng.integers(1, 1 << 16, 200)]
    return kept[:: int(rng.integers(1, 4))], torch.empty(int(rng.integers(1, 1 << 21)))


def _case(key):
    op = CATALOG[key[0]]
    return op, next(case for case in op.cases if case.name == key[1])


def _provider(setting):
    """The provider, imported from the worktree and nowhere else; None: there is no such module."""
    folder = Path(setting.folder).resolve()
    # the next run's processes need not compile the worktree's modules again
    sys.dont_write_bytecode = False
    working = folder / setting.inside
    if setting.provider == OURS:
        # the rooms that measure are imported already, the kernels are not
        gaugeblock.__path__.insert(0, str(folder))
    else:
        os.chdir(working)
        sys.path[:0] = [str(working), *map(str, filter(Path.is_dir, [folder / "src"]))]
        if not _there(setting.module):
            return None
    found, missing = load_providers(setting.device, [setting.provider])
    if missing:
        raise ValueError(*missing.values())
    _expect_from_worktree(setting)
    return found[0]


def _there(module):
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class Elsewhere(ValueError):
    """What is measured is not that of the worktree."""


def _expect_from_worktree(setting):
    """Refuse to go on where the repository's own files are what is measured.

    An editable installation, or a folder on PYTHONPATH, offers those of the checkout on both sides.
    """
    ours = setting.provider == OURS
    folder, repository = (Path(f).resolve() for f in (setting.folder, setting.repository))
    # a virtual environment may lie in the repository
    prefix = Path(sys.prefix).resolve()
    for name, module in list(sys.modules.items()):
        if not getattr(module, "__file__", None):
            continue
        file = Path(module.__file__)
        its = name == setting.module or name.startswith(f"{setting.module}.")
        theirs = not ours and file.is_relative_to(repository) and not file.is_relative_to(prefix)
        measures = name.partition(".")[0] == "gaugeblock" or name in ("__main__", "__mp_main__")
        if (its or (theirs and not measures)) and not file.resolve().is_relative_to(folder):
            raise Elsewhere(
                f"{name} must come from the worktree, it came from {file}; an installed copy "
                "stands in its way, or the commit lacks it"
            )


def _said(error):
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
