"""What `gaugeblock tune` tries on the rows of embedding's table."""

import torch

from .. import _embedding
from . import Problem

KEY = ("kernel", "architecture", "bits")
LAUNCH = ("BLOCK_M", "BLOCK_N", "num_warps", "STAGES")

_TILES = {
    "forward": ((1, 1024, 2, 1), (1, 1024, 4, 1), (2, 512, 4, 1), (4, 256, 2, 1), (8, 128, 4, 1),
                (8, 256, 4, 1), (8, 256, 8, 1)),
    "blocks": ((16, 256, 1, 4), (32, 128, 1, 4), (32, 128, 1, 8), (32, 256, 1, 2), (32, 256, 1, 8),
               (32, 256, 2, 4), (32, 512, 2, 4), (64, 256, 1, 4), (64, 256, 1, 8)),
    "positions": ((1, 256, 1, 4), (2, 256, 2, 4), (4, 128, 2, 4), (4, 256, 4, 2), (4, 256, 4, 6),
                  (8, 128, 4, 4), (8, 256, 8, 4)),
}  # fmt: skip


def candidates(row):
    """The launch configurations that are measured for a row, its own first."""
    own = {name: row[name] for name in LAUNCH}
    others = [dict(zip(LAUNCH, tile)) for tile in _TILES[row["kernel"]]]
    return [own, *(x for x in others if x != own)]


def problem(row, dtype, device, candidate=None):
    """32,768 tokens of GPT-2's vocabulary and width, or every tile ragged.

    A token in twenty is the same one, as in text.
    """
    if candidate is None:
        B, T, V, C, P = 32, 1024, 50_257, 768, 1024
    else:
        T = candidate["BLOCK_M"] + 3
        B, V, C, P = 2, candidate["BLOCK_M"] + 8, candidate["BLOCK_N"] + 5, T + 2
    tokens = torch.randint(V, (B * T,), device=device)
    tokens = tokens.where(torch.rand(B * T, device=device) > 0.05, 7)
    wte, wpe, dy = (torch.randn(rows, C, device=device).to(dtype) for rows in (V, P, B * T))

    def forward():
        return _embedding._forward(tokens, wte, wpe, None, T)

    def backward():
        return _embedding._backward(dy, tokens, None, T, V, P)

    def twin(wte, wpe, dy):
        wte, wpe = (x.detach().requires_grad_() for x in (wte, wpe))
        y = _embedding._eager(tokens.view(B, T), wte, wpe).view(B * T, C)
        return y, *torch.autograd.grad(y, (wte, wpe), dy)

    return Problem(
        inputs=(wte, wpe, dy),
        timed=forward if row["kernel"] == "forward" else backward,
        answers=lambda: (forward(), *backward()),
        twin=twin,
        names=("y", "dwte", "dwpe"),
    )
