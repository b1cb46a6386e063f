"""The record of compiled kernels is of the sources at hand, covers them all and is in the docs."""

import json

import pytest
from gaugeblock.benchmarks import readme
from gaugeblock.kernels import _configurations, artefacts, inspect
from gaugeblock.reference.catalog import CATALOG

from tests.helpers import CHECKOUT

RUN = "run python -m gaugeblock.kernels.artefacts && make readme"


def test_the_record_is_of_these_sources():
    assert artefacts.read()["sources"] == artefacts.sources(), RUN


def test_the_record_has_every_kernel():
    record = artefacts.read()
    assert record["versions"]["triton"] == list(artefacts.VERSIONS)
    compiled = {
        tuple(r[k] for k in ("op", "case", "dtype", "target", "triton")) for r in record["rows"]
    }
    assert compiled == {
        (op.name, case.name, dtype, target, version)
        for dtype in artefacts.DTYPES
        for target in artefacts.TARGETS
        for op, case in inspect.aot_cases(target in artefacts.GATED)
        for version in artefacts.VERSIONS
    }, RUN


def test_what_is_compiled():
    with_kernel = {name for name, op in CATALOG.items() if op.kernel is None}
    some, every = (set(inspect.aot_cases(configurations)) for configurations in (False, True))
    assert some < every
    assert {op.name for op, _ in some} == with_kernel


def test_every_row_of_a_table_is_compiled():
    """At the tile that the row names, on the target that it is for."""
    compiled = {
        (
            r["kernel"],
            r["target"],
            r["tile"].rpartition("×")[0],
            {"float32": 32}.get(r["dtype"], 16),
        )
        for r in artefacts.read()["rows"]
    }
    for row in _configurations.rows("attention"):
        kernel = {"forward": "fwd"}.get(row["kernel"], f"bwd_{row['kernel']}")
        tile = f"{row['BLOCK_M']}×{row['BLOCK_N']}"
        found = f"_attention_{kernel}_kernel", row["architecture"], tile, row["bits"]
        assert found in compiled, RUN


def test_every_kernel_in_the_record_passes():
    failed = [row for row in artefacts.read()["rows"] if not row["passed"]]
    assert not failed


def test_the_page_holds_the_record():
    page = (CHECKOUT / "docs" / "inspect.md").read_text()
    assert readme.fill(page, artefacts.parts()) == page, "run make readme"


def test_any_change_of_a_kernel_changes_the_hash(tmp_path):
    (tmp_path / "_op.py").write_text("a")
    (tmp_path / "_folder").mkdir()
    (tmp_path / "_folder" / "forward.py").write_text("b")
    (tmp_path / "configurations").mkdir()
    (tmp_path / "configurations" / "op.json").write_text("[]")
    seen = [artefacts.sources(tmp_path)]
    for name, text in (
        ("_op.py", "c"),
        ("_folder/forward.py", "d"),
        ("_new.py", ""),
        ("configurations/op.json", "[1]"),
    ):
        (tmp_path / name).write_text(text)
        seen.append(artefacts.sources(tmp_path))
    (tmp_path / "_op.py").rename(tmp_path / "_other.py")
    seen.append(artefacts.sources(tmp_path))
    assert len(set(seen)) == 6
    (tmp_path / "_folder" / "__pycache__").mkdir()
    for name in (
        "__init__.py", "cli.py", "inspect.py", "_folder/__pycache__/forward.cpython-311.pyc",
    ):  # fmt: skip
        (tmp_path / name).write_text("not a kernel")
    assert artefacts.sources(tmp_path) == seen[-1]


def row(**changes):
    figures = {
        "op": "ffn", "case": "small", "dtype": "bfloat16", "kernel": "_ffn_kernel",
        "config": {"BLOCK_M": 64, "BLOCK_N": 32, "EPILOGUE": "bias", "num_warps": 4},
        "target": "sm_90", "triton": "3.6.0", "registers": 100, "spills": 0, "spills_in_loops": 0,
        "shared_bytes": 4096, "instructions": {"HGMMA": 4, "FFMA": 1, "BAR": 2},
        "occupancy": {"programs": 4, "warps": 16, "share": 0.25, "limiter": "registers"},
        "narrow_offsets": 0, "passed": True, "reason": "",
    }  # fmt: skip
    return figures | changes


def test_the_table_shows_both_versions_and_what_fails(tmp_path):
    broken = {"registers": None, "spills": None, "shared_bytes": None, "occupancy": None,
              "instructions": {}, "passed": False, "reason": "does not compile: x"}  # fmt: skip
    rows = [
        row(),
        row(triton="3.9.0", registers=120),
        row(case="large"),
        row(case="large", triton="3.9.0", registers=120),
        row(target="sm_80", spills=8),
        row(target="sm_80", triton="3.9.0", **broken),
        row(dtype="float32", instructions={"FFMA": 2000}),
        row(target="gfx942", occupancy=None, registers=None, spills=None),
    ]
    artefacts.write(rows, tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["rows"]) == len(rows)
    assert record["sources"] == artefacts.sources()
    text = artefacts.parts(tmp_path / "record.json")["artefacts"]
    assert "8 kernels compiled by Triton 3.6.0 and 3.9.0; 1 fail" in text
    lines = text.splitlines()
    assert (
        "| ffn_kernel | small, large | 64×32 bias | 100 / 120 | 0 | 4,096 | 4 | 25% | registers "
        "| 4 HGMMA |" in lines
    )
    assert (
        "| ffn_kernel | small | 64×32 bias | 100 / – | 8 / – | 4,096 / – | 4 / – | 25% / – "
        "| registers / – | 4 HGMMA / – |" in lines
    )
    assert any(line.endswith("| 2,000 FFMA |") for line in lines)
    assert "For gfx942, 1 of 1 compile." in lines
    assert "- `ffn_kernel` small, bfloat16, sm_80, Triton 3.6.0: 8 bytes" in lines
    assert "- `ffn_kernel` small, bfloat16, sm_80, Triton 3.9.0: does not compile: x" in lines


@pytest.mark.slow
def test_the_record_can_be_made_again(tmp_path):
    assert artefacts.main(["--out", str(tmp_path / "record.json")]) == 0
    assert artefacts.read(tmp_path / "record.json")["rows"] == artefacts.read()["rows"]
