"""Philox 4×32-10: random words as a function of a counter and a key, with no state.

    (hi₀, lo₀) = M₀·c₀,   (hi₁, lo₁) = M₁·c₂                  products of 64 bits, in halves
    (c₀, c₁, c₂, c₃) ← (hi₁ ⊕ c₁ ⊕ k₀, lo₁, hi₀ ⊕ c₃ ⊕ k₁, lo₀)      ten times
    (k₀, k₁) ← (k₀ + W₀, k₁ + W₁) mod 2³²                     between the rounds

Element i of a tensor has counter (i mod 2³², ⌊i/2³²⌋, 0, 0) and takes word 0; the key is the seed
as an unsigned 64-bit number, low half first, negative seeds in two's complement.

Shapes: counters and words of any shape, uint64 in and uint32 out.
Source: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, section 5.3; the constants
of its Random123 library.
"""

import math

import numpy as np

from ._checks import expect_integer, expect_number

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
# elements of a mask that are drawn at once
_BLOCK = 2**16


def philox(counter, key, rounds=10):
    """Four words from a counter of four words and a key of two, all below 2³²  ->  uint32."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = map(int, key)
    for _ in range(rounds):
        a, b = _M0 * c0, _M1 * c2
        c0, c1 = (b >> _HALF) ^ c1 ^ np.uint64(k0), b & _LOW
        c2, c3 = (a >> _HALF) ^ c3 ^ np.uint64(k1), a & _LOW
        k0, k1 = (k0 + _W0) % 2**32, (k1 + _W1) % 2**32
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def words(counter, seed):
    """Word 0 of each 64-bit counter under a seed  ->  uint32."""
    counter, seed = np.asarray(counter).astype(np.uint64), int(seed) % 2**64
    return philox((counter & _LOW, counter >> _HALF, 0, 0), (seed % 2**32, seed >> 32))[0]


def keep_mask(index, p, seed):
    """True where word 0 ≥ ⌊p·2³²⌋: dropped with probability p, all of them where p = 1.

    index: the counters, an integer array; or a shape, whose elements are counted in C order.
    """
    least = math.floor(p * 2**32)
    if not isinstance(index, tuple):
        return words(index, seed) >= least
    # words take a hundred times the memory of their mask
    kept = np.empty(math.prod(index), bool)
    for start in range(0, kept.size, _BLOCK):
        counters = np.arange(start, min(start + _BLOCK, kept.size), dtype=np.uint64)
        kept[start : start + _BLOCK] = words(counters, seed) >= least
    return kept.reshape(index)


def expect_dropout(op, name, p, seed):
    """Raise unless `p` (which the op calls `name`) lies in 0 … 1 and the seed has 64 bits."""
    expect_number(op, name, p)
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: {name} must lie in 0 … 1, got {p}")
    expect_integer(op, "seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed must lie in −2⁶³ … 2⁶⁴ − 1, got {seed}")
