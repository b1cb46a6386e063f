"""A token drawn from the truncated softmax of the logits, given a uniform number.

    s = logits/temperature,   p = softmax of s over the tokens that the filters keep
    cdf_v = Σ_{v' ≤ v} p_v',   token = the v with cdf_{v−1} ≤ u < cdf_v

Temperature 0 is greedy: the largest logit, the lowest index of equals. The filters, in this order:

    top_k   the k largest, with all that equal the k-th
    top_p   the smallest set of the most probable tokens whose mass reaches p, with all that equal
            the least probable of them
    min_p   probability ≥ min_p times the largest

Shapes: logits (..., V) of any strides, V < 2³¹; u (...); token (...) int64. Rows are flattened;
a layout that no single row stride describes is copied.
Algorithm: one program a row, which it reads from memory once: its tiles are read again from the
caches. Nothing is sorted. A logit's bits, as an ordered integer, are its key; the least key that a
filter keeps is the largest threshold that still has k tokens, or the mass p, at or above it, and is
found digit by digit from the top, each pass over the row trying PIVOTS thresholds at once: 16 bits
of bfloat16 take 8 passes of 4 thresholds, float32 16. The mass of the kept tokens of each tile is
then summed; the tile and the token in it whose interval holds u come from two scans.
Sums are trees, in float32, of the same order in every pass: a row's answer depends on no other row,
and is the same every time. Within a rounding of a boundary either neighbour is right.
A logit of −∞ is never drawn; of a row with NaN, +∞ or −∞ alone the token is any, in 0 … V − 1.
u is checked on the CPU; on CUDA, where asking would stall the stream, what is below 0 draws the
first kept token, 1 and above the last.
No gradient: a choice has none.
dtypes: float16, bfloat16, float32, float64; options and, but for float64, u pass as float32.
Source: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2020, arXiv:1904.09751 (top-p);
Nguyen et al. 2024, arXiv:2407.01082 (min-p).
"""

import math

import torch
import triton
import triton.language as tl

from ._checks import expect_alike, expect_integer, expect_number, expect_shape, readable
from ._configurations import architecture, find
from ._launch import launch, resolve, tile, tl_accumulator, wide

_SHORT = 1024
# beyond so many temperatures below the largest a probability is 0
_NEGLIGIBLE = 800
# temperatures whose inverse, and whose product with that many, float32 holds
_COLDEST, _HOTTEST = 1e-30, 1e30
# float32 holds the sum of so much, whatever p is
_LEAST_MASS: tl.constexpr = tl.constexpr(1e-30)


@triton.jit
def _load(row_ptr, start, stride_v, V, BLOCK_V: tl.constexpr, ACC: tl.constexpr):
    """A tile of logits, −∞ past the end; −0 becomes 0."""
    offs_v = start + tl.arange(0, BLOCK_V)
    x = tl.load(row_ptr + offs_v.to(tl.int64) * stride_v, mask=offs_v < V, other=float("-inf"))
    return x.to(ACC) + 0.0


