"""The plain torch twins of the kernels: `eager.layer_norm(x, w, b)` and so on.

Each is the CPU implementation of its op, the naive baseline, and the readable statement of what
the kernel beside it computes. 16-bit inputs are computed in float32 and rounded where the kernels
round. Gradients are autograd's.
"""

from importlib import import_module

from . import OPS


def __getattr__(name):
    if name in OPS:
        return import_module(f"._{name}", __package__)._eager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return list(OPS)
