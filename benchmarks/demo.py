"""`make demo`: verify, train, generate and inspect, on whatever machine this is.

Parity runs in Triton's interpreter where there is no GPU, and inspection needs it off: each step is
a process of its own. Everything is left in runs/demo.
"""

from __future__ import annotations

import json
import os
import platform
import pydoc_data.topics
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from gaugeblock.reference.catalog import CATALOG

OUT = Path("runs/demo")
PROMPT = "The import statement "
STEPS = 500
# the held-out loss must come below this share of what the byte frequencies alone give
TARGET = 0.65


def main():
    began = time.perf_counter()
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores, no GPU"
    _say(f"Gaugeblock on {device}, Python {platform.python_version()}, torch {torch.__version__}")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)

    how = "on the GPU" if on_gpu else "in Triton's interpreter"
    _say(f"1. The kernels, run {how}, against the float64 reference")
    interpreter = {} if on_gpu else {"TRITON_INTERPRET": "1"}
    _run("gaugeblock.benchmarks.parity", OUT / "parity.json", **interpreter)

    _say("2. A GPT of 0.84 million parameters, trained on the Python manual's topics")
    text = OUT / "text.txt"
    text.write_text("\n\n".join(t for _, t in sorted(pydoc_data.topics.topics.items())))
    model = OUT / "model"
    _run("gaugeblock", "train", "--data", text, "--out", model, "--steps", STEPS,
         "--evaluate-every", STEPS // 4)  # fmt: skip
    summary = json.loads((model / "train.json").read_text())["summary"]
    share = summary["held_out_loss"] / summary["unigram_entropy"]

    _say(f"3. What it says after {PROMPT!r}")
    said = _run("gaugeblock", "generate", "--model", model, "--prompt", PROMPT,
                "--max-new-tokens", 500, keep=True)  # fmt: skip
    (OUT / "sample.txt").write_text(said)

    _say("4. The kernels, compiled for an H100 or H200 (sm_90)")
    cases = [w for name in dict.fromkeys(_compiled()) for w in ("--case", name)]
    _run("gaugeblock", "inspect", "--target", "sm_90", "--json", OUT / "inspect.json", *cases)

    _say(f"Done in {time.perf_counter() - began:.0f} s. In {OUT}:")
    for name, what in (
        ("parity.json", "every error and budget of the parity table"),
        ("model/", "the trained model as a Hugging Face directory"),
        ("model/loss.png", "its loss curve; metrics.jsonl has the figures"),
        ("sample.txt", "the paragraph above"),
        ("inspect.json", "registers, spills and instructions of each compiled kernel"),
    ):
        print(f"  {name:<16}{what}")
    verdict = "reached" if share <= TARGET else "MISSED"
    print(
        f"held-out loss {share:.3f}× the unigram entropy, at most {TARGET} asked: {verdict}",
        flush=True,
    )
    sys.exit(0 if share <= TARGET else 1)


def _compiled():
    """The names of the cases that are compiled; one for each row of a table would take long."""
    for op in CATALOG.values():
        if op.kernel is None:
            named = (c for c in op.cases if "aot" in c.tags and "configuration" not in c.tags)
            yield from (case.name for case in named)


def _run(module, *arguments, keep=False, **environment):
    """Run a module in a process of its own; end here with its exit code if it fails."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # threads that spin while they wait cost a busy machine an order of magnitude
    inherited.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ran = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=inherited | environment,
        stdout=subprocess.PIPE if keep else None,
        text=True,
    )
    if keep:
        print(ran.stdout, end="", flush=True)
    if ran.returncode:
        print(f"demo: {module} {' '.join(map(str, arguments))} failed", file=sys.stderr)
        sys.exit(ran.returncode)
    return ran.stdout


def _say(line):
    print(f"\n{line}", flush=True)


if __name__ == "__main__":
    main()
