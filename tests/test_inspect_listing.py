"""Loops are found in machine code, and the cycles that its instructions take at least."""

import pytest
from gaugeblock.kernels.inspect.bounds import bounds
from gaugeblock.kernels.inspect.listing import parse, shown

from tests.test_sass import sass


def loops(*lines):
    """The instructions of each inner loop, as words."""
    listing = parse(sass(*lines))
    return [[listing.instructions[n].word for n in loop] for loop in listing.inner_loops()]


def test_instructions_know_their_lines():
    code = sass("MOV R1, R2", "@!P0 BRA `(.L_x_1)", ".L_x_1:", "EXIT")
    lines = code.splitlines()
    lines.insert(3, '\t//## File "/a/mine.py", line 7')
    listing = parse("\n".join(lines))
    assert [(i.word, i.predicate, i.line) for i in listing.instructions] == [
        ("MOV", "", None), ("BRA", "@!P0", 7), ("EXIT", "", 7),
    ]  # fmt: skip
    assert listing.instructions[1].file == "/a/mine.py"
    assert listing.instructions[1].target == ".L_x_1"
    assert listing.labels == {".L_x_1": 2}


def test_a_file_is_named_from_where_python_found_it():
    assert shown(sass.__code__.co_filename) == "tests/test_sass.py"
    # compiled from a copy elsewhere, and kept by Triton's cache
    assert shown("/elsewhere/tests/test_sass.py") == "tests/test_sass.py"
    assert shown("/elsewhere/not_loaded.py") == "/elsewhere/not_loaded.py"


def test_loops_without_a_loop_inside():
    body = (".L_x_0:", "FFMA R1, R2, R3, R4", "@P0 BRA `(.L_x_0)")
    assert loops(*body, "EXIT") == [["FFMA", "BRA"]]
    # a loop around it is none of the innermost; one behind it is
    around = (".L_x_9:", "MUFU.EX2 R1, R2", *body, "@P1 BRA `(.L_x_9)")
    behind = (".L_x_5:", "LDG.E R1, desc[UR4][R2.64]", "@P0 BRA `(.L_x_5)")
    assert loops(*around, *behind, "EXIT") == [["FFMA", "BRA"], ["LDG", "BRA"]]
    assert loops("BRA `(.L_x_1)", "FFMA R1, R2, R3, R4", ".L_x_1:", "EXIT") == []


def test_what_stands_behind_a_loop_and_jumps_back_is_a_part_of_it():
    loop = (".L_x_0:", "@!P1 BRA `(.L_x_7)", ".L_x_1:", "FFMA R1, R2, R3, R4",
            "@P0 BRA `(.L_x_0)", "EXIT", ".L_x_7:", "MUFU.EX2 R1, R2", "BRA `(.L_x_1)")  # fmt: skip
    assert loops(*loop) == [["BRA", "FFMA", "BRA", "MUFU", "BRA"]]
    # the same in code that is no loop: a jump back alone makes none
    once = ("@!P1 BRA `(.L_x_7)", ".L_x_1:", "FFMA R1, R2, R3, R4", "EXIT", ".L_x_7:",
            "MUFU.EX2 R1, R2", "BRA `(.L_x_1)")  # fmt: skip
    assert loops(*once) == []


def test_a_loop_that_only_waits_is_none():
    wait = (".L_x_3:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA `(.L_x_3)")
    around = (".L_x_0:", *wait, "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P1 BRA `(.L_x_0)")
    (loop, _) = bounds(sass(*around, "EXIT"), "sm_80", 4)
    assert loop["section"] == "loop"
    assert loop["instructions"] == 4


