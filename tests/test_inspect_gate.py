"""A user's gate file: what it may say, what it lets pass, how it is brought up to date."""

import json
import math
import tomllib
from importlib.metadata import version

import pytest
from gaugeblock.kernels.inspect import gate_file

from tests.helpers import CHECKOUT, gaugeblock, python

MINE = """
import triton
import triton.language as tl

@triton.jit
def scale_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.exp2(tl.load(x_ptr + offs, mask=offs < n)), mask=offs < n)

blocks = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((256, 2), (512, 4))]
tuned = triton.autotune(blocks, key=["n"])(scale_kernel)

@triton.jit
def wide_kernel(x_ptr, y_ptr):
    rows = tl.arange(0, 256)
    x = tl.load(x_ptr + rows[:, None] * 64 + tl.arange(0, 64)[None, :])
    tl.store(y_ptr + rows[:, None] * 256 + rows[None, :], tl.exp2(tl.dot(x, x.T)))

@triton.jit
def broken_kernel(x_ptr):
    tl.store(x_ptr, missing)
"""
GATE = """# what we promise

[[kernel]]
kernel = "mine:scale_kernel"
signature = "*fp32:16,*fp32:16,i32:16"
constexprs = { BLOCK = 1024 }
targets = ["sm_80", "sm_90"]
num_warps = 8
limits.must = ["MUFU.EX2"]
limits.sm_90 = { registers = 4, must_not = ["LDG.32"] }

[[kernel]]
name = "what it tries"
kernel = "mine:tuned"
signature = "*fp32,*fp32,i32"
limits = { must_not = ["LDG.32"], spills = 0, occupancy = 1 }
"""
# spills, and no limit to say how much it may
UNLIMITED = """[[kernel]]
kernel = "mine:tuned"
signature = "*fp32,*fp32,i32"

[[kernel]]
kernel = "mine:wide_kernel"
signature = "*bf16:16,*fp32:16"
num_warps = 4
"""
BROKEN = '[[kernel]]\nkernel = "mine:broken_kernel"\nsignature = "*fp32"\n'
SCRIPT = """
import json
from pathlib import Path
from gaugeblock.kernels.inspect.run import hold

def held(name, text, **options):
    Path(name).write_text(text)
    found = hold(name, **options)
    return [found.passed, found.data, [table.markdown() for table in found.tables[:1]]]

text = Path("gate.toml").read_text()
said = {"first": held("gate.toml", text), "renewed": held("new.toml", text, renew=True)}
said["again"] = held("new.toml", Path("new.toml").read_text())
told = Path("told.json").read_text()
said["told"] = held("told.json", told)
said["told renewed"] = held("told.json", told, renew=True)
said["unlimited"] = held("unlimited.toml", Path("unlimited.toml").read_text())
broken = Path("broken.toml").read_text()
said["broken"] = held("broken.toml", broken)
try:
    held("broken.toml", broken, renew=True)
except ValueError as error:
    said["broken renewed"] = str(error)
json.dump(said, open("said.json", "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the library makes of files in it, from one process."""
    folder = tmp_path_factory.mktemp("gate")
    (folder / "mine.py").write_text(MINE)
    (folder / "gate.toml").write_text(GATE)
    (folder / "broken.toml").write_text(BROKEN)
    (folder / "unlimited.toml").write_text(UNLIMITED)
    told = {"kernel": "mine:scale_kernel", "signature": "*fp32:16,*fp32:16,i32:16",
            "constexprs": {"BLOCK": 64}, "targets": ["gfx942"],
            "limits": {"shared_bytes": 0}}  # fmt: skip
    (folder / "told.json").write_text(json.dumps({"kernel": [told]}))
    ran = python("-c", SCRIPT, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.fixture
def said(folder):
    return json.loads((folder / "said.json").read_text())


def test_what_is_over_a_limit_is_said(said):
    passed, rows, (table,) = said["first"]
    assert not passed
    assert [(row["target"], row["op"]) for row in rows] == [
        ("sm_80", "mine:scale_kernel"), ("sm_90", "mine:scale_kernel"),
        ("sm_90", "mine:tuned"), ("sm_90", "mine:tuned"),
    ]  # fmt: skip
    registers = rows[1]["registers"]
    assert [row["over"] for row in rows] == [
        [], [f"registers {registers}, at most 4"],
        ["LDG.32 must not be there"], ["LDG.32 must not be there"],
    ]  # fmt: skip
    assert f"| {registers} of 4 |" in table
    assert "4 launches, 3 over a limit" in table
    assert "| mine:tuned | what it tries | 256 2 warps 3 stages | sm_90 |" in table


def test_the_present_figures_become_the_limits(folder, said):
    passed, rows, _ = said["renewed"]
    # what must not be there is a wish, and stays
    assert not passed
    assert [bool(row["over"]) for row in rows] == [False, False, True, True]
    text = (folder / "new.toml").read_text()
    assert text.startswith("# what we promise\n\n[[kernel]]\n")
    scale, tuned = tomllib.loads(text)["kernel"]
    before = tomllib.loads(GATE)["kernel"]
    assert {k: v for k, v in scale.items() if k != "limits"} == {
        k: v for k, v in before[0].items() if k != "limits"
    }
    figures = {k: rows[1][k] for k in ("registers", "spills", "shared_bytes")}
    assert scale["limits"]["sm_90"] == figures | {"occupancy": 1.0, "must_not": ["LDG.32"]}
    assert scale["limits"]["must"] == ["MUFU.EX2"]
    worst = max(row["registers"] for row in rows[2:])
    assert tuned["limits"]["sm_90"]["registers"] == worst
    assert "spills" not in tuned["limits"]
    assert said["again"] == said["renewed"]


def test_json_and_a_chip_without_registers(folder, said):
    passed, (row,), _ = said["told"]
    assert passed, row["over"]
    assert said["told renewed"][0]
    (entry,) = json.loads((folder / "told.json").read_text())["kernel"]
    assert entry["limits"] == {"gfx942": {"shared_bytes": row["shared_bytes"]}}


def test_a_kernel_that_does_not_compile_fails_and_has_no_figures(folder, said):
    passed, rows, (table,) = said["broken"]
    assert not passed
    (row,) = rows
    assert row["over"] == [row["reason"]]
    assert row["reason"].startswith("does not compile: NameError(")
    assert "| mine:broken_kernel |  |  | sm_90 | – |" in table
    assert "does not compile: NameError(" in table
    message = "--update needs mine:broken_kernel for sm_90, it does not compile: NameError("
    assert message in said["broken renewed"]
    assert "\n" not in said["broken renewed"]
    assert (folder / "broken.toml").read_text() == BROKEN


def test_what_has_no_limits_is_held_to_the_gate_of_inspect(said):
    passed, rows, _ = said["unlimited"]
    assert not passed
    assert [row["over"] for row in rows] == [[], [], [rows[2]["reason"]]]
    assert rows[2]["reason"].startswith("spills ")


def test_the_exit_code_is_the_gates(folder):
    ran = gaugeblock("inspect", "--gate", "gate.toml", cwd=folder)
    assert ran.returncode == 1, ran.stderr
    assert "LDG.32 must not be there" in ran.stdout


def entry(**changes):
    return {"kernel": "a:b", "signature": "*fp32"} | changes


WRONG = [
    ({}, "must hold a list named kernel and nothing else"),
    ({"kernel": [], "more": 1}, "must hold a list named kernel and nothing else"),
    ({"kernel": ["a:b"]}, "kernel 1 must be a table, got 'a:b'"),
    ({"kernel": [entry(), {"kernel": "a:b"}]}, "kernel 2 must have a signature, got none"),
    ({"kernel": [entry(warps=4)]}, "may have name, kernel, signature, .*, got warps"),
    ({"kernel": [entry(num_warps="4")]}, "num_warps must be int, got '4'"),
    ({"kernel": [entry(num_stages=True)]}, "num_stages must be int, got True"),
    ({"kernel": [entry(targets=["sm_75"])]}, "targets must be of sm_80, .*, got 'sm_75'"),
    ({"kernel": [entry(targets=[["sm_90"]])]}, r"targets must be of sm_80, .*, got \['sm_90'\]"),
    ({"kernel": [entry(targets=[])]}, "targets must be of sm_80, .*, got None"),
    (
        {"kernel": [entry(limits={"registers": math.nan})]},
        "registers must be a number ≥ 0, got nan",
    ),
    ({"kernel": [entry(limits={"register": 4})]}, "limits may have registers, .*, got register"),
    ({"kernel": [entry(limits={"spills": -1})]}, "spills must be a number ≥ 0, got -1"),
    ({"kernel": [entry(limits={"occupancy": 50})]}, "occupancy must be a share, 0 to 1, got 50"),
    ({"kernel": [entry(limits={"must": ["WGMMA"]})]}, "instructions as they are counted"),
    # none of these is ever counted, so that it would never be found
    ({"kernel": [entry(limits={"must_not": ["LDG.E.128"]})]}, "LDG.128, .*, got 'LDG.E.128'"),
    ({"kernel": [entry(limits={"must_not": ["LDL.64"]})]}, "LDG.128, .*, got 'LDL.64'"),
    ({"kernel": [entry(limits={"must_not": ["LDG.12"]})]}, "LDG.128, .*, got 'LDG.12'"),
    ({"kernel": [entry(limits={"must_not": "LDL"})]}, "must_not must be a list, got 'LDL'"),
    ({"kernel": [entry(limits={"sm_80": {}})]}, "limits.sm_80 must be of a target, got none"),
    (
        {"kernel": [entry(targets=["gfx942"], limits={"registers": 4})]},
        "registers cannot be read for gfx942",
    ),
]


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "gate.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        gate_file.read(path)
    assert "\n" not in str(error.value)


def test_what_toml_spells_otherwise_comes_back(tmp_path):
    path = tmp_path / "gate.toml"
    tables = [entry(constexprs={"least": -math.inf, "größe": 1.5, "on": True})]
    path.write_text("")
    gate_file.write(path, tables)
    assert tomllib.loads(path.read_text())["kernel"] == tables


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "gate.toml").write_text("kernel = [")
    with pytest.raises(ValueError, match=r"gate\.toml must be TOML: "):
        gate_file.read(tmp_path / "gate.toml")
    with pytest.raises(ValueError, match=r"must be a \.toml or a \.json file, got .*gate\.yaml"):
        gate_file.read(tmp_path / "gate.yaml")
    with pytest.raises(OSError, match="No such file"):
        gate_file.read(tmp_path / "other.toml")


@pytest.mark.slow
def test_kernels_that_nobody_here_wrote(tmp_path):
    """Liger's, within the limits of the versions that the file names; the page is what it says."""
    path = CHECKOUT / "examples" / "inspect_liger.toml"
    head = path.read_text().split("[[kernel]]")[0]
    for name in ("triton", "liger-kernel"):
        if version(name) not in head:
            pytest.skip(f"the file is of another {name}")
    ran = gaugeblock("inspect", "--gate", path, "--markdown", tmp_path / "page.md", cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    page = (CHECKOUT / "docs" / "inspect" / "liger.md").read_text()
    assert (tmp_path / "page.md").read_text() == page, "make it again, docs/inspect.md says how"


def test_the_page_of_flash_linear_attention_is_of_its_file():
    entries = gate_file.read(CHECKOUT / "examples" / "inspect_fla.toml")
    page = (CHECKOUT / "docs" / "inspect" / "fla.md").read_text()
    for entry in entries:
        assert f"| {entry.table['kernel']} | {entry.table['name']} |" in page
    assert len({entry.table["kernel"].split(":")[0] for entry in entries}) == 3
    assert ", 0 over a limit;" in page
