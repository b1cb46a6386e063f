"""torch.optim.AdamW(fused=True): the whole step in one kernel."""

from __future__ import annotations

import torch

from . import Provider

NAMES = ("torch_fused_adamw",)


def load(device):
    note = (
        "with the small kernel that sets the step, as the optimiser has one to count it; on a CPU "
        "it takes contiguous tensors for granted"
    )
    return [Provider("torch_fused_adamw", torch.__version__, {"adamw": _adamw}, note=note)]


def _adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
    # filled on the device: a copy from the host would wait for it
    steps = torch.full((), float(step), device=p.device)
    torch._fused_adamw_(
        [p], [g], [m], [v], [], [steps], lr=lr, beta1=beta1, beta2=beta2,
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
