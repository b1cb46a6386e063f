"""What `gaugeblock tune` tries on the rows of cross-entropy's table, and at which shapes."""

import functools

import torch

from .. import _cross_entropy as op
from . import Problem

KEY = ("kernel", "architecture", "bits")
LAUNCH = ("BLOCK_V", "num_warps")
_IGNORED, _ALPHA = -100, 0.0


def candidates(row):
    """The launch configurations that are measured for a row of the table, its own first."""
    own = {name: row[name] for name in LAUNCH}
    tiles = (8192, 16384, 32768) if row["kernel"] == "with_loss" else (1024, 2048, 4096, 8192)
    others = [
        dict(BLOCK_V=tile, num_warps=tile // 32 // each)
        for tile in tiles
        for each in (8, 16, 32)
        if 1 <= tile // 32 // each <= 32
    ]
    return [own, *(x for x in others if x != own)]


def problem(row, dtype, device, candidate=None):
    """The loss of 8,192 tokens of GPT-2; small and odd with a candidate."""
    with_loss = row["kernel"] == "with_loss"
    # few rows are not for the kernel that walks a row
    M, V = (8192, 50257) if candidate is None else (257 if with_loss else 7, 0)
    V = V or candidate["BLOCK_V"] + 37
    draw = torch.Generator(device).manual_seed(0)
    logits = torch.randn((M, V), generator=draw, device=device).to(dtype)
    targets = torch.randint(V, (M,), generator=draw, device=device)
    targets[::5] = _IGNORED
    options = _IGNORED, _ALPHA
    if with_loss:
        dlogits = op._new_gradient(logits)
        run = functools.partial(op._forward_backward, logits, targets, *options, "sum", dlogits)
        return Problem(
            ("loss", "dlogits"), (logits, targets), run, lambda: (run(), dlogits), _twin_with_loss
        )
    if row["kernel"] == "forward":
        run = functools.partial(op._forward, logits, targets, *options)
        # the lse of an ignored row means nothing
        return Problem(("losses",), (logits, targets), run, lambda: run()[:1], _twin)
    dlosses = torch.randn((M,), generator=draw, device=device).to(dtype)
    lse = torch.logsumexp(logits.float(), 1)
    run = functools.partial(op._backward, dlosses.float(), logits, targets, lse, *options)
    inputs = dlosses, logits, targets
    return Problem(("dlogits",), inputs, run, lambda: (run(),), _twin_backward)


def _twin(logits, targets):
    return (op._eager(logits, targets, reduction="none"),)


def _twin_backward(dlosses, logits, targets):
    x = logits.detach().requires_grad_()
    losses = op._eager(x, targets, reduction="none")
    return torch.autograd.grad(losses, x, dlosses.to(losses.dtype))


def _twin_with_loss(logits, targets):
    x = logits.detach().requires_grad_()
    loss = op._eager(x, targets, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, x)
