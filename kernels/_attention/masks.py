"""Who sees whom, and which tiles need a mask: the arithmetic that all attention kernels share.

Positions: query i of a row with n keys stands at i' = i + shift, key j at j. Query i sees key j iff
j < n, causal: j ≤ i'; window w: j > i' − w and, not causal, j < i' + w; keys j < global_tokens are
exempt from the window. Where an option is not used its argument is None and its code is not there.

The walk over tiles is in two parts. First the open ones, in which every query sees every key, with
no mask; then the masked ones: global keys, the window's far edge, the diagonal or the tail. Tiles
that are in neither show nothing and are skipped.
"""

import triton
import triton.language as tl

# whatever changes from call to call: one kernel for all its values
UNSPECIALIZED = ["pairs", "section", "documents", "window", "global_tokens", "least", "seed"]


@triton.jit
def locate(
    T, Tq, Tk, H, pairs, section, documents, lengths_ptr, cu_seqlens_ptr,
    BOTTOM_RIGHT: tl.constexpr, BLOCK: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Which tile of T (Tq or Tk) this program works on -> b, h, block, begin, rows, n, shift.

    Rows are counted from `begin`, where the tile's document begins, or 0; there are `rows` queries
    and n keys, and query i stands at i + shift.
    Programs take the pairs of a batch row and a head in sections whose keys fit in the L2; within a
    section the tiles that take longest come first.
    """
    blocks = tl.cdiv(T, BLOCK)
    if cu_seqlens_ptr is not None:
        blocks = T // BLOCK + documents
    number = tl.program_id(0) // (section * blocks)
    within = tl.program_id(0) - number * section * blocks
    wide = tl.minimum(section, pairs - number * section)
    block = within // wide
    if REVERSED:
        block = blocks - 1 - block
    pair = (number * section + within % wide).to(tl.int64)
    b, h = pair // H, pair % H
    begin = 0
    n = Tk
    if cu_seqlens_ptr is not None:
        # document d has the tiles from cu_seqlens[d] // BLOCK + d on, as many as any may need
        document = 0
        past = documents
        while past - document > 1:
            middle = (document + past) // 2
            below = tl.load(cu_seqlens_ptr + middle).to(tl.int32) // BLOCK + middle <= block
            document = tl.where(below, middle, document)
            past = tl.where(below, past, middle)
        # wrong numbers on the device must not lead out of the tensors
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + document).to(tl.int32), 0), T)
        end = tl.minimum(tl.load(cu_seqlens_ptr + document + 1).to(tl.int32), T)
        # nor leave rows that no document has, which nobody would write
        begin = tl.where(document == 0, 0, begin)
        end = tl.where(document + 1 == documents, T, end)
        n = tl.maximum(end - begin, 0)
        block = tl.maximum(block - begin // BLOCK - document, 0)
        begin = begin.to(tl.int64)
    if lengths_ptr is not None:
        n = tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0), Tk)
    rows = Tq if cu_seqlens_ptr is None else n
    return b, h, block, begin, rows, n, n - rows if BOTTOM_RIGHT else 0


@triton.jit
def visible(i, j, n, window, global_tokens, CAUSAL: tl.constexpr):
    """Whether the query at position i sees key j; i and j broadcast against each other."""
    seen = j < n
    if CAUSAL:
        seen = seen & (j <= i)
    if window is not None:
        near = j > i - window
        if not CAUSAL:
            near = near & (j < i + window)
        if global_tokens is not None:
            near = near | (j < global_tokens)
        seen = seen & near
    return seen


@triton.jit
def sees(offs_m, Tq, n, shift, window, global_tokens, CAUSAL: tl.constexpr):
    """Which queries see a key at all; what the others hold is never read."""
    i = offs_m + shift
    first = tl.zeros_like(i)
    last = first + n - 1
    if CAUSAL:
        last = tl.minimum(last, i)
    if window is not None:
        # a query that may see any key at all sees the first global one
        if global_tokens is None:
            first = tl.maximum(first, i - window + 1)
            if not CAUSAL:
                last = tl.minimum(last, i + window - 1)
    return (offs_m < Tq) & (first <= last)


@triton.jit
def key_span(i_first, i_last, n, window, global_tokens, CAUSAL: tl.constexpr):
    """Keys that queries at positions i_first … i_last see.

    -> low, high, global_high: no key is seen by any but low … high − 1 and those below global_high;
    open_low, open_high: every such key is seen by all.
    """
    low, open_low, global_high = 0, 0, 0
    high, open_high = n, n
    if CAUSAL:
        high = tl.minimum(n, i_last + 1)
        open_high = tl.minimum(n, i_first + 1)
    if window is not None:
        low = tl.maximum(i_first - window + 1, 0)
        open_low = tl.maximum(i_last - window + 1, 0)
        if not CAUSAL:
            high = tl.minimum(n, i_last + window)
            open_high = tl.minimum(n, i_first + window)
        if global_tokens is not None:
            global_high = tl.maximum(tl.minimum(global_tokens, high if CAUSAL else n), 0)
            high = tl.maximum(high, global_high)
    # a tile behind the last query of its document sees nothing
    high = tl.where(i_first <= i_last, high, 0)
    global_high = tl.where(i_first <= i_last, global_high, 0)
    return low, high, open_low, open_high, global_high


@triton.jit
def query_span(j_first, j_last, Tq, shift, window, global_tokens, CAUSAL: tl.constexpr):
    """Queries that see keys j_first … j_last -> low, high, open_low, open_high as in `key_span`."""
    low, open_low = 0, 0
    high, open_high = Tq, Tq
    if window is not None:
        high = tl.minimum(Tq, j_last + window - shift)
        open_high = tl.minimum(Tq, j_first + window - shift)
        if not CAUSAL:
            low = tl.maximum(j_first - window + 1 - shift, 0)
            open_low = tl.maximum(j_last - window + 1 - shift, 0)
        if global_tokens is not None:
            low = tl.where(j_first < global_tokens, 0, low)
            high = tl.where(j_first < global_tokens, Tq, high)
            open_low = tl.where(j_last < global_tokens, 0, open_low)
            open_high = tl.where(j_last < global_tokens, Tq, open_high)
    if CAUSAL:
        low = tl.maximum(j_first - shift, 0)
        open_low = tl.maximum(j_last - shift, 0)
    return low, high, open_low, open_high


@triton.jit
def tiles(low, high, open_low, open_high, global_high, BLOCK: tl.constexpr):
    """The walk over a span in tiles of BLOCK.

    -> open_first, open_last: the open tiles start at open_first, open_first + BLOCK, … < open_last;
    head, left, first, masked: what `masked_start` needs, and the number of masked tiles.
    """
    # an empty span begins and ends behind the global keys
    first = tl.where(low < high, low // BLOCK, tl.cdiv(global_high, BLOCK)) * BLOCK
    high = tl.where(low < high, high, first)
    open_first = tl.minimum(tl.maximum(tl.cdiv(open_low, BLOCK) * BLOCK, first), high)
    open_first = tl.cdiv(open_first, BLOCK) * BLOCK
    open_last = tl.maximum(tl.minimum(open_high, high) // BLOCK * BLOCK, open_first)
    head = tl.cdiv(tl.minimum(global_high, first), BLOCK)
    left = (open_first - first) // BLOCK
    masked = head + left + tl.cdiv(tl.maximum(high - open_last, 0), BLOCK)
    return open_first, open_last, head, left, first, masked


@triton.jit
def masked_start(number, open_last, head, left, first, BLOCK: tl.constexpr):
    """Where masked tile `number` starts: the global ones, left of the open ones, right of them."""
    start = open_last + (number - head - left) * BLOCK
    start = tl.where(number < head + left, first + (number - head) * BLOCK, start)
    return tl.where(number < head, number * BLOCK, start)


@triton.jit
def key_walk(
    block, rows, n, shift, window, global_tokens,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The walk of a tile of queries over the keys -> low, high, global_high; what `tiles` gives."""
    i_first = block * BLOCK_M + shift
    i_last = tl.minimum(block * BLOCK_M + BLOCK_M, rows) - 1 + shift
    low, high, open_low, open_high, global_high = key_span(
        i_first, i_last, n, window, global_tokens, CAUSAL
    )
    open_first, open_last, head, left, first, masked = tiles(
        low, high, open_low, open_high, global_high, BLOCK_N
    )
    return low, high, global_high, open_first, open_last, head, left, first, masked


@triton.jit
def query_walk(
    block, rows, n, shift, window, global_tokens,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The walk of a tile of keys over the queries: what `tiles` gives."""
    j_last = tl.minimum(block * BLOCK_N + BLOCK_N, n) - 1
    low, high, open_low, open_high = query_span(
        block * BLOCK_N, j_last, rows, shift, window, global_tokens, CAUSAL
    )
    # a tile beyond the last key has no queries, one that holds the last key no open ones
    high = tl.where(block * BLOCK_N < n, high, 0)
    open_high = tl.where(block * BLOCK_N + BLOCK_N <= n, open_high, 0)
    return tiles(low, high, open_low, open_high, 0, BLOCK_M)
