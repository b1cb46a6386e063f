"""The ground truth: every operation and model of the GPT family in NumPy float64.

An operation `op` of the catalog is a module `_op.py` here: `op(...)` returns `(y, cache)` and
`op_backward(dy, cache)` one gradient for each floating input, where the op has any. Nothing is
tiled, fused or tuned: one line of code per line of mathematics.
"""

from importlib import import_module
from pathlib import Path

_SHARED = ("_blocks", "_checks", "_philox", "_rounding")
# what is no op, and the module that has it
_OTHERS = {
    "GPT": "_gpt",
    "Transformer": "_transformer",
    "adamw_step": "_training",
    "train": "_training",
    "parameter_count": "_shapes",
    "parameter_shapes": "_shapes",
    **{
        f"{task}_head{backward}": "_heads"
        for task in ("classification", "similarity", "multiple_choice")
        for backward in ("", "_backward")
    },
    "clip_grad_norm": "_clip",
    "cosine_schedule": "_schedules",
    "linear_schedule": "_schedules",
    "noam_schedule": "_schedules",
    "sinusoidal_positions": "_positions",
}
_OPS = tuple(
    sorted(
        path.stem[1:]
        for path in Path(__file__).parent.glob("_[a-z]*.py")
        if path.stem not in (*_SHARED, *_OTHERS.values())
    )
)

# an update and a choice have no gradient
_WITHOUT_GRADIENT = ("adam", "adamw", "sample")

__all__ = [*_OTHERS, *_OPS, *(f"{op}_backward" for op in _OPS if op not in _WITHOUT_GRADIENT)]


def __getattr__(name):
    op = name.removesuffix("_backward")
    if op in _OPS:
        return getattr(import_module(f"._{op}", __name__), name)
    if name in _OTHERS:
        return getattr(import_module(f".{_OTHERS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
