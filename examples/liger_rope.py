"""Liger-Kernel's rotary position embedding, an op that the catalog does not hold.

python examples/liger_rope.py
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
from gaugeblock.reference.oracle import Case, Input, Op, check
from gaugeblock.reference.report import print_report
from liger_kernel.ops.rope import LigerRopeFunction


def turn(x, cos, sin):
    """Turn the pairs (x_i, x_{i + D/2}) by the angles of `cos` and `sin`, (T, D/2)."""
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def rope(q, k, cos, sin):
    return turn(q, cos, sin), turn(k, cos, sin)


def rope_backward(dys, q, k, cos, sin):
    return tuple(turn(dy, cos, -sin) for dy in dys)


def candidate(q, k, cos, sin):
    # q and k whose heads already lie innermost would be turned in place
    return LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin, None, 1, q.shape[-1])


ROPE = Op(
    "rope",
    rope,
    {
        "q": "B H T D",
        "k": "B Hkv T D",
        "cos": Input("T R", grad=False),
        "sin": Input("T R", grad=False),
    },
    [Case("odd", B=2, H=3, Hkv=3, T=7, D=10, R=5), Case("grouped", B=1, H=4, Hkv=2, T=5, D=8, R=4)],
    outputs={"q_turned": "B H T D", "k_turned": "B Hkv T D"},
    backward=rope_backward,
)

if __name__ == "__main__":
    report = check(ROPE, candidate)
    print_report(report)
    raise SystemExit(not report.passed)
