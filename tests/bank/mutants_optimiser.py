"""Wrong adamw and sample kernels."""

import torch

from .models import AdamW, Sample, rounded
from .mutants import mutant


@mutant("adamw", bug="Adam without bias correction", seen="early steps")
class NoBiasCorrection(AdamW):
    def bias(self, beta, step):
        return 1.0


@mutant("adamw", bug="step counted from 0", seen="early steps")
class StepFromZero(AdamW):
    def bias(self, beta, step):
        return super().bias(beta, step + 1)


@mutant("adamw", bug="bias correction of the second moment left out", seen="early steps")
class NoSecondBias(AdamW):
    def direction(self, m, v, bias1, bias2, eps):
        return super().direction(m, v, bias1, 1.0, eps)


@mutant("adamw", bug="L2 decay in place of decoupled decay", seen="weight decay")
class L2Decay(AdamW):
    def update(self, p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
        g = g + weight_decay * p
        return super().update(p, g, m, v, step, lr, beta1, beta2, eps, 0.0)


@mutant("adamw", bug="ε inside the root of Adam", seen="ε or gradients far from 1")
class EpsInsideRoot(AdamW):
    def direction(self, m, v, bias1, bias2, eps):
        return (m / bias1) / (v / bias2 + eps).sqrt()


@mutant("adamw", bug="ε added before the bias correction", seen="early steps with a large ε")
class EpsBeforeCorrection(AdamW):
    def direction(self, m, v, bias1, bias2, eps):
        return (m / bias1) / ((v.sqrt() + eps) / bias2**0.5)


@mutant("adamw", bug="ε lost", seen="no gradient yet; a large ε")
class EpsLost(AdamW):
    def direction(self, m, v, bias1, bias2, eps):
        return super().direction(m, v, bias1, bias2, 0.0)


@mutant(
    "adamw",
    bug="weight decay where none was asked for",
    seen="a weight decay of 0; lr·λ = 0.001 is below bfloat16's rounding",
    dtypes=("float32", "float16"),
)
class AlwaysDecays(AdamW):
    def update(self, p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
        return super().update(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay or 0.01)


@mutant("adamw", bug="weight decay not multiplied by the learning rate", seen="weight decay")
class DecayWithoutRate(AdamW):
    def update(self, p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
        new, m, v = super().update(p, g, m, v, step, lr, beta1, beta2, eps, 0.0)
        return new - weight_decay * p, m, v


@mutant("adamw", bug="weight decay left out", seen="weight decay")
class NoDecay(AdamW):
    def update(self, p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
        return super().update(p, g, m, v, step, lr, beta1, beta2, eps, 0.0)


@mutant("adamw", bug="moments with their betas exchanged", seen="different betas")
class BetasExchanged(AdamW):
    def moments(self, g, m, v, beta1, beta2):
        return super().moments(g, m, v, beta2, beta1)


@mutant("adamw", bug="second moment of the first moment", seen="any step")
class SecondMomentOfFirst(AdamW):
    def moments(self, g, m, v, beta1, beta2):
        m, _ = super().moments(g, m, v, beta1, beta2)
        return m, beta2 * v + (1 - beta2) * m * m


@mutant("adamw", bug="moments not written back", seen="any step")
class MomentsNotWritten(AdamW):
    def update(self, p, g, m, v, *rest):
        new, _, _ = super().update(p, g, m, v, *rest)
        return new, m, v


@mutant("adamw", bug="update from the old first moment", seen="any step")
class UpdateFromOldMoment(AdamW):
    def update(self, p, g, m, v, step, *rest):
        before = m
        self.old = before
        return super().update(p, g, m, v, step, *rest)

    def direction(self, m, v, bias1, bias2, eps):
        return super().direction(self.old, v, bias1, bias2, eps)


@mutant(
    "adamw",
    bug="accumulation in bf16",
    seen="float32 and float16",
    dtypes=("float32", "float16"),
)
class MomentsInBf16(AdamW):
    def moments(self, g, m, v, beta1, beta2):
        return tuple(rounded(x, torch.bfloat16) for x in super().moments(g, m, v, beta1, beta2))


@mutant(
    "adamw",
    bug="accumulation in fp16",
    seen="moments below fp16's smallest",
    dtypes=("float32", "bfloat16"),
)
class SecondMomentInFp16(AdamW):
    def moments(self, g, m, v, beta1, beta2):
        m, v = super().moments(g, m, v, beta1, beta2)
        return m, rounded(v, torch.float16)


@mutant("adamw", bug="autotuned in-place kernel run twice", seen="the first call of a shape")
class TunedInPlace:
    """Tries its two configurations on the caller's own tensors."""

    def __init__(self):
        self.tuned = set()

    def __call__(self, p, g, m, v, **options):
        step = AdamW(in_place=True)
        if p.shape not in self.tuned:
            self.tuned.add(p.shape)
            step(p, g, m, v, **options)
        return step(p, g, m, v, **options)


@mutant("adamw", bug="input modified in place", seen="the gradient compared before and after")
def gradient_set_to_zero(p, g, m, v, **options):
    new = AdamW()(p, g, m, v, **options)
    g.zero_()
    return new


@mutant("adamw", bug="step kept in 32 bits", seen="a step past 2³²", dtypes=("float32",))
class StepIn32Bits(AdamW):
    def bias(self, beta, step):
        return super().bias(beta, step % 2**32)


@mutant("adamw", bug="one tile configuration wrong", seen="more than 4096 elements")
class WrongPastATile(AdamW):
    def update(self, p, g, m, v, *rest):
        new, m, v = super().update(p, g, m, v, *rest)
        if p.numel() > 4096:
            new.view(-1)[4096:] = p.reshape(-1)[4096:]
        return new, m, v


@mutant("sample", bug="temperature ignored", seen="a temperature")
class TemperatureIgnored(Sample):
    def weights(self, x, temperature):
        return super().weights(x, 1.0)


@mutant("sample", bug="temperature multiplies", seen="a temperature")
class TemperatureMultiplies(Sample):
    def weights(self, x, temperature):
        return super().weights(x, 1 / temperature)


@mutant("sample", bug="top_k keeps one too many", seen="top_k")
class OneTooMany(Sample):
    def allowed(self, weights, top_k, top_p, min_p):
        return super().allowed(weights, None if top_k is None else top_k + 1, top_p, min_p)


@mutant("sample", bug="top_p leaves out the token that crosses it", seen="top_p")
class CrossingTokenLeftOut(Sample):
    def allowed(self, weights, top_k, top_p, min_p):
        allowed = super().allowed(weights, top_k, top_p, min_p)
        if top_p is None or top_p >= 1:
            return allowed
        least = torch.where(allowed, weights, torch.inf).amin(-1, keepdim=True)
        fewer = allowed & (weights > least)
        return torch.where(fewer.any(-1, keepdim=True), fewer, allowed)


@mutant("sample", bug="top_p taken before top_k", seen="top_k and top_p together")
class FiltersExchanged(Sample):
    def allowed(self, weights, top_k, top_p, min_p):
        first = super().allowed(weights, None, top_p, None)
        return first & super().allowed(weights, top_k, None, min_p)


@mutant("sample", bug="min_p compared with 1, not with the largest", seen="min_p")
class MinPAbsolute(Sample):
    def allowed(self, weights, top_k, top_p, min_p):
        if min_p is None:
            return super().allowed(weights, top_k, top_p, None)
        p = weights / weights.sum(-1, keepdim=True)
        allowed = super().allowed(weights, top_k, top_p, None) & (p >= min_p)
        return torch.where(allowed.any(-1, keepdim=True), allowed, weights == 1)


@mutant("sample", bug="maximum not subtracted", seen="logits beyond 88")
class NoMaximum(Sample):
    def weights(self, x, temperature):
        return torch.exp(x / temperature)


@mutant("sample", bug="intervals taken from the largest token down", seen="any draw")
class SortedIntervals(Sample):
    def inverse(self, weights, u):
        values, order = weights.sort(-1, descending=True)
        return order.gather(1, super().inverse(values, u)[:, None])[:, 0]


@mutant("sample", bug="u of the first row for all rows", seen="several rows")
class UOfTheFirstRow(Sample):
    def inverse(self, weights, u):
        return super().inverse(weights, u[:1].expand(u.shape))


@mutant("sample", bug="token one too high", seen="any draw")
class OneTooHigh(Sample):
    def inverse(self, weights, u):
        return (super().inverse(weights, u) + 1).clamp(max=weights.shape[-1] - 1)


@mutant("sample", bug="greedy at every temperature", seen="any draw")
class AlwaysGreedy(Sample):
    def choose(self, x, u, temperature, *filters):
        return super().choose(x, u, 0.0, *filters)


@mutant("sample", bug="greedy takes the last of equals", seen="equal logits at temperature 0")
class LastOfEquals(Sample):
    def choose(self, x, u, temperature, *filters):
        if temperature:
            return super().choose(x, u, temperature, *filters)
        return x.shape[-1] - 1 - x.flip(-1).argmax(-1)


@mutant("sample", bug="accumulation in bf16", seen="many tokens")
class SumInBf16(Sample):
    def cumulative(self, x):
        return rounded(super().cumulative(x), torch.bfloat16)


@mutant("sample", bug="cumulative sum within its tile", seen="several tiles")
class SumWithinTile(Sample):
    def cumulative(self, x):
        return torch.cat([part.cumsum(-1) for part in x.split(1024, -1)], -1)
