"""A file of limits that users keep for their own kernels.

    [[kernel]]
    name = "rows of 1,024"
    kernel = "my_package.norm:rms_kernel"
    signature = "*bf16:16,*bf16:16,i32"
    constexprs = { BLOCK = 1024 }
    targets = ["sm_80", "sm_90"]
    num_warps = 8
    limits.must_not = ["LDL", "LDG.16"]
    limits.sm_90 = { registers = 40, spills = 0, shared_bytes = 64, occupancy = 0.5 }

The same in JSON. Limits for one target stand before those for all.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

from .. import user_kernel
from ..sass import COUNTED, WIDTHS
from .compiling import TARGETS, kernel_launches

# figure: which of two is worse; occupancy is a share, at least, the others are at most
FIGURES = {"registers": max, "spills": max, "shared_bytes": max, "occupancy": min}
INSTRUCTIONS = ("must", "must_not")
_KEYS = {
    "name": str, "kernel": str, "signature": str, "constexprs": dict, "targets": list,
    "num_warps": int, "num_stages": int, "limits": dict,
}  # fmt: skip
# a key that TOML takes without quotes
_NAME = re.compile(r"[\w-]+", re.ASCII)
# what `must` and `must_not` may name: as `sass.instruction_mix` counts it
_COUNTED = re.compile(
    rf"(?:{'|'.join(COUNTED)})|(?:LDG|STG)\.(?:{'|'.join(map(str, WIDTHS))})|MUFU\.[A-Z0-9]+"
)


@dataclass(frozen=True)
class Entry:
    """A kernel of the file: its table, and its number for messages."""

    table: dict
    number: int

    @property
    def targets(self):
        return self.table.get("targets", ["sm_90"])

    def limits(self, target):
        """{limit: value} that hold for a target."""
        limits = self.table.get("limits", {})
        common = {key: value for key, value in limits.items() if key not in TARGETS}
        return common | limits.get(target, {})

    def launches(self, target):
        constants = {
            k: user_kernel.constant(v) if isinstance(v, str) else v
            for k, v in self.table.get("constexprs", {}).items()
        }
        options = {k: self.table.get(k) for k in ("num_warps", "num_stages")}
        return kernel_launches(
            self.table["kernel"], self.table["signature"], constants, target=target, **options
        )


def read(path):
    """The Entries of a gate file.

    Raises ValueError for what it may not say, OSError where there is none.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"inspect: gate must be a .toml or a .json file, got {path}")
    try:
        found = (tomllib if path.suffix == ".toml" else json).loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"inspect: {path} must be {path.suffix[1:].upper()}: {error}") from None
    tables = found.get("kernel") if isinstance(found, dict) else None
    if not isinstance(tables, list) or not tables or set(found) != {"kernel"}:
        raise ValueError(f"inspect: {path} must hold a list named kernel and nothing else")
    for number, table in enumerate(tables, 1):
        _expect_entry(table, f"{path}, kernel {number}")
    return [Entry(table, number) for number, table in enumerate(tables, 1)]


def _expect_entry(table, where):
    if not isinstance(table, dict):
        raise ValueError(f"inspect: {where} must be a table, got {table!r}")
    for key in ("kernel", "signature"):
        if key not in table:
            raise ValueError(f"inspect: {where} must have a {key}, got none")
    for key, value in table.items():
        kind = _KEYS.get(key)
        if kind is None:
            raise ValueError(f"inspect: {where} may have {', '.join(_KEYS)}, got {key}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"inspect: {where}: {key} must be {kind.__name__}, got {value!r}")
    targets = table.get("targets", ["sm_90"])
    for target in targets or [None]:
        if not isinstance(target, str) or target not in TARGETS:
            raise ValueError(
                f"inspect: {where}: targets must be of {', '.join(TARGETS)}, got {target!r}"
            )
    for key, value in table.get("limits", {}).items():
        if key in TARGETS and isinstance(value, dict):
            if key not in targets:
                raise ValueError(f"inspect: {where}: limits.{key} must be of a target, got none")
            for inner, limit in value.items():
                _expect_limit(inner, limit, where, key)
        else:
            for target in targets:
                _expect_limit(key, value, where, target)


def _expect_limit(key, value, where, target):
    if key in INSTRUCTIONS:
        names = value if isinstance(value, list) else [value]
        for instruction in names:
            if not _COUNTED.fullmatch(str(instruction)):
                raise ValueError(
                    f"inspect: {where}: {key} must list instructions as they are counted "
                    f"({', '.join(COUNTED)}; LDG.128, MUFU.EX2), got {instruction!r}"
                )
        if not isinstance(value, list):
            raise ValueError(f"inspect: {where}: {key} must be a list, got {value!r}")
    elif key not in FIGURES:
        known = ", ".join([*FIGURES, *INSTRUCTIONS, *TARGETS])
        raise ValueError(f"inspect: {where}: limits may have {known}, got {key}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < inf:
        raise ValueError(f"inspect: {where}: {key} must be a number ≥ 0, got {value!r}")
    elif key == "occupancy" and value > 1:
        raise ValueError(f"inspect: {where}: occupancy must be a share, 0 to 1, got {value!r}")
    elif target == "gfx942" and key != "shared_bytes":
        raise ValueError(f"inspect: {where}: {key} cannot be read for gfx942, got a limit")


def write(path, tables):
    """Write the file anew; of a TOML file's comments the one at its head stays."""
    path = Path(path)
    if path.suffix == ".json":
        path.write_text(json.dumps({"kernel": tables}, indent=1) + "\n")
        return
    head = re.match(r"(?:[ \t]*(?:#.*)?\n)*", path.read_text())[0]
    path.write_text(head + "\n".join(_toml(table) for table in tables))


def _toml(table):
    """A [[kernel]] of the file."""
    lines = ["[[kernel]]"]
    for key, value in table.items():
        if key == "limits":
            lines += [f"limits.{k} = {_value(v)}" for k, v in value.items()]
        else:
            lines.append(f"{key} = {_value(value)}")
    return "\n".join(lines) + "\n"


def _value(value):
    if isinstance(value, dict):
        inner = [f"{_key(k)} = {_value(v)}" for k, v in value.items()]
        return f"{{ {', '.join(inner)} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    # of text, other numbers, true and false JSON's form is TOML's
    return json.dumps(value, ensure_ascii=False)


def _key(name):
    return name if _NAME.fullmatch(name) else json.dumps(name)
