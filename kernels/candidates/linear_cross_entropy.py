"""What `gaugeblock tune` tries on the rows of linear cross-entropy's table, and at which shapes."""

import functools

import torch

from .. import _linear_cross_entropy as op
from . import Problem

KEY = ("kernel", "architecture", "bits")
LAUNCH = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "TMA")
_IGNORED, _ALPHA = -100, 0.0
# what one program may have; chips without rows use sm_80's, the smallest of them has 99 KiB
_SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10}
_HALF = (
    (64, 128, 64, 4, 3), (64, 256, 64, 8, 3), (128, 64, 64, 4, 3), (128, 128, 32, 8, 3),
    (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
)  # fmt: skip
_SINGLE = ((32, 32, 32, 4, 2), (32, 64, 32, 4, 2), (64, 32, 32, 4, 2), (64, 64, 16, 8, 2))


def candidates(row):
    """The launch configurations that are measured for a row of the table, its own first."""
    single = row["bits"] == 32
    by_tma = (False, True) if row["architecture"] == "sm_90" and not single else (False,)
    own = {name: row[name] for name in LAUNCH}
    others = [
        dict(zip(LAUNCH, (*tile, tma))) for tile in (_SINGLE if single else _HALF) for tma in by_tma
    ]
    return [own, *(x for x in others if x != own and _fits(row, x))]


def _fits(row, x):
    """Whether its tiles fit in shared memory, and its products in half of the registers."""
    stage = (x["BLOCK_M"] + x["BLOCK_N"]) * x["BLOCK_K"] * row["bits"] // 8
    held = x["BLOCK_M"] * x["BLOCK_N"] / (32 * x["num_warps"])
    return x["num_stages"] * stage <= _SHARED_BYTES[row["architecture"]] and held <= 128


def problem(row, dtype, device, candidate=None):
    """The head of GPT-2 on 8,192 tokens; small and odd with a candidate."""
    M, C, V = 8192, 768, 50257
    if candidate is not None:
        M, C, V = (candidate[name] + 8 for name in ("BLOCK_M", "BLOCK_K", "BLOCK_N"))
        # a second part of the vocabulary, a second chunk; not a whole tile of either
        V += op._SPLIT.value
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn((M, C), generator=draw, device=device).to(dtype)
    w = (torch.randn((V, C), generator=draw, device=device) * C**-0.5).to(dtype)
    targets = torch.randint(V, (M,), generator=draw, device=device)
    targets[::5] = _IGNORED
    forward = functools.partial(op._forward, x, w, targets, None, _IGNORED, _ALPHA)
    if row["kernel"] == "forward":
        # the lse of an ignored row means nothing
        return Problem(("losses",), (x, w, targets), forward, lambda: forward()[:1], _twin)
    dlosses = torch.randn((M,), generator=draw, device=device).to(dtype)
    lse = forward()[1]
    run = functools.partial(
        op._backward, dlosses.float(), x, w, targets, None, lse, _IGNORED, _ALPHA
    )
    return Problem(("dx", "dw"), (dlosses, x, w, targets), run, lambda: run()[:2], _twin_backward)


def _twin(x, w, targets):
    return (op._eager(x, w, targets, reduction="none"),)


def _twin_backward(dlosses, x, w, targets):
    x, w = (t.detach().requires_grad_() for t in (x, w))
    losses = op._eager(x, w, targets, reduction="none")
    return torch.autograd.grad(losses, (x, w), dlosses.to(losses.dtype))
