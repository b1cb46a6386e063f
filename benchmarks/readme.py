"""`make readme`: put what `make demo` left into docs/demo, and the records into the pages.

The README's generated parts come from docs/demo, those of docs/oracle.md from docs/oracle, which
`make oracle` fills, those of docs/inspect.md and docs/attention.md from what compiled and from the
table of configurations, those of docs/step.md and docs/memory-bound.md from the catalog, that of
docs/compare.md from docs/compare, which `python -m tests.gate_trials` fills. A generated part
stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

from gaugeblock.kernels import artefacts
from gaugeblock.kernels.ceilings import copy_gb_s
from gaugeblock.kernels.sass import MATRIX, TMA
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import Result
from gaugeblock.reference.report import binding

from . import estimates, step_budget
from .markdown import markdown_summary
from .record import RESULTS, load_record
from .report import report
from .tables import tally_words
from .words import NOTHING

CHECKOUT = Path(__file__).resolve().parent.parent
RECORDS = CHECKOUT / "docs" / "demo"
ORACLE = CHECKOUT / "docs" / "oracle"
_FROM = {"findings": "peers"}
_MEMORY_BOUND = (
    "layer_norm", "residual_layer_norm", "cross_entropy", "embedding", "dropout", "adamw", "sample",
)  # fmt: skip
_KEPT = ("parity.json", "inspect.json", "sample.txt", "model/train.json", "model/loss.png")


def keep(demo):
    """Copy the records of a demo run to docs/demo."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name in _KEPT:
        shutil.copyfile(Path(demo) / name, RECORDS / Path(name).name)


def parts(records=RECORDS):
    """{name: Markdown} of the README's generated parts."""
    parity = json.loads((records / "parity.json").read_text())
    trained = json.loads((records / "train.json").read_text())["summary"]
    return {
        "parity": _parity(parity),
        "training": _training(trained),
        "sample": _quote((records / "sample.txt").read_text()),
        "inspect": _inspect(json.loads((records / "inspect.json").read_text())),
        "performance": _performance(),
    }


def oracle_parts(records=ORACLE):
    """{name: Markdown} of the generated parts of the oracle's page."""
    write = {
        "peers": _peers, "findings": _findings, "mutants": _mutants, "legal": _legal,
        "quick": _quick,
    }  # fmt: skip
    return {
        name: body(json.loads((records / f"{_FROM.get(name, name)}.json").read_text()))
        for name, body in write.items()
    }


def pages():
    """{page: its generated parts}."""
    return {
        CHECKOUT / "README.md": parts(),
        CHECKOUT / "docs" / "oracle.md": oracle_parts(),
        CHECKOUT / "docs" / "inspect.md": artefacts.parts(),
        CHECKOUT / "docs" / "attention.md": estimates.parts(),
        CHECKOUT / "docs" / "memory-bound.md": {"traffic": _traffic()},
        CHECKOUT / "docs" / "step.md": step_budget.parts(),
        CHECKOUT / "docs" / "compare.md": {"trials": _trials()},
    }


