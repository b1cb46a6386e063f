"""The kernels compile for GPUs that are not here, and the gate tells good artefacts from bad."""

import json

import pytest
from gaugeblock.kernels.inspect.tables import bounds, mix
from gaugeblock.reference.catalog import CATALOG

from tests.helpers import gaugeblock, python

KEYS = {"op", "case", "dtype", "kernel", "config", "target", "triton", "registers", "spills",
        "spills_in_loops", "shared_bytes", "occupancy", "product_units", "instructions",
        "narrow_offsets", "passed", "reason", "source", "threads", "bounds", "launched", "work",
        "estimate"}  # fmt: skip
KERNELS = [name for name, op in CATALOG.items() if op.kernel is None]
FIRST = {
    name: next(
        case.name
        for case in CATALOG[name].cases
        if "aot" in case.tags and "configuration" not in case.tags
    )
    for name in KERNELS
}
# a compile takes a second: the most that these tests may compile of the catalog
MOST = {"every op": 70, "another chip": 6}
CHIPS = [("sm_80", "float16", "HMMA"), ("sm_100", "bfloat16", "UTCHMMA"),
         ("gfx942", "bfloat16", "v_mfma")]  # fmt: skip


def inspected(tmp_path, *arguments):
    ran = gaugeblock("inspect", *arguments, "--json", tmp_path / "rows.json", cwd=tmp_path)
    assert ran.returncode in (0, 1), ran.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(set(row) == KEYS for row in rows)
    return ran, rows


def cases(*names):
    return [word for name in names for word in ("--case", name)]


def test_every_kernel_compiles_for_hopper_without_spills(tmp_path):
    ran, rows = inspected(tmp_path, *KERNELS, *cases(*sorted(set(FIRST.values()))))
    assert ran.returncode == 0, [row for row in rows if not row["passed"]]
    assert len(rows) <= MOST["every op"]
    assert {(row["op"], row["case"]) for row in rows} >= set(FIRST.items())
    assert all(row["target"] == "sm_90" for row in rows)
    assert all(row["registers"] > 0 and row["spills"] == 0 for row in rows)
    assert all(row["occupancy"]["programs"] > 0 for row in rows)
    assert all(any(name[:3] == "STG" for name in row["instructions"]) for row in rows)
    wide = [row for row in rows if row["op"] == "ffn" and "merge" not in row["kernel"]]
    assert wide
    assert all(row["instructions"].get("HGMMA") for row in wide)


@pytest.mark.parametrize(("target", "dtype", "instruction"), CHIPS)
def test_attention_compiles_for_other_chips(tmp_path, target, dtype, instruction):
    ran, rows = inspected(tmp_path, "attention", *cases(FIRST["attention"]), "--target", target,
                          "--dtype", dtype)  # fmt: skip
    assert ran.returncode == 0, [row for row in rows if not row["passed"]]
    assert 0 < len(rows) <= MOST["another chip"]
    assert {(row["target"], row["dtype"]) for row in rows} == {(target, dtype)}
    products = [row for row in rows if "delta" not in row["kernel"]]
    assert products
    assert all(row["instructions"].get(instruction) for row in products)
    assert all((row["occupancy"] is None) == (target == "gfx942") for row in rows)


def test_sizes_of_one_compile():
    """Triton turns an argument of 1 into a constant, which the interpreter does not."""
    script = (
        "import gaugeblock.kernels.inspect.compiling as inspect\n"
        "from gaugeblock.reference.catalog import CATALOG\n"
        "from gaugeblock.reference.oracle import Case\n"
        "for name, op in CATALOG.items():\n"
        "    if op.kernel is None:\n"
        "        sizes = dict.fromkeys(op.dims(op.cases[0]), 1)\n"
        "        case = Case('ones', **sizes, **op.options(op.cases[0]))\n"
        "        kept = inspect._launches(op, case, 'sm_90', 'bfloat16')\n"
        "        assert kept, name\n"
        "        for kernel, *_, compiled in kept:\n"
        "            assert not isinstance(compiled, Exception), (kernel, compiled)\n"
    )
    ran = python("-c", script)
    assert ran.returncode == 0, ran.stderr[-2000:]


