"""Wrong cross_entropy and linear_cross_entropy kernels."""

from dataclasses import dataclass

import torch
from gaugeblock.reference._embedding import embedding
from gaugeblock.reference._linear_cross_entropy import linear_cross_entropy
from gaugeblock.reference.oracle import Case, Index, Input, Op

from . import models
from .models import rounded, tiles
from .mutants import mutant


@dataclass
class CrossEntropy(models.CrossEntropy):
    block_v: int | None = 64


@dataclass
class LinearCrossEntropy(models.LinearCrossEntropy):
    block_v: int | None = 64
    chunk: int | None = 4


@mutant("cross_entropy", bug="mean over all targets, not those kept", seen="ignored targets")
class MeanOverAll(CrossEntropy):
    def count(self, kept):
        return torch.tensor(float(kept.numel()))


@mutant("linear_cross_entropy", bug="mean over all targets, not those kept", seen="ignored targets")
class LinearMeanOverAll(LinearCrossEntropy):
    def count(self, kept):
        return torch.tensor(float(kept.numel()))


@mutant("cross_entropy", bug="mean over no targets is 0, not NaN", seen="all targets ignored")
class MeanOfNothingIsZero(CrossEntropy):
    def count(self, kept):
        return kept.sum().clamp(min=1).float()


@mutant("cross_entropy", bug="gradient of reduction none wrong", seen="reduction none")
class OneGradientForAllRows(CrossEntropy):
    def backward(self, dloss, saved):
        return super().backward(dloss.flatten()[:1], saved)


@mutant("cross_entropy", bug="incoming gradient taken as 1", seen="a dloss other than 1")
class IncomingGradientIgnored(CrossEntropy):
    def backward(self, dloss, saved):
        return super().backward(torch.ones_like(dloss), saved)


@mutant(
    "cross_entropy",
    bug="gradient written into the caller's logits",
    seen="inputs compared before and after",
)
class GradientIntoLogits(CrossEntropy):
    def forward(self, logits, targets, ignore_index, alpha, reduction):
        loss, saved = super().forward(logits, targets, ignore_index, alpha, reduction)
        return loss, (logits, saved)

    def backward(self, dloss, saved):
        logits, saved = saved
        (dlogits,) = super().backward(dloss, saved)
        # one row of memory where the caller's rows share it
        rows = slice(0, 1) if logits.stride(0) == 0 else slice(None)
        logits.detach()[rows] = dlogits[rows]
        return (logits.detach(),)


@mutant("cross_entropy", bug="ignored targets counted as class 0", seen="ignored targets")
class CountsIgnored(CrossEntropy):
    def __call__(self, logits, targets, **options):
        return super().__call__(logits, targets.clamp(min=0), **options)


@mutant("cross_entropy", bug="ignore_index hard-coded to −100", seen="another ignore_index")
class IgnoreIndexHardCoded(CrossEntropy):
    def forward(self, logits, targets, ignore_index, alpha, reduction):
        return super().forward(logits, targets, -100, alpha, reduction)


@mutant("cross_entropy", bug="ignored rows get a gradient", seen="ignored targets")
class GradientOfIgnored(CrossEntropy):
    def dlogits(self, dloss, x, lse, m, total, index, kept, count, alpha):
        everything = torch.ones_like(kept)
        return super().dlogits(dloss, x, lse, m, total, index, everything, count, alpha)


@mutant("cross_entropy", bug="label smoothing ignored", seen="label smoothing")
class NoSmoothing(CrossEntropy):
    def forward(self, logits, targets, ignore_index, alpha, reduction):
        return super().forward(logits, targets, ignore_index, 0.0, reduction)


@mutant("cross_entropy", bug="label smoothing left out of the gradient", seen="label smoothing")
class NoSmoothingBackward(CrossEntropy):
    def dlogits(self, dloss, x, lse, m, total, index, kept, count, alpha):
        return super().dlogits(dloss, x, lse, m, total, index, kept, count, 0.0)


@mutant(
    "cross_entropy",
    bug="smoothing spread over V − 1 classes in the gradient",
    seen="label smoothing",
)
class SmoothingOverOthers(CrossEntropy):
    def dlogits(self, dloss, x, lse, m, total, index, kept, count, alpha):
        V = x.shape[1]
        d = super().dlogits(dloss, x, lse, m, total, index, kept, count, alpha)
        if alpha == 0:
            return d
        onehot = torch.zeros_like(x).scatter_(1, index[:, None], 1.0)
        share = alpha / V - alpha / (V - 1) * (1 - onehot)
        rows = (dloss.reshape(-1) / count).expand(len(x))[:, None]
        return d + torch.where(kept[:, None], rows * share, 0.0)


