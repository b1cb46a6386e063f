"""What the providers that torch.compile makes share."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from . import Unavailable

# dynamo stops at 8 shapes of a function; a suite has more
_SHAPES = 1024


def expect_compiler(device):
    """`Unavailable` where Inductor has nothing to compile its C++ with; CUDA needs none of it."""
    if device != "cpu":
        return
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise Unavailable(f"needs a C++ compiler, and there is no {compiler}")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise Unavailable("needs Python.h to compile C++, and it is not installed")


def compiled(fn, mode=None):
    """fn, compiled anew for every shape that it meets.

    Past dynamo's limit of shapes fn would run uncompiled, with a warning: the limit is moved, and
    with `fullgraph` it is an error.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _SHAPES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, _SHAPES)
    # a backward is timed again and again on one forward
    torch._functorch.config.donated_buffer = False
    return torch.compile(fn, dynamic=False, fullgraph=True, mode=mode)
