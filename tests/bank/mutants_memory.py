"""Wrong kernels that go astray in memory, or whose result depends on the order of events.

What a GPU does to memory is done here in torch: addresses by `as_strided`, padding by hand, limits
scaled down to sizes that a test can hold.
"""

import math
import random

import torch

from . import models
from .models import Attention, CrossEntropy, Dropout, Embedding, LayerNorm, tiles
from .mutants import mutant


def read(x, strides):
    """What a kernel reads that takes x's strides for others."""
    start, whole = x.storage_offset(), x.untyped_storage().nbytes() // x.itemsize
    at = start + sum(
        torch.arange(n).reshape(-1, *[1] * (x.ndim - i - 1)) * stride
        for i, (n, stride) in enumerate(zip(x.shape, strides))
    )
    # past its end is somebody else's memory
    values = x.as_strided((whole,), (1,), 0)[at.clamp(max=whole - 1)]
    return values.where(at < whole, torch.nan)


def as_if_contiguous(x):
    return read(x, [math.prod(x.shape[i + 1 :]) for i in range(x.ndim)])


def write(x, values):
    """Write into x, as a kernel does that does not ask whether elements share memory."""
    shared = [slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()]
    x[tuple(shared)] = values[tuple(shared)].to(x.dtype)


@mutant("layer_norm", bug="row stride assumed contiguous", seen="transposed and sliced inputs")
class RowStrideAssumed(LayerNorm):
    def forward(self, x, w, b, eps):
        return super().forward(as_if_contiguous(x), w, b, eps)


@mutant("layer_norm", bug="row stride assumed contiguous", seen="output gradients of stride 0")
class GradientStrideAssumed(LayerNorm):
    def backward(self, dy, saved):
        return super().backward(as_if_contiguous(dy), saved)


@mutant("attention", bug="row stride assumed contiguous", seen="output gradients in a layout")
class DoStrideAssumed(Attention):
    def backward(self, do, dlse, saved):
        return super().backward(as_if_contiguous(do), dlse, saved)


@mutant("cross_entropy", bug="row stride assumed contiguous", seen="sliced logits")
class LogitsStrideAssumed(CrossEntropy):
    def forward(self, logits, *rest, **options):
        return super().forward(as_if_contiguous(logits), *rest, **options)


@mutant("ffn", bug="row stride assumed contiguous", seen="transposed weights")
class WeightStrideAssumed(models.FFN):
    def forward(self, x, w1, b1, w2, b2, activation):
        return super().forward(x, as_if_contiguous(w1), b1, w2, b2, activation)


@mutant("attention", bug="row stride assumed contiguous", seen="keys in another layout")
class KeyStrideAssumed(Attention):
    def forward(self, q, k, v, *rest, **options):
        return super().forward(q, as_if_contiguous(k), v, *rest, **options)


@mutant("attention", bug="strides of q used for k", seen="a layout, or Tq ≠ Tk")
class StridesOfQueries(Attention):
    def forward(self, q, k, v, *rest, **options):
        return super().forward(q, read(k, q.stride()), v, *rest, **options)


@mutant("attention", bug="batch and head strides swapped", seen="several rows and heads")
class BatchAndHeadSwapped(Attention):
    def forward(self, q, k, v, *rest, **options):
        B, Hkv = k.shape[:2]
        # element (b, h) lies where (h, b) would, as far as there is memory
        flat = k.flatten(0, 1)
        b, h = torch.arange(B)[:, None], torch.arange(Hkv)
        return super().forward(q, flat[(h * Hkv + b) % len(flat)], v, *rest, **options)


@mutant("embedding", bug="32-bit offset wraps", seen="tables past the limit, here 128 elements")
class OffsetWraps(Embedding):
    def forward(self, wte, wpe, tokens, positions):
        C = wte.shape[1]
        offsets = (tokens[..., None] * C + torch.arange(C)) % 128
        y, saved = super().forward(wte, wpe, tokens, positions)
        wrapped = wte.reshape(-1)[offsets].float() - wte[tokens].float()
        return (y.float() + wrapped).to(y.dtype), saved


