"""The README's generated parts, the make targets, and what a run without a GPU says."""

import json
import re
import shutil
import subprocess

import jsonschema
import pytest
from gaugeblock.benchmarks import gpu, readme
from gaugeblock.benchmarks.markdown import markdown
from gaugeblock.benchmarks.plan import planned
from gaugeblock.benchmarks.record import load_record
from gaugeblock.reference._attention import visible_keys
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.rows.attention import _MASKS as MASKS

from gaugeblock import kernels
from tests.helpers import CHECKOUT, gaugeblock, python

SCHEMA = json.loads((CHECKOUT / "benchmarks" / "record.schema.json").read_text())


def test_the_pages_hold_what_the_records_say():
    for page, generated in readme.pages().items():
        text = page.read_text()
        assert readme.fill(text, generated) == text, page
    for folder, path in readme.newest_records().items():
        jsonschema.validate(load_record(path), SCHEMA)
        text = (folder / "README.md").read_text()
        images = re.findall(r"!\[(.*)\]\(<(.*)>\)", text)
        assert all((folder / image).exists() for _, image in images)
        assert text == markdown([load_record(path)], [images])


def test_the_readme_has_the_parity_of_every_kernel():
    text = (CHECKOUT / "README.md").read_text()
    record = json.loads((readme.RECORDS / "parity.json").read_text())
    kernels = {name for name, op in CATALOG.items() if op.kernel is None}
    assert {r["op"] for r in record["worst"]} == kernels
    assert record["failures"] == 0
    for name in kernels:
        assert f"| {name} |" in text


def test_the_readme_names_every_module():
    tree = (CHECKOUT / "README.md").read_text().split("## The tree")[1]
    for room in ("gaugeblock", "reference", "kernels", "gpt", "benchmarks"):
        for path in (CHECKOUT / room).rglob("*.py"):
            if path.name != "__init__.py":
                assert f" {path.name} " in tree, path


def test_a_generated_part_needs_its_place():
    with pytest.raises(ValueError, match="must hold <!-- parity -->"):
        readme.fill("no place", {"parity": "x"})
    assert (
        readme.fill("<!-- a -->\nold\n<!-- /a -->", {"a": "new\n"})
        == "<!-- a -->\nnew\n<!-- /a -->"
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test", "gpu", "readme", "oracle", "lint"])
def test_targets_of_make_run_anywhere(target):
    def commands(*options):
        ran = subprocess.run(
            ["make", "--always-make", "--dry-run", *options, target],
            cwd=CHECKOUT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return ran.stdout

    assert "pip install" in commands()
    assert "--constraint constraints.txt" in commands()
    assert "-m venv" not in commands("VENV=none")
    assert "python3 -m" in commands("VENV=none")


def test_make_gpu_says_that_there_is_no_gpu(tmp_path):
    ran = python("-m", "gaugeblock.benchmarks.gpu", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 2
    assert ran.stdout.count("\n") == 1
    assert "there must be a CUDA device" in ran.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("op", CATALOG)
def test_every_op_is_timed_somewhere(op):
    assert planned([op], "quick", "cpu")
    assert planned([op], "full", "cuda") or CATALOG[op].kernel
    for case in CATALOG[op].cases:
        if "bench" in case.tags:
            forward = CATALOG[op].flop_count(case), CATALOG[op].byte_count(case, 2)
            assert min(forward) > 0
            if not CATALOG[op].differentiable():
                continue
            backward = CATALOG[op].flop_count(case, "bwd"), CATALOG[op].byte_count(case, 2, "bwd")
            assert forward[0] <= backward[0]
            assert forward[1] <= backward[1]


def test_flops_and_bytes_of_a_known_case():
    op = CATALOG["attention"]
    case = next(c for c in op.cases if c.name == "full_1k_d128")
    assert op.flop_count(case) == 4 * 4 * 16 * 1024 * 1024 * 128
    assert op.flop_count(case, "bwd") == 2.5 * op.flop_count(case)
    assert op.byte_count(case, 2) == 4 * (4 * 16 * 1024 * 128) * 2
    causal = next(c for c in op.cases if c.name == "gpt2_causal_1k")
    assert op.flop_count(causal) == 4 * 32 * 12 * 64 * 1024 * 1025 / 2
    # the pairs are counted without a mask where that is known
    for case in op.select("full", "not lengths"):
        sizes = op.dims(case)
        visible = visible_keys(
            sizes["Tq"], sizes["Tk"], **{k: v for k, v in op.options(case).items() if k in MASKS}
        )
        pairs = op.flop_count(case) / (4 * sizes["B"] * sizes["H"] * sizes["D"])
        assert pairs == pytest.approx(visible.sum() / len(visible))


def test_the_door_lists_its_commands_and_its_version():
    said = gaugeblock("--help")
    assert said.returncode == 0
    for command in ("check", "inspect", "train", "generate", "Exit codes"):
        assert command in said.stdout
    assert gaugeblock("--version").stdout.startswith("gaugeblock 0.1.")
    unknown = gaugeblock("chek")
    assert unknown.returncode == 2
    assert "chek" in unknown.stderr


def test_a_missing_dependency_is_named():
    ran = python(
        "-c",
        "import sys; sys.modules['torch'] = None\n"
        "from gaugeblock.__main__ import main\n"
        "main(['inspect', 'layer_norm'])",
    )
    assert ran.returncode == 2
    assert "pip install 'gaugeblock[kernels]'" in ran.stderr


def test_the_smoke_parity_of_make_gpu_finds_what_is_wrong(tmp_path, monkeypatch, capsys):
    """On a CPU, with interpreted kernels."""
    path = tmp_path / "parity.json"
    assert gpu.smoke(path, "cpu", seconds=60, rounds=1) == 0
    found = json.loads(path.read_text())
    kernels_of_ours = [name for name, op in CATALOG.items() if op.kernel is None]
    assert found["compared"] > 4 * len(kernels_of_ours)
    assert found["failures"] == found["left_out"] == []
    monkeypatch.setattr(kernels, "layer_norm", lambda x, w, b, impl, **options: 1.01 * x)
    assert gpu.smoke(path, "cpu", seconds=60, rounds=1) > 0
    assert {r["op"] for r in json.loads(path.read_text())["failures"]} == {"layer_norm"}
    assert "wrong layer_norm" in capsys.readouterr().out
    assert gpu.smoke(path, "cpu", seconds=0, rounds=1) == 0
    assert len(json.loads(path.read_text())["left_out"]) == len(kernels_of_ours)
