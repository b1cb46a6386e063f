"""One-line errors: name, rule, received value, remedy."""

import operator

import numpy as np


def expect_shape(op, name, array, rule, shape):
    """Raise ValueError unless `array` has `shape`; None in `shape` leaves that dimension free."""
    got = np.shape(array)
    if len(got) != len(shape) or any(want not in (None, have) for want, have in zip(shape, got)):
        free = any(want is None for want in shape)
        want = rule if free else f"{rule} = {tuple(shape)}"
        raise ValueError(f"{op}: {name} must have shape {want}, got {got}")


def expect_rows(op, name, array, rule):
    """Raise ValueError for a scalar, which has no columns."""
    if np.ndim(array) == 0:
        raise ValueError(f"{op}: {name} must have shape {rule}, got ()")


def expect_choice(op, name, value, choices):
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def expect_integer(op, name, value):
    try:
        operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{op}: {name} must be an integer, got {kind}") from None


def expect_number(op, name, value):
    if not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def expect_ids(op, name, ids, size, rule, also=None):
    """The ids as integers, each in 0 … size − 1 (or equal to `also`)."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} must be integers, got {ids.dtype}")
    wrong = (ids < 0) | (ids >= size)
    if also is not None:
        wrong &= ids != also
    if wrong.any():
        raise ValueError(
            f"{op}: {name} must lie in 0 … {rule} − 1 = {size - 1}, got {int(ids[wrong].flat[0])}"
        )
    return ids
