"""Rows of `linear` and `embedding`."""

from ..oracle.op import Case, Index, Input, Wrong
from .parts import embedding_parts, linear_parts
from .row import CPU, FAMILY, row
from .values import repeated_tokens

LINEAR = row(
    "linear",
    {"x": "M K", "w": Input("K N", fan_in="K"), "b": "N"},
    [
        Case("odd", M=5, K=33, N=17),
        Case("one_row", M=1, K=64, N=48),
        Case("many_terms", M=3, K=4099, N=5),
        Case("cpu_bench", M=512, K=768, N=768, tags=CPU),
    ],
    outputs={"y": "M N"},
    flops=lambda c, direction: 2 * c.M * c.K * c.N * (1 if direction == "fwd" else 2),
    errors=(
        Wrong("w_rows", "w must have shape", shapes={"w": (32, 17)}),
        Wrong("b_length", "b must have shape", shapes={"b": (16,)}),
    ),
    kernel="plain products belong to cuBLAS",
    sampled=linear_parts,
)


def _embedding_moves(c, itemsize, direction):
    """Of the table, the different rows of that many draws; its gradient has them all."""
    positions = c.B * c.T
    rows = round(c.V * (1 - (1 - 1 / c.V) ** positions))
    if direction == "fwd":
        return 8 * positions + itemsize * (rows + c.T) * c.C, itemsize * positions * c.C
    return (8 + itemsize * c.C) * positions, itemsize * (c.V + c.P) * c.C


EMBEDDING = row(
    "embedding",
    {"tokens": Index("B T", below="V"), "wte": "V C", "wpe": "P C"},
    [
        Case("odd", B=2, T=7, V=19, P=9, C=13),
        Case("repeated_tokens", B=2, T=11, V=5, P=11, C=8, values={"tokens": repeated_tokens}),
        Case("frequent_tokens", B=4, T=64, V=3, P=64, C=8),
        Case("gpt2_tokens", B=32, T=1024, V=50257, P=1024, C=768, tags=("aot", *FAMILY)),
        Case("cpu_bench", B=8, T=512, V=5003, P=512, C=256, tags=CPU),
    ],
    outputs={"y": "B T C"},
    flops=lambda c, direction: c.B * c.T * c.C * (1 if direction == "fwd" else 2),
    moves=_embedding_moves,
    errors=(
        Wrong("id_too_large", "tokens must lie in", values={"tokens": lambda t: t + 19}),
        Wrong("id_negative", "tokens must lie in", values={"tokens": lambda t: t - 19}),
        Wrong("wpe_width", "wpe must have shape", shapes={"wpe": (9, 12)}),
        Wrong(
            "tokens_float",
            "tokens must be integers",
            values={"tokens": lambda t: t / 2},
            raises=TypeError,
        ),
    ),
    sampled=embedding_parts,
)
