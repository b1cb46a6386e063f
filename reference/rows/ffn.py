"""Row of `ffn`."""

import numpy as np

from ..oracle.op import Case, Input, Wrong
from .parts import ffn_parts
from .row import CPU, FAMILY, LARGE, SWEEP, row
from .values import offset_64, outlier_row, spread_by_10, tiny


def _ffn_flops(c, direction):
    return 4 * c.M * c.C * c.F * (1 if direction == "fwd" else 2)


def _ffn_moves(c, itemsize, direction):
    """Backward reads x, the weights, b1 (or z) and dy; the residual's gradient is dy itself."""
    rows, weights = c.M * c.C, 2 * c.C * c.F
    if direction == "fwd":
        return itemsize * (rows + weights + c.F + c.C), itemsize * rows
    return itemsize * (2 * rows + weights + c.F), itemsize * (rows + weights + c.F + c.C)


def _some_rows_zero(x, dims, rng):
    x[::3] = 0
    return x


def _some_zero(b1, dims, rng):
    """With rows of 0 the pre-activation is exactly 0, where ReLU's gradient is 0."""
    b1[::2] = 0
    return b1


def _one_nan(x, dims, rng):
    x[2, 5] = np.nan
    return x


def _nan_seen(inputs, options):
    """A row that sees a NaN holds one; what becomes of gradients then is not compared."""
    seen = np.isnan(inputs["x"]).any()
    return {f"d{name}": np.bool_(seen) for name in inputs}


_FFN_INPUTS = {
    "x": "M C",
    "w1": Input("C F", fan_in="C"),
    "b1": "F",
    "w2": Input("F C", fan_in="F"),
    "b2": "C",
    "residual": Input("M C", keyword=True),
}

_RESIDUAL = ("residual",)

FFN = row(
    "ffn",
    _FFN_INPUTS,
    [
        Case("odd", M=5, C=33, F=47),
        Case("erf", M=19, C=20, F=36, activation="gelu"),
        Case("relu", M=19, C=20, F=36, activation="relu"),
        Case(
            "relu_at_zero",
            M=19,
            C=20,
            F=36,
            activation="relu",
            values={"x": _some_rows_zero, "b1": _some_zero},
        ),
        Case("relu_nan", M=19, C=20, F=36, activation="relu", values={"x": _one_nan}),
        Case(
            "rank_three",
            B=3,
            T=5,
            C=20,
            F=36,
            shapes={"x": "B T C", "y": "B T C", "residual": "B T C"},
        ),
        Case("residual", M=19, C=20, F=36, keywords=_RESIDUAL),
        Case(
            "residual_rank_three",
            B=2,
            T=9,
            C=24,
            F=40,
            activation="relu",
            shapes={"x": "B T C", "y": "B T C", "residual": "B T C"},
            keywords=_RESIDUAL,
        ),
        Case("residual_one_row", M=1, C=40, F=72, keywords=_RESIDUAL),
        Case(
            "residual_offset_64",
            M=17,
            C=20,
            F=36,
            keywords=_RESIDUAL,
            values={"residual": offset_64},
        ),
        Case("tiny", M=6, C=20, F=36, values={"x": tiny}),
        Case("spread_by_10", M=6, C=20, F=36, values={"x": spread_by_10}),
        Case("outlier_row", M=6, C=20, F=36, values={"x": outlier_row}),
        Case("no_rows", M=0, C=16, F=24, tags=("degenerate", "full")),
        Case("one_row", M=1, C=16, F=64),
        Case("many_rows", M=70, C=17, F=31),
        Case("one_over_a_tile", M=33, C=65, F=129),
        Case("sixteen_rows", M=16, C=48, F=72),
        Case("seventeen_rows", M=17, C=48, F=72),
        Case("one_below_a_tile", M=127, C=31, F=63, tags=("full",)),
        Case("one_over_two_tiles", M=129, C=65, F=33, tags=("full",)),
        # a contraction that is split, with a ragged last part
        Case("few_rows_long", M=3, C=24, F=1000, keywords=_RESIDUAL),
        # more than one group of 8 tiles of 128 rows
        Case("rows_over_a_group", M=1100, C=17, F=24),
        Case("gpt2_width", M=8192, C=768, F=3072, tags=("aot", *FAMILY)),
        Case(
            "compiled_some_rows",
            M=512,
            C=768,
            F=3072,
            keywords=_RESIDUAL,
            tags=("aot", "configuration"),
        ),
        Case(
            "compiled_one_row",
            M=1,
            C=768,
            F=3072,
            keywords=_RESIDUAL,
            tags=("aot", "configuration"),
        ),
        Case(
            "compiled_unaligned",
            M=1001,
            C=765,
            F=3071,
            activation="gelu",
            tags=("aot", "configuration"),
        ),
        Case("gpt2_medium_width", M=8192, C=1024, F=4096, tags=FAMILY),
        Case("gpt2_large_width", M=8192, C=1280, F=5120, tags=FAMILY),
        Case("gpt2_xl_width", M=8192, C=1600, F=6400, tags=("aot", *FAMILY)),
        Case("gpt3_6.7b_width", M=8192, C=4096, F=16384, tags=LARGE),
        Case("gpt3_175b_width", M=2048, C=12288, F=49152, tags=LARGE),
        Case("one_token", M=1, C=1600, F=6400, tags=SWEEP),
        Case("sixteen_tokens", M=16, C=1600, F=6400, tags=SWEEP),
        Case("cpu_bench", M=256, C=256, F=1024, tags=CPU),
    ],
    outputs={"y": "M C"},
    batch="M",
    unspecified=_nan_seen,
    flops=_ffn_flops,
    moves=_ffn_moves,
    errors=(
        Wrong("w1_rows", "w1 must have shape", shapes={"w1": (32, 47)}),
        Wrong("w2_rows", "w2 must have shape", shapes={"w2": (46, 33)}),
        Wrong("b1_length", "b1 must have shape", shapes={"b1": (33,)}),
        Wrong("b2_length", "b2 must have shape", shapes={"b2": (47,)}),
        Wrong("residual_shape", "residual must have shape", shapes={"residual": (33,)}),
        Wrong("unknown_activation", "activation must be one of", options={"activation": "swish"}),
    ),
    sampled=ffn_parts,
)
