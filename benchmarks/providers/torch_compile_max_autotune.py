"""torch.compile of the plain torch functions, with static shapes and a search for tiles."""

from __future__ import annotations

import torch

from . import Provider, Unavailable
from ._compile import compiled
from .torch_compile import FUNCTIONS
from .torch_eager import limits

NAMES = ("torch_compile_max_autotune",)
# without CUDA graphs of its own: the bench captures everybody's calls itself
_MODE = "max-autotune-no-cudagraphs"


def load(device):
    if device != "cuda":
        raise Unavailable("is left to CUDA: on a CPU the search takes minutes")
    ops = {op: compiled(fn, _MODE) for op, fn in FUNCTIONS.items()}
    note = "compiled for each shape, with a search"
    return [Provider(NAMES[0], torch.__version__, ops, limits, note, slow_start=True)]
