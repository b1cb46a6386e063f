"""Triton kernels of the GPT family, and `eager`, their plain torch twins.

Every op takes `impl="auto" | "triton" | "eager"`. "auto" is triton on CUDA; on a CPU it is triton
when the interpreter is on (TRITON_INTERPRET=1 before triton is imported) and eager otherwise.

Nothing heavy is imported before an op is asked for.
"""

from importlib import import_module

_HOMES = {
    "attention": "_attention",
    "cross_entropy": "_cross_entropy",
    "ffn": "_ffn",
    "layer_norm": "_layer_norm",
    "resolve": "_launch",
}

__all__ = [*_HOMES, "eager"]


def __getattr__(name):
    if name == "eager":
        return import_module(".eager", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
