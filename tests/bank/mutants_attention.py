"""Wrong attention kernels."""

from dataclasses import dataclass

import torch

from . import models
from .models import LOG2E, keep_mask, rounded, safe, tiles
from .mutants import mutant
from .mutants_ffn import tf32


@dataclass
class Attention(models.Attention):
    """A right kernel in tiles of 16 × 16."""

    block_m: int | None = 16
    block_n: int | None = 16


@mutant("attention", bug="causal mask aligned top left where Tq ≠ Tk", seen="causal, Tq ≠ Tk")
class TopLeft(Attention):
    def visible(self, Tq, Tk, causal, align, *rest):
        return super().visible(Tq, Tk, causal, "top_left", *rest)


@mutant("attention", bug="diagonal left out of the causal mask", seen="causal")
class DiagonalLeftOut(Attention):
    def visible(self, Tq, Tk, causal, *rest):
        visible = super().visible(Tq, Tk, causal, *rest)
        return visible & visible.roll(-1, -1) if causal else visible


@mutant("attention", bug="window one key too wide", seen="a window")
class WindowOneWide(Attention):
    def visible(self, Tq, Tk, causal, align, window, *rest):
        window = None if window is None else window + 1
        return super().visible(Tq, Tk, causal, align, window, *rest)


@mutant("attention", bug="window one key too narrow", seen="a window")
class WindowOneNarrow(Attention):
    def visible(self, Tq, Tk, causal, align, window, *rest):
        window = None if window is None else max(window - 1, 1)
        return super().visible(Tq, Tk, causal, align, window, *rest)


@mutant("attention", bug="window open to the right", seen="a window without causality")
class WindowOpenToTheRight(Attention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, *rest):
        visible = super().visible(Tq, Tk, causal, align, window, global_tokens, *rest)
        everything = super().visible(Tq, Tk, causal, align, None, 0, *rest)
        right = torch.arange(Tk) > torch.arange(Tq)[:, None] + Tk - Tq
        return visible | (everything & right)


