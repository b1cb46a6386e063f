"""What a check leaves behind: reports, hints, smallest shapes, repros, golden vectors."""

import hashlib
import json
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from gaugeblock.kernels import eager
from gaugeblock.reference.catalog import CATALOG, find
from gaugeblock.reference.oracle import Case, Op, check
from gaugeblock.reference.oracle.covering import covering
from gaugeblock.reference.oracle.explain import explain, tile_of
from gaugeblock.reference.oracle.golden import write_golden
from gaugeblock.reference.oracle.repro import write_repro
from gaugeblock.reference.oracle.result import describe
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from tests.helpers import CHECKOUT, gaugeblock, python

LAYOUT = ("contiguous",)

CANDIDATES = """
import os, time, torch
from gaugeblock.kernels import eager
from gaugeblock.reference.oracle import Case, Op

def good(x, w, b, eps=1e-5):
    return eager.layer_norm(x, w, b, eps)

def last_row(x, w, b, eps=1e-5):
    y = eager.layer_norm(x, w, b, eps)
    return torch.cat([y[:-1], 1.25 * y[-1:]])

def hangs(x, w, b, eps=1e-5):
    while len(x) == 67:
        time.sleep(0.1)
    return eager.layer_norm(x, w, b, eps)

def leaves(x, w, b, eps=1e-5):
    if len(x) == 67:
        os._exit(7)
    return eager.layer_norm(x, w, b, eps)

def bad_gradient(dy, x):
    return 3 * dy

def double(x):
    return 2 * x

DOUBLE = Op("double", lambda x: 2 * x, {"x": "M N"}, [Case("odd", M=3, N=5)])
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(CANDIDATES)
    return tmp_path


def wrong_heads(q, k, v, **options):
    o = eager.attention(q, k, v, **options)
    o[:, 1] *= 1.0102
    return o


@pytest.fixture(scope="module")
def report():
    return check(
        "attention", wrong_heads, backward=False, layouts=LAYOUT,
        expression="full or causal and longer_cache", memory=False,
    )  # fmt: skip


def test_a_failure_is_explained(report):
    failure = report.failures[0]
    assert failure.kind == "row"
    assert "constant factor 1.0102" in failure.hint
    assert "only H 1" in failure.hint
    assert failure.first[1] == 1
    assert failure.ratio > 1
    assert failure.ulps > 100
    assert failure.error == pytest.approx(abs(failure.got - failure.want))


def test_the_report_in_three_forms(report, tmp_path):
    for name in ("r.json", "r.xml", "sub/r.md"):
        report.save(tmp_path / name)
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["passed"] is False
    assert len(document["results"]) == len(report.results)
    assert document["results"][0]["ratio"] == report.results[0].ratio
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert suite.get("failures") == str(len(report.failures)) == "2"
    assert suite.get("tests") == str(len(report.cases()) + len(report.not_checked))
    failure = suite.find("testcase/failure")
    assert failure.get("type") == "row"
    assert failure.text == describe(report.failures[0])
    text = (tmp_path / "sub/r.md").read_text()
    assert "❌ wrong: attention" in text
    assert "| full | float32 | contiguous | o | row |" in text
    with pytest.raises(ValueError, match="path must end in"):
        report.save(tmp_path / "r.txt")


def test_a_right_report_says_so(tmp_path):
    right = check("layer_norm", eager.layer_norm, expression="odd_row", layouts=LAYOUT)
    assert "✅ right" in right.markdown()
    assert 'failures="0"' in right.junit()


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda y: 0 * y, "all zero"),
        (lambda y: -y, "the sign is wrong"),
        (lambda y: y + 0.5, "constant offset 0.5"),
        (lambda y: np.where(np.arange(64)[:, None] % 16 == 15, 3 * y, y),
         "only the last T of each tile of 16"),
        (lambda y: np.where(np.arange(64)[:, None] % 32 == 0, 3 * y, y),
         "only the first T of each tile of 32"),
        (lambda y: np.where(np.arange(64)[:, None] == 63, 3 * y, y), "only T 63 (the last)"),
        (lambda y: np.where(np.arange(64)[:, None] >= 40, 3 * y, y), "only T from 40 on"),
        (lambda y: np.where(np.arange(10) == 4, 3 * y, y), "only D 4"),
        (lambda y: y * np.nan, "all NaN"),
    ],
)  # fmt: skip
def test_patterns_of_an_error_have_a_name(change, hint):
    want = np.random.default_rng(0).standard_normal((2, 64, 10)) + 3
    got = change(want)
    bad = ~(np.abs(got - want) < 1e-9)
    assert hint in explain(got, want, bad, ["H", "T", "D"])


def test_the_tile_of_an_error():
    bad = np.zeros((2, 96, 10), bool)
    bad[:, 32:64] = True
    assert tile_of(bad) == 32
    bad[:, 33] = False
    assert tile_of(bad) is None


def test_failures_shrink_to_the_smallest_shape():
    def wrong_past_20(x, w, b, eps=1e-5):
        y = eager.layer_norm(x, w, b, eps)
        return y if x.shape[-1] <= 20 else 1.5 * y

    settings = {"backward": False, "layouts": LAYOUT, "expression": "odd_row", "shrink": True}
    (failure,) = check("layer_norm", wrong_past_20, **settings).failures
    assert failure.smallest == {"M": 1, "N": 21}


def test_a_repro_runs_by_itself(folder):
    ran = gaugeblock(
        "check", "layer_norm", "mine:last_row", "-k", "odd_row or offset_64", "--repro", "r",
        "--json", "out.json", cwd=folder,
    )  # fmt: skip
    assert ran.returncode == 1
    saved = json.loads((folder / "out.json").read_text())
    written = [r["repro"] for r in saved["results"] if r["repro"]]
    assert len(written) == 2
    for path in written:
        shown = python(path, cwd=folder)
        assert shown.returncode == 1, shown.stderr
        assert "must be" in shown.stdout
        (folder / path).write_text((folder / path).read_text().replace("last_row", "good"))
        assert python(path, cwd=folder).returncode == 0


@pytest.mark.parametrize("output", ["y", "dx"])
def test_a_numpy_repro_runs_by_itself(folder, output):
    op = Op("triple", lambda x: 3 * x, {"x": "M N"}, [Case("odd", M=3, N=5)])
    results = check(op, lambda x: 2 * x, framework="numpy", layouts=LAYOUT,
                    backward=lambda dy, x: 2 * dy).failures  # fmt: skip
    (result,) = [r for r in results if r.output == output]
    path = write_repro(folder / "r", op, result, "mine:double", framework="numpy",
                       backward="mine:double_gradient")  # fmt: skip
    with (folder / "mine.py").open("a") as file:
        file.write("\n\ndef double_gradient(dy, x):\n    return 2 * dy\n")
    shown = python(path, cwd=folder)
    assert shown.returncode == 1, shown.stderr
    assert f"{output}[" in shown.stdout


def test_a_hang_and_an_exit_are_failures_of_their_case(folder):
    for name, kind, hint in (("hangs", "timeout", "within 3 s"), ("leaves", "exit", "code 7")):
        ran = gaugeblock(
            "check", "layer_norm", f"mine:{name}", "-k", "many_rows or odd_row", "--timeout", 3,
            "--json", "out.json", "--no-shrink", cwd=folder,
        )  # fmt: skip
        assert ran.returncode == 1, ran.stderr
        results = json.loads((folder / "out.json").read_text())["results"]
        wrong = [r for r in results if not r["passed"]]
        assert {(r["case"], r["kind"]) for r in wrong} == {("many_rows", kind)}
        assert hint in wrong[0]["hint"]
        assert {r["case"] for r in results} == {"odd_row", "many_rows"}


def test_an_op_from_outside_on_the_command_line(folder):
    assert gaugeblock("check", "mine:DOUBLE", "mine:double", cwd=folder).returncode == 0
    ran = gaugeblock(
        "check", "mine:DOUBLE", "mine:double", "--gradient", "mine:bad_gradient", cwd=folder
    )
    assert ran.returncode == 1
    assert "dx" in ran.stdout
    ran = gaugeblock("check", "mine:good", "mine:double", cwd=folder)
    assert ran.returncode == 2
    assert "must be" in ran.stderr


def test_the_summary_goes_where_github_wants_it(folder):
    summary = folder / "summary.md"
    summary.write_text("before\n")
    ran = gaugeblock(
        "check", "layer_norm", "mine:good", "-k", "odd_row", "--junit", "j.xml", "--markdown",
        "m.md", cwd=folder, GITHUB_STEP_SUMMARY=str(summary),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert summary.read_text() == "before\n" + (folder / "m.md").read_text()
    assert ElementTree.parse(folder / "j.xml").getroot().get("failures") == "0"
    wrong_ending = gaugeblock("check", "layer_norm", "mine:good", "--junit", "j.json", cwd=folder)
    assert wrong_ending.returncode == 2


PLUGIN_TEST = """
import torch
from gaugeblock.kernels import eager

