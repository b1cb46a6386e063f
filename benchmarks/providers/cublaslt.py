"""cuBLASLt's fused epilogues: bias and activation inside the product, through torch."""

from __future__ import annotations

import torch

from . import Provider, Unavailable
from ._limits import forward_only

NAMES = ("cublaslt_epilogue",)


def load(device):
    if device != "cuda":
        raise Unavailable("needs CUDA: cuBLASLt is NVIDIA's")
    ops = {"linear": linear, "ffn": ffn}
    note = "bias, and of ffn's first product the activation, in the epilogue"
    return [Provider("cublaslt_epilogue", f"CUDA {torch.version.cuda}", ops, _limits, note)]


def _limits(op, case, dtype, direction):
    if op.name != "ffn":
        return None
    if op.options(case).get("activation") == "gelu":
        return "its GELU is the tanh one"
    # torch has no derivative of the fused product
    return forward_only(direction)


def linear(x, w, b):
    return torch.addmm(b, x, w)


def ffn(x, w1, b1, w2, b2, activation="gelu_tanh"):
    rows = x.reshape(-1, x.shape[-1])
    a = torch._addmm_activation(b1, rows, w1, use_gelu=activation != "relu")
    return torch.addmm(b2, a, w2).view(x.shape)
