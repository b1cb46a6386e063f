"""The walk through CONTRIBUTING.md is true: its files, added to a copy, pass every test."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import CHECKOUT


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the checkout with the guide's reference module, kernel module and row."""
    folder = tmp_path_factory.mktemp("copy") / "checkout"
    skip = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(CHECKOUT, folder, ignore=skip)
    guide = (CHECKOUT / "CONTRIBUTING.md").read_text()
    reference, kernel, row = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (folder / "reference" / "_rms_norm.py").write_text(reference)
    (folder / "kernels" / "_rms_norm.py").write_text(kernel)
    (folder / "reference" / "rows" / "rms_norm.py").write_text(row)
    return folder


def run(folder, *arguments, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder, env=env | environment, capture_output=True, text=True,
    )  # fmt: skip


def test_the_new_op_passes_every_test(copy):
    ran = run(copy, "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow", "tests",
              "--ignore=tests/test_contributing.py", "-k", "rms_norm or test_rooms")  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:]
    passed = int(re.search(r"(\d+) passed", ran.stdout)[1])
    # 5 cases × 3 dtypes × 2 layouts × 2 implementations, and the tests of every op
    assert passed > 60 + 50


def test_the_new_op_compiles_and_is_timed(copy):
    ran = run(copy, "gaugeblock", "inspect", "rms_norm")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "rms_norm_bwd_kernel" in ran.stdout
    ran = run(copy, "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "-k", "rms_norm")
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "rms_norm-cpu_bench-bwd-gaugeblock" in ran.stdout


def test_a_forgotten_part_is_noticed(copy):
    kernel = copy / "kernels" / "_rms_norm.py"
    kept = kernel.read_text()
    kernel.unlink()
    try:
        ran = run(copy, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_rooms.py")
    finally:
        kernel.write_text(kept)
    assert ran.returncode == 1
    assert "rms_norm" in ran.stdout
