"""What a check found: one `Result` a tensor, a `Report` of all, in four forms."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

# what each kind of failure means, for people
KINDS = {
    "exception": "the candidate raised",
    "timeout": "the candidate did not return in time",
    "exit": "the candidate ended its process",
    "form": "no tensor, too few, or on the wrong device",
    "shape": "wrong shape",
    "dtype": "wrong dtype",
    "nonfinite": "NaN or infinity where there must be none, or the reverse",
    "choice": "an answer that no rounding explains",
    "row": "an element further off than its row's budget",
    "rms": "the tensor as a whole further off than its budget",
    "damage": "memory of the caller changed",
    "uninitialised": "the result depends on memory that was never written",
    "stale": "the result depends on an earlier call",
    "repeat": "bits change from run to run",
    "batch": "bits of a row change with its neighbours",
}


@dataclass(frozen=True)
class Result:
    """One tensor of one case: its worst element against the budget there, and its RMS error.

    kind is "" where it passed, else a key of `KINDS`. index is where error/budget is largest, first
    the first element past its budget, ulps the error in units of the last place, tile the size of
    the tiles that the failing rows fall into.
    """

    op: str
    case: str
    dtype: str
    layout: str
    output: str
    passed: bool
    kind: str = ""
    index: tuple | None = None
    got: float | None = None
    want: float | None = None
    error: float | None = None
    budget: float | None = None
    rms_error: float | None = None
    rms_budget: float | None = None
    discrimination: float | None = None
    hint: str = ""
    first: tuple | None = None
    ulps: float | None = None
    tile: int | None = None
    smallest: dict | None = None
    repro: str | None = None

    @property
    def ratio(self):
        """Error over budget, the larger of element and RMS: at most 1 where it passed."""
        if self.error is None or self.kind == "nonfinite":
            return 0.0 if self.passed else np.inf
        return max(_ratio(self.error, self.budget), _ratio(self.rms_error, self.rms_budget))


@dataclass
class Report:
    """What a check found."""

    op: str
    candidate: str
    device: str
    seed: int
    results: list[Result] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @property
    def passed(self):
        return bool(self.results) and not self.failures

    @property
    def failures(self):
        return [r for r in self.results if not r.passed]

    def cases(self):
        """{(case, dtype, layout): its results}, in the order they were made."""
        grouped = {}
        for r in self.results:
            grouped.setdefault((r.case, r.dtype, r.layout), []).append(r)
        return grouped

    def save(self, path):
        """Write the report: JSON, JUnit XML or a Markdown summary, by the path's ending."""
        path = expect_report_path(path)
        text = _WRITERS[path.suffix](self)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def json(self):
        results = [{**asdict(r), "ratio": r.ratio} for r in self.results]
        document = {**asdict(self), "results": results, "passed": self.passed}
        return json.dumps(_plain(document), indent=1) + "\n"

    def junit(self):
        suite = ElementTree.Element("testsuite", name=f"gaugeblock {self.op}")
        failed = 0
        for results in self.cases().values():
            test = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"{self.op}.{self.candidate}",
                name=case_id(*results[:1]),
            )
            wrong = [r for r in results if not r.passed]
            failed += bool(wrong)
            if wrong:
                failure = ElementTree.SubElement(
                    test, "failure", type=wrong[0].kind, message=_xml(describe(wrong[0]))
                )
                failure.text = _xml("\n".join(map(describe, wrong)))
        for line in self.not_checked:
            test = ElementTree.SubElement(
                suite, "testcase", classname=f"{self.op}.{self.candidate}", name=_xml(line)
            )
            ElementTree.SubElement(test, "skipped", message="not checked")
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(failed))
        suite.set("skipped", str(len(self.not_checked)))
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"

    def markdown(self):
        """A summary that a CI job can post."""
        mark = "✅ right" if self.passed else "❌ wrong"
        lines = [f"### {mark}: {self.op} · `{self.candidate}`", ""]
        cases = self.cases()
        wrong = {key: [r for r in rs if not r.passed] for key, rs in cases.items()}
        wrong = {key: rs for key, rs in wrong.items() if rs}
        lines += [
            f"{len(self.results)} tensors compared in {len(cases)} cases on {self.device}, "
            f"seed {self.seed}; {len(wrong)} cases wrong.",
            "",
        ]
        if wrong:
            lines += ["| case | dtype | layout | tensor | kind | error / budget | hint |"]
            lines += ["|---|---|---|---|---|---|---|"]
            for results in wrong.values():
                r = max(results, key=lambda r: r.ratio)
                share = "" if r.error is None else f"{r.ratio:.3g}"
                cells = (r.case, r.dtype, r.layout, r.output, r.kind, share, r.hint)
                lines += ["| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"]
            kinds = Counter(r.kind for results in wrong.values() for r in results)
            lines += ["", *(f"- **{kind}** × {n}: {KINDS[kind]}" for kind, n in kinds.items())]
        else:
            worst = max(self.results, key=lambda r: r.ratio, default=None)
            if worst:
                lines += [f"Closest to its budget: {case_id(worst)} {worst.output}, "
                          f"{100 * worst.ratio:.0f}%."]  # fmt: skip
        if self.not_checked:
            lines += ["", "Not checked:", *(f"- {line}" for line in self.not_checked)]
        return "\n".join(lines) + "\n"


_WRITERS = {".json": Report.json, ".xml": Report.junit, ".md": Report.markdown}


def expect_report_path(path, suffix=None):
    """The path; ValueError where its ending names no form of report, or not the one wanted."""
    path, wanted = Path(path), [suffix] if suffix else list(_WRITERS)
    if path.suffix not in wanted:
        raise ValueError(f"report: path must end in {', '.join(wanted)}, got {path}")
    return path


def case_id(r):
    return f"{r.case}-{r.dtype}-{r.layout}"


def describe(r):
    """A failure in one line."""
    place = f"{r.op} {r.case} {r.dtype} {r.layout}: {r.output}"
    if r.error is None:
        return f"{place} {r.hint}"
    if r.kind == "nonfinite":
        text = f"{place}{list(r.index)} is {r.got:.9g}, must be {r.want:.9g}"
        return f"{text}; {r.hint}" if r.hint else text
    hint = f"; {r.hint}" if r.hint else ""
    if r.kind == "rms":
        text = f"{place} has RMS error {r.rms_error:.3g}, budget {r.rms_budget:.3g}"
    else:
        ulps = f" ({r.ulps:.3g} ulp)" if r.ulps is not None else ""
        text = (
            f"{place}{list(r.index)} is {r.got:.9g}, must be {r.want:.9g}: "
            f"error {r.error:.3g}{ulps}, budget {r.budget:.3g}"
        )
    smallest = f"; smallest shape {r.smallest}" if r.smallest else ""
    return text + hint + smallest


def _ratio(error, bound):
    return error / bound if bound else (0.0 if error == 0 else np.inf)


def _plain(value):
    """JSON has no NaN or infinity: they are written as strings."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)) and not np.isfinite(value):
        return str(value)
    return value


def _xml(text):
    """Text without the control characters that XML forbids."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