def _trials():
    """How often `compare --gate` was right, of the trials that are recorded."""
    record = json.loads((CHECKOUT / "docs" / "compare" / "trials.json").read_text())
    rows, kinds = [], {"equals": "the same commit", "planted": f"{record['slower']:.0%} slower"}
    for kind, words in kinds.items():
        trials = [t for t in record["trials"] if t["kind"] == kind]
        codes = Counter(t["exit_code"] for t in trials)
        rows.append([f"{words}: exit code", len(trials), *(codes[code] for code in (0, 1, 2)), ""])
        for case in trials[0]["cases"]:
            said = Counter(t["cases"][case][0] for t in trials)
            told = [said["same"] + said["faster"], said["slower"], said["cannot tell"]]
            runs = sorted(t["cases"][case][2] for t in trials)
            rows.append([f"{words}: {case}", len(trials), *told, runs[len(runs) // 2]])
    seconds = sorted(t["seconds"] for t in record["trials"])
    head = ["B is", "trials", "0: same, faster", "1: slower", "2: cannot tell", "runs, median"]
    return (
        f"`{record['command']}`, {record['device']}, {record['threads']} of {record['cores']} "
        f"cores, {seconds[len(seconds) // 2]:.0f} s a comparison:\n\n" + _table(head, rows)
    )


def _traffic():
    """What the memory-bound ops have to move in the family's cases, in bfloat16."""
    ceilings, _ = step_budget.h200_ceilings(RESULTS)
    rows = []
    for name in _MEMORY_BOUND:
        op = CATALOG[name]
        for case in op.cases:
            for direction in ("fwd", "bwd") if op.differentiable() else ("fwd",):
                if "family" in case.tags:
                    read, written = op.traffic(case, 2, direction)
                    least_us = (read + written) / 1e3 / copy_gb_s(ceilings, read + written)
                    moved = [f"{x / 1e6:,.1f}" for x in (read, written)]
                    rows.append([name, case.name, direction, *moved, f"{least_us:,.1f}"])
    return _table(["op", "case", "", "read, MB", "written, MB", "copied in, µs"], rows)


def fill(text, parts):
    """The text with each generated part replaced. Raises ValueError for a part without a place."""
    for name, body in parts.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"page: must hold <!-- {name} --> … <!-- /{name} -->, it does not")
        text = place.sub(lambda m, body=body: m[1] + body + m[2], text)
    return text


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def _parity(record):
    rows = []
    for fields in record["worst"]:
        r = Result(**fields)
        # a choice, as a sampled token is, is right or wrong and has no error
        figures = [NOTHING] * 3
        if r.error is not None:
            error, budget = binding(r)
            figures = [f"{error:.1e}", f"{budget:.1e}", f"{100 * r.ratio:.0f}%"]
        rows.append([r.op, r.case, f"{r.output}, {r.dtype}", *figures])
    said = (
        f"{record['compared']} tensors compared, {record['failures']} wrong "
        f"({record['device']}, torch {record['torch']}, triton {record['triton']}). "
        "The worst tensor of each kernel and dtype:\n\n"
    )
    return said + _table(["kernel", "case", "worst tensor", "error", "budget", "of it"], rows)


def _training(summary):
    share = summary["held_out_loss"] / summary["unigram_entropy"]
    return (
        f"{summary['parameters']:,} parameters, {summary['seconds']:.0f} s, "
        f"{summary['tokens_per_s']:,.0f} tokens/s with the {summary['impl']} kernels. "
        f"Held-out loss {summary['held_out_loss']:.3f} nats a byte, {share:.3f}× the unigram "
        f"entropy {summary['unigram_entropy']:.3f}.\n"
    )


def _quote(text):
    return "```text\n" + text.strip().replace("```", "'''") + "\n```\n"


def _performance(results=RESULTS):
    """The newest record of each device against its peers."""
    parts = []
    for folder, path in newest_records(results).items():
        record = load_record(path)
        page = (folder / "README.md").relative_to(CHECKOUT).as_posix()
        title = f"**{record['device']}** ([all figures and plots]({page}))"
        # on a processor the kernels' twins run
        said = markdown_summary(record) if record["driver"] else f"{tally_words(record)}\n"
        parts.append(f"{title}\n\n{said}")
    return "\n".join(parts)


def newest_records(results=RESULTS):
    """{a device's folder: the record in it that was measured last}."""
    folders = sorted(path for path in results.iterdir() if path.is_dir())
    return {
        folder: max(folder.glob("*.json"), key=lambda path: load_record(path)["started"])
        for folder in folders
    }


def _inspect(rows):
    shown = (*MATRIX, *TMA)
    return _table(
        ["kernel", "case", "registers", "spills", "shared bytes", "matrix instructions"],
        [
            [
                " ".join((row["kernel"].strip("_"), row["config"].get("EPILOGUE", ""))).strip(),
                row["case"], row["registers"], row["spills"], f"{row['shared_bytes']:,}",
                ", ".join(f"{n} {k}" for k, n in row["instructions"].items() if k in shown) or "–",
            ]
            for row in rows
        ],
    )  # fmt: skip


def _peers(record):
    rows = [
        [f"`{e['candidate'].removeprefix('examples.')}`",
         f"{e['package']} {record['versions'][e['package']]}", e["dtype"], e["compared"],
         e["wrong"], f"{len(e['failed'])} of {e['cases']}", f"{100 * e['closest']:.0f}%"]
        for e in record["peers"]
    ]  # fmt: skip
    head = [
        "candidate",
        "version",
        "dtype",
        "tensors",
        "wrong",
        "cases wrong",
        "closest that passes",
    ]
    missing = [f"- `{e['candidate']}`: {e['reason']}\n" for e in record["unavailable"]]
    return _table(head, rows) + ("\nNot run:\n\n" + "".join(missing) if missing else "")


_KNOWN = {"read": "the cause is read in its source", "tried": "reproduced without the oracle"}


def _findings(record):
    text = ""
    for f in record["findings"]:
        entries = [e for e in record["peers"] if e["candidate"] == f["candidate"]]
        package = f"{entries[0]['package']} {record['versions'][entries[0]['package']]}"
        seen = {e["dtype"]: _explained(e, f["number"]) for e in entries}
        said = [f"{dtype}: {_cases(cases)}" for dtype, cases in seen.items() if cases]
        said += [_KNOWN[f["known"]], *([f"[upstream]({f['upstream']})"] if f["upstream"] else [])]
        text += f"- **{package}, {f['sort']}.** {f['what']} ({'; '.join(said)})\n\n"
        text += f"  ```sh\n  {f['command']}\n  ```\n\n"
    unknown = [
        f"- `{e['candidate']}` {e['dtype']}: {', '.join(cases)}\n"
        for e in record["peers"]
        if (cases := _explained(e, None))
    ]
    return text + ("Not diagnosed:\n\n" + "".join(unknown) + "\n" if unknown else "")


def _explained(entry, number):
    """{case: ratio} of the failures that a finding explains."""
    return {
        case: float(f["ratio"]) for case, f in entry["failed"].items() if f["finding"] == number
    }


def _cases(cases):
    worst = max(cases.values())
    share = f", up to {worst:.3g}× the budget" if worst < 1e6 else ""
    return f"{len(cases)} {'case' if len(cases) == 1 else 'cases'}{share}"


def _mutants(record):
    defects, kinds = {}, Counter()
    for name, entry in record.items():
        defects.setdefault(entry["bug"], []).append((name.split("/")[0], entry["first"]))
        kinds.update(first["kind"] for first in entry["first"].values())
    missed = [name for name, entry in record.items() if not entry["first"]]
    quick = sum(any(f["quick"] for f in entry["first"].values()) for entry in record.values())
    said = (
        f"{len(record)} wrong kernels with {len(defects)} defects, {len(record) - len(missed)} "
        f"seen, {quick} of them by a quick check. As what they were seen, each dtype counted: "
        + ", ".join(f"{kind} {n:,}" for kind, n in kinds.most_common())
        + ".\n\n"
    )
    if missed:
        said += f"Not seen: {', '.join(f'`{name}`' for name in missed)}.\n\n"
    rows = []
    for bug, found in defects.items():
        firsts = [first for _, seen in found for first in seen.values()]
        seen = sum(bool(first) for _, first in found)
        rows.append(
            [bug, ", ".join(dict.fromkeys(op for op, _ in found)), f"{seen} of {len(found)}",
             firsts[0]["case"] if firsts else "–",
             ", ".join(dict.fromkeys(f["kind"] for f in firsts)) or "–"]
        )  # fmt: skip
    ops = {}
    for name, entry in record.items():
        ops.setdefault(name.split("/")[0], []).append(bool(entry["first"]))
    short = _table(["op", "wrong kernels", "seen"], [[op, len(s), sum(s)] for op, s in ops.items()])
    long = _table(["defect", "ops", "seen", "for instance in", "as"], rows)
    return f"{said}{short}\n<details><summary>Defect by defect</summary>\n\n{long}\n</details>\n"


def _legal(record):
    rate = record["blamed"] / max(record["compared"], 1)
    above = ", ".join(f"{n:,} above {x}" for x, n in record["above"].items())
    loose = dict(record["loose"])
    said = (
        f"{record['variants']} legal kernels, inputs from {record['seeds']} seed(s), "
        f"{record['compared']:,} "
        f"tensors compared, {record['blamed']:,} blamed ({rate:.1e}). Error over budget: {above}. "
        f"Looseness of {loose.pop('outputs'):,} outputs of a case in a dtype: "
        + ", ".join(f"{n:,} above {x}" for x, n in loose.items())
        + f". {record['compared'] / record['seconds']:,.0f} tensors a second on one core.\n\n"
    )
    rows = [
        [r["op"], r["dtype"], f"{r['compared']:,}", r["blamed"], _figure(max(r["row"], r["rms"])),
         _figure(r["looseness"]), _figure(r["loosest"]), _figure(r["discrimination"])]
        for r in record["ops"]
    ]  # fmt: skip
    head = [
        "op",
        "dtype",
        "tensors",
        "blamed",
        "largest error/budget",
        "looseness",
        "at most",
        "discrimination",
    ]
    blamed = [
        f"- {key.replace('/', ' ')}: {', '.join(f'`{name}`' for name in s['variants'])}\n"
        for key, s in record["outputs"].items()
        if s["blamed"]
    ]
    return said + _table(head, rows) + ("\nBlamed:\n\n" + "".join(blamed) if blamed else "")


def _figure(x):
    return "–" if x is None else f"{x:,.0f}" if 100 <= x < 1e7 else f"{x:.2g}"


def _quick(record):
    rows = []
    for op, r in record["ops"].items():
        one, three = r["float32"], r["three"]
        rows.append(
            [op, r["cases"], one["compared"], f"{one['seconds']:.1f}", f"{three['compared']:,}",
             f"{three['seconds']:.1f}"]
        )  # fmt: skip
    head = ["op", "cases", "tensors, float32", "seconds", "tensors, three dtypes", "seconds"]
    total = [
        sum(r[name]["seconds"] for r in record["ops"].values()) for name in ("float32", "three")
    ]
    said = (
        f"{record['cores']} cores, {record['threads']} threads: {total[0]:.0f} s for all ops in "
        f"float32, {total[1]:.0f} s in float32, float16 and bfloat16.\n\n"
    )
    return said + _table(head, rows)


def main(demo="runs/demo"):
    if Path(demo).exists():
        keep(demo)
    for page, generated in pages().items():
        page.write_text(fill(page.read_text(), generated))
    for folder, record in newest_records().items():
        report([record], markdown=folder / "README.md", png=folder / "plots")


if __name__ == "__main__":
    main()
