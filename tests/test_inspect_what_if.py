"""What another launch would hold: compiled anew, or reckoned."""

import json
from types import SimpleNamespace

import pytest
from gaugeblock.kernels.inspect.what_if import add, fewer_stages, more_warps, room
from gaugeblock.kernels.occupancy import occupancy

from tests.helpers import gaugeblock

MINE = """
import triton
import triton.language as tl

@triton.jit
def matrix_kernel(a_ptr, b_ptr, c_ptr, stride, K, M: tl.constexpr, N: tl.constexpr):
    rows, cols, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 64)
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, K, 64):
        a = tl.load(a_ptr + rows[:, None] * stride + k + inner[None, :])
        b = tl.load(b_ptr + (k + inner)[:, None] * N + cols[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], acc.to(tl.bfloat16))
"""


def test_what_is_changed():
    assert more_warps({}) == {"num_warps": 8}
    assert more_warps({"num_warps": 16, "num_stages": 2}) == {"num_warps": 32, "num_stages": 2}
    assert more_warps({"num_warps": 32}) == {"num_warps": 32}
    assert fewer_stages({}) == {"num_stages": 2}
    assert fewer_stages({"num_stages": 1}) == {"num_stages": 1}


def row(registers, shared_bytes):
    held = occupancy("sm_90", registers, shared_bytes, 128)
    return {"registers": registers, "shared_bytes": shared_bytes, "threads": 128,
            "target": "sm_90", "occupancy": held}  # fmt: skip


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "key", "most"),
    [
        # 168 registers are 3 programs of 4 warps, 128 are 4; in steps of 8
        (168, 0, "registers", 128),
        # 4 programs share 228 KB: 57 KB each, one of which is the system's
        (32, 60_000, "shared_bytes", 56 * 1024),
        # neither alone, where both are used up; nothing where the warps are
        (168, 70_000, "registers", None),
        (168, 70_000, "shared_bytes", None),
        (32, 0, "registers", None),
    ],
)
def test_what_makes_room_for_one_more_program(registers, shared_bytes, key, most):
    asked = row(registers, shared_bytes)
    found, held = room(asked, key)
    assert found == most
    if most is not None:
        assert held["programs"] == asked["occupancy"]["programs"] + 1
        # one more, and there is no room
        more = row(**{"registers": registers, "shared_bytes": shared_bytes} | {key: most + 1})
        assert more["occupancy"]["programs"] == asked["occupancy"]["programs"]


def test_a_kernel_is_compiled_with_other_options(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    ran = gaugeblock(
        "inspect", "mine:matrix_kernel", "--signature", "*bf16:16,*bf16:16,*bf16:16,i32:16,i32:16",
        "--constexpr", "M=128", "--constexpr", "N=128", "--target", "sm_90", "--target", "gfx942",
        "--what-if", "--json", "rows.json", cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    nvidia, amd = json.loads((tmp_path / "rows.json").read_text())
    assert amd["what_if"] is None
    warps, stages, *rest = nvidia["what_if"]
    assert (warps["change"], stages["change"]) == ("twice the warps", "one stage fewer")
    # the sum is spread over twice the threads
    assert warps["registers"] < nvidia["registers"]
    assert warps["shared_bytes"] == nvidia["shared_bytes"]
    # a stage of two tiles, 128 × 64 of 16 bits each
    assert nvidia["shared_bytes"] - stages["shared_bytes"] == 2 * 128 * 64 * 2
    assert all(each["occupancy"]["programs"] > 0 for each in (warps, stages, *rest))
    assert "one stage fewer" in ran.stdout


def test_what_cannot_be_changed_is_not_named():
    at_the_end = row(64, 0) | {"config": {"num_warps": 32, "num_stages": 1}, "spills": 0}
    launch = SimpleNamespace(
        row=at_the_end | {"reason": ""},
        compiled=SimpleNamespace(metadata=SimpleNamespace(tmem_size=0)),
    )
    add([launch], lambda change: [launch])
    assert [each["change"] for each in launch.row["what_if"]] == ["56 registers"]
