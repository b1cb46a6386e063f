"""How the attention kernels are launched: pure functions of shapes, dtype and chip."""

from triton.tools.tensor_descriptor import TensorDescriptor

from .._configurations import architecture, find
from .._launch import tile, tl_accumulator

LARGEST_HEAD_DIM = 256
# up to so many queries a tile of 64 or more would be mostly empty
FEW_QUERIES = 16
# half of the smallest L2 that matters, so that keys stay while all their queries pass
_SECTION_BYTES = 20 << 20
HEAD_DIMS = (64, 128, 256)


def configuration(kernel, Tq, D, dtype, causal, *, plain=True, dropout=0.0):
    """-> BLOCK_M, BLOCK_N, num_warps, num_stages, TMA of "forward", "dkdv" or "dq".

    plain: whether there is no mask but the causal one, and no group of heads.
    """
    row = find(
        "attention",
        kernel=kernel,
        architecture=architecture(),
        head_dim=next(size for size in HEAD_DIMS if size >= D),
        bits=16 if dtype.itemsize == 2 else 32,
        causal=causal,
        queries="few" if Tq <= FEW_QUERIES else "many",
    )
    options = {k: row[k] for k in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "TMA")}
    # random words need registers; so does whatever is not plain in the kernel that has none left
    if dropout or (kernel == "dkdv" and not (plain and tile(D, LARGEST_HEAD_DIM) == D)):
        if options["num_warps"] < 8:
            options["num_warps"] = 8
        elif dtype.itemsize == 2:
            # tiles of float32 are small already
            walked = "BLOCK_M" if kernel == "dkdv" else "BLOCK_N"
            options[walked] = max(options[walked] // 2, 16)
    return options


def head_options(D, dtype):
    """The options that follow from the head dimension and dtype alone."""
    BLOCK_D = tile(D, LARGEST_HEAD_DIM)
    return {"BLOCK_D": BLOCK_D, "WHOLE_D": BLOCK_D == D, "ACC": tl_accumulator(dtype)}


def section(pairs, sharing, x):
    """How many of the pairs are walked together: those whose rows of x (and its twin) fit in L2."""
    head_bytes = 2 * x.shape[2] * x.shape[3] * x.element_size()
    return max(1, min(pairs, sharing * (_SECTION_BYTES // max(head_bytes, 1))))


def descriptor(x, rows, BLOCK_D):
    """A TMA descriptor of tiles (rows, BLOCK_D) of x (B, H, T, D); x itself where none can be.

    The hardware wants addresses and strides in steps of 16 bytes, and no broadcast dimension.
    """
    step = 16 // x.element_size()
    # the stride of a dimension of one row is never used
    strides = [s if size > 1 else step for s, size in zip(x.stride()[:3], x.shape)]
    if x.numel() == 0 or x.data_ptr() % 16 or any(s % step or s <= 0 for s in strides):
        return x
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, BLOCK_D])
