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

# tanh-GELU is z·σ(2u), u = √(2/π)·(z + 0.044715 z³): −2u·log2(e) = z·(_LINEAR + _CUBIC·z²)
_LINEAR: tl.constexpr = tl.constexpr(-2 * math.sqrt(2 / math.pi) / math.log(2))
_CUBIC: tl.constexpr = tl.constexpr(-2 * math.sqrt(2 / math.pi) / math.log(2) * 0.044715)
_LN2: tl.constexpr = tl.constexpr(math.log(2))
_SQRT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
_DENSITY_AT_0: tl.constexpr = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def _gate_inverse(z):
    """(1/σ(2u), whether float32 has nothing so small as σ(2u)), by one exponential.

    Its argument is kept where float32 holds the result.
    """
    t = z * (_LINEAR + _CUBIC * z * z)
    return 1.0 + tl.exp2(tl.minimum(t, 126.0, propagate_nan=tl.PropagateNan.ALL)), t > 126.0


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        # a NaN must stay one
        return tl.where(z <= 0, 0.0, z)
    if ACTIVATION == "gelu":
        return z * (0.5 * (1.0 + tl.erf(z * _SQRT_HALF)))
    inverse, closed = _gate_inverse(z)
    return tl.where(closed, 0.0, z / inverse)


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """f'(z)."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * _SQRT_HALF)) + z * tl.exp(-0.5 * z * z) * _DENSITY_AT_0
    inverse, closed = _gate_inverse(z)
    g = tl.where(closed, 0.0, 1.0 / inverse)
    return g - z * g * (1.0 - g) * (_LN2 * _LINEAR + 3 * _LN2 * _CUBIC * z * z)
