"""Machine code and Triton's first representation are read right, and occupancy adds up."""

import pytest
from gaugeblock.kernels.occupancy import occupancy
from gaugeblock.kernels.sass import (
    _reasons,
    instruction_mix,
    narrow_offsets,
    products,
    spills_in_loops,
)

# registers a thread, shared bytes, threads -> programs, warps, limiter
OCCUPANCY = [
    # the CUDA best practices guide's own example: 37 registers are 40 a thread, 12 warps a quarter
    ("sm_80", 37, 0, 128, 12, 48, "registers"),
    ("sm_80", 37, 0, 320, 4, 40, "registers"),
    # 32 registers are the most that fill the chip
    ("sm_80", 32, 0, 128, 16, 64, "warps"),
    ("sm_90", 33, 0, 128, 12, 48, "registers"),
    # one warp a program: 32 programs are the most
    ("sm_90", 32, 0, 32, 32, 32, "programs"),
    # 72 KB and 1 reserved: two in 164 KB, three in 228
    ("sm_80", 128, 72 * 1024, 128, 2, 8, "shared memory"),
    ("sm_90", 128, 72 * 1024, 128, 3, 12, "shared memory"),
    # 113 KB and 1 reserved fill 228 KB twice; 128 bytes more do not
    ("sm_90", 64, 113 * 1024, 128, 2, 8, "shared memory"),
    ("sm_90", 64, 113 * 1024 + 1, 128, 1, 4, "shared memory"),
    # 24,876 and 1,024 are 25,900: nine would fit, at 25,984 eight do
    ("sm_90", 32, 24_876, 128, 8, 32, "shared memory"),
    # 168 registers: 3 warps a quarter, one program of 8; 128 KB: one
    ("sm_90", 168, 128 * 1024, 256, 1, 8, "registers and shared memory"),
    ("sm_100", 168, 96 * 1024, 256, 1, 8, "registers"),
    # what one program may have is less than what the multiprocessor has
    ("sm_80", 32, 163 * 1024, 128, 1, 4, "shared memory"),
    ("sm_80", 32, 163 * 1024 + 1, 128, 0, 0, "shared memory"),
    ("sm_90", 255, 0, 512, 0, 0, "registers"),
]


@pytest.mark.parametrize(
    ("target", "registers", "shared_bytes", "threads", "programs", "warps", "limiter"), OCCUPANCY
)
def test_occupancy(target, registers, shared_bytes, threads, programs, warps, limiter):
    assert occupancy(target, registers, shared_bytes, threads) == {
        "programs": programs,
        "warps": warps,
        "share": warps / 64,
        "limiter": limiter,
    }


def test_tensor_memory_limits_programs():
    assert occupancy("sm_100", 32, 0, 128, tensor_columns=256)["limiter"] == "tensor memory"
    assert occupancy("sm_100", 32, 0, 128, tensor_columns=256)["programs"] == 2


def sass(*lines):
    """Code as nvdisasm prints it; a name that ends in a colon is a label."""
    text, address = "kernel:\n.text.kernel:\n", 0
    for line in lines:
        if line.endswith(":"):
            text += f"{line}\n"
        else:
            text += f"        /*{address:04x}*/                   {line} ;\n"
            address += 16
    return text


def test_the_instruction_mix():
    code = sass(
        "LDC R1, c[0x0][0x28]",
        "@!P0 LDG.E.128 R4, desc[UR4][R2.64]",
        "@P1 LDG.E.LTC128B.128.CONSTANT R8, desc[UR4][R2.64+0x800]",
        "LDG.E.64 R4, desc[UR4][R2.64]",
        "LDG.E R4, desc[UR4][R2.64]",
        "LDG.E.U16 R4, desc[UR4][R2.64]",
        "LDG.E.S8 R4, desc[UR4][R2.64]",
        "STG.E.128 desc[UR4][R12.64], R4",
        "STG.E desc[UR4][R12.64], R4",
        "@!UP0 UTMALDG.2D [UR8], [UR4]",
        "UTMAREDG.2D.ADD [UR8], [UR4]",
        "LDGSTS.E.BYPASS.LTC128B.128 [R7], desc[UR4][R2.64]",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, !UPT",
        "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24",
        "HMMA.16816.F32 R4, R8, R12, R4",
        "FFMA R1, R2, R3, R4",
        "FFMA.FTZ R1, R2, R3, R4",
        "MUFU.EX2 R4, R4",
        "@P2 MUFU.EX2 R4, R4",
        "MUFU.RCP64H R4, R4",
        "LDSM.16.MT88.4 R4, [R5]",
        "STS.128 [R7], R4",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "STL.64 [R1+0x8], R4",
        "LDL.LU R4, [R1+0x8]",
        "IMAD.WIDE R2, R15.reuse, 0x4, R2",
    )
    assert instruction_mix(code) == {
        "HMMA": 1, "HGMMA": 2, "UTMALDG": 1, "UTMAREDG": 1, "FFMA": 2, "MUFU.EX2": 2,
        "MUFU.RCP64H": 1, "LDG.128": 2, "LDG.16": 1, "LDG.32": 1, "LDG.64": 1, "LDG.8": 1,
        "STG.128": 1, "STG.32": 1, "LDGSTS": 1, "LDSM": 1, "STS": 1, "BAR": 1, "LDL": 1, "STL": 1,
    }  # fmt: skip


def test_comments_and_names_are_no_instructions():
    assert instruction_mix("//---- .text.LDG_kernel ----\n        .global  HMMA_kernel\n") == {}


