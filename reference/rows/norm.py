"""Rows of `layer_norm` and `residual_layer_norm`."""

from ..oracle.op import Case, Wrong
from .parts import layer_norm_parts, residual_layer_norm_parts
from .row import CPU, FAMILY, LARGE, SWEEP, row
from .values import (
    all_negative,
    constant_rows,
    offset_64,
    offset_minus_64,
    outlier_row,
    tiny,
    zeros,
)

# a width in each class of the kernels' tables, some of them away from its border
_WIDTHS = (64, 200, 1000, 4096, 8192, 12288, 65536)


def _compiled():
    """Cases that are compiled, not run: with those of GPT-2's widths, every row of the table."""
    for N in _WIDTHS:
        yield Case(f"compiled_{N}", M=4096, N=N, tags=("aot", "configuration"))


def _borders():
    """Rows and columns one beside the tiles of several rows, and widths at the classes' borders."""
    for M, N in ((15, 64), (17, 65), (9, 256), (7, 250), (3, 1024), (2, 1025)):
        yield Case(f"border_{M}x{N}", M=M, N=N, tags=("full",))
    yield Case("wide", M=2, N=8200, tags=("full",))


LAYER_NORM = row(
    "layer_norm",
    {"x": "M N", "w": "N", "b": "N"},
    [
        Case("odd_row", M=5, N=77),
        Case("one_row", M=1, N=64),
        Case("one_column", M=3, N=1, tags=("degenerate",)),
        Case("many_rows", M=67, N=33),
        # more rows than many a backward has programs
        Case("rows_over_programs", M=300, N=20),
        Case("one_column_over_a_tile", M=3, N=257),
        Case("offset_64", M=7, N=96, values={"x": offset_64}),
        Case("outlier_row", M=7, N=40, values={"x": outlier_row}),
        Case("constant_rows", M=3, N=48, values={"x": constant_rows}, tags=("degenerate",)),
        Case("eps", M=4, N=20, eps=0.5),
        Case("rank_three", B=3, T=5, N=20, shapes={"x": "B T N", "y": "B T N"}),
        Case("no_rows", M=0, N=16, tags=("degenerate", "full")),
        Case("tiny", M=5, N=40, values={"x": tiny}),
        Case("negative", M=5, N=40, values={"x": all_negative}),
        *_borders(),
        *_compiled(),
        Case("gpt2_width", M=32768, N=768, tags=("aot", *FAMILY)),
        Case("gpt2_xl_width", M=32768, N=1600, tags=("aot", *FAMILY)),
        Case("gpt3_6.7b_width", M=8192, N=4096, tags=LARGE),
        Case("gpt3_175b_width", M=8192, N=12288, tags=LARGE),
        Case("few_rows", M=1024, N=768, tags=SWEEP),
        Case("cpu_bench", M=1024, N=768, tags=CPU),
    ],
    outputs={"y": "M N"},
    batch="M",
    flops=lambda c, direction: c.M * c.N * (8 if direction == "fwd" else 14),
    errors=(
        Wrong("w_length", "w must have shape", shapes={"w": (76,)}),
        Wrong("b_length", "b must have shape", shapes={"b": (78,)}),
    ),
    sampled=layer_norm_parts,
)


def _residual_moves(c, itemsize, direction):
    """Backward takes the sum h in place of its terms, whose gradients are one tensor."""
    if direction == "fwd":
        return itemsize * (2 * c.M * c.N + 2 * c.N), itemsize * 2 * c.M * c.N
    return itemsize * (3 * c.M * c.N + c.N), itemsize * (c.M * c.N + 2 * c.N)


RESIDUAL_LAYER_NORM = row(
    "residual_layer_norm",
    {"x": "M N", "r": "M N", "w": "N", "b": "N"},
    [
        Case("odd_row", M=5, N=77),
        Case("one_row", M=1, N=64),
        Case("one_column", M=3, N=1),
        Case("many_rows", M=67, N=33),
        # more rows than many a backward has programs
        Case("rows_over_programs", M=300, N=20),
        Case("one_column_below_a_tile", M=3, N=255),
        Case("one_column_over_a_tile", M=3, N=257),
        # a rounding of h before the mean is subtracted shows here
        Case("offset_64", M=7, N=96, values={"r": offset_64}),
        Case("offsets_cancel", M=7, N=96, values={"x": offset_64, "r": offset_minus_64}),
        Case("outlier_row", M=7, N=40, values={"x": outlier_row, "r": outlier_row}),
        # a variance far below ε: y is w·(h − μ)/√ε
        Case("tiny", M=5, N=40, values={"x": tiny, "r": tiny, "b": zeros}),
        Case("negative", M=5, N=40, values={"x": all_negative, "r": all_negative}),
        Case(
            "constant_rows",
            M=3,
            N=48,
            values={"x": constant_rows, "r": constant_rows},
            tags=("degenerate",),
        ),
        Case("eps", M=4, N=20, eps=0.5),
        Case("rank_three", B=3, T=5, N=20, shapes=dict.fromkeys("xryh", "B T N")),
        Case("no_rows", M=0, N=16, tags=("degenerate", "full")),
        *_borders(),
        *_compiled(),
        Case("gpt2_width", M=32768, N=768, tags=("aot", *FAMILY)),
        Case("gpt2_xl_width", M=32768, N=1600, tags=("aot", *FAMILY)),
        Case("gpt3_6.7b_width", M=8192, N=4096, tags=LARGE),
        Case("cpu_bench", M=1024, N=768, tags=CPU),
    ],
    outputs={"y": "M N", "h": "M N"},
    batch="M",
    flops=lambda c, direction: c.M * c.N * (9 if direction == "fwd" else 15),
    moves=_residual_moves,
    errors=(
        Wrong("r_shape", "r must have shape", shapes={"r": (4, 77)}),
        Wrong("w_length", "w must have shape", shapes={"w": (76,)}),
        Wrong("b_length", "b must have shape", shapes={"b": (78,)}),
    ),
    sampled=residual_layer_norm_parts,
)