def test_a_loops_bound_is_that_of_a_pass_that_jumps_over_what_it_can():
    """A condition with two sides, each of which some pass runs and no pass has to."""
    code = sass(
        ".L_x_0:", "MUFU.EX2 R1, R2",
        "@P1 BRA `(.L_x_1)", *["MUFU.EX2 R1, R2"] * 3, "BRA `(.L_x_2)",
        ".L_x_1:", *["MUFU.RCP R1, R2"] * 5,
        ".L_x_2:", "MUFU.RSQ R1, R2", "@P0 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    loop, whole = bounds(code, "sm_90", 8)
    assert (loop["instructions"], whole["instructions"]) == (13, 14)
    assert loop["cycles"]["exp"] == 2 * 8 * 32 / 16
    assert loop["cycles"]["issue"] == 4 * 8 / 4
    assert whole["cycles"]["exp"] == 10 * 8 * 32 / 16
    # whose exponentials belong to every product
    assert loop["work"]["exponentials"] == 8 * 32


def test_what_every_pass_runs_is_counted_wherever_it_stands():
    # the middle stands behind the loop's end, and cannot be jumped over
    code = sass(
        ".L_x_0:", "FFMA R1, R2, R3, R4", "BRA `(.L_x_7)", ".L_x_1:", "FFMA R1, R2, R3, R4",
        "@P0 BRA `(.L_x_0)", "EXIT", ".L_x_7:", "MUFU.EX2 R1, R2", "BRA `(.L_x_1)",
    )  # fmt: skip
    loop, _ = bounds(code, "sm_90", 4)
    assert loop["cycles"]["issue"] == loop["instructions"] == 6
    assert loop["cycles"]["exp"] == 8


# a mnemonic, of one warp or four: its pipe and the cycles on sm_80, sm_90 and sm_100
COSTS = [
    ("HMMA.16816.F32.BF16", 1, "matrix", (2, 1, 0.5)),
    ("HMMA.1688.F32.TF32", 1, "matrix", (2, 1, 0.5)),
    ("IMMA.16832.S8.S8", 1, "matrix", (2, 1, 0.5)),
    # 64 · 128 · 16 multiply-adds of a warpgroup, at 2,048 a cycle
    ("HGMMA.64x128x16.F32.BF16", 4, "matrix", (None, 64, None)),
    ("QGMMA.64x128x32.F32.E4M3.E4M3", 4, "matrix", (None, 64, None)),
    ("MUFU.EX2", 1, "exp", (2, 2, 2)),
    ("FFMA.FTZ", 4, "fp32", (2, 1, 1)),
    ("FFMA2", 4, "fp32", (4, 2, 2)),
    ("LDG.E.LTC128B.128", 1, "load/store", (4, 4, 4)),
    ("LDG.E.U16", 1, "load/store", (1, 1, 1)),
    ("STS.64", 1, "load/store", (2, 2, 2)),
    ("LDSM.16.M88.4", 1, "load/store", (4, 4, 4)),
    ("LDGSTS.E.BYPASS.128", 2, "load/store", (8, 8, 8)),
    ("IADD3", 4, "issue", (1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("mnemonic", "warps", "pipe", "cycles"), COSTS)
def test_cycles_at_least(mnemonic, warps, pipe, cycles):
    for target, expected in zip(("sm_80", "sm_90", "sm_100"), cycles, strict=True):
        if expected is not None:
            (whole,) = bounds(sass(f"{mnemonic} R4, R8, R12, R4"), target, warps)
            assert whole["cycles"][pipe] == expected
            assert whole["cycles"]["issue"] == warps / 4
            assert whole["least"] == max(whole["cycles"].values())


def test_products_without_a_shape_have_no_bound():
    (whole,) = bounds(sass("UTCHMMA gdesc[UR4], gdesc[UR8]", "MUFU.EX2 R1, R2"), "sm_100", 4)
    assert whole["cycles"]["matrix"] is None
    assert whole["work"]["flop"] is None
    assert (whole["least"], whole["limit"]) == (8, "exp")


def test_the_work_of_a_loop():
    code = sass(".L_x_0:", "LDG.E.128 R4, desc[UR4][R2.64]", "HGMMA.64x64x16.F32.BF16 R56",
                "MUFU.EX2 R1, R2", "MUFU.RCP R1, R2", "@P0 BRA `(.L_x_0)", "EXIT")  # fmt: skip
    loop, whole = bounds(code, "sm_90", 8)
    work = {"flop": 2 * 2 * 64 * 64 * 16, "exponentials": 256, "read_bytes": 8 * 512}
    assert loop["work"] == whole["work"] == work
    assert loop["cycles"]["exp"] == 2 * 8 * 32 / 16
