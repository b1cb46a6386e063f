"""Each instruction has its line of Python, in the files saved and in the table of costs."""

import json
import re

from gaugeblock.kernels.inspect.lines import annotate, cost

from tests.helpers import gaugeblock
from tests.test_sass import sass

MINE = """
import triton
import triton.language as tl

@triton.jit
def helper(x):
    return tl.exp2(x)

@triton.jit
def scale_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = helper(tl.load(x_ptr + offs, mask=offs < n))
    tl.store(y_ptr + offs, x, mask=offs < n)
"""
FILE = sass.__code__.co_filename
LINE = sass.__code__.co_firstlineno
CODE = sass("MOV R1, R2", "MUFU.EX2 R1, R2", "FFMA R1, R2, R3, R4", "LDG.E R4, desc[UR4][R2.64]")


def from_lines(*numbers):
    """The code with a source before each instruction from the second on."""
    lines = CODE.splitlines()
    for place, number in reversed(list(enumerate(numbers, 3))):
        lines.insert(place, f'\t//## File "{FILE}", line {number}')
    return "\n".join(lines)


def test_what_each_line_costs():
    found = cost(from_lines(LINE + 1, LINE, LINE))
    place = "tests/test_sass.py"
    assert found == [
        {"source": f"{place}:{LINE}", "python": "def sass(*lines):", "instructions": 2,
         "matrix": 0, "exp": 0, "fp32": 1, "load/store": 1, "other": 0},
        {"source": f"{place}:{LINE + 1}", "instructions": 1,
         "python": '"""Code as nvdisasm prints it; a name that ends in a colon is a label."""',
         "matrix": 0, "exp": 1, "fp32": 0, "load/store": 0, "other": 0},
        {"source": None, "python": "", "instructions": 1,
         "matrix": 0, "exp": 0, "fp32": 0, "load/store": 0, "other": 1},
    ]  # fmt: skip


def test_code_is_annotated_line_by_line():
    said = annotate(from_lines(LINE, LINE, LINE)).splitlines()
    instructions = [line for line in said if "/*" in line]
    assert "//" not in instructions[0]
    for line in instructions[1:]:
        assert line.endswith(f" // tests/test_sass.py:{LINE}  def sass(*lines):")
    assert not any("//##" in line for line in said)
    assert len(said) == len(CODE.splitlines())


def test_what_the_compiler_made_is_saved(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    ran = gaugeblock(
        "inspect", "mine:scale_kernel", "--signature", "*fp32:16,*fp32:16,i32",
        "--constexpr", "BLOCK=512", "--target", "sm_90", "--target", "gfx942", "--lines",
        "--save", "out", "--json", "rows.json", cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    nvidia, amd = (tmp_path / "out" / f"scale_kernel-{name}" for name in ("sm_90", "gfx942"))
    both = {"kernel.ttir", "kernel.ttgir", "row.json"}
    assert {p.name for p in nvidia.iterdir()} == {*both, "kernel.ptx", "kernel.sass", "lines.md"}
    assert {p.name for p in amd.iterdir()} == {*both, "kernel.amdgcn"}
    code = (nvidia / "kernel.sass").read_text()
    # the exponential comes from the helper's line, which was inlined
    (line,) = {line.split("//")[1].strip() for line in code.splitlines() if "MUFU.EX2" in line}
    assert line == "mine.py:7  return tl.exp2(x)"
    instructions = [line for line in code.splitlines() if re.search(r"/\*\w{4}\*/", line)]
    known = [line for line in instructions if re.search(r"// mine\.py:\d+  \S", line)]
    # ptxas pads the code behind its end
    assert len(known) >= 0.8 * len(instructions)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows[1]["lines"] is None
    assert sum(line["instructions"] for line in rows[0]["lines"]) == len(instructions)
    (helper,) = (line for line in rows[0]["lines"] if line["source"] == "mine.py:7")
    assert helper["exp"] == rows[0]["instructions"]["MUFU.EX2"] == 4
    assert "return tl.exp2(x)" in ran.stdout
    assert "| mine.py:7 |" in (nvidia / "lines.md").read_text()
    assert json.loads((amd / "row.json").read_text())["target"] == "gfx942"
