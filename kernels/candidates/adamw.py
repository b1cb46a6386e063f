"""What `gaugeblock tune` tries on the rows of adamw's table.

Timed is the step of GPT-2's 124M parameters as the list that they are, in 148 tensors; for
"squares" with clipping, so that the norm is in the time.
"""

import torch

from .._adamw import launchers
from . import Problem

KEY = ("kernel", "architecture", "bits")
LAUNCH = ("BLOCK_N", "STEPS", "num_warps")

# GPT-2's tensors: width 768, 12 layers
_LAYER = (768, 768, 768 * 2304, 2304, 768 * 768, 768, 768, 768, 768 * 3072, 3072, 3072 * 768, 768)
_MODEL = (50257 * 768, 1024 * 768, *_LAYER * 12, 768, 768)
_STEP = (10, 1e-3, 0.9, 0.95, 1e-8, 0.1)


def candidates(row):
    """The launch configurations that are measured for a row of the table, its own first."""
    own = {name: row[name] for name in LAUNCH}
    # elements that a thread holds of each tensor at a time: those of one access of 16 bytes, or two
    held = (4, 8) if row["bits"] == 32 else (8, 16)
    others = [
        {"BLOCK_N": 32 * warps * elements, "STEPS": chunk // (32 * warps * elements),
         "num_warps": warps}
        for elements in held
        for warps in (4, 8)
        for chunk in (4096, 8192, 16384, 32768)
    ]  # fmt: skip
    return [own, *(x for x in others if x != own)]


def problem(row, dtype, device, candidate=None):
    """The step of a list; of the small one, half lies at addresses that no vector access takes."""
    sizes = _MODEL
    if candidate:
        tile = candidate["BLOCK_N"]
        chunk = tile * candidate["STEPS"]
        sizes = (chunk, chunk + tile + 3, tile - 1, 5)
    generator = torch.Generator(device).manual_seed(0)
    draw = torch.randn(4, sum(sizes), generator=generator, device=device, dtype=dtype)
    # a second moment is never negative
    inputs = (*draw[:3], draw[3].square())
    clips = row["kernel"] == "squares"

    def step(p, g, m, v):
        norm = p.new_empty((), dtype=torch.float32) if clips else None
        tensors = zip(*(x.split(sizes) for x in (p, g, m, v)), [None] * len(sizes))
        launchers.forward(tensors, [_STEP] * len(sizes), norm, 1.0, False)
        return (p, m, v) if norm is None else (p, m, v, norm)

    def answers():
        p, g, m, v = (x.clone() for x in inputs)
        return step(p, g, m, v)

    def twin(*tensors):
        p, g, m, v = (x.clone() for x in tensors)
        norm = g.norm()
        if clips:
            g = g * (1.0 / (norm + 1e-6)).clamp(max=1.0)
        decay, rate1, beta2, rate2, length, root, eps = launchers.coefficients(*_STEP)
        m = m + rate1 * (g - m)
        v = beta2 * v + rate2 * g.square()
        p = decay * p - length * m / (v.sqrt() * root + eps)
        return (p, m, v, norm) if clips else (p, m, v)

    return Problem(("p", "m", "v", "norm")[: 3 + clips], inputs, lambda: step(*inputs), answers,
                   twin)  # fmt: skip
