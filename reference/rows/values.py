"""Values that cases put in place of normal ones: each takes (array, dims, rng)."""

import numpy as np


def offset_64(x, dims, rng):
    """A residual stream far from zero, where a one-pass variance loses its digits."""
    return x + 64


def outlier_row(x, dims, rng):
    """One row a thousand times the others."""
    x[-1] *= 1000
    return x


def constant_rows(x, dims, rng):
    return np.broadcast_to(x[..., :1], x.shape).copy()


def spread_by_100(x, dims, rng):
    """Values so far apart that exp overflows unless the maximum is subtracted."""
    return x * 100


def some_ignored(targets, dims, rng):
    targets[::3] = -100
    return targets


def all_ignored(targets, dims, rng):
    return np.full_like(targets, -100)


def all_positive(x, dims, rng):
    return np.abs(x)


def rising(x, dims, rng):
    """Keys that score higher the later they come: the running maximum rises in every tile."""
    return x + np.linspace(0, 8, x.shape[-2])[:, None]


def spread_by_10(x, dims, rng):
    return x * 10


def tiny(x, dims, rng):
    return x * 1e-6


def all_negative(x, dims, rng):
    return -np.abs(x)


def huge_outlier(x, dims, rng):
    """One value a thousand times the others."""
    if x.size:
        x.flat[x.size // 2] = 1000 * np.sign(x.flat[x.size // 2])
    return x


def repeated_tokens(tokens, dims, rng):
    return tokens % 2


def zeros(x, dims, rng):
    return np.zeros_like(x)


def offset_minus_64(x, dims, rng):
    return x - 64
