"""What `gaugeblock tune` tries on the rows of sample's table."""

import torch

from .. import _sample
from . import Problem

KEY = ("kernel", "architecture", "bits")
LAUNCH = ("BLOCK_V", "DIGIT", "num_warps")
_FILTERS = dict(temperature=0.8, top_k=200, top_p=0.95, min_p=None)


def candidates(row):
    """The launch configurations that are measured for a row, its own first."""
    own = {name: row[name] for name in LAUNCH}
    tiles = ((2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32), (16_384, 32))
    others = [dict(zip(LAUNCH, (BLOCK_V, DIGIT, warps)))
              for BLOCK_V, warps in tiles for DIGIT in (1, 2, 4)
              # so many comparisons are held by a thread
              if 64 * 32 * warps >= (BLOCK_V << DIGIT)]  # fmt: skip
    return [own, *(x for x in others if x != own)]


def problem(row, dtype, device, candidate=None):
    """64 rows of GPT-2's vocabulary, or three of two tiles and a part of one.

    Rounding may make another token right, where u is within some 1e-7 of a boundary: the few rows
    that are checked make that unlikely.
    """
    M, V = (64, 50_257) if candidate is None else (3, 2 * candidate["BLOCK_V"] + 5)
    logits = torch.randn(M, V, device=device).to(dtype)
    u = torch.rand(M, device=device)

    def token():
        return _sample._forward(logits, u, **_FILTERS)

    def twin(logits, u):
        return (_sample._eager(logits, u, **_FILTERS),)

    return Problem(
        inputs=(logits, u),
        timed=token,
        answers=lambda: (token(),),
        twin=twin,
        names=("token",),
    )
