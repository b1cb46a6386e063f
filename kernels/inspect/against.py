"""The same launches compiled at a git revision, in a worktree of its own.

A process with that checkout on its path compiles them; it reads the artefacts with the inspector of
today, so that both sides are read alike. The kernels of the catalog are compiled by Gaugeblock's
own checkout at the revision, a user's kernel by the repository that the working folder is in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..sass import place
from ..worktree import commit_of, top, worktree

CHECKOUT = Path(__file__).resolve().parents[2]
# the inspector: what reads artefacts, and what it needs
_INSPECTOR = ("inspect", "sass.py", "occupancy.py", "user_kernel.py", "worktree.py")


def rows_at(ref, asked):
    """(commit, rows) of what is asked, at a revision.

    asked: {"targets", "dtype", "ops", "cases"}, or {"targets", "kernel", "signature", "constexprs",
    "num_warps", "num_stages"}; what the revision does not have has no rows.
    Raises ValueError where there is no such revision, or it cannot compile them.
    """
    repository = _repository(asked)
    commit = commit_of(repository, ref, "inspect: --against")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "checkout"
        with worktree(repository, root, commit):
            if repository == CHECKOUT:
                _give_inspector(root)
            return commit, _rows(asked, repository, root, ref)


def _repository(asked):
    """The root of the repository whose history is meant."""
    if "kernel" in asked:
        return top(Path.cwd(), "inspect: --against")
    if not (CHECKOUT / ".git").exists():
        raise ValueError(
            f"inspect: --against needs Gaugeblock's own git checkout for ops of the catalog, got "
            f"{CHECKOUT}; clone it and run there"
        )
    return CHECKOUT


def _give_inspector(root):
    """Today's inspector in place of the revision's."""
    for name in _INSPECTOR:
        mine, its = CHECKOUT / "kernels" / name, root / "kernels" / name
        if mine.is_dir():
            shutil.rmtree(its, ignore_errors=True)
            shutil.copytree(mine, its, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(mine, its)


def _rows(asked, repository, root, ref):
    """The rows that a process in the worktree makes."""
    paths = [Path(p).resolve() for p in sys.path if p]
    paths = [root / p.relative_to(repository) if p.is_relative_to(repository) else p for p in paths]
    paths = [root, *paths] if repository == CHECKOUT else paths
    folder = Path.cwd()
    folder = root / folder.relative_to(repository) if folder.is_relative_to(repository) else root
    if not folder.is_dir():
        raise ValueError(f"inspect: the working folder must exist at {ref}, it does not: {folder}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    request, answer = root.with_name("asked.json"), root.with_name("rows.json")
    request.write_text(json.dumps(asked | {"root": str(root)}))
    ran = subprocess.run(
        [sys.executable, "-m", "gaugeblock.kernels.inspect.against", request, answer],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if ran.returncode:
        said = (ran.stderr.strip().splitlines() or [f"exit {ran.returncode}"])[-1]
        raise ValueError(f"inspect: --against {ref}: {said.removeprefix('ValueError: inspect: ')}")
    return json.loads(answer.read_text())


def _compile(asked):
    """In the worktree's process: the rows."""
    from .. import user_kernel
    from .compiling import inspect, inspect_kernel, known

    root = Path(asked["root"])
    if "kernel" in asked:
        try:
            kernel, _ = user_kernel.load(asked["kernel"])
        except user_kernel.Absent:
            return []
        file = Path(kernel.fn.__code__.co_filename).resolve()
        if not file.is_relative_to(root):
            raise ValueError(
                f"inspect: {asked['kernel']} must lie in the repository of the working folder, it "
                f"is imported from {file}; put the repository on PYTHONPATH"
            )
        constants = {k: user_kernel.constant(v) for k, v in asked["constexprs"].items()}
        options = {k: asked[k] for k in ("num_warps", "num_stages")}
        return [
            row for target in asked["targets"]
            for row in inspect_kernel(
                asked["kernel"], asked["signature"], constants, target=target, **options
            )
        ]  # fmt: skip
    ops, cases = known(asked["ops"], asked["cases"])
    if (asked["ops"] and not ops) or (asked["cases"] and not cases):
        return []
    return [row for t in asked["targets"] for row in inspect(ops, t, asked["dtype"], cases)]


def differences(now, before):
    """[{"op", "case", "dtype", "kernel", "target", "config", "change", "figures", "instructions"}].

    A launch of now is compared with that of before which has the same op, case, kernel, target and
    place among those. change: "same", "changed", "new" or "gone". figures and instructions:
    {name: [before, now]}, None on the side that has no such launch.
    """
    sides = {}
    for number, rows in enumerate((before, now)):
        met = {}
        for row in rows:
            name = tuple(row[k] for k in ("op", "case", "kernel", "target"))
            met[name] = met.get(name, 0) + 1
            sides.setdefault((*name, met[name]), [None, None])[number] = row
    # in the order of now; what is gone at last
    order = sorted(sides.values(), key=lambda pair: pair[1] is None)
    return [_difference(*pair) for pair in order]


def _difference(before, now):
    row = now or before
    sides = [_figures(side) if side else {} for side in (before, now)]
    figures = {k: [side.get(k) for side in sides] for k in _figures(row)}
    counts = [side["instructions"] if side else {} for side in (before, now)]
    names = sorted({**counts[0], **counts[1]}, key=place)
    counts = {k: [c.get(k, 0) if side else None for c, side in zip(counts, (before, now))]
              for k in names}  # fmt: skip
    change = "same"
    if before is None or now is None:
        change = "gone" if now is None else "new"
    elif any(one != other for one, other in (figures | counts).values()):
        change = "changed"
    return {k: row[k] for k in ("op", "case", "dtype", "kernel", "target", "config")} | {
        "change": change, "figures": figures, "instructions": counts
    }  # fmt: skip


def _figures(row):
    held = row["occupancy"] or {}
    whole = row["bounds"][-1] if row["bounds"] else {}
    config = row["config"]
    return {
        "registers": row["registers"],
        "spills": row["spills"],
        "shared_bytes": row["shared_bytes"],
        "programs": held.get("programs"),
        "occupancy": held.get("share"),
        "limited by": held.get("limiter"),
        "all instructions": whole.get("instructions"),
        "tile": "×".join(str(v) for k, v in config.items() if k.startswith("BLOCK")),
        "num_warps": config.get("num_warps"),
        "num_stages": config.get("num_stages"),
        "fails": row["reason"],
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_compile(json.loads(Path(sys.argv[1]).read_text()))))
