"""What the compiler made of a kernel, on a machine without a GPU.

    inspect(ops, target, dtype, cases)             rows of the catalog's kernels
    inspect_kernel(kernel, signature, constants)   rows of a user's own

Nothing heavy is imported before one is asked for.
"""

from importlib import import_module

__all__ = ["TARGETS", "aot_cases", "inspect", "inspect_kernel"]


def __getattr__(name):
    if name in __all__:
        return getattr(import_module(".compiling", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
