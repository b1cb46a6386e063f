"""`make readme`: put what `make demo` left into docs/demo and into the README's generated parts.

A generated part stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from gaugeblock.reference.oracle import Result
from gaugeblock.reference.report import binding

CHECKOUT = Path(__file__).resolve().parent.parent
RECORDS = CHECKOUT / "docs" / "demo"
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
    }


def fill(text, parts):
    """The text with each generated part replaced. Raises ValueError for a part without a place."""
    for name, body in parts.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"README: must hold <!-- {name} --> … <!-- /{name} -->, it does not")
        text = place.sub(lambda m, body=body: m[1] + body + m[2], text)
    return text


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def _parity(record):
    rows = []
    for fields in record["worst"]:
        r = Result(**fields)
        error, budget = binding(r)
        rows.append(
            [r.op, r.case, f"{r.output}, {r.dtype}", f"{error:.1e}", f"{budget:.1e}",
             f"{100 * r.ratio:.0f}%"]
        )  # fmt: skip
    said = (
        f"{record['compared']} tensors compared, {record['failures']} wrong "
        f"({record['device']}, torch {record['torch']}, triton {record['triton']}). "
        "The worst tensor of each case:\n\n"
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


def _inspect(rows):
    return _table(
        ["kernel", "case", "registers", "spills", "shared bytes", "matrix instructions"],
        [
            [
                " ".join((row["kernel"].strip("_"), row["config"].get("EPILOGUE", ""))).strip(),
                row["case"], row["registers"], row["spills"], f"{row['shared_bytes']:,}",
                ", ".join(f"{n} {name}" for name, n in row["instructions"].items()) or "–",
            ]
            for row in rows
        ],
    )  # fmt: skip


def main(demo="runs/demo"):
    keep(demo)
    readme = CHECKOUT / "README.md"
    readme.write_text(fill(readme.read_text(), parts()))


if __name__ == "__main__":
    main()
