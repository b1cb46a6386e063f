"""Rooms import only the rooms they may, and every op is where its name says."""

import ast
import importlib
import itertools
import sys

import pytest
from gaugeblock.reference.catalog import CATALOG

from tests.helpers import CHECKOUT

ROOMS = ("gaugeblock", "reference", "kernels", "gpt", "benchmarks", "tests")
# what a room's modules may import beside the standard library and itself
ALLOWED = {
    "gaugeblock": {"typer", "gaugeblock"},
    "reference": {"numpy", "scipy", "ml_dtypes", "safetensors"},
    "kernels": {"torch", "triton"},
    "gpt": {"torch", "numpy", "safetensors", "tokenizers", "matplotlib", "gaugeblock.kernels"},
    "benchmarks": {
        "torch", "triton", "numpy", "rich", "pytest", "pytest_benchmark", "matplotlib",
        "gaugeblock.reference", "gaugeblock.kernels", "gaugeblock.gpt", "gaugeblock.benchmarks",
    },
}  # fmt: skip
EXCEPTIONS = {
    # Student's t
    "benchmarks/significance.py": {"scipy"},
    # whose path it turns to a worktree
    "benchmarks/side.py": {"gaugeblock"},
    "benchmarks/telemetry.py": {"pynvml"},
    "kernels/inspect.py": {"gaugeblock.reference.catalog"},
    "reference/oracle/adapters.py": {"torch", "jax", "cupy"},
    "reference/pytest_plugin.py": {"pytest"},
    "reference/report.py": {"rich"},
}
CLI = {"typer", "rich", "gaugeblock.reference.catalog"}
STANDARD = set(sys.stdlib_module_names)


def imports(path):
    """The absolute modules a file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # the packages a relative import climbs out of; within its room it is free
            depth = len(path.relative_to(CHECKOUT).parts) - 1
            if node.level > depth:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                yield from (f"gaugeblock.{name}" for name in names)
            if node.level:
                continue
            if node.module == "gaugeblock":
                yield from (f"gaugeblock.{alias.name}" for alias in node.names)
            else:
                yield node.module


def sources():
    return [path for room in ALLOWED for path in sorted((CHECKOUT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(CHECKOUT)))
def test_a_room_imports_only_what_it_may(path):
    name = path.relative_to(CHECKOUT).as_posix()
    room = name.split("/")[0]
    allowed = ALLOWED[room] | EXCEPTIONS.get(name, set()) | STANDARD
    if path.name == "cli.py":
        allowed |= CLI
    for module in imports(path):
        parts = module.split(".")
        prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)} - {"gaugeblock"}
        if room == "gaugeblock":
            prefixes.add(parts[0])
        assert prefixes & allowed or module in allowed, f"{name} imports {module}"


def test_no_file_imports_a_bare_room():
    for path in [*sources(), *(CHECKOUT / "tests").glob("*.py")]:
        bare = {module.split(".")[0] for module in imports(path)} & {
            "reference", "kernels", "gpt", "benchmarks",
        }  # fmt: skip
        assert not bare, f"{path} imports {bare}"


@pytest.mark.parametrize("package", ["gaugeblock.reference", "gaugeblock.kernels"])
def test_a_module_never_shadows_its_function(package):
    module = importlib.import_module(package)
    names = [n for n in CATALOG if hasattr(module, n)]
    assert names
    for first, second in itertools.permutations(names, 2):
        assert callable(getattr(module, first))
        assert callable(getattr(module, second))
        assert getattr(module, first) is getattr(module, first)


def test_every_row_has_its_reference_its_kernel_and_its_twin():
    reference = importlib.import_module("gaugeblock.reference")
    kernels = importlib.import_module("gaugeblock.kernels")
    for name, op in CATALOG.items():
        assert hasattr(reference, name)
        if op.differentiable():
            assert hasattr(reference, f"{name}_backward")
            assert op.backward is not None
        assert op.flops is not None
        assert op.errors
        assert any(not case.tags & {"degenerate", "aot", "bench"} for case in op.cases)
        assert any("cpu" in case.tags for case in op.cases)
        if op.kernel is None:
            assert hasattr(kernels, name)
            assert hasattr(kernels.eager, name)
            assert any("aot" in case.tags for case in op.cases)
        else:
            assert not hasattr(kernels, name), f"{name} says it has no kernel, and has one"


def test_every_module_is_in_the_catalog():
    kernels = importlib.import_module("gaugeblock.kernels")
    reference = importlib.import_module("gaugeblock.reference")
    assert set(kernels.OPS) == {name for name, op in CATALOG.items() if op.kernel is None}
    assert set(reference._OPS) == set(CATALOG)


def test_a_relative_import_of_another_room_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_rooms.CHECKOUT", tmp_path)
    for name, source in (
        ("kernels/_op.py", "from ._launch import x\nfrom ..gpt import model\nfrom .. import gpt"),
        ("reference/oracle/op.py", "from .._rounding import x\nfrom ...kernels import eager"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(source)
    assert list(imports(tmp_path / "kernels/_op.py")) == ["gaugeblock.gpt"] * 2
    assert list(imports(tmp_path / "reference/oracle/op.py")) == ["gaugeblock.kernels"]