REFUSED = {
    "norm": "op must be one of",
    "attention linear": "linear must have a kernel, got none (plain products",
    "--dtype int8": "dtype must be one of",
    "--target sm_75": "target must be one of",
    "ffn --case odd": "case must be one of gpt2_width, compiled_some_rows, ",
    "ffn --num-warps 4": "--num-warps goes with a kernel module:function",
    "mine:kernel": "mine:kernel must come alone, with its --signature",
    "ffn mine:kernel --signature i32": "mine:kernel must come alone, with its --signature",
    "mine:kernel --signature i32 --case odd": "--case goes with ops of the catalog",
    "mine:kernel --signature i32 --constexpr N": "constexpr must be NAME=VALUE, got 'N'",
    "ffn --update": "--update goes with --gate FILE, got none",
    "ffn --gate g.toml": "--gate names its own kernels, got ops beside it",
    "--gate g.toml --against HEAD": "--gate names its own kernels, got against beside it",
    "ffn --ceilings nowhere.json": "No such file",
    "ffn --ceilings c.json --target sm_80 --target sm_90": "--ceilings are of one chip, got",
    "mine:kernel --signature i32 --ceilings c.json": "--ceilings goes with ops of the catalog",
    "--gate nowhere.toml": "No such file",
    "nowhere.at_all:kernel --signature i32": "nowhere.at_all must import, it does not: Module",
    "failing:kernel --signature i32": "failing must import, it does not: RuntimeError: no GPU",
}


def test_what_cannot_be_inspected_is_refused_in_one_line(tmp_path):
    (tmp_path / "failing.py").write_text("raise RuntimeError('no GPU\\nat all')")
    script = (
        "import sys\n"
        "from gaugeblock.__main__ import main\n"
        f"for line in {list(REFUSED)}:\n"
        "    try:\n"
        "        main(['inspect', *line.split()])\n"
        "    except SystemExit as end:\n"
        "        print(end.code)\n"
    )
    ran = python("-c", script, cwd=tmp_path)
    assert ran.stdout.split() == ["2"] * len(REFUSED), ran.stderr
    said = ran.stderr.splitlines()
    assert len(said) == len(REFUSED)
    for line, message in zip(said, REFUSED.values(), strict=True):
        assert message in line


def test_the_interpreter_is_refused():
    ran = gaugeblock("inspect", TRITON_INTERPRET="1")
    assert ran.returncode == 2
    assert ran.stderr == "gaugeblock: inspect: TRITON_INTERPRET must be off, got 1; unset it\n"


# what a user's module may hold
MINE = """
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr, SQUARE: tl.constexpr = False):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0) * factor
    if SQUARE:
        x = tl.exp2(x)
    if y_ptr is None:
        y_ptr = x_ptr
    tl.store(y_ptr + offs, x, mask=offs < n)

blocks = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((256, 2), (512, 4), (256, 2))]
tuned = triton.autotune(blocks, key=["n"])(scale_kernel)
half = triton.autotune([triton.Config({"BLOCK": b}) for b in (100, 256)], key=["n"])(scale_kernel)
guessed = triton.heuristics({"SQUARE": lambda a: a["n"] > 1})(tuned)

@triton.jit
def matrix_kernel(a_ptr, b_ptr, c_ptr, stride, K, M: tl.constexpr, N: tl.constexpr,
                  DTYPE: tl.constexpr):
    rows = tl.program_id(0) * stride + tl.arange(0, M)
    cols, inner = tl.arange(0, N), tl.arange(0, 64)
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, K, 64):
        a = tl.load(a_ptr + rows[:, None] * stride + k + inner[None, :])
        b = tl.load(b_ptr + (k + inner)[:, None] * N + cols[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], acc.to(DTYPE))

@triton.jit
def copy_kernel(x_desc, y_ptr, M, N, BLOCK: tl.constexpr):
    y_desc = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    y_desc.store([0, 0], x_desc.load([0, 0]))

@gluon.jit
def gluon_kernel(x_ptr, y_ptr, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    offs = gl.arange(0, BLOCK, layout)
    gl.store(y_ptr + offs, gl.load(x_ptr + offs))

@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), missing)

@triton.jit
def outer_kernel(x_ptr, BLOCK: tl.constexpr):
    broken_kernel(x_ptr, BLOCK)

def plain():
    pass
"""

