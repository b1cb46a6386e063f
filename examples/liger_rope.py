"""Liger-Kernel's rotary position embedding, an op that the catalog does not hold.

gaugeblock check examples.liger_rope:ROPE examples.liger_rope:candidate --dtype float16
"""

from . import interpreted  # noqa: F401

# isort: split
import numpy as np
from gaugeblock.reference.oracle import Case, Input, Op, stored
from liger_kernel.ops.rope import LigerRopeFunction


def turn(x, cos, sin):
    a, b = np.split(x, 2, -1)
    # half precision multiplies in half precision: Liger, like eager torch, rounds the products
    y = stored(a * cos) - stored(b * sin), stored(b * cos) + stored(a * sin)
    return np.concatenate(y, -1)


def candidate(q, k, cos, sin):
    # q and k whose heads already lie innermost would be turned in place
    return LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin, None, 1, q.shape[-1])


TABLE = Input("T R", grad=False)
ROPE = Op(
    "rope",
    lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, cos, sin)),
    {"q": "B H T D", "k": "B Hkv T D", "cos": TABLE, "sin": TABLE},
    [Case("odd", B=2, H=3, Hkv=3, T=7, D=10, R=5), Case("grouped", B=1, H=4, Hkv=2, T=5, D=8, R=4)],
    outputs={"q_turned": "B H T D", "k_turned": "B Hkv T D"},
    backward=lambda dys, q, k, cos, sin: tuple(turn(dy, cos, -sin) for dy in dys),
)
