"""How often `gaugeblock compare --gate` is wrong, by trying: `python -m tests.gate_trials`.

    equals     both sides are the same commit; each case called faster or slower is a false alarm
    planted    the newer commit's kernels wait a few percent longer in every call

Each trial is the command as a user types it, in a process of its own, on a clone of this checkout;
kinds take turns. The record is written after every trial.

    --equals N, --planted N, --slower 0.03, --out FILE, --more to add to what the file holds
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gaugeblock.benchmarks.record import device_name

from tests.helpers import CHECKOUT

RECORD = CHECKOUT / "docs" / "compare" / "trials.json"
OPS = ("attention", "ffn")
_OPTIONS = ["--case", "cpu_bench", "--direction", "fwd", "--no-check"]
_ASKED = '        return getattr(import_module(f"._{name}", __name__), name)\n'
_PLANTED = '''

def _longer(fn):
    """fn, which waits at its end for a share of the time that it took."""
    import functools
    import time

    @functools.wraps(fn)
    def call(*arguments, **options):
        start = time.perf_counter()
        result = fn(*arguments, **options)
        now = time.perf_counter()
        end = now + {share} * (now - start)
        while time.perf_counter() < end:
            pass
        return result

    return call
'''


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--equals", type=int, default=100)
    parser.add_argument("--planted", type=int, default=100)
    parser.add_argument("--slower", type=float, default=0.03)
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--more", action="store_true")
    given = parser.parse_args(arguments)
    left = {"equals": given.equals, "planted": given.planted}
    record = {
        "device": device_name("cpu"), "cores": len(os.sched_getaffinity(0)), "threads": 1,
        "slower": given.slower, "ops": list(OPS), "command": None, "trials": [],
    }  # fmt: skip
    if given.more:
        record["trials"] = _trials_of(given.out, record)
    with tempfile.TemporaryDirectory() as folder:
        clone = planted(Path(folder), given.slower)
        while any(left.values()):
            # whichever is further behind
            kind = max(left, key=lambda k: left[k] / max(getattr(given, k), 1))
            left[kind] -= 1
            trial, record["command"] = tried(clone, kind)
            record["trials"].append(trial)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(record, indent=1) + "\n")
            print(kind, trial["exit_code"], f"{trial['seconds']:.0f} s", trial["cases"], flush=True)


def _trials_of(file, record):
    """The trials in a file, which must be of the same machine and settings."""
    kept = json.loads(file.read_text())
    for key in ("device", "cores", "threads", "slower", "ops"):
        if kept[key] != record[key]:
            raise ValueError(f"gate_trials: {key} must be {kept[key]} for more, got {record[key]}")
    return kept["trials"]


def planted(folder, share):
    """A clone with two commits on top of one another: as it is, and with every call longer."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "-q", str(CHECKOUT), str(clone)], check=True)
    plant(clone, share)
    me = ("-c", "user.name=gaugeblock", "-c", "user.email=gaugeblock@localhost")
    subprocess.run(["git", *me, "commit", "-qam", "longer"], cwd=clone, check=True)
    return clone


def plant(checkout, share):
    """Let every call of its kernels take so much longer."""
    file = checkout / "kernels" / "__init__.py"
    text = file.read_text()
    if _ASKED not in text:
        raise ValueError(f"gate_trials: {file.name} must hold {_ASKED.strip()!r}, it does not")
    longer = _ASKED.replace("return getattr", "return _longer(getattr").replace(
        ", name)\n", ", name))\n"
    )
    file.write_text(text.replace(_ASKED, longer) + _PLANTED.format(share=share))


def tried(clone, kind):
    """(what one comparison said, the command)."""
    out = clone.parent / "trial.json"
    out.unlink(missing_ok=True)
    ref = {"equals": "HEAD", "planted": "HEAD~1"}[kind]
    command = ["gaugeblock", "compare", "--gate", ref, *OPS, *_OPTIONS]
    environment = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *command, "--json", str(out)],
        cwd=clone, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if not out.exists():
        raise RuntimeError(f"gate_trials: {' '.join(command)} must write a record: {done.stderr}")
    found = json.loads(out.read_text())
    cases = {
        f"{line['op']} {line['case']}": [line["verdict"], line["ratio"], line["runs"][0]]
        for line in found["lines"]
    }
    trial = {
        "kind": kind, "exit_code": done.returncode, "seconds": round(time.monotonic() - start, 1),
        "load": round(os.getloadavg()[0], 2), "cases": cases,
    }  # fmt: skip
    return trial, " ".join(command).replace(ref, "REF")


if __name__ == "__main__":
    main()
