"""Which elements dropout keeps: Philox 4×32-10, a function of an element's index and the seed.

    word(i) = word 0 of Philox at counter (i mod 2³², ⌊i/2³²⌋, 0, 0), key = seed as uint64
    element i is kept iff word(i) ≥ ⌊p·2³²⌋

No state: any tile of any kernel, forward or backward, finds the same mask again.
Source: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, section 5.3.
"""

import math

import torch
import triton
import triton.language as tl

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def threshold(p):
    """The least word that is kept; 2³², more than any, where p is 1."""
    return math.floor(p * 2**32)


def signed(seed):
    """The seed's 64 bits as a number that int64 holds."""
    return (seed + 2**63) % 2**64 - 2**63


@triton.jit
def kept(index, seed, least):
    """True where the element of an int64 index is kept; least as `threshold` gives it."""
    word, _, _, _ = tl.randint4x(seed, index)
    return word.to(tl.uint32, bitcast=True).to(tl.int64) >= least


def keep_mask(index, p, seed):
    """The same in torch, for the eager twins: index an int64 tensor."""
    c0, c1 = index & _LOW, (index >> 32) & _LOW
    c2 = c3 = torch.zeros_like(index)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # 64-bit products wrap around; their halves are right all the same
        a, b = c0 * _M0, c2 * _M1
        c0, c1 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW
        c2, c3 = ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0 >= threshold(p)