ASK = {
    "two targets": ("mine:scale_kernel", "*fp32:16,*fp32:16,i32:16,fp32", {"BLOCK": 1024}),
    "narrow loads": ("mine:scale_kernel", "*fp32,*fp32,i32,fp32", {"BLOCK": 1024}),
    "a fixed parameter": ("mine:scale_kernel", "*fp32:16,i32:16,fp32",
                          {"BLOCK": 1024, "y_ptr": None}),
    "tuned": ("mine:tuned", "*fp32:16,*fp32:16,i32:16,fp32", {}),
    "tuned, a block given": ("mine:guessed", "*fp32:16,*fp32:16,i32:16,fp32",
                             {"BLOCK": 128, "SQUARE": True}),
    "products": ("mine:matrix_kernel", "*bf16:16,*bf16:16,*bf16:16,i32:16,i32:16",
                 {"M": 128, "N": 128, "DTYPE": "tl.bfloat16"}),
    "too large": ("mine:matrix_kernel", "*bf16:16,*bf16:16,*bf16:16,i32:16,i32:16",
                  {"M": 256, "N": 256, "DTYPE": "tl.bfloat16"}),
    "descriptors": ("mine:copy_kernel", "tensordesc<bf16[64, 64]>,*bf16:16,i32,i32", {"BLOCK": 64}),
    "gluon": ("mine:gluon_kernel", "*fp32:16,*fp32:16", {"BLOCK": 512}),
    "no such function": ("mine:scale", "i32", {}),
    "no kernel": ("mine:plain", "i32", {}),
    "no name": ("mine:", "i32", {}),
    "too few types": ("mine:scale_kernel", "*fp32,*fp32,i32", {"BLOCK": 1024}),
    "unknown type": ("mine:scale_kernel", "*fp32,*float,i32,fp32", {"BLOCK": 1024}),
    "unknown hint": ("mine:scale_kernel", "*fp32:8,*fp32,i32,fp32", {"BLOCK": 1024}),
    "no constexpr": ("mine:scale_kernel", "*fp32,*fp32,i32,fp32", {}),
    "unknown constexpr": ("mine:scale_kernel", "*fp32,*fp32,i32,fp32", {"BLOK": 1024}),
    "does not compile": ("mine:broken_kernel", "*fp32", {"BLOCK": 64}),
    "does not compile within": ("mine:outer_kernel", "*fp32", {"BLOCK": 64}),
    "one of two compiles": ("mine:half", "*fp32:16,*fp32:16,i32:16,fp32", {}),
    "not a power of two": ("mine:scale_kernel", "*fp32,*fp32,i32,fp32", {"BLOCK": 100}),
}  # fmt: skip
SCRIPT = """
import json, sys
from gaugeblock.kernels.inspect import inspect_kernel
from gaugeblock.kernels.user_kernel import constant
asked, options, answers = json.load(open("asked.json")), json.load(open("options.json")), {}
for name, (kernel, signature, constants) in asked.items():
    constants = {k: constant(v) if isinstance(v, str) else v for k, v in constants.items()}
    try:
        answers[name] = inspect_kernel(kernel, signature, constants, **options.get(name, {}))
    except ValueError as error:
        answers[name] = str(error)
json.dump(answers, open("answers.json", "w"))
"""
OPTIONS = {
    "products": {"num_warps": 8, "num_stages": 3, "target": "sm_80"},
    "too large": {"num_warps": 4, "num_stages": 5},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each question above gets, rows or a message, all from one process."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(MINE)
    (folder / "asked.json").write_text(json.dumps(ASK))
    (folder / "options.json").write_text(json.dumps(OPTIONS))
    ran = python("-c", SCRIPT, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return json.loads((folder / "answers.json").read_text())


def test_a_users_kernel_side_by_side(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    kernel, signature, _ = ASK["two targets"]
    ran, rows = inspected(tmp_path, kernel, "--signature", signature, "--constexpr", "BLOCK=1024",
                          "--constexpr", "SQUARE=True", "--num-warps", "8",
                          "--target", "sm_80", "--target", "sm_90")  # fmt: skip
    assert ran.returncode == 0
    assert [row["target"] for row in rows] == ["sm_80", "sm_90"]
    for row in rows:
        assert (row["op"], row["case"], row["kernel"]) == (kernel, signature, "scale_kernel")
        assert row["config"] == {"BLOCK": 1024, "SQUARE": True, "num_warps": 8, "num_stages": 3}
        # 1,024 numbers by 256 threads: four each, in one access
        assert row["instructions"] == {"MUFU.EX2": 4, "LDG.128": 1, "STG.128": 1}
        assert row["occupancy"]["limiter"] == "warps"
    (line,) = (line for line in ran.stdout.splitlines() if "100%" in line)
    assert f" {rows[0]['registers']} / {rows[1]['registers']} " in line
    assert "sm_80 / sm_90" in ran.stdout
    assert "MUFU" in ran.stdout


def test_hints_and_fixed_parameters_reach_the_compiler(answers):
    (plain,), (hinted,) = answers["narrow loads"], answers["two targets"]
    assert set(plain["instructions"]) == {"LDG.32", "STG.32"}
    assert set(hinted["instructions"]) == {"LDG.128", "STG.128"}
    (fixed,) = answers["a fixed parameter"]
    assert fixed["config"]["y_ptr"] == "None"
    assert fixed["instructions"] == hinted["instructions"]


def test_an_autotuners_configurations_are_rows(answers):
    configs = [(row["config"]["BLOCK"], row["config"]["num_warps"]) for row in answers["tuned"]]
    assert configs == [(256, 2), (512, 4)]
    given = answers["tuned, a block given"]
    assert [(r["config"]["BLOCK"], r["config"]["num_warps"]) for r in given] == [(128, 2), (128, 4)]
    assert all(row["instructions"]["MUFU.EX2"] for row in given)


def test_the_gate_of_a_users_kernel(answers):
    (good,), (bad,) = answers["products"], answers["too large"]
    assert good["passed"], good["reason"]
    assert good["target"] == "sm_80"
    assert good["instructions"]["HMMA"]
    assert good["config"]["DTYPE"] == "bf16"
    # row × stride in 32 bits is told, and is the user's choice
    assert good["narrow_offsets"] == 2
    assert not bad["passed"]
    assert bad["spills"] > 100
    assert bad["spills_in_loops"] > 0
    assert f"spills {bad['spills']} bytes, {bad['spills_in_loops']} instructions" in bad["reason"]
    assert "needs more than 232448 bytes of shared memory" in bad["reason"]
    assert bad["occupancy"]["programs"] == 0
    assert bad["occupancy"]["limiter"] == "shared memory"


def test_bulk_copies_are_counted(answers):
    (row,) = answers["descriptors"]
    assert row["instructions"]["UTMALDG"] == row["instructions"]["UTMASTG"] == 1


def test_gluons_kernels_are_read_too(answers):
    (row,) = answers["gluon"]
    assert row["instructions"] == {"LDG.128": 1, "STG.128": 1}
    # not known: it has no first representation to follow
    assert row["narrow_offsets"] is None


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("no such function", "inspect: mine must define scale, it does not"),
        ("no kernel", "inspect: mine:plain must be a @triton.jit kernel, got function"),
        ("no name", "inspect: kernel must be module:function, got 'mine:'"),
        ("too few types", "must have 4 types (x_ptr, y_ptr, n, factor), got 3"),
        ("unknown type", "must name y_ptr's type, one of i1, "),
        ("unknown hint", "may add :16 (divisible by 16) or :1 to a type, got :8"),
        ("no constexpr", "scale_kernel needs its constexpr BLOCK, got none; give --constexpr"),
        ("unknown constexpr", "must be a parameter of scale_kernel (x_ptr, "),
    ],
)
def test_a_users_mistake_is_told_in_one_line(answers, question, message):
    assert message in answers[question]
    assert "\n" not in answers[question]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("does not compile", "does not compile: NameError("),
        ("does not compile within", "NameError('missing is not defined'), line 2 of the function"),
        ("not a power of two", "must be a power of 2, line 2 of the function"),
    ],
)
def test_what_does_not_compile_is_a_row_that_fails(answers, question, message):
    (row,) = answers[question]
    assert message in row["reason"]
    assert "\n" not in row["reason"]
    assert (row["passed"], row["registers"], row["occupancy"]) == (False, None, None)
    assert not mix([[row]]).rows
    assert not bounds([[row]]).rows