def test_spills_are_found_in_loops_only():
    loop = (".L_x_0:", "FFMA R1, R2, R3, R4", "@P0 BRA `(.L_x_0)")
    assert spills_in_loops(sass("STL [R1], R2", *loop, "LDL R2, [R1]")) == 0
    inside = (loop[0], "STL [R1], R2", "LDL R2, [R1]", *loop[1:])
    assert spills_in_loops(sass(*inside)) == 2
    # a loop around the loop, and a jump forward over a spill
    around = (".L_x_9:", "LDL R2, [R1]", *loop, "@P0 CALL.REL.NOINC `(.L_x_9)")
    assert spills_in_loops(sass(*around)) == 1
    assert spills_in_loops(sass("BRA `(.L_x_1)", "STL [R1], R2", ".L_x_1:", "EXIT")) == 0


@pytest.mark.parametrize(
    ("target", "spills", "in_loops", "shared_bytes", "reason"),
    [
        ("sm_80", 0, 0, 1024, []),
        # four registers that wait for a loop to end
        ("sm_80", 16, 0, 1024, []),
        ("sm_80", 20, 0, 1024, ["spills 20 bytes, 0 instructions in loops"]),
        ("sm_80", 8, 1, 1024, ["spills 8 bytes, 1 instructions in loops"]),
        ("sm_80", 0, 0, 163 * 1024 + 1, ["needs more than 166912 bytes of shared memory"]),
        ("sm_90", 0, 0, 163 * 1024 + 1, []),
        ("sm_100", 800, 9, 1024, []),
    ],
)
def test_the_gate_of_the_machine_code(target, spills, in_loops, shared_bytes, reason):
    row = {"target": target, "spills": spills, "spills_in_loops": in_loops, "product_units": [],
           "shared_bytes": shared_bytes, "instructions": {"HMMA": 1}}  # fmt: skip
    assert _reasons(row) == reason
    assert _reasons(row | {"product_units": ["HMMA"]}) == reason
    without = [] if target == "sm_100" else ["runs products without HGMMA"]
    assert _reasons(row | {"product_units": ["HGMMA"]}) == without + reason


@pytest.mark.parametrize(
    ("rows", "dtype", "options", "warps", "on_90", "on_80"),
    [
        (64, "bf16", "", 4, ["HGMMA"], ["HMMA"]),
        (128, "f16", "", 8, ["HGMMA"], ["HMMA"]),
        (32, "f16", "", 4, ["HMMA"], ["HMMA"]),
        (64, "f16", "", 2, ["HMMA"], ["HMMA"]),
        (64, "f8E4M3FN", "", 4, ["QGMMA"], ["HMMA"]),
        (64, "i8", "", 4, ["IGMMA"], ["IMMA"]),
        (64, "f32", "", 4, ["FFMA"], ["FFMA"]),
        (64, "f32", ", inputPrecision = tf32", 4, ["HGMMA"], ["HMMA"]),
        (64, "f64", "", 4, [], []),
    ],
)
def test_the_units_that_products_belong_on(rows, dtype, options, warps, on_90, on_80):
    tile = f"tensor<{rows}x64x{dtype}>"
    ttir = f"    %d = tt.dot %a, %b, %c{options} : {tile} * tensor<64x64x{dtype}> -> tensor<f32>\n"
    assert products(ttir, "sm_90", warps) == on_90
    assert products(ttir, "sm_80", warps) == on_80


def ttir(*lines):
    """A function of a pointer and two numbers, in Triton's first representation."""
    head = "tt.func public @k(%x_ptr: !tt.ptr<f32>, %stride: i32, %n: i32) {\n"
    return head + "".join(f"  {line} loc(#loc{i})\n" for i, line in enumerate(lines)) + "}\n"


PROGRAM = ("%c64 = arith.constant 64 : i32", "%pid = tt.get_program_id x : i32")
LOAD = "%p = tt.addptr %x_ptr, %offs : !tt.ptr<f32>, i32"
LOAD_64 = "%p = tt.addptr %x_ptr, %offs : !tt.ptr<f32>, i64"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (("%offs = arith.muli %pid, %stride : i32", LOAD), 1),
        # widened too late
        (
            ("%o = arith.muli %pid, %stride : i32", "%offs = arith.extsi %o : i32 to i64", LOAD_64),
            1,
        ),
        (
            (
                "%a = arith.extsi %pid : i32 to i64",
                "%b = arith.extsi %stride : i32 to i64",
                "%offs = arith.muli %a, %b : i64",
                LOAD_64,
            ),
            0,
        ),
        # a row's number is bounded by the number of rows
        (("%offs = arith.muli %pid, %c64 : i32", LOAD), 0),
        # a quotient is smaller than what was divided
        (
            ("%o = arith.muli %pid, %stride : i32", "%offs = arith.remsi %o, %n : i32", LOAD),
            0,
        ),
        # tiles of 32-bit numbers, through a loop's first value
        (
            (
                "%s = tt.splat %pid : i32 -> tensor<64xi32>",
                "%t = tt.splat %stride : i32 -> tensor<64xi32>",
                "%u = arith.muli %s, %t : tensor<64xi32>",
                "%r:2 = scf.for %i = %c0 to %n step %c64 iter_args(%acc = %u, %z = %s) -> (i32) {",
                "%offs = arith.addi %acc, %s : tensor<64xi32>",
                "%p = tt.addptr %xs, %offs : tensor<64x!tt.ptr<f32>>, tensor<64xi32>",
            ),
            1,
        ),
    ],
)  # fmt: skip
def test_addresses_in_32_bits_are_found(lines, found):
    assert narrow_offsets(ttir(*PROGRAM, *lines)) == found
