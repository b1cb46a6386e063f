"""What `gaugeblock tune` tries on the rows of ffn's table, and at which shapes.

"fused" times the products that have an activation in their epilogue, forward and backward; "plain"
those with a bias and a residual, either order of the weights; "sums" a weight gradient.
"""

import torch

from .._activations import ACTIVATIONS
from .._launch import accumulator
from .._product import product
from . import Problem

KEY = ("kernel", "architecture", "bits", "rows")
LAUNCH = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "TMA", "PERSISTENT")
# what one program may have; chips without rows use sm_80's, the smallest of them has 99 KiB
_SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10}
_ACTIVATION = "gelu_tanh"

# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages
_LARGE = (
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
    (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 3),
    (128, 128, 32, 8, 4), (128, 128, 128, 8, 2), (64, 256, 64, 8, 3), (64, 256, 64, 8, 4),
    (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (128, 64, 64, 4, 3),
    (128, 64, 64, 8, 4),
)  # fmt: skip
_FEW = tuple(
    (16, BLOCK_N, BLOCK_K, warps, stages)
    for BLOCK_N, BLOCK_K in ((32, 128), (32, 256), (64, 64), (64, 128), (128, 64), (128, 32))
    for warps in (2, 4, 8)
    for stages in (3, 4, 5)
)
_FLOAT32 = (
    (32, 32, 32, 4, 2), (32, 32, 32, 4, 3), (64, 32, 32, 4, 2), (64, 32, 16, 4, 3),
    (64, 64, 16, 8, 2), (64, 64, 16, 8, 3), (32, 64, 16, 4, 3), (32, 32, 16, 4, 4),
)  # fmt: skip
_FEW_FLOAT32 = ((16, 32, 32, 4, 2), (16, 32, 32, 4, 3), (16, 32, 64, 4, 2), (16, 64, 32, 4, 3))


def candidates(row):
    """The launch configurations that are measured for a row of the table, its own first."""
    single, few = row["bits"] == 32, row["rows"] == "few"
    tiles = (_FEW_FLOAT32 if few else _FLOAT32) if single else _FEW if few else _LARGE
    # few rows leave nothing that a descriptor's large boxes would save
    by_tma = ((False, False),)
    if row["architecture"] == "sm_90" and not single and not few:
        by_tma += ((True, False),) if row["kernel"] == "sums" else ((True, False), (True, True))
    own = {name: row[name] for name in LAUNCH}
    others = [dict(zip(LAUNCH, (*tile, *tma))) for tma in by_tma for tile in tiles]
    return [own, *(x for x in others if x != own and _fits(row, x))]


def _fits(row, candidate):
    """Whether its tiles fit in shared memory, and its sums in half of the registers."""
    BLOCK_M, BLOCK_N, BLOCK_K = (candidate[f"BLOCK_{x}"] for x in "MNK")
    shared_bytes = candidate["num_stages"] * (BLOCK_M + BLOCK_N) * BLOCK_K * row["bits"] // 8
    if candidate["PERSISTENT"]:
        # half a tile on its way out beside what is loaded
        shared_bytes += BLOCK_M * min(BLOCK_N, 128) * row["bits"] // 8
    registers = BLOCK_M * BLOCK_N / (32 * candidate["num_warps"])
    wide = registers > 64 and not candidate["TMA"]
    return shared_bytes <= _SHARED_BYTES[row["architecture"]] and registers <= 128 and not wide


def problem(row, dtype, device, candidate=None):
    """What is timed for a row, or a small odd shape at which a candidate must be right."""
    M, N, K = _shape(row, device, candidate)
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=draw)).to(device, dtype)

    make = {"fused": _fused, "plain": _plain, "sums": _sums}[row["kernel"]]
    names, inputs, launched, twin = make(row["rows"], normal, M, N, K)
    return Problem(names, inputs, launched, launched, twin)


def _shape(row, device, candidate):
    """M, N, K: GPT-2's smallest width, or all tiles ragged; descriptors want multiples of 8."""
    sums = row["kernel"] == "sums"
    if candidate is None:
        M = {"few": 8, "some": 512, "many": 16384 if row["bits"] == 16 else 2048}[row["rows"]]
        return (768, 3072, M) if sums else (M, 3072, 768)
    # on a GPU more tiles than multiprocessors, so that a persistent program has several
    count = 12 if device == "cuda" else 2
    M = 13 if row["rows"] == "few" else count * candidate["BLOCK_M"] + 8
    return M, count * candidate["BLOCK_N"] + 8, 2 * candidate["BLOCK_K"] + 24


def _fused(rows, normal, M, N, K):
    scale = K**-0.5
    inputs = normal(M, K), normal(K, N, scale=scale), normal(N), normal(N, K, scale=scale)
    inputs = *inputs, normal(M, N)
    z, options = torch.empty_like(inputs[4]), {"activation": _ACTIVATION, "rows": rows}

    def launched():
        x, w1, b, w2, saved = inputs
        a = product(x, w1, epilogue="activate", bias=b, z=z, **options)
        return z, a, product(x, w2.t(), epilogue="slope", z=saved, **options)

    def twin(x, w1, b, w2, saved):
        f = ACTIVATIONS[_ACTIVATION]
        before = x @ w1 + b
        with torch.enable_grad():
            at = saved.detach().requires_grad_()
            (slope,) = torch.autograd.grad(f(at).sum(), at)
        return before, f(before), (x @ w2.t()) * slope

    return ("z", "a", "dz"), inputs, launched, twin


def _plain(rows, normal, M, N, K):
    scale = K**-0.5
    inputs = normal(M, K), normal(K, N, scale=scale), normal(N), normal(M, N)
    inputs = *inputs, normal(N, K, scale=scale)

    def launched():
        x, w, b, residual, turned = inputs
        return product(x, w, bias=b, add=residual, rows=rows), product(x, turned.t(), rows=rows)

    def twin(x, w, b, residual, turned):
        return x @ w + b + residual, x @ turned.t()

    return ("y", "dx"), inputs, launched, twin


def _sums(rows, normal, M, N, K):
    inputs = normal(K, M), normal(K, N)
    sums = inputs[1].new_empty(N)

    def launched():
        x, dy = inputs
        return product(x.t(), dy, sums=sums, rows=rows), sums

    def twin(x, dy):
        return x.t() @ dy, dy.sum(0, dtype=accumulator(dy.dtype)).to(dy.dtype)

    return ("dw", "db"), inputs, launched, twin
