"""The record of what every kernel compiles to, on the oldest and the newest Triton.

    python -m gaugeblock.kernels.artefacts

compiles the catalog's "aot" cases in three dtypes for four targets on both versions, each installed
in a folder of its own beside this environment's torch, and writes docs/artefacts.json. Cases of one
row of a table of configurations are compiled for the targets that have such rows. The record holds
the hash of the sources that it is of. Exit 1 when a row fails its gate.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from .inspect import aot_cases, tables
from .sass import MATRIX

CHECKOUT = Path(__file__).resolve().parent.parent
RECORD = CHECKOUT / "docs" / "artefacts.json"
VERSIONS = ("3.6.0", "3.9.0")
DTYPES = ("bfloat16", "float16", "float32")
# those with a gate and rows of their own in the tables of configurations; others must compile
GATED, OTHERS = ("sm_90", "sm_80"), ("sm_100", "gfx942")
TARGETS = (*GATED, *OTHERS)
COLUMNS = (
    "op", "case", "kernel", "tile", "dtype", "target", "triton", "registers", "spills",
    "shared_bytes", "programs", "share", "limiter", "products", "passed", "reason",
)  # fmt: skip


def sources(folder=CHECKOUT / "kernels"):
    """SHA-256 over the modules of the ops, what they share, and their tables of configurations."""
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("_[a-z]*")), folder / "configurations"]:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in (file for file in files if file.suffix in (".py", ".json")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()


def read(path=RECORD):
    """The record, with its rows as dicts."""
    record = json.loads(Path(path).read_text())
    rows = [dict(zip(record["columns"], row, strict=True)) for row in record["rows"]]
    return {**record, "rows": rows}


def write(rows, path):
    """Write the rows of `gaugeblock inspect`, one a line."""
    head = {
        "sources": sources(),
        "versions": {
            "triton": VERSIONS,
            "torch": version("torch"),
            "python": platform.python_version(),
        },
        "columns": COLUMNS,
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()]
    rows = [json.dumps([_short(row)[name] for name in COLUMNS], ensure_ascii=False) for row in rows]
    text = "{\n" + "".join(lines) + ' "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"
    Path(path).write_text(text)


def _short(row):
    """What the record keeps of a row: of the instructions, those that a product may become."""
    held = row["occupancy"] or dict.fromkeys(("programs", "share", "limiter"))
    products = {k: n for k, n in row["instructions"].items() if k in (*MATRIX, "FFMA")}
    return {**row, **held, "products": products, "tile": tables.tile(row["config"])}


def parts(path=RECORD):
    """{name: Markdown}: the generated part of docs/inspect.md."""
    record = read(path)
    rows = record["rows"]
    said = (
        f"{len(rows)} kernels compiled by Triton {' and '.join(record['versions']['triton'])}; "
        f"{sum(not row['passed'] for row in rows)} fail their gate. Where the two versions differ, "
        "both figures stand, the older version's first.\n"
    )
    for dtype in DTYPES:
        for target in GATED:
            table = _table([r for r in rows if (r["dtype"], r["target"]) == (dtype, target)])
            if dtype == DTYPES[0]:
                said += f"\n**{dtype}, {target}**\n\n{table}"
            else:
                title = f"<details><summary>{dtype}, {target}</summary>"
                said += f"\n{title}\n\n{table}\n</details>\n"
    return {"artefacts": said + _only_compiled(rows) + _notes(rows)}


_CELLS = {
    "registers": lambda row: _figure(row["registers"]),
    "spills": lambda row: _figure(row["spills"]),
    "shared bytes": lambda row: _figure(row["shared_bytes"]),
    "programs": lambda row: _figure(row["programs"]),
    "occupancy": lambda row: "–" if row["share"] is None else f"{100 * row['share']:.3g}%",
    "limited by": lambda row: row["limiter"] or "–",
    "matrix, or FFMA": lambda row: _products(row),
}


def _table(rows):
    """One line a launch, with the figures of both versions and every case that has the same."""
    launches, met = {}, Counter()
    for row in rows:
        name = tuple(row[k] for k in ("kernel", "case", "tile"))
        met[*name, row["triton"]] += 1
        launches.setdefault((*name, met[*name, row["triton"]]), []).append(row)
    lines = {}
    for (kernel, case, tile, _), versions in launches.items():
        cells = (dict.fromkeys(show(row) for row in versions) for show in _CELLS.values())
        line = kernel.strip("_"), tile, *(" / ".join(cell) for cell in cells)
        lines.setdefault(line, {})[case] = None
    head = ["kernel", "cases", "tile", *_CELLS]
    body = [(kernel, ", ".join(cases), *rest) for (kernel, *rest), cases in lines.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *body))


def _figure(value):
    return "–" if value is None else f"{value:,}"


def _products(row):
    """The instructions of tiles; of float32 kernels, the fused multiply-adds."""
    names = [k for k in row["products"] if k != "FFMA" or row["dtype"] == "float32"]
    return ", ".join(f"{row['products'][k]:,} {k}" for k in names) or "–"


def _only_compiled(rows):
    """How many kernels compile for the chips that have no gate."""
    said = ""
    for target in OTHERS:
        those = [row for row in rows if row["target"] == target]
        good = sum(row["passed"] for row in those)
        said += f"\nFor {target}, {good} of {len(those)} compile.\n"
    return said


def _notes(rows):
    """The rows that spill or fail, by name."""
    said = ""
    for title, chosen in (
        ("Spills outside loops", [r for r in rows if r["spills"] and r["passed"]]),
        ("Failures", [r for r in rows if not r["passed"]]),
    ):
        lines = [
            f"- `{r['kernel'].strip('_')}` {r['case']}, {r['dtype']}, {r['target']}, "
            f"Triton {r['triton']}: {r['reason'] or str(r['spills']) + ' bytes'}\n"
            for r in chosen
        ]
        said += f"\n{title}:\n\n{''.join(lines)}" if lines else ""
    return said


def compile_all(cache, jobs):
    """Rows of every version, dtype and target."""
    for name in VERSIONS:
        install(name, cache)
    work = [
        (cache / f"triton-{name}", dtype, targets)
        for name in VERSIONS
        for dtype in DTYPES
        for targets in (GATED, OTHERS)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        return [row for part in pool.map(lambda w: _inspect(*w), work) for row in part]


def install(name, cache):
    """That version of triton, alone, in a folder of `cache`; nothing where it is there already."""
    folder = cache / f"triton-{name}"
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=cache) as half:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
             f"{half}/triton", f"triton=={name}"],
            check=True,
        )  # fmt: skip
        Path(half, "triton").rename(folder)


def _inspect(triton, dtype, targets):
    """The rows of `gaugeblock inspect` on the triton in a folder. OSError where there are none."""
    names = sorted({case.name for _, case in aot_cases(targets == GATED)})
    chosen = [word for target in targets for word in ("--target", target)]
    chosen += [word for name in names for word in ("--case", name)]
    paths = f"{triton}{os.pathsep}{CHECKOUT}"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        ran = subprocess.run(
            [sys.executable, "-m", "gaugeblock", "inspect", "--dtype", dtype, *chosen,
             "--json", path],
            env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True, cwd=folder,
        )  # fmt: skip
        if ran.returncode not in (0, 1):
            said = ran.stderr.strip()[-2000:]
            raise OSError(f"artefacts: {triton.name} must inspect {dtype}, it does not: {said}")
        return json.loads(path.read_text())


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m gaugeblock.kernels.artefacts")
    parser.add_argument("--out", type=Path, default=RECORD, help="where the record goes")
    parser.add_argument(
        "--cache", type=Path, default=CHECKOUT / "runs", help="where both versions of triton stay"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    chosen = parser.parse_args(arguments)
    chosen.cache.mkdir(parents=True, exist_ok=True)
    write(compile_all(chosen.cache.resolve(), chosen.jobs), chosen.out)
    rows = read(chosen.out)["rows"]
    failed = [row for row in rows if not row["passed"]]
    for row in failed:
        print(*(row[name] for name in ("kernel", "case", *COLUMNS[3:7], "reason")))
    print(f"{len(rows)} kernels compiled, {len(failed)} fail their gate: {chosen.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
