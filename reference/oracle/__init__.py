"""The oracle: is this kernel right? Budgets are derived, never set by hand."""

from .check import Report, Result, check
from .op import Case, Index, Input, Op, Wrong

__all__ = ["Case", "Index", "Input", "Op", "Report", "Result", "Wrong", "check"]