@triton.jit
def _key(x, SPARE: tl.constexpr):
    """An integer that is larger where x is; SPARE low bits are 0 in every x."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SPARE


@triton.jit
def _weight(x, most, lowest, inverse):
    """exp((x − most)/temperature), 0 far below."""
    return tl.exp(tl.maximum(x - most, lowest) * inverse)


@triton.jit
def _threshold(
    row_ptr, stride_v, V, most, lowest, inverse, least, want,
    BY_MASS: tl.constexpr, KEY: tl.constexpr, SPARE: tl.constexpr, DIGIT: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The largest key at or above which there are `want` tokens.

    BY_MASS: that share of the mass of the tokens from `least` on.
    """
    BITS: tl.constexpr = KEY.primitive_bitwidth - SPARE
    PIVOTS: tl.constexpr = 1 << DIGIT
    tl.static_assert(BITS % DIGIT == 0)
    digits = tl.arange(0, PIVOTS).to(KEY)
    found = tl.full((), -(1 << (BITS - 1)), KEY)
    for step in range(BITS // DIGIT):
        shift = BITS - DIGIT * (step + 1)
        pivots = found + (digits << shift)
        total = tl.zeros((PIVOTS,), ACC if BY_MASS else tl.int32)
        for start in range(0, V, BLOCK_V):
            x = _load(row_ptr, start, stride_v, V, BLOCK_V, ACC)
            key = _key(x, SPARE)
            above = key[None, :] >= pivots[:, None]
            if BY_MASS:
                e = tl.where(key >= least, _weight(x, most, lowest, inverse), 0.0)
                total += tl.sum(tl.where(above, e[None, :], 0.0), 1)
            else:
                total += tl.sum(above.to(tl.int32), 1)
        if BY_MASS:
            # everything is above the first threshold of all
            mass = tl.sum(tl.where(digits == 0, total, 0.0), 0)
            share = tl.maximum(want * mass, _LEAST_MASS)
            want = tl.where(step == 0, share, want)
        # what was found holds enough already: a digit of 0 needs no proof
        enough = (total >= want) | (digits == 0)
        found += (tl.sum(enough.to(KEY), 0) - 1) << shift
    return found


@triton.jit
def _kept_weight(x, most, lowest, inverse, least, min_p, SPARE: tl.constexpr):
    """The weight of a token that the filters keep; of others 0. The largest weight is 1."""
    e = _weight(x, most, lowest, inverse)
    if least is not None:
        e = tl.where(_key(x, SPARE) >= least, e, 0.0)
    if min_p is not None:
        e = tl.where(e >= min_p, e, 0.0)
    return e


@triton.jit
def _first(cdf, weights, offs, target):
    """The first offset that may be drawn whose interval ends beyond the target, or the last."""
    beyond = tl.min(tl.where((cdf > target) & (weights > 0), offs, 0x7FFFFFFF), 0)
    return tl.minimum(beyond, tl.max(tl.where(weights > 0, offs, 0), 0))


@triton.jit
def _sample_fwd_kernel(
    logits_ptr, u_ptr, token_ptr, stride_m, stride_v, V, lowest, inverse, top_k, top_p, min_p,
    GREEDY: tl.constexpr, TILES: tl.constexpr, DIGIT: tl.constexpr, BLOCK_V: tl.constexpr,
    KEY: tl.constexpr, SPARE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_m
    offs_v = tl.arange(0, BLOCK_V)
    best = tl.full((BLOCK_V,), float("-inf"), ACC)
    at = offs_v
    for start in range(0, V, BLOCK_V):
        x = _load(row_ptr, start, stride_v, V, BLOCK_V, ACC)
        if GREEDY:
            at = tl.where(x > best, start + offs_v, at)
        best = tl.maximum(best, x)
    most = tl.max(best, 0)
    if GREEDY:
        token = tl.min(tl.where(best == most, at, V - 1), 0)
        tl.store(token_ptr + row, tl.cast(token, tl.int64))
    else:
        # of a row of −∞ alone the differences must not be NaN
        most = tl.where(most == float("-inf"), 0.0, most)
        least = None
        if top_k is not None:
            least = _threshold(
                row_ptr, stride_v, V, most, lowest, inverse, 0, top_k,
                False, KEY, SPARE, DIGIT, BLOCK_V, ACC,
            )  # fmt: skip
        if top_p is not None:
            if least is None:
                least = _key(tl.full((), float("-inf"), ACC), SPARE)
            least = tl.maximum(least, _threshold(
                row_ptr, stride_v, V, most, lowest, inverse, least, top_p,
                True, KEY, SPARE, DIGIT, BLOCK_V, ACC,
            ))  # fmt: skip
        offs_t = tl.arange(0, TILES)
        masses = tl.zeros((TILES,), ACC)
        for start in range(0, V, BLOCK_V):
            x = _load(row_ptr, start, stride_v, V, BLOCK_V, ACC)
            e = _kept_weight(x, most, lowest, inverse, least, min_p, SPARE)
            masses = tl.where(offs_t == start // BLOCK_V, tl.sum(e, 0), masses)
        cdf = tl.cumsum(masses, 0)
        target = tl.load(u_ptr + row).to(ACC) * tl.sum(masses, 0)
        start = _first(cdf, masses, offs_t, target) * BLOCK_V
        below = tl.sum(tl.where(offs_t * BLOCK_V < start, masses, 0.0), 0)
        x = _load(row_ptr, start, stride_v, V, BLOCK_V, ACC)
        e = _kept_weight(x, most, lowest, inverse, least, min_p, SPARE)
        token = start + _first(below + tl.cumsum(e, 0), e, offs_v, target)
        tl.store(token_ptr + row, tl.cast(tl.minimum(token, V - 1), tl.int64))


def _configuration(V, dtype):
    """Launch options for rows of V logits: a pure function of shape, dtype and chip."""
    bits = 16 if dtype.itemsize == 2 else 32
    row = find("sample", kernel="rows", architecture=architecture(), bits=bits)
    BLOCK_V = tile(V, row["BLOCK_V"])
    tiles = triton.cdiv(V, BLOCK_V)
    # a pass over one short tile is all waiting: fewer of them, with more thresholds
    short = tiles == 1 and BLOCK_V <= _SHORT
    return dict(
        BLOCK_V=BLOCK_V,
        TILES=triton.next_power_of_2(tiles),
        DIGIT=4 if short else row["DIGIT"],
        KEY=tl.int64 if dtype == torch.float64 else tl.int32,
        # of float32 bits, in which 16-bit logits leave so many unused; a multiple of a digit stays
        SPARE={torch.bfloat16: 16, torch.float16: 12}.get(dtype, 0),
        ACC=tl_accumulator(dtype),
        num_warps=row["num_warps"],
    )


def _held(temperature):
    """The nearest temperature that float32 can divide by."""
    return min(max(temperature, _COLDEST), _HOTTEST)


def _forward(logits, u, temperature, top_k, top_p, min_p):
    """logits (M, V), u (M,) -> token (M,)."""
    M, V = logits.shape
    token = torch.empty((M,), dtype=torch.int64, device=logits.device)
    greedy = temperature == 0
    if greedy:
        top_k = top_p = min_p = None
    temperature = _held(temperature)
    launch(
        _sample_fwd_kernel, M,
        logits, u.contiguous(), token, *logits.stride(), V,
        -_NEGLIGIBLE * temperature, 1 / temperature,
        None if top_k is None or top_k >= V else top_k,
        # 1 keeps everything, however the mass was rounded
        None if top_p is None or top_p >= 1 else top_p,
        min_p or None,
        GREEDY=greedy, **_configuration(V, logits.dtype),
    )  # fmt: skip
    return token


def _launch_all(logits, u, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """One call straight through the launchers, to be compiled."""
    return _forward(logits, u, temperature, top_k, top_p, min_p)


@torch.library.custom_op("gaugeblock::sample_fwd", mutates_args=())
def _fwd_op(
    logits: torch.Tensor, u: torch.Tensor, temperature: float,
    top_k: int | None, top_p: float | None, min_p: float | None,
) -> torch.Tensor:  # fmt: skip
    return _forward(logits, u, temperature, top_k, top_p, min_p)


@_fwd_op.register_fake
def _(logits, u, temperature, top_k, top_p, min_p):
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


def _eager(logits, u, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The plain torch twin."""
    x = wide(logits)
    if temperature == 0:
        return x.argmax(-1)
    s = x / _held(temperature)
    kept = s > -math.inf
    if top_k is not None:
        kept = kept & (s >= s.topk(min(top_k, s.shape[-1])).values[..., -1:])
    if top_p is not None and top_p < 1:
        ordered = s.where(kept, -math.inf).sort().values
        stays = ordered.softmax(-1).cumsum(-1) > 1 - top_p
        stays[..., -1] = True
        kept = kept & (s >= ordered.where(stays, math.inf).amin(-1, keepdim=True))
    if min_p is not None:
        p = s.where(kept, -math.inf).softmax(-1)
        kept = kept & (p >= min_p * p.amax(-1, keepdim=True))
    cdf = s.where(kept, -math.inf).softmax(-1).cumsum(-1)
    total = cdf[..., -1:]
    # u below 1 may be rounded up to it
    target = (u.to(cdf.dtype)[..., None] * total).minimum(total.nextafter(total.new_zeros(())))
    return (cdf > target).int().argmax(-1)


def sample(logits, u, temperature=1.0, top_k=None, top_p=None, min_p=None, *, impl="auto"):
    """The token whose cumulative interval holds u, among those that the filters keep.

    Shapes: logits (..., V); u (...), floating, in 0 … 1, 1 excluded; token (...) int64.
    Temperature 0 is greedy: the lowest index of the largest logit.
    Raises ValueError for shapes, options, devices or (on a CPU) u out of range, TypeError for
    dtypes.
    """
    expect_alike("sample", logits=logits)
    _expect_u(logits, u)
    _expect_filters(temperature, top_k, top_p, min_p)
    if resolve("sample", impl, logits) == "eager":
        return _eager(logits, u, temperature, top_k, top_p, min_p)
    top_k = None if top_k is None else int(top_k)
    top_p, min_p = (None if x is None else float(x) for x in (top_p, min_p))
    rows = logits.reshape(-1, logits.shape[-1])
    return _fwd_op(rows, u.reshape(-1), float(temperature), top_k, top_p, min_p).view(u.shape)


def _expect_u(logits, u):
    if not isinstance(u, torch.Tensor) or not u.is_floating_point():
        got = u.dtype if isinstance(u, torch.Tensor) else type(u).__name__
        raise TypeError(f"sample: u must be a floating tensor, got {got}")
    if u.device != logits.device:
        raise ValueError(
            f"sample: u must be on logits's device {logits.device}, got {u.device}; move it"
        )
    expect_shape("sample", "logits", logits, "(..., V)", (*u.shape, None))
    if logits.shape[-1] < 1:
        raise ValueError("sample: V must be at least 1, got 0")
    if readable(u):
        outside = u[~((u >= 0) & (u < 1))]
        if len(outside):
            raise ValueError(f"sample: u must lie in 0 … 1, 1 excluded, got {float(outside[0])}")


def _expect_filters(temperature, top_k, top_p, min_p):
    for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        if value is not None or name == "temperature":
            expect_number("sample", name, value)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sample: temperature must be finite and at least 0, got {temperature}")
    if top_k is not None:
        expect_integer("sample", "top_k", top_k)
        if top_k < 1:
            raise ValueError(f"sample: top_k must be at least 1, got {top_k}; None keeps all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample: top_p must lie in 0 … 1, 0 excluded, got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"sample: min_p must lie in 0 … 1, got {min_p}")
