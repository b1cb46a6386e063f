"""The generated parts of docs/reference.md, from the record of `python -m tests.proof`."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

from gaugeblock.benchmarks.markdown import escape
from gaugeblock.benchmarks.readme import fill

from .speed import SHAPES, shape_words

CHECKOUT = Path(__file__).parents[2]
RECORD = CHECKOUT / "docs" / "reference" / "proof.json"
# of benchmarks.reference_speed
SPEED = RECORD.with_name("speed.json")
PAGE = CHECKOUT / "docs" / "reference.md"
_NOTHING = "–"


def parts(record=RECORD):
    """{name: Markdown} of the page."""
    record = json.loads(Path(record).read_text())
    ops = record["ops"]
    return {
        "summary": _summary(record, ops),
        "ops": _ops(ops),
        "exact": _exact(ops),
        "sources": _sources(record, ops),
        "models": _models(record["models"]),
        "steps": _steps(ops),
        "mutants": _mutants(ops),
        "speed": _speed(ops),
        "model speed": _model_speed(json.loads(SPEED.read_text())),
    }


def write():
    PAGE.write_text(fill(PAGE.read_text(), parts()))


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def _figure(x, form=".1e"):
    return "0" if x == 0 else format(x, form)


def _ratio(entry):
    parts = [entry["exact"][p]["ratio"] for p in ("forward", "gradient") if p in entry["exact"]]
    return max(parts)


def _summary(record, ops):
    cases = sum(e["exact"]["cases"] for e in ops.values())
    worst = max(ops, key=lambda op: _ratio(ops[op]))
    of = sum(e["mutants"]["of"] for e in ops.values())
    left = [s for e in ops.values() for s in e["mutants"]["survivors"]]
    known = sum(s["reason"] is not None for s in left)
    complex_cases = sum(e["steps"]["complex_cases"] for e in ops.values())
    complex_error = max(e["steps"]["complex"] for e in ops.values())
    torch_error = max(e["sources"]["torch"]["error"] for e in ops.values())
    return (
        f"- **Exact arithmetic.** {len(ops)} ops on {cases} adversarial inputs: no output and no "
        f"gradient is further from the exact result than {_ratio(ops[worst]):.1f} ulp times its "
        f"condition number (`{worst}`); the tests hold every one to {record['bound']:.0f}.\n"
        f"- **Its own forward.** {complex_cases} cases' gradients equal the complex step to "
        f"{complex_error:.0e}.\n"
        f"- **Other people's float64.** torch's autograd agrees to {torch_error:.0e}.\n"
        f"- **Mutation.** {of - len(left):,} of {of:,} one-place changes of the reference are "
        f"seen; {known} of the {len(left)} others have their reason: equal in effect, or the "
        "business of another test.\n"
    )


def _documented(op):
    """(formula, source) of an op's docstring: its indented part, and what follows `Source:`."""
    text = importlib.import_module(f"gaugeblock.reference._{op}").__doc__
    formula = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    source = " ".join(text[text.index("Source:") + len("Source:") :].split())
    return formula, source.rstrip(".")


def _link(text):
    """The arXiv numbers of a source as links."""
    number = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
    return number.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", escape(text))


def _ops(ops):
    head = [
        "op", "formula", "exact: ulp × condition", "torch", "onnx", "jax", "mutants seen", "time",
    ]  # fmt: skip
    rows = []
    for op, entry in ops.items():
        others = [_error(entry["sources"].get(source)) for source in ("torch", "onnx", "jax")]
        m = entry["mutants"]
        formula = "<br>".join(
            f"`{line.replace(chr(96), chr(39))}`" for line in _documented(op)[0][:3]
        )
        rows.append(
            [f"[`{op}`](../reference/_{op}.py)", formula.replace("|", "\\|"),
             f"{_ratio(entry):.2f}", *others, f"{m['caught']} of {m['of']}",
             f"{entry['speed']['ratio']:.1f}×"]
        )  # fmt: skip
    sources = "".join(f"- `{op}`: {_link(_documented(op)[1])}.\n" for op in ops)
    return (
        _table(head, rows)
        + f"\n<details><summary>Sources of the formulas</summary>\n\n{sources}\n</details>\n"
    )


