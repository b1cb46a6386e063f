"""A tiled product with an epilogue, which several ops share.

    c = epilogue(a b)        sums = Σ_k b[k]
    epilogue(s):  s + bias + add;   "activate": z = s + bias, c = f(z) + add;   "slope": s·f'(z)

Shapes: a (M, K), b (K, N) of any strides; c and add (M, N) with contiguous rows; bias and sums
(N,); z (M, N) contiguous. c and add may be float32 beside 16-bit operands, and the same tensor:
then the product is added in place.
Algorithm: tiles of c in groups of rows, whose operands stay in the L2 cache. Where c has too few
tiles for the chip, their contraction is split: the parts go to a workspace, and a second kernel adds
them in order and applies the epilogue. How many splits there are is a pure function of the shape and
architecture, so the bits are the same in every run. A persistent kernel (one program for each
multiprocessor) loads the next tile while the last one is stored. On Hopper the tiles come by TMA
descriptors where address and strides are multiples of 16 bytes, either dimension contiguous.
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
_GROUP_M = 8
LAUNCH = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "TMA", "PERSISTENT")
_UNFINISHED = {"EPILOGUE": "none", "ACTIVATION": "none"}


@triton.jit
def _locate(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
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
def _walk(
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
        for start in range(low, high, BLOCK_K):
            mask_k = offs < K - start
            a_tile = tl.load(a_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
            b_tile = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n, other=0.0)
            acc = dot(a_tile, b_tile, acc)
            if SUM:
                sums += tl.sum(b_tile.to(ACC), 0)
            a_ptrs += stride_ak * BLOCK_K
            b_ptrs += stride_bk * BLOCK_K
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
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, TMA: tl.constexpr, A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    split = index // tiles
    block_m, block_n = _locate(index % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_m, first_n = block_m * BLOCK_M, block_n * BLOCK_N
    low = split * part
    high = tl.minimum(low + part, K)
    if sums_ptr is not None:
        if block_m == 0:
            acc, sums = _walk(
                a, b, stride_am, stride_ak, stride_bk, stride_bn, first_m, first_n, M, N, K,
                low, high, True, TMA, A_TURNED, B_TURNED, BLOCK_M, BLOCK_N, BLOCK_K, ACC,
            )  # fmt: skip
            offs_n = first_n + tl.arange(0, BLOCK_N)
            sums_ptrs = sums_ptr + split.to(tl.int64) * N + offs_n
            tl.store(sums_ptrs, cast(sums, sums_ptr.dtype.element_ty), mask=offs_n < N)
        else:
            acc, _ = _walk(
                a, b, stride_am, stride_ak, stride_bk, stride_bn, first_m, first_n, M, N, K,
                low, high, False, TMA, A_TURNED, B_TURNED, BLOCK_M, BLOCK_N, BLOCK_K, ACC,
            )  # fmt: skip
    else:
        acc, _ = _walk(
            a, b, stride_am, stride_ak, stride_bk, stride_bn, first_m, first_n, M, N, K,
            low, high, False, TMA, A_TURNED, B_TURNED, BLOCK_M, BLOCK_N, BLOCK_K, ACC,
        )  # fmt: skip
    # with splits c holds their parts, one (M, N) after the other
    c_ptr += split.to(tl.int64) * M * N
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
    stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_dm, M, N, K, tiles, splits, part,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, PERSISTENT: tl.constexpr, TMA: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Each split of each tile; the splits of one tile are far apart, those of a row near."""
    if PERSISTENT:
        for index in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0), flatten=True):
            _tile(
                index, a, b, c_ptr, bias_ptr, z_ptr, add_ptr, sums_ptr,
                stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_dm,
                M, N, K, tiles, part, EPILOGUE, ACTIVATION, TMA, A_TURNED, B_TURNED,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, ACC,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), a, b, c_ptr, bias_ptr, z_ptr, add_ptr, sums_ptr,
            stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_dm,
            M, N, K, tiles, part, EPILOGUE, ACTIVATION, TMA, A_TURNED, B_TURNED,
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
    ptrs = parts_ptr + offs_m * N + offs_n[None, :]
    acc = tl.load(ptrs, mask=mask, other=0.0)
    for _ in tl.static_range(1, SPLITS):
        ptrs += M.to(tl.int64) * N
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
    options, splits, part = configuration(kernel, M, N, K, a.dtype, rows)
    a_read, b_read, described = _operands(a, b, options)
    options |= described
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
        M, N, K, tiles, splits, part,
        **options, **(finish if splits == 1 else _UNFINISHED), GROUP_M=_GROUP_M,
        ACC=tl_accumulator(a.dtype),
    )  # fmt: skip
    if splits > 1:
        launch(
            _product_merge_kernel, triton.cdiv(M, 4) * triton.cdiv(N, 256),
            parts, c, *read, sum_parts, sums, *strides, M, N,
            SPLITS=splits, **finish, BLOCK_M=4, BLOCK_N=256, num_warps=4,
        )  # fmt: skip
    return c


