"""What `gaugeblock inspect` was asked for, and what it found: rows, tables, a verdict."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from .. import ceilings, user_kernel
from . import estimate, gate, gate_file, lines, saved, tables, what_if
from .against import differences, rows_at
from .compiling import catalog_launches, kernel_launches


@dataclass
class Asked:
    """The command line's words. ValueError for words that do not go together."""

    ops: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=lambda: ["sm_90"])
    dtype: str | None = None
    cases: list[str] = field(default_factory=list)
    signature: str | None = None
    constexprs: list[str] = field(default_factory=list)
    num_warps: int | None = None
    num_stages: int | None = None
    against: str | None = None
    ceilings: Path | None = None
    what_if: bool = False

    def __post_init__(self):
        mine = [name for name in self.ops if ":" in name]
        if mine and (len(self.ops) > 1 or self.signature is None):
            raise ValueError(f"inspect: {mine[0]} must come alone, with its --signature")
        for option, given in (("case", self.cases), ("dtype", self.dtype)):
            if mine and given:
                raise ValueError(f"inspect: --{option} goes with ops of the catalog, got {mine[0]}")
        self.dtype = self.dtype or "bfloat16"
        for name in ("signature", "constexprs", "num_warps", "num_stages"):
            if getattr(self, name) not in (None, []) and not mine:
                option = name.removesuffix("s") if name == "constexprs" else name.replace("_", "-")
                raise ValueError(
                    f"inspect: --{option} goes with a kernel module:function, got none"
                )
        if self.ceilings and mine:
            raise ValueError(f"inspect: --ceilings goes with ops of the catalog, got {mine[0]}")
        if self.ceilings and len(self.targets) > 1:
            raise ValueError(
                f"inspect: --ceilings are of one chip, got targets {', '.join(self.targets)}"
            )
        if self.ceilings:
            # a file that is of no use is told before anything is compiled
            rates = ceilings.read(self.ceilings)[0]["matrix_tflop_s"]
            if self.dtype not in rates:
                raise ValueError(
                    f"inspect: {self.ceilings} must have the rate of {self.dtype} products, it has "
                    f"{', '.join(rates)}"
                )
        self.kernel = mine[0] if mine else None
        self.constants = dict(map(_named, self.constexprs))

    def launches(self, target, change=dict):
        """Everything that is asked for, compiled for a target."""
        if self.kernel is None:
            return catalog_launches(self.ops, target, self.dtype, self.cases, change)
        constants = {k: user_kernel.constant(v) for k, v in self.constants.items()}
        return kernel_launches(
            self.kernel, self.signature, constants, target=target, change=change,
            num_warps=self.num_warps, num_stages=self.num_stages,
        )  # fmt: skip

    def elsewhere(self):
        """What `rows_at` is told."""
        if self.kernel is None:
            return {"targets": self.targets, "dtype": self.dtype, "ops": self.ops,
                    "cases": self.cases}  # fmt: skip
        return {"targets": self.targets, "kernel": self.kernel, "signature": self.signature,
                "constexprs": self.constants, "num_warps": self.num_warps,
                "num_stages": self.num_stages}  # fmt: skip


def _named(text):
    """(name, value) of NAME=VALUE, both as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"inspect: constexpr must be NAME=VALUE, got {text!r}")
    return name, value


@dataclass
class Found:
    """The tables to show, what goes into a JSON file, whether all is well, and the Launches."""

    tables: list
    data: object
    passed: bool
    launches: list

    def by_line(self):
        """Add what each line of Python costs."""
        self.tables.append(lines.table(self.launches))
        for launch in self.launches:
            launch.row["lines"] = lines.cost(launch.code) if launch.code else None

    def save(self, path):
        """Write the data as JSON."""
        _write(path, json.dumps(self.data, indent=1) + "\n")

    def save_markdown(self, path):
        """Write the tables as Markdown."""
        _write(path, "\n".join(table.markdown() for table in self.tables if table.rows))

    def save_artefacts(self, folder):
        """Write what the compiler made, a folder a launch."""
        saved.save(self.launches, folder)


def _write(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run(asked):
    """Compile what is asked for, and read it."""
    commit, before = None, []
    if asked.against is not None:
        commit, before = rows_at(asked.against, asked.elsewhere())
    launches = [asked.launches(target) for target in asked.targets]
    if asked.what_if:
        for target, part in zip(asked.targets, launches):
            what_if.add(part, partial(asked.launches, target))
    parts = [[launch.row for launch in part] for part in launches]
    rows = [row for part in parts for row in part]
    estimate.add(rows, asked.ceilings)
    shown = [tables.figures(parts, asked.targets), tables.mix(parts), tables.bounds(parts)]
    shown += [estimate.table(rows), what_if.table(rows)]
    data = rows
    if asked.against is not None:
        found = differences(rows, before)
        shown.append(tables.differences(found, asked.against))
        data = {"against": asked.against, "commit": commit, "rows": rows, "before": before,
                "differences": found}  # fmt: skip
    launches = [x for part in launches for x in part]
    return Found(shown, data, all(row["passed"] for row in rows), launches)


def hold(path, renew=False):
    """What a gate file says of the kernels that it lists; renew: write it anew."""
    entries = gate_file.read(path)
    found, table = gate.check(entries)
    if renew:
        gate.update(path, entries, found)
        found, table = gate.check(gate_file.read(path))
    launches = [launch for *_, launch, _ in found]
    for *_, launch, reasons in found:
        launch.row["over"] = reasons
    rows = [launch.row for launch in launches]
    shown = [table, tables.mix([rows]), tables.bounds([rows])]
    return Found(shown, rows, not any(reasons for *_, reasons in found), launches)
