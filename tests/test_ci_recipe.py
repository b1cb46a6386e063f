"""The recipes of `examples/ci` parse, their commands are commands, and the CPU job runs."""

import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import groupby

import pytest
import typer
import yaml
from gaugeblock.kernels.inspect import gate_file

from gaugeblock.__main__ import door
from tests.helpers import CHECKOUT

FOLDER = CHECKOUT / "examples" / "ci"
RECIPES = sorted(FOLDER.glob("*.yml"))
PAGES = [CHECKOUT / "docs" / name for name in ("ci.md", "compare.md", "benchmarks.md")]
# what a user of Liger-Kernel would write at the top
EXAMPLE = {
    "OP": "examples.liger_rms_norm:RMS_NORM",
    "CANDIDATE": "examples.liger_rms_norm:candidate",
    "KERNELS": "kernels.toml",
}


KERNELS = """[[kernel]]
kernel = "liger_kernel.ops.rms_norm:_rms_norm_forward_kernel"
signature = "*bf16:16,i32:16,*bf16:16,i32:16,*bf16:16,i32:16,*fp32:16,i32:16,i32:16,fp32,fp32"
constexprs = { BLOCK_SIZE = 1024, casting_mode = 0, elementwise_affine = true }
targets = ["sm_80", "sm_90"]
"""


def jobs(recipe):
    """{job: its scripts}, of GitHub's form or GitLab's."""
    found = yaml.safe_load(recipe.read_text())
    if "jobs" in found:
        return {
            name: [step["run"] for step in job["steps"] if "run" in step]
            for name, job in found["jobs"].items()
        }
    return {
        name: [*job.get("before_script", ()), *job["script"]]
        for name, job in found.items()
        if isinstance(job, dict) and "script" in job
    }


def variables(recipe):
    found = yaml.safe_load(recipe.read_text())
    return found.get("env") or found["variables"]


