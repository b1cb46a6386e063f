"""What the compiler made, as files: one folder a launch."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from .lines import annotate, table

# the representations that are text, from the first to the last
_TEXTS = ("ttir", "ttgir", "ptx", "amdgcn")


def save(launches, folder):
    """Write each launch into a folder of its own; what lay there under the same name is replaced.

    kernel.ttir, .ttgir, .ptx and .sass (.amdgcn on AMD), lines.md, row.json; of a kernel that did
    not compile, row.json alone.
    """
    met = Counter()
    for launch in launches:
        row = launch.row
        words = (row["op"], row["case"]) if row["dtype"] else ()
        name = "-".join((*words, row["kernel"].strip("_"), row["target"]))
        met[name] += 1
        # a kernel that is launched again, or in another configuration
        name += f"-{met[name]}" if met[name] > 1 else ""
        own = Path(folder) / re.sub(r"[^\w.-]", "_", name)
        own.mkdir(parents=True, exist_ok=True)
        for old in (*own.glob("kernel.*"), own / "lines.md"):
            old.unlink(missing_ok=True)
        (own / "row.json").write_text(json.dumps(row, indent=1) + "\n")
        asm = getattr(launch.compiled, "asm", {})
        for kind in _TEXTS:
            if kind in asm:
                (own / f"kernel.{kind}").write_text(asm[kind])
        if launch.code:
            (own / "kernel.sass").write_text(annotate(launch.code))
            (own / "lines.md").write_text(table([launch], most=None).markdown())
