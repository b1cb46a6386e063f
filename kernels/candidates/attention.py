"""What `gaugeblock tune` tries on the rows of attention's table, and at which shapes.

Timed for "forward" is the forward pass; for "dkdv" and "dq" the whole backward pass, the other
kernels launched as the table says.
"""

import functools

import torch

from .._attention import launchers
from .._attention.eager import eager
from . import Problem

KEY = ("kernel", "architecture", "head_dim", "bits", "causal", "queries")
LAUNCH = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "TMA")
# what one program may have; chips without rows use sm_80's, the smallest of them has 99 KiB
_SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10}

# BLOCK_M, BLOCK_N, num_warps, num_stages by head dimension
_MANY = {
    "forward": {
        64: ((128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 4, 2), (128, 128, 8, 2),
             (128, 128, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2),
              (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 2)),
        256: ((128, 64, 8, 1), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 8, 2),
              (64, 32, 4, 2), (64, 32, 4, 3), (32, 32, 4, 2)),
    },
    "dkdv": {
        64: ((64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3), (32, 64, 4, 2),
             (32, 64, 4, 3), (32, 128, 8, 2)),
        128: ((32, 128, 8, 1), (32, 128, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (32, 64, 4, 1),
              (32, 64, 4, 2), (32, 64, 8, 2)),
        256: ((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 2), (32, 32, 8, 3), (64, 32, 8, 1),
              (64, 32, 8, 2), (16, 64, 8, 2)),
    },
    "dq": {
        64: ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3),
             (128, 32, 4, 3), (128, 128, 8, 2)),
        128: ((128, 64, 8, 1), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2),
              (64, 64, 8, 2), (64, 32, 4, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 3), (32, 32, 4, 2), (32, 32, 8, 2), (64, 64, 8, 2),
              (128, 16, 8, 2), (64, 16, 4, 2)),
    },
}  # fmt: skip
# of the side that has no more than 16 rows: the other side, num_warps, num_stages
_FEW = ((32, 4, 2), (32, 8, 2), (64, 2, 2), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 4, 2),
        (128, 8, 2))  # fmt: skip
_MANY_FLOAT32 = {
    64: ((32, 32, 4, 1), (32, 32, 4, 2), (32, 32, 8, 1), (64, 32, 4, 1), (32, 64, 4, 1),
         (64, 64, 8, 1), (16, 32, 4, 1)),
    128: ((32, 16, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1), (32, 16, 4, 1),
          (64, 16, 8, 1), (32, 16, 8, 2)),
    256: ((16, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 2), (32, 16, 8, 1), (16, 32, 8, 1)),
}  # fmt: skip
_FEW_FLOAT32 = ((16, 4, 1), (16, 8, 1), (32, 4, 1), (32, 4, 2), (32, 8, 1), (64, 4, 1), (64, 8, 1))


def candidates(row):
    """The launch configurations that are measured for a row of the table, its own first."""
    D, single = row["head_dim"], row["bits"] == 32
    if row["queries"] == "few":
        tiles = [(16, *tile) for tile in (_FEW_FLOAT32 if single else _FEW)]
    else:
        tiles = (_MANY_FLOAT32 if single else _MANY[row["kernel"]])[D]
    # float32 products of tiles that a descriptor brings spill by the kilobyte
    by_tma = (False, True) if row["architecture"] == "sm_90" and not single else (False,)
    own = {name: row[name] for name in LAUNCH}
    others = [dict(zip(LAUNCH, (*tile, tma))) for tile in tiles for tma in by_tma]
    return [own, *(x for x in others if x != own and _fits(row, x))]


def _fits(row, candidate):
    """Whether its tiles fit in shared memory, and its sums in half of the registers."""
    held, walked = candidate["BLOCK_M"], candidate["BLOCK_N"]
    if row["kernel"] == "dkdv":
        held, walked = walked, held
    inputs = 1 if row["kernel"] == "forward" else 2
    sums = 2 if row["kernel"] == "dkdv" else 1
    # what is held lies there once, what is walked once a stage
    rows = inputs * held + 2 * candidate["num_stages"] * walked
    shared_bytes = rows * row["head_dim"] * row["bits"] // 8
    registers = sums * held * row["head_dim"] / (32 * candidate["num_warps"])
    return shared_bytes <= _SHARED_BYTES[row["architecture"]] and registers <= 128


def representative_shape(head_dim, queries):
    """B, H, Hkv, Tq, Tk, D at which candidates are timed: 16,384 tokens, or queries of a decode."""
    H = {64: 12, 128: 16, 256: 8}[head_dim]
    B, Tq, Tk = (8, 2048, 2048) if queries == "many" else (32, 8, 4096)
    return B, H, H, Tq, Tk, head_dim


def odd_shape(head_dim, queries, candidate, harder):
    """B, H, Hkv, Tq, Tk, D at which it must be right, all tiles ragged.

    Launchers change a configuration for padded or shared heads: those come with the harder alone,
    in rows of 16-byte steps, as descriptors want them. Tq ≤ Tk, so that descriptors read masked
    tiles too, as where candidates are timed.
    """
    Tq = 13 if queries == "few" else 2 * candidate["BLOCK_M"] + 5
    Hkv, D = (1, head_dim - 8) if harder else (2, head_dim)
    return 1, 2, Hkv, Tq, max(2 * candidate["BLOCK_N"], Tq) + 9, D


def problem(row, dtype, device, candidate=None, harder=False):
    """Both passes; harder: with a window, global keys, lengths, dropout and one kv head."""
    sizes = row["head_dim"], row["queries"]
    shape = odd_shape(*sizes, candidate, harder) if candidate else representative_shape(*sizes)
    q, k, v, do, dlse = inputs = _draw(shape, dtype, device)
    options = _options(shape, row["causal"], device, harder)
    forward = functools.partial(launchers.forward, q, k, v, *options)
    timed = forward
    if row["kernel"] != "forward":
        timed = functools.partial(launchers.backward, do, None, q, k, v, *forward(), *options)

    def answers():
        o, lse = forward()
        return o, lse, *launchers.backward(do, dlse, q, k, v, o, lse, *options)

    def twin(q, k, v, do, dlse):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        o, lse = eager(*inputs, *options)
        return o, lse, *torch.autograd.grad((o, lse), inputs, (do, dlse.to(lse.dtype)))

    return Problem(("o", "lse", "dq", "dk", "dv"), inputs, timed, answers, twin)


def _draw(shape, dtype, device):
    """q, k, v, do, dlse."""
    B, H, Hkv, Tq, Tk, D = shape
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    sizes = (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, D), (B, H, Tq, D)
    return *(draw(size, dtype=dtype) for size in sizes), draw((B, H, Tq))


def _options(shape, causal, device, harder):
    *_, Tk, D = shape
    scale = D**-0.5
    if not harder:
        return None, None, causal, True, None, 0, scale, 0.0, 0, "ieee"
    # every query sees a key, so that nothing is infinite
    lengths = torch.tensor([Tk - 5], device=device)
    return lengths, None, causal, True, Tk // 3, 3, scale, 0.2, 1, "ieee"
