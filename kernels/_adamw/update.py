"""The kernels: one step of a chunk of a tensor, and the norm of all gradients in two stages."""

import triton
import triton.language as tl

from .._launch import cast

# of the table of tensors: addresses of p, g, m, v and master; elements
_COLUMNS: tl.constexpr = tl.constexpr(6)
# what a step needs of a tensor's hyperparameters: see launchers.coefficients
_COEFFICIENTS: tl.constexpr = tl.constexpr(7)
# Programs that add squares, each its chunks in turn, whatever the chip: the norm's bits depend on
# the tensors alone. Two waves on the largest chips, and one tile of partial sums for the last one.
SQUARES_PROGRAMS = 1024


@triton.jit
def _pointer(table_ptr, tensor, column, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a table's cell; what is known of it comes from the launcher."""
    ptr = tl.load(table_ptr + tensor * _COLUMNS + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _load(ptr, offs, n, other: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr):
    # a mask would split loads of 16 bytes: the end of a tensor need not be one of theirs
    if MASKED:
        return tl.load(ptr + offs, mask=offs < n, other=other).to(ACC)
    else:
        return tl.load(ptr + offs).to(ACC)


@triton.jit
def _store(ptr, offs, n, x, MASKED: tl.constexpr):
    x = cast(x, ptr.dtype.element_ty)
    if MASKED:
        tl.store(ptr + offs, x, mask=offs < n)
    else:
        tl.store(ptr + offs, x)


@triton.jit
def _step_tile(
    p_ptr, g_ptr, m_ptr, v_ptr, master_ptr, offs, n, factor,
    decay, rate1, beta2, rate2, length, root, eps,
    HAS_MASTER: tl.constexpr, CLIP: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    g = _load(g_ptr, offs, n, 0.0, MASKED, ACC)
    m = _load(m_ptr, offs, n, 0.0, MASKED, ACC)
    # 1: where eps is 0, what is masked must not divide 0 by 0
    v = _load(v_ptr, offs, n, 1.0, MASKED, ACC)
    if HAS_MASTER:
        p = _load(master_ptr, offs, n, 0.0, MASKED, ACC)
    else:
        p = _load(p_ptr, offs, n, 0.0, MASKED, ACC)
    if CLIP:
        g = g * factor
    m = m + rate1 * (g - m)
    v = beta2 * v + rate2 * (g * g)
    # correctly rounded: the compiler's own float32 roots and quotients may be off by 2 ulp
    if tl.float32 == ACC:
        p = p * decay - length * tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
    else:
        p = p * decay - length * (m / (tl.sqrt(v) * root + eps))
    _store(m_ptr, offs, n, m, MASKED)
    _store(v_ptr, offs, n, v, MASKED)
    _store(p_ptr, offs, n, p, MASKED)
    if HAS_MASTER:
        _store(master_ptr, offs, n, p, MASKED)


@triton.jit
def _step_chunk(
    p_ptr, g_ptr, m_ptr, v_ptr, master_ptr, chunk, n, norm_ptr, max_norm,
    decay, rate1, beta2, rate2, length, root, eps,
    HAS_MASTER: tl.constexpr, CLIP: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    factor = 1.0
    if CLIP:
        norm = tl.load(norm_ptr)
        factor = max_norm / (norm + 1e-6)
        # written so that a NaN stays one
        factor = tl.where(factor > 1.0, 1.0, factor)
        if SKIP:
            # a tensor without elements is left as it is; true of neither inf nor NaN
            n = tl.where(tl.abs(norm) < float("inf"), n, 0)
    begin = chunk * (BLOCK_N * STEPS)
    end = begin + BLOCK_N * STEPS
    if end <= n:
        for start in range(begin, end, BLOCK_N):
            _step_tile(
                p_ptr, g_ptr, m_ptr, v_ptr, master_ptr, start + tl.arange(0, BLOCK_N), n, factor,
                decay, rate1, beta2, rate2, length, root, eps, HAS_MASTER, CLIP, False, ACC,
            )  # fmt: skip
    else:
        for start in range(begin, n, BLOCK_N):
            _step_tile(
                p_ptr, g_ptr, m_ptr, v_ptr, master_ptr, start + tl.arange(0, BLOCK_N), n, factor,
                decay, rate1, beta2, rate2, length, root, eps, HAS_MASTER, CLIP, True, ACC,
            )  # fmt: skip


@triton.jit
def _adamw_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, master_ptr, n, norm_ptr, max_norm,
    decay, rate1, beta2, rate2, length, root, eps,
    HAS_MASTER: tl.constexpr, CLIP: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tensor, whose address and hyperparameters are arguments."""
    _step_chunk(
        p_ptr, g_ptr, m_ptr, v_ptr, master_ptr, tl.program_id(0).to(tl.int64), n,
        norm_ptr, max_norm, decay, rate1, beta2, rate2, length, root, eps,
        HAS_MASTER, CLIP, SKIP, BLOCK_N, STEPS, ACC,
    )  # fmt: skip


@triton.jit
def _adamw_list_kernel(
    table_ptr, chunks_ptr, coefficients_ptr, norm_ptr, max_norm,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, M_TYPE: tl.constexpr, V_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_MASTER: tl.constexpr, CLIP: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Many tensors: a program looks up its tensor, and which chunk of it is its own."""
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * pid)
    chunk = tl.load(chunks_ptr + 2 * pid + 1)
    row_ptr = coefficients_ptr + tensor * _COEFFICIENTS
    _step_chunk(
        _pointer(table_ptr, tensor, 0, P_TYPE, ALIGNED),
        _pointer(table_ptr, tensor, 1, G_TYPE, ALIGNED),
        _pointer(table_ptr, tensor, 2, M_TYPE, ALIGNED),
        _pointer(table_ptr, tensor, 3, V_TYPE, ALIGNED),
        _pointer(table_ptr, tensor, 4, tl.float32, ALIGNED),
        chunk, tl.load(table_ptr + tensor * _COLUMNS + 5), norm_ptr, max_norm,
        tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3),
        tl.load(row_ptr + 4), tl.load(row_ptr + 5), tl.load(row_ptr + 6),
        HAS_MASTER, CLIP, SKIP, BLOCK_N, STEPS, ACC,
    )  # fmt: skip


@triton.jit
def _add_squares(
    squares, g_ptr, chunk, n,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    begin = chunk * (BLOCK_N * STEPS)
    end = begin + BLOCK_N * STEPS
    if end <= n:
        for start in range(begin, end, BLOCK_N):
            g = _load(g_ptr, start + tl.arange(0, BLOCK_N), n, 0.0, False, ACC)
            squares += g * g
    else:
        for start in range(begin, n, BLOCK_N):
            g = _load(g_ptr, start + tl.arange(0, BLOCK_N), n, 0.0, True, ACC)
            squares += g * g
    return squares


@triton.jit
def _adamw_squares_kernel(
    g_ptr, parts_ptr, n, chunks,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_N,), ACC)
    for chunk in range(pid, chunks, tl.num_programs(0)):
        squares = _add_squares(squares, g_ptr, chunk, n, BLOCK_N, STEPS, ACC)
    tl.store(parts_ptr + pid, tl.sum(squares, 0))


@triton.jit
def _adamw_squares_list_kernel(
    table_ptr, chunks_ptr, parts_ptr, chunks,
    G_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_N,), ACC)
    for own in range(pid, chunks, tl.num_programs(0)):
        tensor = tl.load(chunks_ptr + 2 * own)
        chunk = tl.load(chunks_ptr + 2 * own + 1)
        g_ptr = _pointer(table_ptr, tensor, 1, G_TYPE, ALIGNED)
        n = tl.load(table_ptr + tensor * _COLUMNS + 5)
        squares = _add_squares(squares, g_ptr, chunk, n, BLOCK_N, STEPS, ACC)
    tl.store(parts_ptr + pid, tl.sum(squares, 0))


@triton.jit
def _adamw_norm_kernel(parts_ptr, norm_ptr, parts, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    squares = tl.zeros((BLOCK_N,), ACC)
    for start in range(0, parts, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        squares += tl.load(parts_ptr + offs, mask=offs < parts, other=0.0)
    total = tl.sum(squares, 0)
    if tl.float32 == ACC:
        tl.store(norm_ptr, tl.sqrt_rn(total))
    else:
        tl.store(norm_ptr, tl.sqrt(total))