def configuration(kernel, M, N, K, dtype, rows=None):
    """-> options of the launch, splits of the contraction, length of a split.

    kernel: "fused" (an activation in the epilogue), "plain" or "sums". rows: the table's class of
    shapes; by the shape where it is None.
    """
    chip = architecture()
    row = find(
        "ffn",
        kernel=kernel,
        architecture=chip,
        bits=16 if dtype.itemsize == 2 else 32,
        rows=rows or shape_class(kernel, M, N, dtype, chip),
    )
    options = {k: row[k] for k in LAUNCH}
    for name, size in (("BLOCK_M", M), ("BLOCK_N", N), ("BLOCK_K", K)):
        options[name] = tile(size, row[name])
    tiles = triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(N, options["BLOCK_N"])
    steps = triton.cdiv(K, options["BLOCK_K"])
    splits, steps = splitting(tiles, steps, options["BLOCK_M"] <= FEW_ROWS, chip)
    # the loops over tiles and steps become one, which must not be empty
    options["PERSISTENT"] = options["PERSISTENT"] and K > 0
    return options, splits, steps * options["BLOCK_K"]


def shape_class(kernel, M, N, dtype, chip):
    """What the table calls the shape: "few" rows, or "some" or "many" large tiles."""
    if kernel == "sums" or dtype.itemsize != 2:
        return "few" if M <= FEW_ROWS and kernel != "sums" else "many"
    if M <= FEW_ROWS:
        return "few"
    # with fewer, the last round of tiles leaves much of the chip idle
    return "many" if M * N >= 4 * _MULTIPROCESSORS[chip] * 128 * 256 else "some"


def splitting(tiles, steps, few, chip):
    """-> (splits of a contraction of so many steps, steps of a split)."""
    programs = _MULTIPROCESSORS[chip]
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
    return _MULTIPROCESSORS[architecture()]


def _operands(a, b, options):
    """The operands as the kernel reads them, tensors or descriptors, and the flags that say so."""
    made = [None, None]
    if options["TMA"]:
        made = [
            descriptor(a, options["BLOCK_M"], options["BLOCK_K"]),
            descriptor(b, options["BLOCK_K"], options["BLOCK_N"]),
        ]
    if None in made:
        # a persistent loop hides nothing where addresses are computed in registers
        flags = {"TMA": False, "PERSISTENT": False, "A_TURNED": False, "B_TURNED": False}
        return a, b, flags
    (a_desc, a_turned), (b_desc, b_turned) = made
    return a_desc, b_desc, {"TMA": True, "A_TURNED": a_turned, "B_TURNED": b_turned}


def descriptor(x, rows, columns):
    """(TMA descriptor of tiles (rows, columns) of a matrix, whether of its transpose), or None.

    The hardware wants addresses and strides in steps of 16 bytes.
    """
    step = 16 // x.element_size()
    if x.numel() == 0 or x.data_ptr() % 16:
        return None
    for turned, y, block in ((False, x, [rows, columns]), (True, x.t(), [columns, rows])):
        if y.stride(1) == 1 and y.stride(0) >= y.shape[1] and y.stride(0) % step == 0:
            return TensorDescriptor(y, list(y.shape), [y.stride(0), 1], block), turned
    return None
