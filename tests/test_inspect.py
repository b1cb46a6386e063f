"""The kernels compile for GPUs that are not here, and the gate tells good artefacts from bad."""

import json

import pytest
from gaugeblock.reference.catalog import CATALOG

from tests.helpers import gaugeblock, python

KEYS = {"op", "case", "kernel", "config", "target", "triton", "registers", "spills",
        "shared_bytes", "instructions", "passed"}  # fmt: skip


def inspected(tmp_path, *arguments):
    ran = gaugeblock("inspect", *arguments, "--json", tmp_path / "rows.json", cwd=tmp_path)
    assert ran.returncode in (0, 1), ran.stderr
    return ran.returncode, json.loads((tmp_path / "rows.json").read_text())


def test_every_kernel_compiles_for_hopper_without_spills(tmp_path):
    code, rows = inspected(tmp_path, "--target", "sm_90")
    assert code == 0, [row for row in rows if not row["passed"]]
    assert all(set(row) >= KEYS for row in rows)
    assert {row["op"] for row in rows} == {n for n, op in CATALOG.items() if op.kernel is None}
    assert all(row["registers"] > 0 and row["spills"] == 0 for row in rows)
    products = [
        row for row in rows if row["op"] in ("attention", "ffn") and "delta" not in row["kernel"]
    ]
    assert products
    assert all(row["instructions"].get("HGMMA") for row in products)


@pytest.mark.parametrize(
    ("target", "dtype", "instruction"),
    [("sm_80", "float16", "HMMA"), ("sm_90", "float32", None), ("sm_100", "bfloat16", "UTCHMMA"),
     ("gfx942", "bfloat16", "v_mfma")],
)  # fmt: skip
def test_attention_compiles_for_other_chips(tmp_path, target, dtype, instruction):
    code, rows = inspected(tmp_path, "attention", "--target", target, "--dtype", dtype)
    assert code == 0, [row for row in rows if not row["passed"]]
    products = [row for row in rows if "delta" not in row["kernel"]]
    assert {row["target"] for row in rows} == {target}
    assert all(bool(row["instructions"].get(instruction)) == bool(instruction) for row in products)


def test_a_kernel_that_spills_or_needs_too_much_memory_fails_the_gate():
    script = (
        "from gaugeblock.kernels import _attention\n"
        "from gaugeblock.kernels.inspect import inspect\n"
        "_attention._TILES['forward'][128] = (128, 128, 4, 3)\n"
        "_attention._TILES['dkdv'][64] = (128, 128, 8, 7)\n"
        "rows = inspect(['attention'])\n"
        "bad = [(r['kernel'], r['case'], r['reason']) for r in rows if not r['passed']]\n"
        "assert len(bad) == 2, bad\n"
        "assert any(k == '_attention_fwd_kernel' and 'spills' in r for k, c, r in bad), bad\n"
        "assert any(k == '_attention_bwd_dkdv_kernel' and 'shared' in r for k, c, r in bad), bad\n"
    )
    ran = python("-c", script)
    assert ran.returncode == 0, ran.stderr


def test_sizes_of_one_compile():
    """Triton turns an argument of 1 into a constant, which the interpreter does not."""
    script = (
        "import gaugeblock.kernels.inspect as inspect\n"
        "from gaugeblock.reference.catalog import CATALOG\n"
        "from gaugeblock.reference.oracle import Case\n"
        "for name, op in CATALOG.items():\n"
        "    if op.kernel is None:\n"
        "        case = Case('ones', **dict.fromkeys(op.dims(op.cases[0]), 1))\n"
        "        for dtype in ('bfloat16', 'float32'):\n"
        "            kept = inspect._launches(op, case, 'sm_90', dtype)\n"
        "            assert len(kept) >= 2, name\n"
    )
    ran = python("-c", script)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("norm",), {}, "op must be one of"),
        (("attention", "linear"), {}, "linear must have a kernel, got none (plain products"),
        (("--dtype", "int8"), {}, "dtype must be one of"),
        (("--target", "sm_75"), {}, "target must be one of"),
        ((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET must be off"),
    ],
)
def test_what_cannot_be_inspected_is_refused_in_one_line(arguments, environment, message):
    ran = gaugeblock("inspect", *arguments, **environment)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1