def commands(text):
    """The arguments of each `gaugeblock …` in a shell script."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for is_mark, words in groupby(lexer, lambda word: set(word) <= set("();<>|&")):
            words = list(words)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if not is_mark and words[:1] == ["gaugeblock"]:
                yield words[1:]


def expect_command(arguments):
    """Raises where the real door would not take the arguments."""
    group = typer.main.get_command(door())
    context = group.make_context("gaugeblock", list(arguments), resilient_parsing=True)
    command = group.get_command(context, arguments[0])
    if command is None:
        raise ValueError(f"gaugeblock has no command {arguments[0]}")
    name, rest = arguments[0], list(arguments[1:])
    command.make_context(name, rest, parent=context)


def scripts():
    for recipe in RECIPES:
        for name, found in jobs(recipe).items():
            yield pytest.param("\n".join(found), variables(recipe), id=f"{recipe.stem}-{name}")


@pytest.mark.parametrize(("text", "known"), list(scripts()))
def test_the_commands_of_a_job_are_commands(text, known):
    # numbers are parsed: a variable that holds one must stand for it
    for name, value in known.items():
        value = re.sub(r"\$\{\{.*?\}\}", "expression", str(value))
        text = re.sub(rf"\${name}\b", lambda m, v=value: v, text)
    found = list(commands(text))
    assert found
    for arguments in found:
        expect_command(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_commands(page):
    text = page.read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`(gaugeblock [^`…]+)`", text)
    for block in [*blocks, *inline]:
        for arguments in commands(block):
            expect_command(arguments)


@pytest.mark.parametrize(
    "wrong", ["compare --gat x", "nonsense", "compare --gate x --budget-s long"]
)
def test_what_is_no_command_is_found(wrong):
    with pytest.raises(Exception, match=r"(?i)no such|valid|no command"):
        expect_command(wrong.split())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_uses_what_it_asks_for(recipe):
    text = recipe.read_text()
    body = "\n".join("\n".join(found) for found in jobs(recipe).values())
    for name in variables(recipe):
        assert f"${name}" in body, name
    # Gaugeblock has no name in a registry
    assert re.search(r"GAUGEBLOCK: git\+https://", text)
    for line in body.splitlines():
        if "pip install" in line:
            assert "@ $GAUGEBLOCK" in line
    assert yaml.safe_load(text).get("stages") or True in yaml.safe_load(text)


def test_both_cpu_jobs_ask_the_same():
    def asked(name):
        text = "\n".join(jobs(FOLDER / name)["right"])
        return [c for c in commands(text) if c[0] in ("check", "inspect")]

    assert asked("github.yml") == asked("gitlab.yml")


def run(script, folder, **environment):
    """A step as a runner runs it, in the checkout as the user's repository."""
    (folder / "gaugeblock").write_text(f'#!/bin/sh\nexec {sys.executable} -m gaugeblock "$@"\n')
    (folder / "gaugeblock").chmod(0o755)
    known = os.environ | EXAMPLE | environment
    # as the tests themselves set it
    if "TRITON_INTERPRET" not in environment:
        known.pop("TRITON_INTERPRET", None)
    known |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(CHECKOUT)}
    known |= {"GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    for name in ("oracle.xml", "repro", "compiled.json"):
        script = script.replace(f" {name}", f" {folder / name}")
    return subprocess.run(
        ["bash", "-e", "-c", script], cwd=CHECKOUT, env=known, capture_output=True, text=True
    )


def test_the_cpu_job_runs_on_somebody_s_package(tmp_path):
    pytest.importorskip("liger_kernel")
    steps = yaml.safe_load((FOLDER / "github.yml").read_text())["jobs"]["right"]["steps"]
    check, inspect = (
        next(s for s in steps if f"gaugeblock {name}" in s.get("run", ""))
        for name in ("check", "inspect")
    )
    ran = run(check["run"], tmp_path, **check["env"])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    suites = ElementTree.parse(tmp_path / "oracle.xml").getroot()
    assert len(list(suites.iter("testcase"))) > 5
    assert "rms_norm" in (tmp_path / "summary.md").read_text()
    hasty = check["run"].replace("--timeout", "--no-shrink --no-backward --timeout")
    wrong = run(hasty, tmp_path, **check["env"], CANDIDATE="operator:add")
    assert wrong.returncode == 1, wrong.stderr
    kernels = tmp_path / "kernels.toml"
    for stages, code in ((3, 0), ("", 2)):
        kernels.write_text(KERNELS + (f"num_stages = {stages}\n" if stages else "stages = 3\n"))
        ran = run(inspect["run"], tmp_path, KERNELS=str(kernels))
        assert ran.returncode == code, ran.stdout + ran.stderr
    rows = json.loads((tmp_path / "compiled.json").read_text())
    assert [(row["target"], row["over"]) for row in rows] == [("sm_80", []), ("sm_90", [])]


@pytest.mark.parametrize("recipe", ["github.yml", "gitlab.yml"])
@pytest.mark.parametrize(
    ("first", "second", "code"), [(0, 9, 0), (1, 9, 1), (2, 0, 0), (2, 2, 2), (2, 1, 1)]
)
def test_a_gate_that_cannot_tell_is_asked_once_more(tmp_path, recipe, first, second, code):
    script = next(s for s in jobs(FOLDER / recipe)["fast"] if "compare --gate" in s)
    asked = tmp_path / "asked"
    fake = (
        f"gaugeblock() {{ echo x >> {asked}; "
        f"[ $(wc -l < {asked}) = 1 ] && return {first}; return {second}; }}\n"
    )
    ran = subprocess.run(["bash", "-e", "-c", fake + script], capture_output=True, text=True)
    assert ran.returncode == code
    assert len(asked.read_text().split()) == (2 if first == 2 else 1)
    if recipe == "github.yml":
        assert ("::error::" in ran.stdout) == (code != 0)


@pytest.mark.parametrize(
    ("base", "asked"), [("HEAD~2", "HEAD~2"), ("0" * 40, "HEAD~1"), ("", "HEAD~1")]
)
def test_a_base_that_is_not_there_is_the_commit_before(tmp_path, base, asked):
    script = next(s for s in jobs(FOLDER / "github.yml")["fast"] if "compare --gate" in s)
    me = ("git", "-c", "user.name=n", "-c", "user.email=e@localhost")
    subprocess.run([*me, "init", "--quiet"], cwd=tmp_path, check=True)
    for _ in range(3):
        subprocess.run([*me, "commit", "-qm", "x", "--allow-empty"], cwd=tmp_path, check=True)
    fake = 'gaugeblock() { echo "$3"; }\n'
    ran = subprocess.run(
        ["bash", "-e", "-c", fake + script], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"BASE": base},
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.strip()) == (0, asked)


def test_the_gate_file_of_the_recipes_is_one():
    (entry,) = gate_file.read(FOLDER / "kernels.toml")
    assert entry.targets == ["sm_80", "sm_90"]