@mutant(
    "cross_entropy",
    bug="maximum not subtracted",
    seen="logits beyond 88",
)
class NoMaximum(CrossEntropy):
    def statistics(self, x):
        total = x.exp().sum(-1)
        return total.log(), torch.zeros_like(total), total


@mutant(
    "cross_entropy",
    bug="maximum over the wrong axis",
    seen="rows whose maxima differ by more than 88",
)
class MaximumOverRows(CrossEntropy):
    def statistics(self, x):
        # one maximum for the tile of rows
        m = x.amax().expand(len(x))
        total = (x - m[:, None]).exp().sum(-1)
        return m + total.log(), m, total


@mutant("cross_entropy", bug="maximum starts from 0", seen="logits all below −88")
class MaximumFromZero(CrossEntropy):
    def statistics(self, x):
        m = x.amax(-1).clamp(min=0)
        total = (x - m[:, None]).exp().sum(-1)
        return m + total.log(), m, total


@mutant(
    "cross_entropy",
    bug="log(softmax) formed",
    seen="a target more than 104 below the maximum",
)
class LogOfSoftmax(CrossEntropy):
    def row_losses(self, x, lse, index, alpha):
        losses = super().row_losses(x, lse, index, alpha)
        # what exp brings to 0 comes back as log 0
        return -losses.neg().exp().log() if alpha == 0 else losses


@mutant("cross_entropy", bug="sum not rescaled when the maximum rises", seen="several tiles")
class SumNotRescaled(CrossEntropy):
    def statistics(self, x):
        m_i, l_i = x.new_full(x.shape[:1], -torch.inf), x.new_zeros(x.shape[:1])
        for cols in tiles(x.shape[1], self.block_v):
            m_i = torch.maximum(m_i, x[:, cols].amax(-1))
            l_i = l_i + torch.exp(x[:, cols] - m_i[:, None]).sum(-1)
        return m_i + l_i.log(), m_i, l_i


@mutant(
    "cross_entropy",
    bug="tail of the vocabulary unmasked",
    seen="a vocabulary that is no multiple of the tile",
)
class VocabularyTailUnmasked(CrossEntropy):
    def statistics(self, x):
        # what lies behind a row is the next row
        tail = -x.shape[1] % self.block_v
        return super().statistics(torch.cat([x, x.roll(-1, 0).repeat(1, 64)[:, :tail]], 1))


@mutant(
    "cross_entropy",
    bug="tail of the vocabulary counted as logits of 0",
    seen="a vocabulary that is no multiple of the tile",
)
class VocabularyTailZero(CrossEntropy):
    def statistics(self, x):
        return super().statistics(
            torch.cat([x, x.new_zeros(len(x), -x.shape[1] % self.block_v)], 1)
        )


@mutant(
    "cross_entropy",
    bug="logits rounded to bf16",
    seen="float32 and float16",
    dtypes=("float32", "float16"),
)
class LogitsInBf16(CrossEntropy):
    def statistics(self, x):
        return super().statistics(rounded(x, torch.bfloat16))


@mutant("cross_entropy", bug="accumulation in bf16", seen="several tiles")
class SumInBf16(CrossEntropy):
    def statistics(self, x):
        m = x.amax(-1)
        total = torch.zeros_like(m)
        for cols in tiles(x.shape[1], self.block_v):
            partial = (x[:, cols] - m[:, None]).exp().sum(-1)
            total = rounded(total + partial, torch.bfloat16)
        return m + total.log(), m, total


@mutant("cross_entropy", bug="target compared within its tile", seen="a vocabulary over 1024")
class TargetWithinTile(CrossEntropy):
    def dlogits(self, dloss, x, lse, m, total, index, kept, count, alpha):
        d = super().dlogits(dloss, x, lse, m, total, index, kept, count, alpha)
        # every tile marks the target's place in its own tile
        elsewhere = torch.arange(x.shape[1]) % 1024 == (index % 1024)[:, None]
        elsewhere &= torch.arange(x.shape[1]) != index[:, None]
        rows = (dloss.reshape(-1) / count).expand(len(x))[:, None] * kept[:, None]
        return torch.where(elsewhere, d - rows * (1 - alpha), d)