@mutant("layer_norm", bug="32-bit offset wraps", seen="rows past the limit, here 2,048 elements")
class RowOffsetWraps(LayerNorm):
    def forward(self, x, w, b, eps):
        offsets = torch.arange(x.numel()).reshape(x.shape) % 2048
        return super().forward(x.reshape(-1)[offsets], w, b, eps)


def stored_in_tiles(y, tile=32):
    """Rows of y stored as whole tiles, the last row first: tails fall on the row behind."""
    N = y.shape[-1]
    padded = -(-N // tile) * tile
    memory = torch.zeros(y.numel() + padded, dtype=y.dtype)
    for row, values in reversed(list(enumerate(y.reshape(-1, N)))):
        memory[row * N : row * N + padded] = 0
        memory[row * N : row * N + N] = values
    return memory[: y.numel()].reshape(y.shape)


@mutant(
    "layer_norm",
    bug="unmasked store of the tail overwrites neighbours",
    seen="rows that are no multiple of the tile",
)
class TailStoreUnmasked(LayerNorm):
    def forward(self, *inputs, **options):
        y, saved = super().forward(*inputs, **options)
        return stored_in_tiles(y), saved


@mutant(
    "attention",
    bug="unmasked store of the tail overwrites neighbours",
    seen="a Tq that is no multiple of the tile, several heads",
)
class QueryTailStoreUnmasked(Attention):
    def forward(self, *inputs, **options):
        (o, lse), saved = super().forward(*inputs, **options)
        rows = stored_in_tiles(o.reshape(*o.shape[:2], -1), 16 * o.shape[-1])
        return (rows.reshape(o.shape), lse), saved


@mutant(
    "adamw",
    bug="unmasked store of the tail overwrites neighbours",
    seen="memory behind an argument compared before and after",
)
class UpdateTailUnmasked(models.AdamW):
    def __call__(self, p, g, m, v, **options):
        step = models.AdamW(in_place=True)
        new = step(p, g, m, v, **options)
        if p.is_contiguous():
            behind = p.storage_offset() + p.numel()
            room = p.untyped_storage().nbytes() // p.itemsize - behind
            p.as_strided((min(-p.numel() % 128, room),), (1,), behind).zero_()
        return new


@mutant("layer_norm", bug="input modified in place", seen="inputs compared before and after")
class CentredInPlace(LayerNorm):
    def forward(self, x, w, b, eps):
        y, saved = super().forward(x.clone(), w, b, eps)
        write(x, x.float() - x.float().mean(-1, keepdim=True))
        return y, saved


@mutant("attention", bug="input modified in place", seen="inputs compared before and after")
class ScaledInPlace(Attention):
    def forward(self, q, k, v, visible, keep, dropout, scale):
        outputs, saved = super().forward(q.clone(), k, v, visible, keep, dropout, scale)
        write(q, q / 2)
        return outputs, saved


@mutant("ffn", bug="input modified in place", seen="output gradients compared before and after")
class GradientOverwritten(models.FFN):
    def backward(self, dy, saved):
        grads = super().backward(dy.clone(), saved)
        write(dy, torch.zeros_like(dy))
        return grads


def last_tile_unwritten(y, tile=16):
    """y without the rows past the last whole tile: memory as it was allocated."""
    written = torch.empty(y.shape, dtype=y.dtype)
    whole = y.shape[-2] // tile * tile
    written[..., :whole, :] = y[..., :whole, :]
    return written


@mutant("layer_norm", bug="tail of an output never written", seen="rows past the last whole tile")
class OutputTailUnwritten(LayerNorm):
    def forward(self, *inputs, **options):
        y, saved = super().forward(*inputs, **options)
        return last_tile_unwritten(y), saved


@mutant("attention", bug="tail of an output never written", seen="queries past the last whole tile")
class QueryTailUnwritten(Attention):
    def forward(self, *inputs, **options):
        (o, lse), saved = super().forward(*inputs, **options)
        return (last_tile_unwritten(o), lse), saved


@mutant("attention", bug="tail of a gradient never written", seen="keys past the last whole tile")
class KeyGradientTailUnwritten(Attention):
    def backward(self, do, dlse, saved):
        dq, dk, dv = super().backward(do, dlse, saved)
        return dq, last_tile_unwritten(dk), dv


@mutant(
    "attention",
    bug="tail of a gradient never written",
    seen="keys that no query sees",
)
class HiddenKeysGradientUnwritten(Attention):
    def backward(self, do, dlse, saved):
        dq, dk, dv = super().backward(do, dlse, saved)
        seen = saved[5].any(-2)[..., None].expand_as(dk)
        written = torch.empty_like(dk)
        written[seen] = dk[seen]
        return dq, written, dv


@mutant("embedding", bug="tail of a gradient never written", seen="ids that no token has")
class GradientOfUnusedUnwritten(Embedding):
    def scatter(self, shape, ids, rows):
        table, full = torch.empty(shape), super().scatter(shape, ids, rows)
        table[ids] = full[ids]
        return table


@mutant(
    "layer_norm",
    bug="memory taken for zeros without being set",
    seen="fresh memory that holds something else",
)
class AccumulatorNotZeroed(LayerNorm):
    def over_rows(self, x):
        return torch.empty(x.shape[1:]).add_(super().over_rows(x))


@mutant(
    "layer_norm",
    bug="gradient accumulated without atomics",
    seen="several row blocks; other bits from run to run",
)
class UpdatesLost(LayerNorm):
    def __init__(self):
        super().__init__()
        self.draw = random.Random(0)

    def over_rows(self, x):
        total = x.new_zeros(x.shape[1:])
        for part in tiles(len(x), 2):
            # of two programs that read the same sum, the later one's is written
            if part.start == 0 or self.draw.random() > 0.3:
                total = total + x[part].sum(0)
        return total


@mutant("attention", bug="gradient accumulated without atomics", seen="several tiles")
class DqUpdatesLost(Attention):
    def __init__(self):
        super().__init__()
        self.draw = random.Random(0)

    def backward(self, do, dlse, saved):
        dq, dk, dv = super().backward(do, dlse, saved)
        k = saved[1]
        if k.shape[2] <= 16:
            return dq, dk, dv
        visible = saved[5].clone()
        start = 16 * self.draw.randrange(-(-k.shape[2] // 16))
        visible[..., start : start + 16] = False
        some, _, _ = super().backward(do, dlse, (*saved[:5], visible, *saved[6:]))
        return some, dk, dv


@mutant(
    "layer_norm",
    bug="order of atomics changes bits",
    seen="repeated calls, where determinism is claimed",
    dtypes=("float32",),
    checks={"deterministic": True},
)
class OrderOfAtomics(LayerNorm):
    def __init__(self):
        super().__init__()
        self.draw = torch.Generator().manual_seed(0)

    def over_rows(self, x):
        return super().over_rows(x[torch.randperm(len(x), generator=self.draw)])


@mutant(
    "attention",
    bug="order of atomics changes bits",
    seen="repeated calls, where determinism is claimed",
    dtypes=("float32",),
    checks={"deterministic": True},
)
class OrderOfKeyTiles(Attention):
    def __init__(self):
        super().__init__()
        self.draw = torch.Generator().manual_seed(0)

    def backward(self, do, dlse, saved):
        q, k, v, o, lse, visible, keep, *rest = saved
        order = torch.randperm(k.shape[2], generator=self.draw)
        saved = (q, k[:, :, order], v[:, :, order], o, lse, visible[..., order],
                 None if keep is None else keep[..., order], *rest)  # fmt: skip
        dq, dk, dv = super().backward(do, dlse, saved)
        back = order.argsort()
        return dq, dk[:, :, back], dv[:, :, back]


@mutant(
    "attention",
    bug="order of sums depends on the batch",
    seen="one row of a batch by itself, where batch invariance is claimed",
    dtypes=("float32",),
    checks={"batch_invariant": True},
)
class SplitsByBatch(Attention):
    def forward(self, q, *rest, **options):
        self.block_n = 8 if q.shape[0] == 1 else None
        return super().forward(q, *rest, **options)


@mutant("embedding", bug="duplicate indices lose updates", seen="tokens that occur twice")
class DuplicatesOverwrite(Embedding):
    def scatter(self, shape, ids, rows):
        table = torch.zeros(shape)
        table[ids] = rows
        return table


@mutant("embedding", bug="gradient of positions from the last batch row alone", seen="several rows")
class LastRowOfPositions(Embedding):
    def backward(self, dy, saved):
        dwte, dwpe = super().backward(dy, saved)
        _, positions, (_, wpe), storage = saved
        if wpe is not None:
            dwpe = self.scatter(wpe, positions[-1], dy[-1].float()).to(storage)
        return dwte, dwpe


@mutant("embedding", bug="positions left out", seen="a table of positions")
class PositionsLeftOut(Embedding):
    def forward(self, wte, wpe, tokens, positions):
        y, saved = super().forward(wte, None, tokens, positions)
        return y, (*saved[:2], (saved[2][0], None if wpe is None else wpe.shape), saved[3])


@mutant("embedding", bug="positions one too high", seen="a table of positions")
class PositionsOneHigh(Embedding):
    def __call__(self, tokens, wte, wpe=None, positions=None):
        if wpe is not None and positions is None:
            positions = (torch.arange(tokens.shape[-1]) + 1) % len(wpe)
        return super().__call__(tokens, wte, wpe, positions)


@mutant("embedding", bug="accumulation in bf16", seen="tokens that occur often")
class GradientInBf16(Embedding):
    def scatter(self, shape, ids, rows):
        table = torch.zeros(shape, dtype=torch.bfloat16)
        for i, row in zip(ids, rows):
            table[i] += row.bfloat16()
        return table.float()


@mutant("dropout", bug="same dropout mask for different seeds", seen="another seed than 0")
class SeedIgnored(Dropout):
    def keep(self, shape, p, seed):
        return super().keep(shape, p, 0)


@mutant("dropout", bug="high half of the seed left out", seen="seeds past 32 bits, negative seeds")
class SeedOf32Bits(Dropout):
    def keep(self, shape, p, seed):
        return super().keep(shape, p, seed % 2**32)


@mutant("dropout", bug="dropout not rescaled by 1/(1 − p)", seen="any p but 0")
class DropoutUnscaled(Dropout):
    def scaled(self, x, keep, p):
        return super().scaled(x, keep, 0.0)


@mutant("dropout", bug="scaled by 1/p", seen="any p but 1/2")
class ScaledByP(Dropout):
    def scaled(self, x, keep, p):
        return super().scaled(x, keep, 1 - p)


@mutant(
    "dropout",
    bug="dropout mask differs between forward and backward",
    seen="any gradient",
)
class OtherMaskInBackward(Dropout):
    def backward(self, dy, saved):
        keep, p = saved
        return super().backward(dy, (keep.flatten().roll(1).reshape(keep.shape), p))


@mutant("dropout", bug="gradient not masked", seen="any gradient")
class GradientNotMasked(Dropout):
    def backward(self, dy, saved):
        keep, p = saved
        return super().backward(dy, (torch.ones_like(keep), p))


@mutant("dropout", bug="keeps with probability p", seen="any p but 1/2")
class KeepsWithP(Dropout):
    def keep(self, shape, p, seed):
        return super().keep(shape, 1 - p, seed)


@mutant("dropout", bug="same mask in every tile", seen="more than 1,024 elements")
class MaskOfTheTile(Dropout):
    def keep(self, shape, p, seed):
        first = super().keep((1024,), p, seed)
        return first.repeat(-(-math.prod(shape) // 1024))[: math.prod(shape)].reshape(shape)


@mutant("dropout", bug="elements counted along memory, not in C order", seen="a transposed input")
class CountedInMemory(Dropout):
    def forward(self, x, p, seed):
        keep = self.keep(x.shape, p, seed)
        if x.ndim == 2 and x.stride(0) < x.stride(1):
            keep = self.keep(x.shape[::-1], p, seed).T
        return self.scaled(x, keep, p), (keep, p)
