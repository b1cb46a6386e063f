"""A tiled product with an epilogue, which several ops share.

    c = epilogue(a b)        sums = Σ_k b[k]
    epilogue(s):  s + bias + add;   "activate": z = s + bias, c = f(z) + add;   "slope": s·f'(z)

Shapes: a (M, K), b (K, N) of any strides; c and add (M, N) with contiguous rows; bias and sums
(N,); z (M, N) contiguous. c and add may be float32 beside 16-bit operands, and the same tensor:
then the product is added in place.
Algorithm: tiles of c in groups of rows, whose operands stay in the L2 cache. Where c has too few
tiles for the chip, their contraction is split: the parts go to a workspace, and a second kernel
adds them in order and applies the epilogue. How many splits there are is a pure function of the
shape and architecture, so the bits are the same in every run. A persistent kernel (one program for
each multiprocessor) loads the next tile while the last one is stored. On Hopper the tiles come by
TMA descriptors where addresses and strides are multiples of 16 bytes, either dimension contiguous.
The column sums of b are taken by the first row of tiles, which passes over all of b anyway.
dtypes: float16, bfloat16, float32 (IEEE products, not TF32), float64.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._activations import activate, slope
from ._configurations import architecture, find
from ._launch import accumulator, cast, dot, launch, tile, tl_accumulator

# up to so many rows a tile of 64 or more would be mostly empty
FEW_ROWS = 16
# multiprocessors that splits are chosen for
_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
_MOST_SPLITS = 16
# how much longer half a tile takes than half of the time of a whole one
_SMALLER_TILES = 1.45
_GROUP_M = 8
LAUNCH = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "TMA", "PERSISTENT")
_UNFINISHED = {"EPILOGUE": "none", "ACTIVATION": "none"}


@triton.jit
def locate(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Rows and columns of tiles that the tile with this number has before it."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = index // (blocks_n * GROUP_M)
    group_m = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = index % (blocks_n * GROUP_M)
    return group * GROUP_M + within % group_m, within // group_m


@triton.jit
def _described(desc, row, column, TURNED: tl.constexpr):
    """A tile by a descriptor of the matrix or, TURNED, of its transpose."""
    if TURNED:
        return tl.trans(desc.load([column, row]))
    else:
        return desc.load([row, column])


@triton.jit
def walk(
    a, b, stride_am, stride_ak, stride_bk, stride_bn, first_m, first_n, M, N, K, low, high,
    SUM: tl.constexpr, TMA: tl.constexpr, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of a b contracted from low to high, and the column sums of b where SUM."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    sums = tl.zeros((BLOCK_N,), ACC)
    if TMA:
        for start in range(low, high, BLOCK_K):
            a_tile = _described(a, first_m, start, A_TURNED)
            b_tile = _described(b, start, first_n, B_TURNED)
            acc = dot(a_tile, b_tile, acc)
            if SUM:
                sums += tl.sum(b_tile.to(ACC), 0)
    else:
        offs_m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
        offs_n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        offs_k = (low + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_m, mask_n = offs_m[:, None] < M, offs_n[None, :] < N
        a_ptrs = a + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
        offs = tl.arange(0, BLOCK_K)
        # a step over rows far apart passes 32 bits
        step = tl.full((), BLOCK_K, tl.int64)
        for start in range(low, high, BLOCK_K):
            mask_k = offs < K - start
            a_tile = tl.load(a_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
            b_tile = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n, other=0.0)
            acc = dot(a_tile, b_tile, acc)
            if SUM:
                sums += tl.sum(b_tile.to(ACC), 0)
            a_ptrs += step * stride_ak
            b_ptrs += step * stride_bk
    return acc, sums


@triton.jit
def _finish(
    acc, first_m, first_n, c_ptr, bias_ptr, z_ptr, add_ptr, stride_cm, stride_dm, M, N,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile, stored."""
    offs_m = (first_m + tl.arange(0, acc.shape[0])).to(tl.int64)[:, None]
    offs_n = (first_n + tl.arange(0, acc.shape[1])).to(tl.int64)
    mask_n = offs_n < N
    mask = (offs_m < M) & mask_n[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(acc.dtype)[None, :]
    if EPILOGUE == "activate":
        if z_ptr is not None:
            z_ptrs = z_ptr + offs_m * N + offs_n[None, :]
            tl.store(z_ptrs, cast(acc, z_ptr.dtype.element_ty), mask=mask)
        acc = activate(acc, ACTIVATION)
    if EPILOGUE == "slope":
        z = tl.load(z_ptr + offs_m * N + offs_n[None, :], mask=mask, other=0.0)
        acc *= slope(z.to(acc.dtype), ACTIVATION)
    if add_ptr is not None:
        more = tl.load(add_ptr + offs_m * stride_dm + offs_n[None, :], mask=mask, other=0.0)
        acc += more.to(acc.dtype)
    c_ptrs = c_ptr + offs_m * stride_cm + offs_n[None, :]
    tl.store(c_ptrs, cast(acc, c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile(
    index, a, b, c_ptr, bias_ptr, z_ptr, add_ptr, sums_ptr,
    stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_dm, M, N, K, tiles, part,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One split of one tile of c."""
    low, high = 0, K
    if SPLIT:
        split = index // tiles
        index = index % tiles
        low = (split.to(tl.int64) * part).to(tl.int32)
        high = tl.minimum(low + part, K)
        # c holds the splits' parts, one (M, N) after the other, and sums theirs
        c_ptr += split.to(tl.int64) * M * N
        if sums_ptr is not None:
            sums_ptr += split.to(tl.int64) * N
    block_m, block_n = locate(index, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_m, first_n = block_m * BLOCK_M, block_n * BLOCK_N
    if sums_ptr is not None:
        if block_m == 0:
            acc, sums = walk(
                a, b, stride_am, stride_ak, stride_bk, stride_bn, first_m, first_n, M, N, K,
                low, high, True, TMA, A_TURNED, B_TURNED, BLOCK_M, BLOCK_N, BLOCK_K, ACC,
            )  # fmt: skip
            offs_n = first_n + tl.arange(0, BLOCK_N)
            tl.store(sums_ptr + offs_n, cast(sums, sums_ptr.dtype.element_ty), mask=offs_n < N)
        else:
            acc, _ = walk(
                a, b, stride_am, stride_ak, stride_bk, stride_bn, first_m, first_n, M, N, K,
                low, high, False, TMA, A_TURNED, B_TURNED, BLOCK_M, BLOCK_N, BLOCK_K, ACC,
            )  # fmt: skip
    else:
        acc, _ = walk(
            a, b, stride_am, stride_ak, stride_bk, stride_bn, first_m, first_n, M, N, K,
            low, high, False, TMA, A_TURNED, B_TURNED, BLOCK_M, BLOCK_N, BLOCK_K, ACC,
        )  # fmt: skip
    if BLOCK_N == 256:
        # by halves, so that what the epilogue needs beside the tile fits in the registers
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _finish(
            left, first_m, first_n, c_ptr, bias_ptr, z_ptr, add_ptr, stride_cm, stride_dm, M, N,
            EPILOGUE, ACTIVATION,
        )  # fmt: skip
        _finish(
            right, first_m, first_n + BLOCK_N // 2, c_ptr, bias_ptr, z_ptr, add_ptr, stride_cm,
            stride_dm, M, N, EPILOGUE, ACTIVATION,
        )  # fmt: skip
    else:
        _finish(
            acc, first_m, first_n, c_ptr, bias_ptr, z_ptr, add_ptr, stride_cm, stride_dm, M, N,
            EPILOGUE, ACTIVATION,
        )  # fmt: skip


@triton.jit
def _product_kernel(
    a, b, c_ptr, bias_ptr, z_ptr, add_ptr, sums_ptr,
    stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_dm, M, N, K, tiles, part,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr,
    PERSISTENT: tl.constexpr, TMA: tl.constexpr, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Each split of each tile; the splits of one tile are far apart, those of a row near."""
    if PERSISTENT:
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                index, a, b, c_ptr, bias_ptr, z_ptr, add_ptr, sums_ptr,
                stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_dm,
                M, N, K, tiles, part, EPILOGUE, ACTIVATION, SPLIT, TMA, A_TURNED, B_TURNED,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, ACC,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), a, b, c_ptr, bias_ptr, z_ptr, add_ptr, sums_ptr,
            stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_dm,
            M, N, K, tiles, part, EPILOGUE, ACTIVATION, SPLIT, TMA, A_TURNED, B_TURNED,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, ACC,
        )  # fmt: skip


@triton.jit
def _product_merge_kernel(
    parts_ptr, c_ptr, bias_ptr, z_ptr, add_ptr, sum_parts_ptr, sums_ptr,
    stride_cm, stride_dm, M, N,
    SPLITS: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The splits' parts, added in order."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_m, block_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    first_m, first_n = block_m * BLOCK_M, block_n * BLOCK_N
    offs_m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    offs_n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    mask = (offs_m < M) & mask_n[None, :]
    acc = tl.load(parts_ptr + offs_m * N + offs_n[None, :], mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        ptrs = parts_ptr + (offs_m + M * split) * N + offs_n[None, :]
        acc += tl.load(ptrs, mask=mask, other=0.0)
    _finish(
        acc, first_m, first_n, c_ptr, bias_ptr, z_ptr, add_ptr, stride_cm, stride_dm, M, N,
        EPILOGUE, ACTIVATION,
    )  # fmt: skip
    if sums_ptr is not None:
        if block_m == 0:
            sums = tl.load(sum_parts_ptr + offs_n, mask=mask_n, other=0.0)
            for split in tl.static_range(1, SPLITS):
                sums += tl.load(sum_parts_ptr + offs_n + N * split, mask=mask_n, other=0.0)
            tl.store(sums_ptr + offs_n, cast(sums, sums_ptr.dtype.element_ty), mask=mask_n)


def product(
    a, b, *, out=None, add=None, sums=None, bias=None, z=None, epilogue="none", activation="none",
    rows=None,
):  # fmt: skip
    """epilogue(a b) (+ add) -> c, written to `out` where it is given.

    a (M, K), b (K, N) of any strides. out: (M, N) with contiguous rows; a new tensor of a's dtype
    by default. add: (M, N); it may be out. out and add may be float32 beside 16-bit operands.
    sums: (N,), receives the column sums of b. bias: (N,). z: (M, N) contiguous, written by the
    epilogue "activate" unless it is None, read by "slope". rows: the table's class of shapes, for
    measurements; by the shape where it is None.
    """
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty((M, N), dtype=a.dtype, device=a.device) if out is None else out
    if M == 0 and sums is not None:
        # no tile passes over b
        sums.copy_(b.sum(0, dtype=accumulator(b.dtype)))
    kernel = "sums" if sums is not None else "plain" if epilogue == "none" else "fused"
    described = None not in (turned(a), turned(b))
    options, splits, part = configuration(kernel, M, N, K, a.dtype, described=described, rows=rows)
    a_read, b_read, flags = operands(a, b, options)
    options |= flags
    tiles = triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(N, options["BLOCK_N"])
    if add is not None and add.stride(-1) != 1:
        add = add.contiguous()
    read = bias, z, add
    finish = {"EPILOGUE": epilogue, "ACTIVATION": activation}
    strides = c.stride(0), 0 if add is None else add.stride(0)
    whole = c, *read, sums, *strides
    if splits > 1:
        parts = torch.empty((splits, M, N), dtype=accumulator(a.dtype), device=a.device)
        sum_parts = None if sums is None else parts.new_empty((splits, N))
        target = parts, None, None, None, sum_parts, N, 0
    else:
        target = whole
    programs = tiles * splits
    if options["PERSISTENT"]:
        programs = min(programs, multiprocessors(a.device))
    launch(
        _product_kernel, programs,
        a_read, b_read, *target[:5], *a.stride(), *b.stride(), *target[5:],
        M, N, K, tiles, part,
        **options, **(finish if splits == 1 else _UNFINISHED), SPLIT=splits > 1, GROUP_M=_GROUP_M,
        ACC=tl_accumulator(a.dtype),
    )  # fmt: skip
    if splits > 1:
        launch(
            _product_merge_kernel, triton.cdiv(M, 4) * triton.cdiv(N, 256),
            parts, c, *read, sum_parts, sums, *strides, M, N,
            SPLITS=splits, **finish, BLOCK_M=4, BLOCK_N=256, num_warps=4,
        )  # fmt: skip
    return c


def configuration(kernel, M, N, K, dtype, *, described=True, rows=None):
    """-> options of the launch, splits of the contraction, length of a split.

    kernel: "fused" (an activation in the epilogue), "plain" or "sums". described: whether
    the operands lie as TMA wants them. rows: the table's class of shapes; by the shape where None.
    """
    row = _row(kernel, rows or shape_class(kernel, M, N, dtype), dtype)
    options = {k: row[k] for k in LAUNCH}
    if not described:
        # loaded value by value, through registers
        options |= {"TMA": False, "PERSISTENT": False}
        options |= {"BLOCK_N": min(row["BLOCK_N"], 64), "BLOCK_K": min(row["BLOCK_K"], 32)}
    for name, size in (("BLOCK_M", M), ("BLOCK_N", N), ("BLOCK_K", K)):
        options[name] = tile(size, options[name])
    tiles = triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(N, options["BLOCK_N"])
    steps = triton.cdiv(K, options["BLOCK_K"])
    splits, steps = splitting(tiles, steps, options["BLOCK_M"] <= FEW_ROWS)
    # where a tile has bounds of its own, the loops over tiles and steps do not become one
    options["PERSISTENT"] = options["PERSISTENT"] and splits == 1
    return options, splits, steps * options["BLOCK_K"]


def _row(kernel, rows, dtype):
    bits = 16 if dtype.itemsize == 2 else 32
    return find("ffn", kernel=kernel, architecture=architecture(), bits=bits, rows=rows)


def shape_class(kernel, M, N, dtype):
    """What the table calls the shape: "few" rows, or "some" or "many" large tiles."""
    if kernel == "sums":
        # splits make up for few tiles
        return "many"
    if M <= FEW_ROWS:
        return "few"
    if dtype.itemsize != 2:
        return "many"

    def longest(rows):
        row = _row(kernel, rows, dtype)
        tiles = triton.cdiv(M, row["BLOCK_M"]) * triton.cdiv(N, row["BLOCK_N"])
        return triton.cdiv(tiles, _processors()) * row["BLOCK_M"] * row["BLOCK_N"]

    # of smaller tiles fewer are idle in the last round, but each value is read more often
    return "many" if longest("many") <= _SMALLER_TILES * longest("some") else "some"


def _processors():
    return _MULTIPROCESSORS[architecture()]


def splitting(tiles, steps, few):
    """-> (splits of a contraction of so many steps, steps of a split)."""
    programs = _processors()
    most = max(min(_MOST_SPLITS, steps), 1)
    if few:
        # what counts is to have loads of weights underway everywhere: four programs together
        splits = max(min(4 * programs // max(tiles, 1), most), 1)
    else:
        splits = min(range(1, most + 1), key=lambda s: _rounds(tiles, steps, s, programs))
    part = max(triton.cdiv(steps, splits), 1)
    return max(triton.cdiv(steps, part), 1), part


def _rounds(tiles, steps, splits, programs):
    """What a product costs, in steps of one tile.

    The prologue and epilogue of a program take as long as 4 steps, a tile's float32 parts, written
    and read, 0.08 (8 bytes at 4 TB/s, beside 128 operations at 5 TFLOP/s of a multiprocessor), the
    second launch 4.
    """
    longest = triton.cdiv(tiles * splits, programs) * (triton.cdiv(steps, splits) + 4)
    return longest + (0.08 * tiles * splits + 4 if splits > 1 else 0)


def multiprocessors(device):
    """How many programs a persistent kernel has."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _processors()


def operands(a, b, options):
    """a and b as a kernel of these options reads them, by descriptors or not, and its flags."""
    a_turned, b_turned = turned(a), turned(b)
    if not options["TMA"] or None in (a_turned, b_turned):
        return a, b, {"TMA": False, "A_TURNED": False, "B_TURNED": False}
    a_desc = descriptor(a, a_turned, options["BLOCK_M"], options["BLOCK_K"])
    b_desc = descriptor(b, b_turned, options["BLOCK_K"], options["BLOCK_N"])
    return a_desc, b_desc, {"TMA": True, "A_TURNED": a_turned, "B_TURNED": b_turned}


def turned(x):
    """Whether a TMA descriptor must be of x's transpose; None where there can be none.

    The hardware wants addresses and strides in steps of 16 bytes.
    """
    step = 16 // x.element_size()
    if x.numel() == 0 or x.data_ptr() % 16:
        return None
    for transposed, y in ((False, x), (True, x.t())):
        if y.stride(1) == 1 and y.stride(0) >= y.shape[1] and y.stride(0) % step == 0:
            return transposed
    return None


def descriptor(x, transposed, rows, columns):
    """A TMA descriptor of tiles (rows, columns) of a matrix or, transposed, of x.t()."""
    y, block = (x.t(), [columns, rows]) if transposed else (x, [rows, columns])
    return TensorDescriptor(y, list(y.shape), list(y.stride()), block)
