"""The candidate in a process of its own, replaced when it hangs, exits or breaks its device."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys

from .check import Checker, expect_op, shrink_failures
from .model import ModelChecker
from .op import Op
from .result import Report, Result
from .shrink import SECONDS

# messages after which nothing more works on the device in that process
_DEVICE_FAULTS = ("CUDA error", "device-side assert", "illegal memory access", "HIP error")


def check_apart(op, candidate, *, timeout=None, shrink=False, **settings):
    """`check`, with the candidate in a process of its own.

    op, candidate: "name" or "module:attribute"; the working folder is searched first. For the op
                   "gpt" the settings are those of `check_model`.
    timeout:       seconds that one call of the candidate may take; None waits for ever.
    The other arguments are those of `check`. Raises ValueError where the process refuses them.
    """
    worker = _Worker(op, candidate, settings)
    try:
        report, units = worker.ask("plan", None)
        for number in range(units):
            answer = worker.ask("examine", number, timeout)
            if isinstance(answer, _Lost):
                where = worker.where(number)
                lost = Result(*where, "outputs", False, answer.kind, hint=answer.hint)
                report.results.append(lost)
                continue
            results, report.not_checked = answer
            report.results += results
            if any(broke_device(r.hint) for r in results):
                worker.restart()
        if shrink:
            shrink_failures(report, lambda r, seconds: worker.shrink(r, seconds, timeout))
    finally:
        worker.stop()
    return report


def broke_device(message):
    """Whether nothing more works on the device in the process that said this."""
    return any(fault in message for fault in _DEVICE_FAULTS)


class _Lost:
    """No answer: the process hung or ended."""

    def __init__(self, kind, hint):
        self.kind, self.hint = kind, hint


class _Worker:
    def __init__(self, op, candidate, settings):
        self.request = op, candidate, settings, os.getcwd()
        self.start()

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *self.request), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def restart(self):
        self.stop()
        self.start()

    def ask(self, what, argument, timeout=None):
        """The answer to a question; `_Lost` where a call of the candidate hung or ended it."""
        in_call = False
        try:
            self.pipe.send((what, argument))
            while True:
                # only calls of the candidate are timed
                if in_call and not self.pipe.poll(timeout):
                    self.restart()
                    return _Lost("timeout", f"did not return within {timeout:g} s")
                kind, content = self.pipe.recv()
                if kind == "missing":
                    raise ModuleNotFoundError(f"No module named {content!r}", name=content)
                if kind == "refused":
                    raise ValueError(content)
                if kind == "answer":
                    return content
                in_call = kind == "enter"
        except (EOFError, ConnectionError, BrokenPipeError):
            self.process.join()
            code = self.process.exitcode
            if what == "plan":
                raise ValueError(f"check: the import ended its process, exit code {code}") from None
            self.start()
            return _Lost("exit", f"ended its process, exit code {code}")

    def where(self, number):
        return self.ask("where", number)

    def shrink(self, result, seconds, timeout):
        found = self.ask("shrink", (result, seconds), timeout)
        # a hang or an exit in the middle of shrinking: the next one gets what is left
        return (None, seconds / 4) if isinstance(found, _Lost) else found


def _serve(pipe, op, candidate, settings, folder):
    """The process: answers questions until it is stopped."""
    os.chdir(folder)
    search_working_folder()

    @contextlib.contextmanager
    def watch():
        pipe.send(("enter", None))
        try:
            yield
        finally:
            pipe.send(("leave", None))

    try:
        checker = _checker(op, candidate, {**settings, "watch": watch})
        checker.name = candidate
    except ModuleNotFoundError as error:
        pipe.send(("missing", error.name))
        return
    except (ValueError, TypeError) as error:
        pipe.send(("refused", str(error)))
        return
    while True:
        try:
            what, argument = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("answer", _answer(checker, what, argument)))
        except ValueError as error:
            pipe.send(("refused", str(error)))


def _checker(op, candidate, settings):
    row = None
    if op != "gpt":
        row = expect_op(load(op, "op") if ":" in op else op)
        if not isinstance(row, Op):
            raise ValueError(f"check: op {op} must be an Op, got {type(row).__name__}")
    fn = load(candidate, "candidate")
    if not callable(fn):
        raise ValueError(f"check: {candidate} must be callable, got {type(fn).__name__}")
    if row is None:
        return ModelChecker(fn, **settings)
    if isinstance(settings.get("backward"), str):
        settings["backward"] = load(settings["backward"], "backward")
    return Checker(row, fn, **settings)


def _answer(checker, what, argument):
    if what == "plan":
        report = checker.report()
        return Report(
            report.op, checker.name, report.device, report.seed, [], report.not_checked
        ), len(checker.units)
    if what == "examine":
        return checker.examine(checker.units[argument]), checker.not_checked
    if what == "where":
        case, dtype, layout = checker.units[argument]
        return checker.op.name, case.name, dtype, layout
    return checker.shrink(argument[0], min(argument[1], SECONDS))


def search_working_folder():
    """Let names be found in the working folder first."""
    sys.path.insert(0, os.getcwd())


def load(name, what):
    """What `module:attribute` names. ValueError where it cannot be had, with the reason."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ValueError(f"check: {what} must be module:name, got {name!r}")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"check: {what} {module} must import, it does not: {said}") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"check: {module} must define {attribute}, it does not")
        found = getattr(found, part)
    return found
