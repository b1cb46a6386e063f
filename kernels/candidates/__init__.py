"""What `gaugeblock tune` tries, one module an op that has a table of launch configurations.

A module has

    KEY, LAUNCH          fields of a row that say what it is for, and how to launch
    candidates(row)      -> [{LAUNCH}], the row's own first, all of what may be faster and fits
    problem(row, dtype, device, candidate=None, harder=False)  -> Problem

A problem without a candidate is the representative shape that is timed. With one it is small and
odd, every tile of the candidate ragged, and the candidate must be right there. harder=True is the
same with every option that changes how the kernel is launched or what it computes; a module that
has no such thing leaves the parameter out.
"""

from collections.abc import Callable
from typing import NamedTuple


class Problem(NamedTuple):
    """A row's kernel on its inputs.

    inputs:  tensors, floating ones of the row's dtype where the op does not fix another.
    timed:   () launches what is timed, straight through the launchers.
    answers: () -> every output by the launchers.
    twin:    (*inputs) -> the same by plain torch in the inputs' dtypes, float64 too.
    names:   of the answers.
    """

    names: tuple
    inputs: tuple
    timed: Callable
    answers: Callable
    twin: Callable
