"""The feed-forward network's activations and their slopes, for epilogues of products."""

import math

import torch.nn.functional as F
import triton
import triton.language as tl

ACTIVATIONS = {
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}

_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(math.sqrt(2 / math.pi))
_SQRT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
_DENSITY_AT_0: tl.constexpr = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def _tanh(x):
    """tanh by one exponential of a number that is never positive, so that nothing overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        # a NaN must stay one
        return tl.where(z <= 0, 0.0, z)
    if ACTIVATION == "gelu":
        return z * (0.5 * (1.0 + tl.erf(z * _SQRT_HALF)))
    return 0.5 * z * (1.0 + _tanh((z + 0.044715 * z * z * z) * _SQRT_2_OVER_PI))


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """f'(z)."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * _SQRT_HALF)) + z * tl.exp(-0.5 * z * z) * _DENSITY_AT_0
    t = _tanh((z + 0.044715 * z * z * z) * _SQRT_2_OVER_PI)
    inner = (1.0 + 3 * 0.044715 * z * z) * _SQRT_2_OVER_PI
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
