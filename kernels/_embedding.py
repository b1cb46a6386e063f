"""Token embedding plus learned positions.

    y[..., t, :] = wte[tokens[..., t]] + wpe[positions[..., t]]
    dwte[v] = Σ over tokens equal to v of dy,   dwpe likewise over positions

Shapes: tokens (..., T) int32 or int64; wte (V, C); wpe (P, C) or None; positions broadcastable to
tokens, 0 … T−1 by default; y (..., T, C). Any strides; those of dy that no single row stride
describes are copied.
Algorithm: forward, one kernel: two rows are read, their sum is written. dwte: torch sorts the
tokens (stable); the sorted positions are cut into blocks of BLOCK_M, and one program adds up the
gradient rows of a block in their order, token after token. A token that lies in one block is stored
at once, in a table filled with zeros; of one that crosses into others each block leaves a partial
sum, and a second kernel adds these up in the order of the blocks. dwpe: for default positions a sum
over the batch; for given ones the same way as dwte.
No atomics, nothing waits for the host: bitwise deterministic, and no update is lost however often a
token occurs.
Ids out of range are a ValueError on a CPU; on CUDA, where asking would stall the stream, they make
their rows of y NaN, and take part in no gradient.
Saved for backward: tokens and positions alone.
dtypes: float16, bfloat16, float32, float64; sums in float32, or float64 for float64.
Source: Radford et al. 2018, section 3.1 (h₀ = U Wₑ + Wₚ).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ._checks import expect_alike, expect_integers, expect_shape, readable
from ._configurations import architecture, find
from ._launch import accumulator, cast, launch, resolve, tile, tl_accumulator, wide

# partial sums that are added at a time
_PARTS = 32


@triton.jit
def _rows_of(
    table_ptr, index, rows, stride_v, stride_c, mask, offs_n, mask_n, ACC: tl.constexpr
):  # fmt: skip
    """Rows of a table at index, NaN where it lies outside."""
    inside = (index >= 0) & (index < rows)
    ptrs = table_ptr + index[:, None] * stride_v + offs_n[None, :] * stride_c
    x = tl.load(ptrs, mask=(mask & inside)[:, None] & mask_n[None, :], other=0.0)
    return tl.where(inside[:, None], x.to(ACC), float("nan"))


@triton.jit
def _embedding_fwd_kernel(
    tokens_ptr, wte_ptr, wpe_ptr, positions_ptr, y_ptr,
    stride_tv, stride_tc, stride_pv, stride_pc, M, V, P, C, period,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_N)
    offs_m = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < C
    tokens = tl.load(tokens_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    y = _rows_of(wte_ptr, tokens, V, stride_tv, stride_tc, mask_m, offs_n, mask_n, ACC)
    if wpe_ptr is not None:
        t = offs_m % period
        if positions_ptr is not None:
            t = tl.load(positions_ptr + t, mask=mask_m, other=0).to(tl.int64)
        y += _rows_of(wpe_ptr, t, P, stride_pv, stride_pc, mask_m, offs_n, mask_n, ACC)
    mask = mask_m[:, None] & mask_n[None, :]
    y = cast(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * C + offs_n[None, :], y, mask=mask)


@triton.jit
def _embedding_bwd_blocks_kernel(
    dy_ptr, ids_ptr, order_ptr, table_ptr, part_ptr,
    stride_dm, stride_dc, M, V, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of the ids that lie in one block of sorted positions; of others, partial sums.

    A block has two of these: of the id that enters from the block before, and of the one that goes
    on into the next.
    """
    columns = tl.cdiv(C, BLOCK_N)
    block = (tl.program_id(0) // columns).to(tl.int64)
    offs_n = (tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < C
    part_ptr += 2 * block * C + offs_n
    first = block * BLOCK_M
    stop = tl.minimum(first + BLOCK_M, M)
    token = tl.load(ids_ptr + first).to(tl.int64)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=0).to(tl.int64)
    entered = ((first > 0) & (before == token)).to(tl.int32)
    acc = tl.zeros((BLOCK_N,), ACC)
    for i in tl.range(first, stop, num_stages=STAGES):
        row = tl.load(order_ptr + i)
        following = tl.load(ids_ptr + i + 1, mask=i + 1 < M, other=-1).to(tl.int64)
        acc += tl.load(dy_ptr + row * stride_dm + offs_n * stride_dc, mask=mask_n, other=0.0).to(
            ACC
        )
        ends = ((i + 1 == M) | (following != token)).to(tl.int32)
        whole = (ends > entered) & (token >= 0) & (token < V)
        dw = cast(acc, table_ptr.dtype.element_ty)
        tl.store(table_ptr + token * C + offs_n, dw, mask=mask_n & whole)
        tl.store(part_ptr, acc, mask=mask_n & (ends * entered > 0))
        acc = tl.where(ends > 0, 0.0, acc)
        # what goes on from here began here, unless it has not ended yet
        entered *= 1 - ends
        token = following
    goes_on = tl.load(ids_ptr + stop - 1).to(tl.int64) == token
    tl.store(part_ptr + (1 - entered) * C, acc, mask=mask_n & (goes_on & (stop < M)))


@triton.jit
def _embedding_bwd_merge_kernel(
    ids_ptr, part_ptr, table_ptr, M, V, C,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sum of the id that begins in a block and goes on into the next."""
    columns = tl.cdiv(C, BLOCK_N)
    block = (tl.program_id(0) // columns).to(tl.int64)
    offs_n = (tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < C
    first = block * BLOCK_M
    token = tl.load(ids_ptr + first + BLOCK_M).to(tl.int64)
    last = tl.load(ids_ptr + first + BLOCK_M - 1).to(tl.int64)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    begins = (first == 0) | (before != token)
    if begins & (last == token) & (token >= 0) & (token < V):
        offs_p = tl.arange(0, BLOCK_P)
        acc = tl.load(part_ptr + (2 * block + 1) * C + offs_n, mask=mask_n, other=0.0)
        at = block + 1
        more = 1
        while more > 0:
            starts = (at + offs_p) * BLOCK_M
            ids = tl.load(ids_ptr + starts, mask=starts < M, other=-1).to(tl.int64)
            goes_on = (ids == token) & (starts < M)
            offs = 2 * (at + offs_p)[:, None] * C + offs_n[None, :]
            mask = goes_on[:, None] & mask_n[None, :]
            acc += tl.sum(tl.load(part_ptr + offs, mask=mask, other=0.0), 0)
            at += BLOCK_P
            # sorted: where the last of these goes on, all do
            more = tl.min(goes_on.to(tl.int32), 0)
        tl.store(table_ptr + token * C + offs_n, cast(acc, table_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _embedding_bwd_positions_kernel(
    dy_ptr, dwpe_ptr, stride_dm, stride_dc, M, T, P, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Positions 0 … T−1 in every row of the batch: its sum; zeros behind them."""
    columns = tl.cdiv(C, BLOCK_N)
    offs_t = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < C
    mask = (offs_t < T)[:, None] & mask_n[None, :]
    ptrs = dy_ptr + offs_t[:, None] * stride_dm + offs_n[None, :] * stride_dc
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in tl.range(0, M, T, num_stages=STAGES):
        acc += tl.load(ptrs + tl.cast(start, tl.int64) * stride_dm, mask=mask, other=0.0).to(ACC)
    dwpe = cast(acc, dwpe_ptr.dtype.element_ty)
    mask = (offs_t < P)[:, None] & mask_n[None, :]
    tl.store(dwpe_ptr + offs_t[:, None] * C + offs_n[None, :], dwpe, mask=mask)


def _configuration(kernel, C, dtype):
    """-> BLOCK_M, BLOCK_N, num_warps, STAGES of "forward", "blocks" or "positions"."""
    row = find(
        "embedding",
        kernel=kernel,
        architecture=architecture(),
        bits=16 if dtype.itemsize == 2 else 32,
    )
    options = {name: row[name] for name in ("BLOCK_M", "num_warps")}
    options |= {"BLOCK_N": tile(C, row["BLOCK_N"]), "ACC": tl_accumulator(dtype)}
    return options if kernel == "forward" else options | {"STAGES": row["STAGES"]}


def _programs(rows, C, options):
    return triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(C, options["BLOCK_N"])


def _forward(tokens, wte, wpe, positions, period):
    """tokens (M,), positions None or (period,) -> y (M, C)."""
    (M,), (V, C) = tokens.shape, wte.shape
    tokens, positions = tokens.contiguous(), None if positions is None else positions.contiguous()
    y = torch.empty((M, C), dtype=wte.dtype, device=wte.device)
    options = _configuration("forward", C, wte.dtype)
    P, strides = (0, (0, 0)) if wpe is None else (len(wpe), wpe.stride())
    launch(
        _embedding_fwd_kernel, _programs(M, C, options),
        tokens, wte, wpe, positions, y, *wte.stride(), *strides, M, V, P, C, period, **options,
    )  # fmt: skip
    return y


def _backward(dy, tokens, positions, period, V, P):
    """-> dwte (V, C), dwpe (P, C)."""
    M, C = dy.shape
    dwte = _summed(dy, tokens, V)
    if positions is not None:
        return dwte, _summed(dy, positions.expand(M // max(period, 1), period).reshape(-1), P)
    dwpe = torch.empty((P, C), dtype=dy.dtype, device=dy.device)
    options = _configuration("positions", C, dy.dtype)
    launch(
        _embedding_bwd_positions_kernel, _programs(P, C, options),
        dy, dwpe, *dy.stride(), M, max(period, 1), P, C, **options,
    )  # fmt: skip
    return dwte, dwpe


def _summed(dy, ids, V):
    """The sums (V, C) of the rows of dy that have the same id."""
    M, C = dy.shape
    table = torch.zeros((V, C), dtype=dy.dtype, device=dy.device)
    if M == 0:
        return table
    ids, order = torch.sort(ids, stable=True)
    options = _configuration("blocks", C, dy.dtype)
    blocks = triton.cdiv(M, options["BLOCK_M"])
    part = torch.empty((blocks, 2, C), dtype=accumulator(dy.dtype), device=dy.device)
    launch(
        _embedding_bwd_blocks_kernel, _programs(M, C, options),
        dy, ids, order, table, part, *dy.stride(), M, V, C, **options,
    )  # fmt: skip
    BLOCK_N = tile(C, 128)
    launch(
        _embedding_bwd_merge_kernel, (blocks - 1) * triton.cdiv(C, BLOCK_N),
        ids, part, table, M, V, C,
        BLOCK_M=options["BLOCK_M"], BLOCK_P=_PARTS, BLOCK_N=BLOCK_N, ACC=options["ACC"],
        num_warps=4,
    )  # fmt: skip
    return table


def _launch_all(tokens, wte, wpe):
    """One forward and backward call straight through the launchers, to be compiled.

    With positions by default, and given.
    """
    T, tokens = tokens.shape[-1], tokens.reshape(-1)
    found = []
    for positions in (None, torch.arange(T, dtype=tokens.dtype, device=tokens.device)):
        y = _forward(tokens, wte, wpe, positions, T)
        found.append((y, _backward(y, tokens, positions, T, len(wte), len(wpe))))
    return found


@torch.library.custom_op("gaugeblock::embedding_fwd", mutates_args=())
def _fwd_op(
    tokens: torch.Tensor, wte: torch.Tensor, wpe: torch.Tensor | None,
    positions: torch.Tensor | None, period: int,
) -> torch.Tensor:  # fmt: skip
    return _forward(tokens, wte, wpe, positions, period)


@_fwd_op.register_fake
def _(tokens, wte, wpe, positions, period):
    return wte.new_empty((tokens.shape[0], wte.shape[1]))


@torch.library.custom_op("gaugeblock::embedding_bwd", mutates_args=())
def _bwd_op(
    dy: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor | None,
    period: int, V: int, P: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _backward(dy, tokens, positions, period, V, P)


@_bwd_op.register_fake
def _(dy, tokens, positions, period, V, P):
    return dy.new_empty((V, dy.shape[1])), dy.new_empty((P, dy.shape[1]))


def _save(ctx, inputs, output):
    tokens, wte, wpe, positions, ctx.period = inputs
    ctx.has_wpe = wpe is not None
    ctx.rows = wte.shape[0], wpe.shape[0] if ctx.has_wpe else 0
    ctx.save_for_backward(tokens, positions)


def _differentiate(ctx, dy):
    dwte, dwpe = _bwd_op(dy, *ctx.saved_tensors, ctx.period, *ctx.rows)
    return None, dwte, dwpe if ctx.has_wpe else None, None, None


_fwd_op.register_autograd(_differentiate, setup_context=_save)


def _eager(tokens, wte, wpe=None, positions=None):
    """The plain torch twin."""
    y = _looked_up(tokens, wte)
    if wpe is not None:
        if positions is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
        y = y + _looked_up(positions, wpe)
    return y.to(wte.dtype)


def _looked_up(ids, table):
    """Rows in the accumulators' dtype; in it their gradients are added too."""
    if table.requires_grad and torch.is_grad_enabled():
        return F.embedding(ids, wide(table))
    return wide(F.embedding(ids, table))


def embedding(tokens, wte, wpe=None, positions=None, *, impl="auto"):
    """y = wte[tokens] + wpe[positions].

    Shapes: tokens (..., T) int32 or int64; wte (V, C); wpe (P, C), or None for tokens alone;
    positions broadcastable to tokens, 0 … T−1 by default; y (..., T, C).
    Raises ValueError for shapes, devices or (on a CPU) ids out of range, TypeError for dtypes.
    """
    expect_alike("embedding", wte=wte, **({} if wpe is None else {"wpe": wpe}))
    expect_shape("embedding", "wte", wte, "(V, C)", (None, None))
    _expect_ids(wte, "tokens", tokens, "V", len(wte))
    if tokens.ndim == 0:
        raise ValueError("embedding: tokens must have shape (..., T), got ()")
    if wpe is not None:
        expect_shape("embedding", "wpe", wpe, "(P, C)", (None, wte.shape[1]))
        _expect_positions(tokens, wpe, positions)
    if resolve("embedding", impl, wte) == "eager":
        return _eager(tokens, wte, wpe, positions)
    period = tokens.shape[-1]
    if wpe is None:
        positions = None
    elif positions is not None:
        # the same in every row of the batch, as a model gives them, or all of them
        own_rows = positions.shape[:-1].numel() > 1
        whole = positions.expand(tokens.shape) if own_rows else positions.ravel().expand(period)
        positions = whole.reshape(-1)
        period = positions.shape[0]
    y = _fwd_op(tokens.reshape(-1), wte, wpe, positions, period)
    return y.view(*tokens.shape, wte.shape[1])


def _expect_ids(wte, name, ids, rule, size):
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"embedding: {name} must be a torch tensor, got {type(ids).__name__}")
    expect_integers("embedding", name, ids)
    if ids.device != wte.device:
        raise ValueError(
            f"embedding: {name} must be on wte's device {wte.device}, got {ids.device}; move it"
        )
    if readable(ids):
        wrong = ids[(ids < 0) | (ids >= size)]
        if len(wrong):
            raise ValueError(
                f"embedding: {name} must lie in 0 … {rule} − 1 = {size - 1}, got {int(wrong[0])}"
            )


def _expect_positions(tokens, wpe, positions):
    T, P = tokens.shape[-1], len(wpe)
    if positions is None:
        if T > P:
            raise ValueError(
                f"embedding: positions must lie in 0 … P − 1 = {P - 1}, got {T - 1}; "
                "give shorter rows, or positions"
            )
        return
    _expect_ids(wpe, "positions", positions, "P", P)
    shape, got = tuple(tokens.shape), tuple(positions.shape)
    # not `in`, which torch.compile does not see through where sizes are symbols
    fits = all(have == 1 or have == want for have, want in zip(got[::-1], shape[::-1]))
    if len(got) > len(shape) or not fits:
        raise ValueError(
            f"embedding: positions must be broadcastable to tokens' shape {shape}, got {got}"
        )
