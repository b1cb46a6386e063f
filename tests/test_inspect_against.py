"""The same launches at a git revision stand beside those of now."""

import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from gaugeblock.kernels import user_kernel
from gaugeblock.kernels.inspect import against
from gaugeblock.kernels.inspect.against import differences, rows_at

from tests.helpers import CHECKOUT, gaugeblock

SCALE = """
import triton
import triton.language as tl

@triton.jit
def scale_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, {what}, mask=offs < n)
"""
MINE = ("mine.norm:scale_kernel", "--signature", "*fp32:16,*fp32:16,i32:16",
        "--constexpr", "BLOCK=1024")  # fmt: skip


def git(folder, *arguments):
    name = ("-c", "user.name=A", "-c", "user.email=a@example.com")
    subprocess.run(["git", "-C", folder, *name, *arguments], check=True, capture_output=True)


def committed(folder):
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")


@pytest.fixture
def repository(tmp_path):
    """A user's repository: one kernel below src/, committed and then changed."""
    folder = tmp_path / "repository"
    (folder / "src" / "mine").mkdir(parents=True)
    source = folder / "src" / "mine" / "norm.py"
    source.write_text(SCALE.format(what="x * 2"))
    committed(folder)
    source.write_text(SCALE.format(what="tl.exp2(x)"))
    return folder


def test_a_users_kernel_at_a_commit_and_now(repository):
    where = {"PYTHONPATH": f"{repository / 'src'}:{CHECKOUT}", "cwd": repository}
    ran = gaugeblock("inspect", *MINE, "--against", "HEAD", "--json", "rows.json",
                     "--markdown", "page.md", **where)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads((repository / "rows.json").read_text())
    (before,), (now,), (difference,) = found["before"], found["rows"], found["differences"]
    assert (before["kernel"], now["kernel"]) == ("scale_kernel", "scale_kernel")
    assert before["source"] == now["source"] == "mine/norm.py:5"
    assert "MUFU.EX2" not in before["instructions"]
    assert now["instructions"]["MUFU.EX2"] == 8
    assert difference["change"] == "changed"
    assert difference["instructions"]["MUFU.EX2"] == [0, 8]
    assert difference["figures"]["registers"] == [before["registers"], now["registers"]]
    assert len(found["commit"]) == 40
    assert "MUFU.EX2 0 → 8 (+8)" in ran.stdout
    assert "MUFU.EX2 0 → 8 (+8)" in (repository / "page.md").read_text()
    trees = subprocess.run(
        ["git", "-C", repository, "worktree", "list"], capture_output=True, text=True
    ).stdout
    assert len(trees.splitlines()) == 1


def test_a_kernel_that_the_commit_lacks_is_new(repository):
    source = repository / "src" / "mine" / "norm.py"
    source.with_name("gate.py").write_text(source.read_text())
    source.write_text(source.read_text().replace("scale_kernel", "other_kernel"))
    where = {"PYTHONPATH": f"{repository / 'src'}:{CHECKOUT}", "cwd": repository}
    for name in ("mine.gate:scale_kernel", "mine.norm:other_kernel"):
        ran = gaugeblock("inspect", name, *MINE[1:], "--against", "HEAD", "--json", "rows.json",
                         **where)  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        found = json.loads((repository / "rows.json").read_text())
        assert found["before"] == []
        assert [each["change"] for each in found["differences"]] == ["new"]


def test_what_is_no_commit_is_refused(repository, monkeypatch):
    monkeypatch.chdir(repository)
    asked = {"targets": ["sm_90"], "kernel": MINE[0], "signature": MINE[2], "constexprs": {},
             "num_warps": None, "num_stages": None}  # fmt: skip
    with pytest.raises(ValueError, match=r"--against must name a commit of .*, got 'nowhere'"):
        rows_at("nowhere", asked)
    shutil.rmtree(".git")
    with pytest.raises(
        ValueError, match=r"--against must be asked for in a repository: .*not a git repo"
    ):
        rows_at("HEAD", asked)


def test_a_kernel_outside_of_the_repository_has_no_commit(tmp_path, monkeypatch):
    # where these tests run Triton interprets, and has no kernels to load
    code = compile("0", str(tmp_path / "elsewhere.py"), "eval")
    kernel = SimpleNamespace(fn=SimpleNamespace(__code__=code))
    monkeypatch.setattr(user_kernel, "load", lambda name: (kernel, []))
    asked = {"root": str(tmp_path / "checkout"), "kernel": "elsewhere:scale_kernel"}
    with pytest.raises(ValueError, match="must lie in the repository of the working folder, it is"):
        against._compile(asked)


def test_the_catalogs_kernels_at_a_commit_and_now(tmp_path):
    """In a copy of the checkout, one kernel of which is changed after the commit."""
    for room in ("gaugeblock", "kernels", "reference"):
        shutil.copytree(CHECKOUT / room, tmp_path / room,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    # a commit that had the kernels and none of the tools
    for file in (tmp_path / "kernels").glob("[!_]*.py"):
        if file.name != "eager.py":
            file.unlink()
    committed(tmp_path)
    shutil.copytree(CHECKOUT / "kernels", tmp_path / "kernels", dirs_exist_ok=True)
    # what reads the artefacts is of today, on both sides
    occupancy = tmp_path / "kernels" / "occupancy.py"
    occupancy.write_text(occupancy.read_text().replace("warps: int = 64", "warps: int = 128"))
    kernel = tmp_path / "kernels" / "_dropout.py"
    source = kernel.read_text()
    assert "x, 0.0) * scale" in source
    kernel.write_text(source.replace("x, 0.0) * scale", "x, 0.0) * tl.exp2(scale)"))
    ran = gaugeblock("inspect", "dropout", "--against", "HEAD", "--json", "rows.json",
                     cwd=tmp_path, PYTHONPATH=str(tmp_path))  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found["before"]) == len(found["rows"]) > 0
    assert {each["change"] for each in found["differences"]} == {"changed"}
    for each in found["differences"]:
        assert each["instructions"]["MUFU.EX2"] == [0, 1]
    for row in found["before"] + found["rows"]:
        held = row["occupancy"]
        assert held["share"] == held["warps"] / 128


def row(**changes):
    held = {"programs": 4, "warps": 16, "share": 0.25, "limiter": "registers"}
    figures = {
        "op": "ffn", "case": "small", "dtype": "bfloat16", "kernel": "_ffn_kernel",
        "config": {"BLOCK_M": 64, "num_warps": 4}, "target": "sm_90", "registers": 100,
        "spills": 0, "shared_bytes": 4096, "occupancy": held, "bounds": None,
        "instructions": {"HGMMA": 4}, "reason": "",
    }  # fmt: skip
    return figures | changes


def test_launches_that_are_new_or_gone_are_named():
    # the second launch of a kernel is compared with the second
    before = [row(), row(registers=64), row(case="old")]
    now = [row(), row(registers=72, instructions={"HGMMA": 4, "MUFU.EX2": 2}), row(case="new")]
    found = differences(now, before)
    assert [(each["case"], each["change"]) for each in found] == [
        ("small", "same"), ("small", "changed"), ("new", "new"), ("old", "gone"),
    ]  # fmt: skip
    assert found[1]["figures"]["registers"] == [64, 72]
    assert found[1]["instructions"] == {"HGMMA": [4, 4], "MUFU.EX2": [0, 2]}
    assert found[2]["figures"]["registers"] == [None, 100]
    assert found[3]["figures"]["registers"] == [100, None]
    assert found[3]["instructions"] == {"HGMMA": [4, None]}
