"""torch.compile of the plain torch functions, with static shapes."""

from __future__ import annotations

import torch

from . import Provider
from ._compile import compiled, expect_compiler
from .torch_eager import OPS, limits

NAMES = ("torch_compile",)


def load(device):
    expect_compiler(device)
    ops = {op: compiled(fn) for op, fn in FUNCTIONS.items()}
    return [
        Provider(
            "torch_compile", torch.__version__, ops, limits, "compiled for each shape",
            slow_start=device == "cpu",
        )
    ]  # fmt: skip


def _adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
    """The step written out, to be fused; torch's own keeps a counter on the CPU."""
    p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = (v / (1 - beta2**step)).sqrt() + eps
    p.addcdiv_(m, root, value=-lr / (1 - beta1**step))


FUNCTIONS = {**OPS, "adamw": _adamw}