@mutant(
    "cross_entropy",
    bug="one tile configuration wrong",
    seen="a vocabulary over 4096",
)
class WrongInLongRows(CrossEntropy):
    def statistics(self, x):
        return super().statistics(x[:, :4096])


@mutant(
    "linear_cross_entropy",
    bug="logits rounded to bf16 before the softmax",
    seen="float32 and float16; logits at an offset in bfloat16",
)
class HeadLogitsInBf16(LinearCrossEntropy):
    def logits(self, x, w, b):
        return rounded(super().logits(x, w, b), torch.bfloat16)


@mutant("linear_cross_entropy", bug="bias left out", seen="a bias")
class NoBias(LinearCrossEntropy):
    def logits(self, x, w, b):
        return super().logits(x, w, None)


@mutant("linear_cross_entropy", bug="gradient of the bias left out", seen="a bias")
class NoBiasGradient(LinearCrossEntropy):
    def backward(self, dloss, saved):
        dx, dw, db = super().backward(dloss, saved)
        return dx, dw, None if db is None else torch.zeros_like(db)


@mutant(
    "linear_cross_entropy",
    bug="dW reduced in bf16 over many rows",
    seen="several chunks of rows",
)
class HeadGradientInBf16(LinearCrossEntropy):
    def backward(self, dloss, saved):
        dx, _, db = super().backward(dloss, saved)
        x, w, b, stats, index, kept, count, alpha, storage, _ = saved
        dloss = dloss.float().reshape(-1).expand(len(x))
        dw = torch.zeros_like(w)
        for rows in tiles(len(x), self.chunk):
            d = self.dlogits(
                dloss[rows], self.logits(x[rows], w, b), *(s[rows] for s in stats),
                index[rows], kept[rows], count, alpha,
            )  # fmt: skip
            dw = rounded(dw + d.mT @ x[rows], torch.bfloat16)
        return dx, dw.to(storage), db


@mutant("linear_cross_entropy", bug="dw of the last chunk of rows alone", seen="several chunks")
class LastChunkOverwrites(LinearCrossEntropy):
    def backward(self, dloss, saved):
        dx, _, db = super().backward(dloss, saved)
        x, w, b, stats, index, kept, count, alpha, storage, _ = saved
        rows = tiles(len(x), self.chunk)[-1]
        d = self.dlogits(
            dloss.float().reshape(-1).expand(len(x))[rows], self.logits(x[rows], w, b),
            *(s[rows] for s in stats), index[rows], kept[rows], count, alpha,
        )  # fmt: skip
        return dx, (d.mT @ x[rows]).to(storage), db


@mutant(
    "linear_cross_entropy",
    bug="gradient computed in the forward for dloss = 1",
    seen="a dloss other than 1",
)
class GradientForUnitLoss(LinearCrossEntropy):
    def backward(self, dloss, saved):
        return super().backward(torch.ones_like(dloss), saved)


@mutant(
    "linear_cross_entropy",
    bug="K tail of the head left out",
    seen="a width that is no multiple of 16",
)
class HeadTailLeftOut(LinearCrossEntropy):
    def logits(self, x, w, b):
        whole = x.shape[1] // 16 * 16 or x.shape[1]
        return super().logits(x[:, :whole], w[:, :whole], b)


def _tied(tokens, wte, targets):
    x, _ = embedding(tokens, wte)
    loss, _ = linear_cross_entropy(x, wte, targets)
    return loss


TIED_HEAD = Op(
    "tied_head",
    _tied,
    {
        "tokens": Index("B T", below="V"),
        "wte": Input("V C", fan_in="C"),
        "targets": Index("B T", below="V"),
    },
    [Case("odd", B=2, T=5, V=11, C=7)],
    outputs={"loss": ""},
)


@mutant(TIED_HEAD, bug="tied weights miss one gradient path", seen="tied weights")
def head_path_alone(tokens, wte, targets):
    x = models.embedding(tokens, wte.detach())
    return models.linear_cross_entropy(x, wte, targets)


@mutant(TIED_HEAD, bug="tied weights miss one gradient path", seen="tied weights")
def embedding_path_alone(tokens, wte, targets):
    return models.linear_cross_entropy(models.embedding(tokens, wte), wte.detach(), targets)