def test_one_configuration_that_does_not_compile_costs_no_other(answers):
    bad, good = answers["one of two compiles"]
    assert [row["config"]["BLOCK"] for row in (bad, good)] == [100, 256]
    assert bad["reason"].startswith("does not compile: ")
    assert good["passed"], good["reason"]


def test_a_kernel_of_the_catalog_that_fails_is_a_row(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    script = (
        "import torch, triton.language as tl\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from gaugeblock.kernels.inspect import compiling as inspect\n"
        "from mine import broken_kernel, matrix_kernel\n"
        "with FakeTensorMode(), inspect._compiling(inspect.TARGETS['sm_90']) as kept:\n"
        "    x = torch.empty(64, 64, dtype=torch.bfloat16, device='cuda')\n"
        "    broken_kernel[(1,)](x, BLOCK=64)\n"
        "    matrix_kernel[(1,)](x, x, x, 64, 64, M=64, N=64, DTYPE=tl.bfloat16)\n"
        "broken, narrow = (inspect._read(compiled, 'sm_90', True) for *_, compiled in kept)\n"
        "assert not broken['passed'] and broken['registers'] is None\n"
        "assert broken['reason'].startswith('does not compile: NameError('), broken\n"
        "assert narrow['reason'] == 'computes 2 addresses in 32 bits', narrow\n"
    )
    ran = python("-W", "ignore", "-c", script, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