@mutant("attention", bug="window counted in whole tiles", seen="a window")
class WindowInTiles(Attention):
    def visible(self, Tq, Tk, causal, align, window, *rest):
        window = None if window is None else -(-window // 16) * 16
        return super().visible(Tq, Tk, causal, align, window, *rest)


@mutant("attention", bug="global tokens not exempt from the window", seen="global tokens")
class GlobalTokensIgnored(Attention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, *rest):
        return super().visible(Tq, Tk, causal, align, window, 0, *rest)


@mutant(
    "attention",
    bug="global tokens right of the window left out",
    seen="global tokens beyond a window without causality",
)
class GlobalTokensOnTheLeftAlone(Attention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, *rest):
        visible = super().visible(Tq, Tk, causal, align, window, global_tokens, *rest)
        near = super().visible(Tq, Tk, causal, align, window, 0, *rest)
        shift = Tk - Tq if align == "bottom_right" else 0
        return near | (visible & (torch.arange(Tk) < torch.arange(Tq)[:, None] + shift))


@mutant("attention", bug="global tokens exempt from causality", seen="causal with global tokens")
class GlobalTokensNotCausal(Attention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, *rest):
        visible = super().visible(Tq, Tk, causal, align, window, global_tokens, *rest)
        if window is None:
            return visible
        everything = super().visible(Tq, Tk, False, align, None, 0, *rest)
        return visible | (everything & (torch.arange(Tk) < global_tokens))


@mutant(
    "attention",
    bug="global tokens counted from the start of the sequence",
    seen="documents with global tokens",
)
class GlobalTokensOfTheSequence(Attention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, *rest):
        if window is None:
            return super().visible(Tq, Tk, causal, align, window, global_tokens, *rest)
        visible = super().visible(Tq, Tk, causal, align, window, 0, *rest)
        everything = super().visible(Tq, Tk, causal, align, None, 0, *rest)
        return visible | (everything & (torch.arange(Tk) < global_tokens))


@mutant(
    "attention",
    bug="lengths ignored after the first batch row",
    seen="rows of different lengths",
)
class LengthOfTheFirstRow(Attention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens):
        if lengths is not None:
            lengths = lengths[:1].expand(len(lengths))
        return super().visible(Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens)


@mutant("attention", bug="lengths ignored", seen="lengths below Tk")
class LengthsIgnored(Attention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens):
        return super().visible(Tq, Tk, causal, align, window, global_tokens, None, cu_seqlens)


@mutant("attention", bug="diagonal placed by Tk, not by lengths", seen="causal with lengths")
class DiagonalByTk(Attention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens):
        whole = super().visible(Tq, Tk, causal, align, window, global_tokens, None, cu_seqlens)
        if lengths is None:
            return whole
        return whole & (torch.arange(Tk) < lengths[:, None, None, None])


@mutant("attention", bug="zero-length document miscounted", seen="a document of length 0")
class ZeroLengthDocument(Attention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens):
        if cu_seqlens is not None:
            # a document has a token at least, at the cost of the next
            ends = cu_seqlens.diff().clamp(min=1).cumsum(0).clamp(max=Tk)
            cu_seqlens = torch.cat([cu_seqlens[:1], ends]).long()
        return super().visible(Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens)


@mutant("attention", bug="documents see each other", seen="several documents")
class DocumentsIgnored(Attention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens):
        return super().visible(Tq, Tk, causal, align, window, global_tokens, lengths, None)


@mutant("attention", bug="tail of keys left out", seen="a Tk that is no multiple of the tile")
class KeyTailLeftOut(Attention):
    def visible(self, Tq, Tk, *rest):
        return super().visible(Tq, Tk, *rest) & (torch.arange(Tk) < max(Tk // 16 * 16, 16))


@mutant(
    "attention",
    bug="contraction tail unmasked",
    seen="a Tk that is no multiple of 32",
)
class KeyTailUnmasked(Attention):
    def forward(self, q, k, v, visible, keep, dropout, scale):
        # the last tile goes on into the next head's keys; no mask there
        tail = -k.shape[2] % 32
        k, v = (torch.cat([x, x.roll(-1, 1).repeat(1, 1, 32, 1)[:, :, :tail]], 2) for x in (k, v))
        self.tail = tail
        visible = torch.nn.functional.pad(visible, (0, tail), value=True)
        visible[..., visible.shape[-1] - tail :] &= not self.causal
        keep = None if keep is None else torch.nn.functional.pad(keep, (0, tail))
        return super().forward(q, k, v, visible, keep, dropout, scale)

    def __call__(self, q, k, v, *, causal=False, **options):
        self.causal = causal
        return super().__call__(q, k, v, causal=causal, **options)

    def backward(self, do, dlse, saved):
        dq, dk, dv = super().backward(do, dlse, saved)
        T = dk.shape[2] - self.tail
        return dq, dk[:, :, :T], dv[:, :, :T]


@mutant("attention", bug="a row that sees nothing gives NaN", seen="causal, Tq > Tk; length 0")
class UnseeingRowsNaN(Attention):
    def normalise(self, acc, m_i, l_i):
        return acc / l_i[..., None], safe(m_i) + self.log(l_i)


@mutant("attention", bug="a row that sees nothing gives the mean of v", seen="causal, Tq > Tk")
class UnseeingRowsMean(Attention):
    def scores(self, q, k, visible, scale):
        return super().scores(q, k, visible, scale).clamp(min=-1e30)


@mutant("attention", bug="a row that sees nothing has lse 0", seen="lse, causal, Tq > Tk")
class UnseeingRowsLseZero(Attention):
    def forward(self, *inputs, **options):
        (o, lse), saved = super().forward(*inputs, **options)
        return (o, safe(lse)), saved


@mutant("attention", bug="NaN in a hidden key or value leaks", seen="NaN in hidden values")
class HiddenValuesLeak(Attention):
    def forward(self, q, k, v, visible, keep, dropout, scale):
        (o, lse), saved = super().forward(q, k, v, visible, keep, dropout, scale)
        # p is 0 there, and 0·NaN is NaN
        leak = self.heads(0 * v.sum(2, keepdim=True), q.shape[1])
        return (o + leak, lse), saved


@mutant("attention", bug="NaN in a hidden key or value leaks", seen="NaN in hidden keys")
class HiddenKeysLeak(Attention):
    def forward(self, q, k, v, visible, keep, dropout, scale):
        (o, lse), saved = super().forward(q, k, v, visible, keep, dropout, scale)
        return (o, lse), (self.heads(0 * k.sum(2, keepdim=True), q.shape[1]), saved)

    def backward(self, do, dlse, saved):
        # ds is 0 there, and 0·NaN is NaN
        leak, saved = saved
        dq, dk, dv = super().backward(do, dlse, saved)
        return dq + leak, dk, dv


@mutant("attention", bug="NaN in a hidden query or gradient leaks", seen="NaN in unseeing queries")
class HiddenQueriesLeak(Attention):
    def forward(self, q, k, v, visible, keep, dropout, scale):
        outputs, saved = super().forward(q, k, v, visible, keep, dropout, scale)
        return outputs, (0 * q.sum(2, keepdim=True), saved)

    def backward(self, do, dlse, saved):
        leak, saved = saved
        dq, dk, dv = super().backward(do, dlse, saved)
        return dq, dk + self.over_groups(leak.float(), dk.shape[1]).to(dk), dv


@mutant("attention", bug="NaN swallowed by a maximum", seen="NaN in a key that is seen")
class NanSwallowed(Attention):
    def scores(self, q, k, visible, scale):
        return super().scores(q, k, visible, scale).fmax(torch.tensor(-torch.inf))


class Walk(Attention):
    """The walk over keys again, with the updates of the two sums as steps."""

    def walk(self, q, k, v, visible, keep, dropout, scale, storage, part):
        m_i = q.new_full(q.shape[:3], -torch.inf)
        l_i, acc = torch.zeros_like(m_i), torch.zeros_like(q)
        for cols in tiles(k.shape[2], self.block_n):
            s = self.scores(q, k[:, :, cols], visible[..., cols], scale)
            m_new = self.new_maximum(m_i, s)
            p = self.exp(s - safe(m_new)[..., None])
            alpha = self.rescale(m_i, safe(m_new))
            l_i = self.new_sum(l_i, alpha, p)
            p = self.dropped(rounded(p, storage), keep, cols, dropout)
            acc = self.new_acc(acc, alpha[..., None], p @ v[:, :, cols])
            m_i = m_new
        return self.normalise(acc, m_i, l_i)

    def new_sum(self, l_i, alpha, p):
        return l_i * alpha + p.sum(-1)

    def new_acc(self, acc, alpha, pv):
        return acc * alpha + pv


@mutant("attention", bug="accumulator not rescaled when the maximum rises", seen="several tiles")
class AccNotRescaled(Walk):
    def new_acc(self, acc, alpha, pv):
        return acc + pv


@mutant("attention", bug="sum not rescaled when the maximum rises", seen="several tiles")
class SumNotRescaled(Walk):
    def new_sum(self, l_i, alpha, p):
        return l_i + p.sum(-1)


@mutant("attention", bug="accumulator rescaled after the new tile", seen="several tiles")
class RescaledTooLate(Walk):
    def new_acc(self, acc, alpha, pv):
        return (acc + pv) * alpha.where(alpha != 0, torch.ones(()))


@mutant("attention", bug="accumulation in bf16", seen="several tiles")
class AccumulatedInBf16(Walk):
    def new_acc(self, acc, alpha, pv):
        return rounded(acc * alpha + pv, torch.bfloat16)


@mutant(
    "attention",
    bug="accumulation in fp16",
    seen="several tiles in float32 and float16",
    dtypes=("float32", "float16"),
)
class AccumulatedInFp16(Walk):
    def new_acc(self, acc, alpha, pv):
        return rounded(acc * alpha + pv, torch.float16)


@mutant("attention", bug="sum of probabilities in bf16", seen="several tiles")
class SumInBf16(Walk):
    def new_sum(self, l_i, alpha, p):
        return rounded(l_i * alpha + p.sum(-1), torch.bfloat16)


@mutant("attention", bug="dropped probabilities left out of the sum", seen="dropout")
class SumOfKept(Walk):
    def walk(self, q, k, v, visible, keep, dropout, scale, storage, part):
        o, lse = super().walk(q, k, v, visible, keep, dropout, scale, storage, part)
        if keep is None:
            return o, lse
        p = self.exp(self.scores(q, k, visible, scale) - safe(lse)[..., None])
        kept = torch.where(keep, p, 0.0).sum(-1, keepdim=True)
        return torch.where(kept > 0, o / kept, 0.0), lse


@mutant(
    "attention",
    bug="maximum over the wrong axis",
    seen="scores spread by more than 88",
)
class MaximumOfTheTile(Attention):
    def new_maximum(self, m_i, s):
        # one maximum for all queries of the tile: right while no row underflows
        m_new = torch.maximum(m_i, s.amax((-2, -1))[..., None])
        return m_new.amax(-1, keepdim=True).expand_as(m_i)


@mutant("attention", bug="maximum not subtracted", seen="scores beyond 88")
class NoMaximum(Attention):
    def new_maximum(self, m_i, s):
        return torch.zeros_like(m_i)


@mutant("attention", bug="maximum starts from 0", seen="scores all below −88")
class MaximumFromZero(Attention):
    def new_maximum(self, m_i, s):
        return super().new_maximum(m_i, s).clamp(min=0)


@mutant("attention", bug="scale applied twice", seen="a scale other than 1")
class ScaleTwice(Attention):
    def forward(self, q, k, v, visible, keep, dropout, scale):
        return super().forward(q, k, v, visible, keep, dropout, scale * scale)


@mutant("attention", bug="scale not applied", seen="the default scale")
class ScaleLeftOut(Attention):
    def forward(self, q, k, v, visible, keep, dropout, scale):
        return super().forward(q, k, v, visible, keep, dropout, 1.0)


@mutant("attention", bug="scale taken as positive", seen="a negative scale")
class ScalePositive(Attention):
    def forward(self, q, k, v, visible, keep, dropout, scale):
        return super().forward(q, k, v, visible, keep, dropout, abs(scale))


@mutant("attention", bug="scale of 0 taken as the default", seen="a scale of 0")
class ScaleZeroIsDefault(Attention):
    def __call__(self, q, k, v, *, scale=None, **options):
        return super().__call__(q, k, v, scale=scale or None, **options)


@mutant("attention", bug="mask added before the scale", seen="a scale that is 0 or negative")
class MaskBeforeScale(Attention):
    def scores(self, q, k, visible, scale):
        hidden = torch.where(visible, 0.0, -1e9)
        return (q @ k.mT + hidden) * scale


@mutant("attention", bug="head dimension hard-coded to 64", seen="a D over 64")
class HeadDim64(Attention):
    def scores(self, q, k, visible, scale):
        return super().scores(q[..., :64], k[..., :64], visible, scale)


@mutant("attention", bug="head dimension hard-coded to 64", seen="the default scale, D ≠ 64")
class ScaleOf64(Attention):
    def __call__(self, q, k, v, *, scale=None, **options):
        return super().__call__(q, k, v, scale=1 / 8 if scale is None else scale, **options)


@mutant("attention", bug="odd head dimension read past its end", seen="an odd D")
class OddHeadDim(Attention):
    def scores(self, q, k, visible, scale):
        if q.shape[-1] % 2:
            # loads of two elements reach the next row's first
            q, k = (torch.cat([x, x.roll(-1, -2)[..., :1]], -1) for x in (q, k))
        return super().scores(q, k, visible, scale)


@dataclass
class Split(Attention):
    splits: int = 3


@mutant(
    "attention", bug="parts of a split row averaged, not weighted", seen="several tiles of keys"
)
class SplitsAveraged(Split):
    def merge(self, parts):
        o, lse = (torch.stack(x) for x in zip(*parts))
        return o.mean(0), lse.logsumexp(0)


@mutant("attention", bug="lse of the last part of a split row returned", seen="lse")
class LseOfLastPart(Split):
    def merge(self, parts):
        return super().merge(parts)[0], parts[-1][1]


@mutant("attention", bug="one tile configuration wrong", seen="more than 128 keys")
class WrongOverManyKeys(Attention):
    def rescale(self, m_i, m_new):
        alpha = super().rescale(m_i, m_new)
        return alpha if self.keys <= 128 else torch.ones_like(alpha)

    def forward(self, q, k, *rest, **options):
        self.keys = k.shape[2]
        return super().forward(q, k, *rest, **options)


@mutant(
    "attention",
    bug="scores in bf16",
    seen="float32 and float16; large scores in bfloat16",
)
class ScoresInBf16(Attention):
    def scores(self, q, k, visible, scale):
        return rounded(super().scores(q, k, visible, scale), torch.bfloat16)


@mutant("attention", bug="probabilities rounded below the storage dtype", seen="any case")
class ProbabilitiesInFp8(Attention):
    def dropped(self, p, keep, cols, dropout):
        return super().dropped(rounded(p, torch.float8_e4m3fn), keep, cols, dropout)


@mutant("attention", bug="TF32 where fp32 was promised", seen="float32", dtypes=("float32",))
class Tf32(Attention):
    def scores(self, q, k, visible, scale):
        return super().scores(tf32(q), tf32(k), visible, scale)


@mutant("attention", bug="exponential interpolated in too coarse a table", seen="any case")
class CoarseExp(Attention):
    def exp(self, x):
        # 2^n·(1 + f): a straight line between powers of 2
        x = x * LOG2E
        n = x.floor()
        return torch.where(x > -126, torch.exp2(n) * (1 + x - n), 0.0)


@mutant("attention", bug="query head h reads key head h mod Hkv", seen="grouped heads")
class HeadsInterleaved(Attention):
    def heads(self, k, H):
        return k.repeat(1, H // k.shape[1], 1, 1)

    def over_groups(self, dk, Hkv):
        B, H, Tk, D = dk.shape
        return dk.reshape(B, H // Hkv, Hkv, Tk, D).sum(1)


@mutant("attention", bug="dK and dV of the last query head of a group alone", seen="grouped heads")
class LastHeadOverwrites(Attention):
    def over_groups(self, dk, Hkv):
        return dk.reshape(dk.shape[0], Hkv, -1, *dk.shape[2:])[:, :, -1]


@mutant("attention", bug="lse stored in log2, read as ln", seen="lse")
class LseReturnedInLog2(Attention):
    def forward(self, *inputs, **options):
        (o, lse), saved = super().forward(*inputs, **options)
        return (o, lse * LOG2E), saved


@mutant("attention", bug="lse stored in log2, read as ln", seen="any backward")
class LseSavedInLog2(Attention):
    def forward(self, *inputs, **options):
        outputs, saved = super().forward(*inputs, **options)
        return outputs, (*saved[:4], saved[4] * LOG2E, *saved[5:])


@mutant("attention", bug="gradient of lse left out", seen="a gradient of lse")
class LseGradientLost(Attention):
    def backward(self, do, dlse, saved):
        return super().backward(do, None, saved)


@mutant("attention", bug="delta left out of dS", seen="any backward")
class DeltaLeftOut(Attention):
    def score_gradient(self, p, dp, delta):
        return p * dp


@mutant("attention", bug="dK lacks the scale", seen="any backward")
class DkUnscaled(Attention):
    def dk_scale(self, scale):
        return 1.0


@mutant("attention", bug="dV from unnormalised probabilities", seen="any backward")
class DvUnnormalised(Attention):
    def backward(self, do, dlse, saved):
        dq, dk, _ = super().backward(do, dlse, saved)
        q, k, _, _, _, visible, keep, dropout, scale, storage, Hkv = saved
        s = self.scores(q, k, visible, scale)
        p = self.exp(s - safe(s.amax(-1, keepdim=True)))
        every = slice(None)
        p = self.dropped_bwd(p, keep, every, every, dropout)
        do = torch.where(visible.any(-1, keepdim=True), do.float(), 0.0)
        return dq, dk, self.over_groups(p.mT @ do, Hkv).to(storage)


@mutant("attention", bug="dQ of the last tile of keys alone", seen="several tiles of keys")
class DqOfLastTile(Attention):
    def backward(self, do, dlse, saved):
        _, dk, dv = super().backward(do, dlse, saved)
        last = tiles(saved[1].shape[2], self.block_n)[-1]
        visible = saved[5].clone()
        visible[..., : last.start] = False
        # the statistics are those of the whole row
        dq, _, _ = super().backward(do, dlse, (*saved[:5], visible, *saved[6:]))
        return dq, dk, dv


@mutant("attention", bug="causal tile on the diagonal skipped in dK", seen="causal")
class DiagonalTileSkipped(Attention):
    def backward(self, do, dlse, saved):
        dq, _, dv = super().backward(do, dlse, saved)
        visible = saved[5]
        Tq, Tk = visible.shape[-2:]
        same = torch.arange(Tq)[:, None] // 16 == torch.arange(Tk) // 16
        hidden = visible & ~(same & ~visible.all(-1, keepdim=True))
        _, dk, _ = super().backward(do, dlse, (*saved[:5], hidden, *saved[6:]))
        return dq, dk, dv


@mutant(
    "attention",
    bug="dropout mask differs between forward and backward",
    seen="dropout's gradients",
)
class OtherMaskInBackward(Attention):
    def dropped_bwd(self, dp, keep, rows, cols, dropout):
        # drawn for each tile from the tile's own start
        if keep is not None:
            rows = slice(0, rows.stop - rows.start)
        return super().dropped_bwd(dp, keep, rows, cols, dropout)


@mutant("attention", bug="dropout not rescaled by 1/(1 − p)", seen="dropout")
class DropoutUnscaled(Attention):
    def dropped(self, p, keep, cols, dropout):
        return super().dropped(p, keep, cols, 0.0)

    def dropped_bwd(self, dp, keep, rows, cols, dropout):
        return super().dropped_bwd(dp, keep, rows, cols, 0.0)


@mutant("attention", bug="same dropout mask for different seeds", seen="a seed other than 0")
class SeedIgnored(Attention):
    def keep(self, shape, dropout, seed):
        return super().keep(shape, dropout, 0)


@mutant("attention", bug="same dropout mask in every head", seen="dropout with several heads")
class MaskOfTheFirstHead(Attention):
    def keep(self, shape, dropout, seed):
        return keep_mask((1, 1, *shape[2:]), dropout, seed).expand(shape)


@mutant("attention", bug="dropout keeps with probability p", seen="dropout other than 1/2")
class KeepsWithP(Attention):
    def keep(self, shape, dropout, seed):
        return ~super().keep(shape, dropout, seed)


@mutant("attention", bug="dropout left out of dP", seen="dropout's gradients")
class DropoutMissingInDp(Attention):
    def score_gradient(self, p, dp, delta):
        return p * (self.undropped - delta)

    def dropped_bwd(self, dp, keep, rows, cols, dropout):
        self.undropped = dp
        return super().dropped_bwd(dp, keep, rows, cols, dropout)