def _error(source):
    return _figure(source["error"]) if source else _NOTHING


def _exact(ops):
    rows = []
    for op, entry in ops.items():
        e = entry["exact"]
        places = [e[p] for p in ("forward", "gradient") if p in e]
        figures = [f"{p['ratio']:.2f} ({p['tensor']}, {p['case']})" for p in places]
        figures += [_NOTHING] * (2 - len(figures))
        rows.append([f"`{op}`", e["cases"], f"{e['ulp']:.3g}", f"{e['condition']:.3g}", *figures])
    head = ["op", "inputs", "worst error, ulp", "worst condition number",
            "worst ratio, forward", "worst ratio, gradients"]  # fmt: skip
    return _table(head, rows)


def _sources(record, ops):
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    rows = []
    for op, entry in ops.items():
        for source, found in entry["sources"].items():
            rows.append([f"`{op}`", source, found["cases"], _figure(found["error"]), found["case"]])
    return f"{versions}.\n\n" + _table(["op", "source", "cases", "worst error", "in"], rows)


def _models(found):
    rows = [[f"`{peer}`", e["tensors"], _figure(e["error"])] for peer, e in found.items()]
    return _table(["model", "tensors", "worst error"], rows)


def _steps(ops):
    rows, left = [], []
    for op, entry in ops.items():
        s = entry["steps"]
        if s["central"]:
            rows.append([f"`{op}`", s["complex_cases"], _figure(s["complex"]), s["central"]])
        left += [f"- `{op}`, {case}: {escape(why)}\n" for case, why in s["left_out"]]
    table = _table(["op", "complex steps", "worst error", "central differences"], rows)
    return table + "\nLeft out, one method or both:\n\n" + "".join(left)


def _mutants(ops):
    rows, reasons = [], {}
    for op, entry in ops.items():
        m = entry["mutants"]
        rows.append([f"`{op}`", m["of"], m["caught"], len(m["survivors"])])
        for s in m["survivors"]:
            reasons.setdefault(s["reason"] or "**not explained**", []).append((op, s))
    text = _table(["op", "mutants", "seen", "survive"], rows)
    text += "\n<details><summary>Why the survivors may</summary>\n\n"
    for why, found in reasons.items():
        text += f"{why if why.startswith('**') else escape(why)}:\n\n"
        text += "".join(
            f"- `{op}.{s['function']}`: `{s['change'].replace('`', '')}`\n" for op, s in found
        )
        text += "\n"
    return text + "</details>\n"


def _speed(ops):
    rows = [
        [f"`{op}`", shape_words(op), f"{entry['speed']['ms']:.1f}",
         f"{entry['speed']['torch_ms']:.1f}", f"{entry['speed']['ratio']:.2f}"]
        for op, entry in ops.items() if op in SHAPES
    ]  # fmt: skip
    return _table(["op", "shape", "ms", "torch, ms", "ratio"], rows)


def _model_speed(record):
    shape, others = record["shape"], record["others"]
    rows = [
        [
            f"{name}{after}",
            *(f"{record[which]['median_s'][of][d]:.2f}" for of in ("reference", "torch")),
            f"{record[which]['ratio'][d]:.2f}",
        ]
        for which, after in (("others", ""), ("first", ", first of a turn"))
        for d, name in (("fwd", "forward"), ("bwd", "backward"))
    ]
    setting = record["NUMPY_MADVISE_HUGEPAGE"]
    return (
        f"{record['parameters']:,} parameters, {shape['n_layer']} layers, 1 × {shape['tokens']} "
        f"tokens, {record['cores']} cores, medians of {len(others['times_s']['torch']['fwd'])}"
        + (f", NUMPY_MADVISE_HUGEPAGE={setting}" if setting else "")
        + ":\n\n"
        + _table(["", "reference, s", "torch, s", "ratio"], rows)
    )
