"""Triton kernels of the GPT family, and `eager`, their plain torch twins.

Every op takes `impl="auto" | "triton" | "eager"`. "auto" is triton on CUDA; on a CPU it is triton
when the interpreter is on (TRITON_INTERPRET=1 before triton is imported) and eager otherwise; for
float64 it is eager. `resolve(op, impl, tensor)` says which.

An op is a module `_NAME.py` or a folder `_NAME` here. Nothing heavy is imported before one is asked
for.
"""

from importlib import import_module
from pathlib import Path

_SHARED = (
    "_activations", "_checks", "_configurations", "_launch", "_loss", "_philox", "_product",
)  # fmt: skip
OPS = tuple(
    sorted(
        path.stem[1:]
        for path in Path(__file__).parent.glob("_[a-z]*")
        if path.stem not in _SHARED and (path.suffix == ".py" or (path / "__init__.py").exists())
    )
)

__all__ = [*OPS, "eager", "resolve"]


def __getattr__(name):
    if name in OPS:
        return getattr(import_module(f"._{name}", __name__), name)
    if name == "eager":
        return import_module(".eager", __name__)
    if name == "resolve":
        return import_module("._launch", __name__).resolve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
