"""The oracle: is this kernel right? Budgets are derived, never set by hand."""

from .._rounding import otherwise, refinement, rescaled, stored
from .check import check
from .model import check_model
from .op import Case, Index, Input, Op, Wrong
from .result import Report, Result

__all__ = [
    "Case",
    "Index",
    "Input",
    "Op",
    "Report",
    "Result",
    "Wrong",
    "check",
    "check_model",
    "otherwise",
    "refinement",
    "rescaled",
    "stored",
]
