"""Other people's implementations under the oracle: what they fail at, and why.

    python -m examples.peers --out docs/oracle/peers.json

Every one of `PEERS` runs on the quick cases with seed 0, in one thread. `FINDINGS` say what is
known about the cases that fail; the record names those without a finding too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from gaugeblock.reference.oracle import check
from gaugeblock.reference.oracle.worker import load

ALL = ("float32", "float16", "bfloat16")
NARROW = ALL[1:]


@dataclass(frozen=True)
class Peer:
    """A candidate, and the arguments of `check` that it takes; op and candidate as on a command
    line.
    """

    package: str
    op: str
    candidate: str
    dtypes: tuple[str, ...] = ALL
    framework: str = "torch"
    backward: bool = True

    def command(self, dtype, cases=()):
        """The command line that checks these cases, all by default."""
        words = ["gaugeblock check", self.op, self.candidate]
        words += [] if self.framework == "torch" else ["--framework", self.framework]
        words += [] if self.backward else ["--no-backward"]
        words += [] if dtype == "float32" else ["--dtype", dtype]
        return " ".join([*words, *([f'-k "{" or ".join(cases)}"'] if cases else [])])

    def check(self, dtype, expression=None):
        """The report. ValueError where the candidate cannot be imported."""
        op = load(self.op, "op") if ":" in self.op else self.op
        fn = load(self.candidate, "candidate")
        return check(
            op, fn, dtypes=(dtype,), framework=self.framework, backward=self.backward,
            expression=expression,
        )  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What is known about a peer's failing cases.

    what:     the cause in words.
    source:   how far it is known: "read" in the source, "reproduced" without the oracle, "inferred".
    upstream: the thread where it is discussed.
    """

    candidate: str
    cases: tuple[str, ...]
    what: str
    dtypes: tuple[str, ...] = ALL
    source: str = "reproduced"
    upstream: str = ""


SDPA = "examples.torch_sdpa:attention"
EAGER = "examples.transformers_eager:attention"
JAX = "examples.jax_attention:attention"
ONNX = "examples.onnx_reference:attention"
ONNX_NORM = "examples.onnx_reference:layer_norm"
LIGER_LOSS = "examples.liger_cross_entropy:cross_entropy"
# Triton's interpreter has no bfloat16 arithmetic
_INTERPRETED = ("float32", "float16")
_NUMPY = {"framework": "numpy", "backward": False}

PEERS = (
    Peer("torch", "attention", SDPA),
    Peer("transformers", "attention", EAGER),
    Peer("jax", "attention", JAX, framework="jax"),
    Peer("onnx", "attention", ONNX, **_NUMPY),
    Peer("onnx", "layer_norm", ONNX_NORM, **_NUMPY),
    Peer("onnx", "examples.onnx_reference:GELU", "examples.onnx_reference:gelu", **_NUMPY),
    Peer("liger-kernel", "cross_entropy", LIGER_LOSS, _INTERPRETED),
    *(
        Peer("liger-kernel", f"examples.liger_{name}:{name.upper()}",
             f"examples.liger_{name}:candidate", _INTERPRETED)
        for name in ("rms_norm", "rope", "swiglu")
    ),
)  # fmt: skip

FINDINGS = ()


def known(candidate, dtype):
    """{case: its finding} of a candidate in a dtype."""
    return {
        case: finding
        for finding in FINDINGS
        if finding.candidate == candidate and dtype in finding.dtypes
        for case in finding.cases
    }


def measured(peer, dtype):
    """What the oracle says of a peer in a dtype, plain data."""
    start = time.perf_counter()
    report = peer.check(dtype)
    worst = {}
    for r in report.failures:
        if r.case not in worst or r.ratio > worst[r.case].ratio:
            worst[r.case] = r
    passing = [r.ratio for r in report.results if r.passed]
    return {
        **asdict(peer),
        "dtype": dtype,
        "compared": len(report.results),
        "wrong": len(report.failures),
        "cases": len({r.case for r in report.results}),
        "failed": {
            case: {"output": r.output, "layout": r.layout, "kind": r.kind, "ratio": _plain(r.ratio),
                   "hint": r.hint}
            for case, r in worst.items()
        },
        "closest": max(passing, default=0.0),
        "not_checked": report.not_checked,
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def _plain(ratio):
    return ratio if ratio < float("inf") else "inf"


def record(peers=PEERS, progress=lambda line: None):
    """The measurements of all peers, the findings, and the peers that are not to be had."""
    found = {"versions": {}, "peers": [], "unavailable": [], "findings": []}
    for peer in peers:
        for dtype in peer.dtypes:
            try:
                entry = measured(peer, dtype)
            except ValueError as error:
                found["unavailable"].append({"candidate": peer.candidate, "reason": str(error)})
                break
            found["peers"].append(entry)
            found["versions"][peer.package] = _version(peer.package)
            progress(f"{peer.candidate} {dtype}: {entry['wrong']} of {entry['compared']} wrong")
    by_name = {peer.candidate: peer for peer in peers}
    for finding in FINDINGS:
        if finding.candidate in by_name:
            command = by_name[finding.candidate].command(finding.dtypes[0], finding.cases)
            found["findings"].append(asdict(finding) | {"command": command})
    return found


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m examples.peers", description=__doc__)
    parser.add_argument("--out", type=Path, help="the record")
    options = parser.parse_args(arguments)
    found = record(progress=lambda line: print(line, file=sys.stderr))
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
