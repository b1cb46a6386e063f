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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gaugeblock.reference.catalog import find
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

    def command(self, dtype, cases=(), layout=None):
        """The command line that checks these cases, all by default."""
        words = ["gaugeblock check", self.op, self.candidate]
        words += [] if self.framework == "torch" else ["--framework", self.framework]
        words += [] if self.backward else ["--no-backward"]
        words += [] if dtype == "float32" else ["--dtype", dtype]
        words += ["--layout", layout] if layout else []
        return " ".join([*words, *([f'-k "{" or ".join(cases)}"'] if cases else [])])

    def check(self, dtype, cases=()):
        """The report on these cases, all quick ones by default. ValueError where the candidate
        cannot be imported.
        """
        op = load(self.op, "op") if ":" in self.op else find(self.op)
        if cases:
            op = replace(op, cases=[case for case in op.cases if case.name in cases])
        fn = load(self.candidate, "candidate")
        return check(op, fn, dtypes=(dtype,), framework=self.framework, backward=self.backward)


@dataclass(frozen=True)
class Finding:
    """What is known about failures of a candidate.

    sort:     "defect", "other meaning" than the catalog's, or "less precise" than it asks.
    cases:    those it explains; all that no finding before it explains where there are none.
    layout:   the layout it needs, where it needs one.
    known:    how the cause is known: "read" in the source, "tried" without the oracle, "inferred".
    upstream: the thread where it is discussed.
    """

    candidate: str
    sort: str
    what: str
    cases: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ALL
    layout: str | None = None
    known: str = "tried"
    upstream: str = ""

    def explains(self, r, dtype):
        """Whether it says why this result fails."""
        right_case = not self.cases or r.case in self.cases
        return dtype in self.dtypes and right_case and self.layout in (None, r.layout)


SDPA = "examples.torch_sdpa:attention"
EAGER = "examples.transformers_eager:attention"
JAX = "examples.jax_attention:attention"
ONNX = "examples.onnx_reference:attention"
ONNX_NORM = "examples.onnx_reference:layer_norm"
LIGER_LOSS = "examples.liger_cross_entropy:cross_entropy"
LIGER_ROPE = "examples.liger_rope:candidate"
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

_HIDDEN = ("top_left_hidden_nan", "lengths", "lengths_causal")
_LEAKS = "NaN in a value that the mask hides reaches the result: its weight is 0, and 0·NaN is NaN."

# the first that explains a failure is taken
FINDINGS = (
    Finding(
        SDPA,
        "defect",
        "On a CPU `is_causal=True` with a `scale` of 0 or below gives NaN. The math backend is "
        "right, and so is the same mask given as `attn_mask`. Probably −∞ is written into the "
        "scores before they are multiplied by the scale.",
        ("scale_negative", "scale_zero_causal"),
    ),
    Finding(
        SDPA,
        "other meaning",
        _LEAKS,
        _HIDDEN,
        upstream="https://github.com/pytorch/pytorch/issues/101967",
    ),
    Finding(
        EAGER,
        "other meaning",
        "A query that sees no key gets the mean of all values, not 0: the mask adds the dtype's "
        "lowest finite value, which leaves all scores of such a row equal.",
        ("unseeing_queries",),
    ),
    Finding(EAGER, "other meaning", _LEAKS, _HIDDEN),
    Finding(
        EAGER,
        "less precise",
        "Scores are kept in 16 bits between the product and the softmax, which costs digits where "
        "they are large.",
        dtypes=NARROW,
        known="read",
    ),
    Finding(
        JAX,
        "other meaning",
        "A query that sees no key gets the mean of all values, not 0: hidden scores are a large "
        "negative number.",
        ("unseeing_queries",),
    ),
    Finding(JAX, "other meaning", _LEAKS, _HIDDEN),
    Finding(
        ONNX,
        "other meaning",
        "A negative scale gives NaN: the evaluator multiplies q and k by its square root, as the "
        "specification recommends.",
        ("scale_negative",),
        upstream="https://github.com/onnx/onnx/issues/6984",
    ),
    Finding(ONNX, "other meaning", _LEAKS, _HIDDEN),
    Finding(
        ONNX,
        "less precise",
        "All arithmetic, sums included, is in 16 bits.",
        dtypes=NARROW,
        known="read",
    ),
    Finding(
        ONNX_NORM,
        "defect",
        "`stash_type=1`, statistics in float32, is ignored: they are in 16 bits. Mended upstream, "
        "not in this release.",
        dtypes=NARROW,
        upstream="https://github.com/onnx/onnx/pull/8439",
    ),
    Finding(
        LIGER_LOSS,
        "other meaning",
        "Where every target is ignored the mean is 0; torch, and with it the catalog, says NaN.",
        ("all_ignored_mean",),
        dtypes=_INTERPRETED,
        upstream="https://github.com/pytorch/pytorch/issues/70348",
    ),
    Finding(
        LIGER_LOSS,
        "other meaning",
        "It takes logits of rank 2 alone.",
        ("rank_three",),
        dtypes=_INTERPRETED,
        known="read",
    ),
    Finding(
        LIGER_LOSS,
        "defect",
        "Where the logits' last stride is not 1 their gradient is the logits themselves. The "
        "forward pass makes them contiguous, the copy has no `requires_grad`, and so the kernel "
        "writes no gradient over it.",
        dtypes=_INTERPRETED,
        layout="transposed",
    ),
    Finding(
        LIGER_ROPE,
        "defect",
        "Where the heads lie innermost its backward pass turns the output's gradient in place: "
        "whoever else holds that gradient finds it changed.",
        dtypes=_INTERPRETED,
        layout="transposed",
    ),
)


def explanation(candidate, r, dtype):
    """The index of the finding that explains a failure, None where none does."""
    return next(
        (i for i, f in enumerate(FINDINGS) if f.candidate == candidate and f.explains(r, dtype)),
        None,
    )


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
                   "hint": r.hint, "finding": explanation(peer.candidate, r, dtype)}
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
    for number, finding in enumerate(FINDINGS):
        shown = _shown(found["peers"], number)
        if shown:
            dtype, cases = shown
            cases = () if finding.layout else cases
            command = by_name[finding.candidate].command(dtype, cases, finding.layout)
            found["findings"].append(asdict(finding) | {"number": number, "command": command})
    return found


def _shown(entries, number):
    """(dtype, its worst cases) that show a finding; None where nothing does."""
    for entry in entries:
        failed = {c: f for c, f in entry["failed"].items() if f["finding"] == number}
        if failed:
            worst = sorted(failed, key=lambda c: -float(failed[c]["ratio"]))[:3]
            return entry["dtype"], [c for c in failed if c in worst]
    return None


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m examples.peers", description=__doc__)
    parser.add_argument("--out", type=Path, help="the record")
    parser.add_argument("--only", default="", help="candidates whose name holds this")
    parser.add_argument("--dtypes", nargs="+", default=ALL)
    options = parser.parse_args(arguments)
    # before any of the peers imports Triton
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    chosen = [
        replace(peer, dtypes=tuple(d for d in peer.dtypes if d in options.dtypes))
        for peer in PEERS
        if options.only in peer.candidate
    ]
    found = record(chosen, lambda line: print(line, file=sys.stderr))
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