def test_good(oracle):
    report = oracle.check("layer_norm", eager.layer_norm, expression="odd_row")
    assert report.passed

def test_bad(oracle):
    def bad(x, w, b, eps=1e-5):
        return eager.layer_norm(x, w, b, eps) * (1.5 if len(x) == 5 else 1)
    oracle.check("layer_norm", bad, expression="odd_row or one_row", layouts=("contiguous",))
"""


@pytest.mark.parametrize("how", [(), ("-p", "gaugeblock.reference.pytest_plugin")])
def test_the_pytest_plugin_gives_one_result_a_case(tmp_path, how):
    (tmp_path / "test_mine.py").write_text(PLUGIN_TEST)
    installed = () if how else ("-p", "gaugeblock.reference.pytest_plugin")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *how, *installed],
        cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "", "PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "odd_row-float32-contiguous" in ran.stdout
    failed = [line for line in ran.stdout.splitlines() if line.startswith("SUBFAILED")]
    assert len(failed) == 1, ran.stdout


def test_golden_vectors_hold_what_the_manifest_says(tmp_path):
    manifest = write_golden(
        tmp_path, [CATALOG["layer_norm"], CATALOG["sample"]], ("bfloat16",),
        expression="odd_row or odd",
    )  # fmt: skip
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert [e["op"] for e in manifest["entries"]] == ["layer_norm", "sample"]
    for entry in manifest["entries"]:
        path = tmp_path / entry["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    held = load_file(tmp_path / manifest["entries"][0]["file"])
    x, w, b = (held[f"input.{n}"].astype(np.float64) for n in "xwb")
    centred = x - x.mean(-1, keepdims=True)
    y = w * centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-5) + b
    np.testing.assert_allclose(held["output.y"], y, rtol=1e-12)
    np.testing.assert_allclose(held["grad.b"], held["grad_output.y"].sum(0), rtol=1e-12)
    assert (held["budget.y"] > 0).all()
    assert held["budget.y"].max() < 0.1


def test_golden_vectors_from_the_command_line(tmp_path):
    dtypes = ("--dtype", "float16", "--dtype", "e4m3")
    ran = gaugeblock("golden", "out", "embedding", "-k", "odd", *dtypes, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "2 files" in ran.stdout
    # in eight bits there are inputs, outputs and no gradients
    held = load_torch(tmp_path / "out" / "embedding-odd-e4m3.safetensors")
    assert held["input.wte"].dtype == torch.float8_e4m3fn
    rows = held["input.wte"].double()[held["input.tokens"]]
    assert torch.equal(held["output.y"], rows + held["input.wpe"].double()[: rows.shape[-2]])
    assert not [name for name in held if name.startswith("grad")]
    assert gaugeblock("golden", "out", "norm", cwd=tmp_path).returncode == 2


def test_packages_bring_ops_of_their_own(tmp_path):
    (tmp_path / "theirs.py").write_text(CANDIDATES)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gaugeblock.ops]\nmore = theirs:DOUBLE\n")
    path = f"{tmp_path}:{CHECKOUT}"
    ran = gaugeblock("check", "double", "theirs:double", cwd=tmp_path, PYTHONPATH=path)
    assert ran.returncode == 0, ran.stderr
    with pytest.raises(ValueError, match="op must be one of"):
        find("double")


def test_a_covering_array_holds_every_legal_pair():
    axes = {"a": [0, 1, 2], "b": list("xyz"), "c": [False, True], "d": [0, 1, 2, 3]}

    def legal(c):
        return not (c["a"] == 2 and c["b"] == "z")

    cases = covering(axes, legal)
    assert all(map(legal, cases))
    pairs = {(x, y) for c in cases for x in c.items() for y in c.items() if x[0] < y[0]}
    everything = {
        ((a, i), (b, j)) for a in axes for b in axes if a < b for i in axes[a] for j in axes[b]
    }
    assert everything - pairs == {(("a", 2), ("b", "z"))}
    assert len(cases) < 20
    assert covering(axes, legal) == cases
