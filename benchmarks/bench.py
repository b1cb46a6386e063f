"""`gaugeblock bench`: parity, then time, then a record."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from gaugeblock.kernels.worktree import state_of

from . import ceilings, honesty, roofline, timing
from .calls import Contender, InputSets
from .gate import Gate, Refused, free_memory
from .plan import planned, settled
from .providers import OURS
from .providers import load as load_providers
from .record import Writer, new_record
from .telemetry import Telemetry, summed_up

# the share of the budget that the ceilings may take, before and after
_CEILINGS = 0.1
# a case gets this share of what is left at least: rather few cases than none well
_LEAST_SHARE = 1 / 16
# seconds that are spent on timing in any case, however long the rest took
_LEAST_TIMED_S = {"cpu": 0.5, "cuda": 1.5}
_ENERGY_S = 0.5
# for the table and the end of the process
_CLOSING_S = 1.5
# rounds between two looks at the chip's state
_WATCHED = 8


def bench(ops=(), *, suite="quick", providers=None, dtypes=None, direction="both", out=None,
          budget_s=None, device=None, seed=0, say=print, since=None):  # fmt: skip
    """Time every provider of the ops on a suite's cases; the record, which is also in `out`.

    ops:       names from the catalog; all by default.
    suite:     "quick" (the family's shapes) or "full"; a CPU has cases of its own.
    providers: names; by default all, in "quick" without those that take long to start.
    dtypes:    of float32, float16, bfloat16; bfloat16 on a GPU and float32 on a CPU by default.
    direction: "fwd", "bwd" or "both".
    out:       a folder; one under runs/ by default.
    budget_s:  seconds for everything; 480 on a GPU, 60 on a CPU by default. What does not fit is
               named in the record.
    since:     when the budget began, by time.monotonic(); now by default.
    Raises ValueError for a name that is none.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = _Run(ops, suite, providers, dtypes, direction, device, budget_s, seed, say, since)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return run.into(Path(out) if out else Path("runs") / f"bench-{stamp}")


def _state(provider):
    """A provider's own commit, where it comes from elsewhere."""
    return dict(zip(("commit", "dirty"), state_of(provider.file))) if provider.file else {}


class _Run:
    def __init__(
        self, ops, suite, names, dtypes, direction, device, budget_s, seed, say, since=None
    ):  # fmt: skip
        self.device, self.seed, self.say = device, seed, say
        self.started = time.monotonic() if since is None else since
        dtypes, self.directions = settled(dtypes, direction, budget_s, device)
        self.budget_s = budget_s or (480 if device == "cuda" else 60)
        self.points = [(op, c, d) for op, c in planned(ops, suite, device) for d in dtypes]
        self.providers, missing = load_providers(device, names)
        if names is None and suite == "quick":
            late = [p for p in self.providers if p.slow_start]
            self.providers = [p for p in self.providers if not p.slow_start]
            missing |= {p.name: "takes long to start: in the full suite, or named" for p in late}
        self.record = new_record(device)
        self.record["providers"] = {
            **{p.name: {"version": p.version, "reason": None, "note": p.note} | _state(p)
               for p in self.providers},
            **{name: {"version": None, "reason": reason} for name, reason in missing.items()},
        }  # fmt: skip
        self.rng = np.random.default_rng(seed)

    def into(self, folder):
        self.writer = Writer(folder, self.record)
        self.clock, self.telemetry = timing.clock(self.device), Telemetry(self.device)
        self.record["machine"] |= {
            "clock_overhead_ms": self.clock.overhead_ms,
            "telemetry": self.telemetry.reason or "NVML",
        }
        begun = time.monotonic()
        before = ceilings.measure(self.device, _CEILINGS * self.budget_s, self.seed)
        self.record["ceilings"] = {"before": before, "after": None, "drift": None}
        self.writer.save()
        # they take as long again at the end
        ceilings_s = time.monotonic() - begun
        self.end, took = self.started + self.budget_s - 1.2 * ceilings_s - _CLOSING_S, {}
        for number, (op, case, dtype) in enumerate(self.points):
            begun, where = time.monotonic(), (op.name, case.name, dtype)
            left = self.end - begun
            # what one case took, the op's next one may take
            if left <= took.get(op.name, 0.0):
                reason = f"the time budget of {self.budget_s:g} s was spent"
                self._leave_out(where, self._of(op), None, reason)
                continue
            share = max(left / (len(self.points) - number), _LEAST_SHARE * left)
            try:
                self._point(op, case, dtype, share)
            except Exception as error:
                # before anything was timed
                self._leave_out(where, self._of(op), None, _first_line(error))
            took[op.name] = time.monotonic() - begun
            self.writer.save()
        self._close(before)
        return self.record

    def _close(self, before):
        try:
            after = ceilings.measure(self.device, _CEILINGS * self.budget_s, self.seed)
        except RuntimeError:
            # a device that a call has broken; the record stays incomplete
            self.writer.save()
            return
        drift = roofline.drift(before, after)
        self.record["ceilings"] |= {"after": after, "drift": drift}
        if drift > roofline.DRIFT_LIMIT:
            for entry in self.record["entries"]:
                entry["marks"].append(f"ceilings drifted by {drift:.1%}")
        self.writer.save(complete=True)

    def _of(self, op):
        """The directions of an op that are asked for."""
        return [d for d in self.directions if d == "fwd" or op.differentiable()]

    def _point(self, op, case, dtype, share_s):
        """All providers on one case in one dtype."""
        start, where = time.monotonic(), (op.name, case.name, dtype)
        directions = self._of(op)
        able = {}
        for provider in self.providers:
            reasons = {d: provider.cannot(op, case, dtype, d) for d in directions}
            for d, reason in reasons.items():
                # that a peer lacks an op is said by its name; that we do, has a reason
                reason = op.kernel if provider.name == OURS and op.kernel else reason
                if reason and (op.name in provider.ops or provider.name == OURS):
                    self._leave_out(where, [d], provider.name, reason)
            able[provider] = [d for d, reason in reasons.items() if not reason]
        able = {p: ds for p, ds in able.items() if ds}
        if not able:
            return
        gate, passed = self._gated(op, case, dtype, able, where)
        for number, d in enumerate(directions):
            found = {p: passed[p] for p, ds in able.items() if d in ds and p in passed}
            left = share_s - (time.monotonic() - start)
            if found:
                share = left / (len(directions) - number)
                try:
                    self._timed(op, case, dtype, d, gate, found, share)
                except Exception as error:
                    # one of them broke more than its own call; the other direction has its entries
                    self._leave_out(where, [d], None, _first_line(error))
            free_memory(self.device)

    def _gated(self, op, case, dtype, able, where):
        """(gate, {provider: results of those that are right at the shape that is timed})."""
        gate = Gate(op, case, dtype, self.device, "bwd" in self.directions, self.seed)
        passed = {}
        for provider, directions in able.items():
            try:
                results = gate.check(provider.ops[op.name], "bwd" in directions)
                honesty.clocks()
                passed[provider] = results
            except Exception as error:
                self._refuse(where, directions, provider, error)
        return gate, passed

    def _timed(self, op, case, dtype, direction, gate, found, share_s):
        """Entries of the providers in one direction, timed turn about."""
        where, end = (op.name, case.name, dtype), time.monotonic() + share_s
        sets = InputSets(gate.expectation, self.device)
        contenders = self._contenders(op, where, direction, found, sets)
        if not contenders:
            return
        seen = []
        samples = timing.interleave(
            self.clock,
            {p.name: c.run for p, c in contenders.items()},
            max(0.7 * (end - time.monotonic()), _LEAST_TIMED_S[self.device]),
            self.rng,
            watch=lambda number: number % _WATCHED or seen.append(self.telemetry.sample()),
        )
        # counting energy takes long: ours, and the one to beat
        peers = [n for n in samples if n != OURS and not samples[n].error]
        best = min(peers, key=lambda n: samples[n].median, default=None)
        for provider, contender in contenders.items():
            results, times = found[provider], samples[provider.name]
            read, written = op.traffic(case, getattr(torch, dtype).itemsize, direction)
            flops = op.flop_count(case, direction)
            try:
                if times.error:
                    raise times.error
                # some backwards compute again what others keep
                least = min(flops, 2 * op.flop_count(case))
                honesty.floor(times, roofline.floor_ms(self.record["device"], dtype, read, least))
                honesty.after(contender, sets, gate, self.clock, times)
                honesty.clocks()
            except Exception as error:
                self._refuse(where, [direction], provider, error)
                continue
            entry = self._entry(
                op, case, dtype, direction, contender, times, results, read + written, flops
            )
            entry["telemetry"] = summed_up(seen)
            if provider.name in (OURS, best):
                entry["energy_j"] = self._energy(contender, times)
            self.record["entries"].append(entry)
        self._tell(where, direction)

    def _contenders(self, op, where, direction, found, sets):
        """{provider: what is timed of it} of those that can be called again and again."""
        contenders = {}
        for provider in found:
            try:
                contender = Contender(provider.name, provider.ops[op.name], sets, direction)
                honesty.before(contender, sets)
                honesty.clocks()
                contenders[provider] = contender
            except Exception as error:
                self._refuse(where, [direction], provider, error)
        return contenders

    def _entry(self, op, case, dtype, direction, contender, times, results, moved, flops):
        quantiles = times.quantiles()
        roof_ms, roof = roofline.roof(
            self.record["ceilings"]["before"], dtype, moved, flops, self.clock.overhead_ms
        )
        outputs = set(op.outputs)
        part = [r for r in results if (r.output in outputs) == (direction == "fwd")]
        ratio = max((r.ratio for r in part), default=None)
        interval = times.interval
        marks = []
        if interval is None or interval > timing.INTERVAL:
            marks.append(f"not settled: the median's interval is over {timing.INTERVAL:.0%}")
        if self.device == "cuda" and not contender.graph:
            marks.append(f"not a graph, so launches count: {contender.why_no_graph}")
        return {
            "op": op.name,
            "case": case.name,
            "dtype": dtype,
            "direction": direction,
            "provider": contender.name,
            "shape": {k: v for k, v in case.settings.items()},
            "time_ms": quantiles,
            "samples_ms": [round(ms, 6) for ms in times.ms],
            "samples": len(times),
            "interval": interval,
            "gb_s": moved / quantiles["p50"] / 1e6,
            "tflop_s": flops / quantiles["p50"] / 1e9,
            "bytes": int(moved),
            "flops": int(flops),
            "roof_ms": roof_ms,
            "roof": roof,
            "energy_j": None,
            "percent_of_roof": roof_ms and 100 * roof_ms / quantiles["p50"],
            "graph": contender.graph,
            "marks": marks,
            "parity": {
                "compared": len(part),
                "ratio": ratio if ratio is not None and math.isfinite(ratio) else None,
            },
        }

    def _energy(self, contender, times):
        """Joules of a call, from a row of calls; None where nothing counts them."""
        if self.telemetry.energy_j() is None or time.monotonic() > self.end:
            return None
        n = max(1, round(1e3 * _ENERGY_S / times.median))
        self.clock.synchronize()
        start = self.telemetry.energy_j()
        for number in range(n):
            contender.run(number)
        self.clock.synchronize()
        return (self.telemetry.energy_j() - start) / n

    def _refuse(self, where, directions, provider, error):
        """Leave a provider out for what it did. Ours has no excuse."""
        refused = isinstance(error, Refused)
        wrong = (refused and error.wrong) or provider.name == OURS
        reason = str(error) if refused else _first_line(error)
        self._leave_out(where, directions, provider.name, reason, wrong)

    def _leave_out(self, where, directions, provider, reason, refused=False):
        op, case, dtype = where
        for direction in directions:
            self.record["left_out"].append(
                {"op": op, "case": case, "dtype": dtype, "direction": direction,
                 "provider": provider, "reason": reason, "refused": refused}
            )  # fmt: skip

    def _tell(self, where, direction):
        """One line about what was just timed."""
        key = (*where, direction)
        entries = [
            e for e in self.record["entries"]
            if (e["op"], e["case"], e["dtype"], e["direction"]) == key
        ]  # fmt: skip
        times = ", ".join(
            f"{e['provider']} {e['time_ms']['p50']:.4g} ms" for e in sorted(
                entries, key=lambda e: (e["provider"] != OURS, e["time_ms"]["p50"])
            )
        )  # fmt: skip
        self.say(f"{' '.join(key)}: {times or 'nobody'}")


def _first_line(error):
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "does not fit into memory"
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}"
