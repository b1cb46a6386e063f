"""Wrong layer_norm and residual_layer_norm kernels."""

import torch

from .models import LayerNorm, ResidualLayerNorm, rounded
from .mutants import mutant


@mutant(
    "layer_norm",
    bug="variance as E[x²] − E[x]²",
    seen="rows at an offset of 64",
    dtypes=("float32",),
)
class OnePassVariance(LayerNorm):
    def moments(self, x):
        mean = self.row_mean(x)
        return mean, (self.row_mean(x * x) - mean * mean).clamp(min=0)


@mutant("layer_norm", bug="ε lost", seen="ε of the order of the variance; constant rows")
class EpsLost(LayerNorm):
    def rstd(self, var, eps):
        return super().rstd(var, 0.0)


@mutant("residual_layer_norm", bug="ε lost", seen="rows far smaller than √ε; constant rows")
class ResidualEpsLost(ResidualLayerNorm):
    def rstd(self, var, eps):
        return super().rstd(var, 0.0)


@mutant(
    "layer_norm",
    bug="ε outside the root of a norm",
    seen="ε of the order of the deviation; constant rows",
)
class EpsOutside(LayerNorm):
    def rstd(self, var, eps):
        return 1 / (var.sqrt() + eps)


@mutant("layer_norm", bug="ε hard-coded", seen="another ε than 1e-5")
class EpsHardCoded(LayerNorm):
    def rstd(self, var, eps):
        return super().rstd(var, 1e-5)


@mutant("layer_norm", bug="unbiased variance", seen="short rows")
class UnbiasedVariance(LayerNorm):
    def moments(self, x):
        mean, var = super().moments(x)
        return mean, var * x.shape[-1] / max(x.shape[-1] - 1, 1)


@mutant(
    "layer_norm",
    bug="padding of a row's tile counted in the variance",
    seen="a row length that is no power of two",
)
class PaddingInVariance(LayerNorm):
    def moments(self, x):
        mean, var = super().moments(x)
        N = x.shape[-1]
        padding = (1 << (N - 1).bit_length()) - N
        # the padding holds 0, whose distance from the mean counts
        return mean, var + padding * mean.square() / N


@mutant("layer_norm", bug="mean and rstd saved in bf16", seen="rows at an offset of 64")
class StatisticsInBf16(LayerNorm):
    def gradients(self, dy, x, mean, rstd, w, xhat):
        mean, rstd = rounded(mean, torch.bfloat16), rounded(rstd, torch.bfloat16)
        return super().gradients(dy, x, mean, rstd, w, xhat)


@mutant("layer_norm", bug="accumulation in bf16", seen="a sum over many columns")
class MeanAccumulatedInBf16(LayerNorm):
    def row_mean(self, x):
        total = torch.zeros_like(x[:, :1])
        for part in x.split(8, -1):
            total = rounded(total + part.sum(-1, keepdim=True), torch.bfloat16)
        return total / x.shape[-1]


@mutant("layer_norm", bug="accumulation in fp16", seen="squares beyond fp16's 65,504")
class VarianceInFp16(LayerNorm):
    def moments(self, x):
        mean = self.row_mean(x)
        return mean, self.row_mean(rounded((x - mean).square(), torch.float16))


@mutant("layer_norm", bug="dW reduced in bf16 over many rows", seen="67 rows and more")
class WeightGradientInBf16(LayerNorm):
    def over_rows(self, x):
        total = torch.zeros_like(x[0])
        for part in x.split(4):
            total = rounded(total + part.sum(0), torch.bfloat16)
        return total


@mutant("layer_norm", bug="dx lacks the mean of g", seen="any backward")
class NoMeanOfG(LayerNorm):
    def gradients(self, dy, x, mean, rstd, w, xhat):
        dx, dw, db = super().gradients(dy, x, mean, rstd, w, xhat)
        return dx + rstd * self.row_mean(w * dy), dw, db


@mutant("layer_norm", bug="dx lacks the path through the variance", seen="any backward")
class NoVariancePath(LayerNorm):
    def gradients(self, dy, x, mean, rstd, w, xhat):
        _, dw, db = super().gradients(dy, x, mean, rstd, w, xhat)
        return rstd * (w * dy - self.row_mean(w * dy)), dw, db


@mutant("layer_norm", bug="dw from x instead of x̂", seen="any backward")
class WeightGradientOfX(LayerNorm):
    def gradients(self, dy, x, mean, rstd, w, xhat):
        dx, _, db = super().gradients(dy, x, mean, rstd, w, xhat)
        return dx, self.over_rows(dy * x), db


@mutant(
    "layer_norm",
    bug="rows past the backward's number of programs left out of dw",
    seen="more than 256 rows",
)
class RowsOverPrograms(LayerNorm):
    def over_rows(self, x):
        return super().over_rows(x[:256])


@mutant("layer_norm", bug="rank-3 input to a rank-2 backward", seen="x of shape (B, T, N)")
class RankTwoBackward(LayerNorm):
    def backward(self, dy, saved):
        self.rows = dy.shape[0]
        return super().backward(dy, saved)

    def over_rows(self, x):
        # as many rows as the first dimension says
        return super().over_rows(x[: self.rows])


@mutant(
    "layer_norm",
    bug="one tile configuration wrong",
    seen="rows longer than 256",
)
class WrongInLongRows(LayerNorm):
    def row_mean(self, x):
        # the loop over a second tile starts from the first's mean
        return super().row_mean(x) if x.shape[1] <= 256 else x[:, :256].mean(-1, keepdim=True)


@mutant(
    "residual_layer_norm",
    bug="one rounding too many on a residual stream",
    seen="a residual stream at an offset of 64",
    dtypes=("float16", "bfloat16"),
)
class NormOfRoundedSum(ResidualLayerNorm):
    def forward(self, x, r, w, b, eps):
        _, saved = super().forward(x, r, w, b, eps)
        h = x + r
        y, _ = self.norm(h.float(), w.float(), b.float(), eps)
        return (y.to(x.dtype), h), saved


@mutant("residual_layer_norm", bug="gradient of the second output left out", seen="a gradient of h")
class SumGradientLost(ResidualLayerNorm):
    def backward(self, dy, dh, saved):
        return super().backward(dy, torch.zeros_like(dh), saved)


@mutant("residual_layer_norm", bug="gradient reaches one summand only", seen="any backward")
class GradientOfOneSummand(ResidualLayerNorm):
    def backward(self, dy, dh, saved):
        dx, _, dw, db = super().backward(dy, dh, saved)
        return dx, dh.clone(), dw, db


@mutant("residual_layer_norm", bug="the input returned", seen="any r that is not 0", cheat=True)
class SumNotTaken(ResidualLayerNorm):
    def forward(self, x, r, w, b, eps):
        (y, _), saved = super().forward(x, r, w, b, eps)
        return (y, x.clone()), saved
