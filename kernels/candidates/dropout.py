"""What `gaugeblock tune` tries on the rows of dropout's table."""

import torch

from .. import _dropout
from . import Problem

KEY = ("kernel", "architecture", "bits")
LAUNCH = ("BLOCK_N", "num_warps")


def candidates(row):
    """The launch configurations that are measured for a row, its own first."""
    own = {name: row[name] for name in LAUNCH}
    tiles = [(256 * warps * many, warps) for warps in (2, 4, 8) for many in (1, 2, 4)]
    others = [dict(zip(LAUNCH, tile)) for tile in tiles]
    return [own, *(x for x in others if x != own)]


def problem(row, dtype, device, candidate=None):
    """32,768 tokens of GPT-2's width, or two tiles and a part of one."""
    shape = (32_768, 768) if candidate is None else (2 * candidate["BLOCK_N"] + 5,)
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    p, seed = 0.1, 2**40 + 1
    return Problem(
        inputs=(x, dy),
        timed=lambda: _dropout._drop(x, p, seed),
        answers=lambda: (_dropout._drop(x, p, seed), _dropout._drop(dy, p, seed)),
        twin=lambda x, dy: (_dropout._eager(x, p, seed), _dropout._eager(dy, p, seed)),
        names=("y", "dx"),
    )
