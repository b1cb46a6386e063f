"""Wrong ffn kernels."""

import math

import torch

from .models import FFN, product, rounded, tiles
from .mutants import mutant


def tf32(x):
    """float32 values cut to the 10 bits of mantissa that a tensor core reads."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@mutant("ffn", bug="erf's GELU for the tanh form", seen="gelu_tanh")
class ErfForTanh(FFN):
    def activate(self, z, activation):
        return super().activate(z, activation.replace("gelu_tanh", "gelu"))


@mutant("ffn", bug="slope of the tanh form for erf's GELU", seen="gelu", dtypes=("float32",))
class TanhSlopeForErf(FFN):
    def slope(self, z, activation):
        return super().slope(z, {"gelu": "gelu_tanh"}.get(activation, activation))


@mutant("ffn", bug="cubic term left out of the slope", seen="gelu_tanh's gradient")
class NoCubicInSlope(FFN):
    def slope(self, z, activation):
        if activation != "gelu_tanh":
            return super().slope(z, activation)
        t = torch.tanh(self.inner(z))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * math.sqrt(2 / math.pi)


@mutant("ffn", bug="slope taken at the activation", seen="any backward but relu's")
class SlopeAtActivation(FFN):
    def slope(self, z, activation):
        return super().slope(self.activate(z, activation), activation)


@mutant("ffn", bug="ReLU gradient at zero taken as 1", seen="pre-activations that are exactly 0")
class ReluSlopeAtZero(FFN):
    def slope(self, z, activation):
        return (z >= 0).float() if activation == "relu" else super().slope(z, activation)


@mutant("ffn", bug="leak of 0.01 below zero", seen="relu")
class Leaky(FFN):
    def activate(self, z, activation):
        leaky = torch.where(z > 0, z, 0.01 * z)
        return leaky if activation == "relu" else super().activate(z, activation)


@mutant("ffn", bug="NaN swallowed by a maximum", seen="a NaN in x under relu")
class NanSwallowed(FFN):
    def activate(self, z, activation):
        if activation == "relu":
            return z.fmax(torch.zeros(()))
        return super().activate(z, activation)


@mutant("ffn", bug="tanh through exp overflows", seen="pre-activations beyond 40")
class TanhOverflows(FFN):
    def tanh_of(self, u):
        e = torch.exp(2 * u)
        return (e - 1) / (e + 1)


@mutant("ffn", bug="output bias left out", seen="a b2 that is not 0")
class NoOutputBias(FFN):
    def forward(self, x, w1, b1, w2, b2, activation):
        return super().forward(x, w1, b1, w2, torch.zeros_like(b2), activation)


@mutant("ffn", bug="hidden bias added after the activation", seen="a b1 that is not 0")
class HiddenBiasLate(FFN):
    def forward(self, x, w1, b1, w2, b2, activation):
        self.late = b1.float()
        return super().forward(x, w1, torch.zeros_like(b1), w2, b2, activation)

    def activate(self, z, activation):
        return super().activate(z, activation) + self.late


@mutant("ffn", bug="gradient of the hidden bias before the slope", seen="any backward")
class BiasGradientBeforeSlope(FFN):
    def backward(self, dy, saved):
        dx, dw1, _, dw2, db2 = super().backward(dy, saved)
        x, _, _, w2, *_ = saved
        return dx, dw1, (dy.float().reshape(x.shape) @ w2.mT).sum(0).to(dx.dtype), dw2, db2


@mutant("ffn", bug="accumulation in bf16", seen="contractions over several tiles")
class AccumulatedInBf16(FFN):
    def affine(self, x, w, b, step):
        total = b
        for part in tiles(x.shape[-1], 16):
            total = rounded(total + x[:, part] @ w[part], torch.bfloat16)
        return total


@mutant(
    "ffn",
    bug="accumulation in fp16",
    seen="float32 and float16; bfloat16 beyond fp16's 65,504",
    dtypes=("float32", "float16"),
)
class AccumulatedInFp16(FFN):
    def affine(self, x, w, b, step):
        total = b
        for part in tiles(x.shape[-1], 16):
            total = rounded(total + x[:, part] @ w[part], torch.float16)
        return total


@mutant("ffn", bug="dW reduced in bf16 over many rows", seen="70 rows and more")
class WeightGradientInBf16(FFN):
    def over_rows(self, a, b):
        total = torch.zeros(a.shape[1], b.shape[1])
        for rows in tiles(len(a), 8):
            total = rounded(total + a[rows].mT @ b[rows], torch.bfloat16)
        return total


@mutant("ffn", bug="TF32 where fp32 was promised", seen="float32", dtypes=("float32",))
class Tf32(FFN):
    def affine(self, x, w, b, step):
        return product(tf32(x), tf32(w), step) + b


@mutant("ffn", bug="contraction tail unmasked", seen="a C or F that is no multiple of 32")
class TailUnmasked(FFN):
    def affine(self, x, w, b, step):
        # the last tile of a row goes on into the next row, that of w into what lies behind it
        tail = -x.shape[1] % 32
        behind_x = x.roll(-1, 0).repeat(1, 32)[:, :tail]
        behind_w = w.repeat(32, 1)[:tail]
        return super().affine(torch.cat([x, behind_x], 1), torch.cat([w, behind_w]), b, step)


@mutant("ffn", bug="contraction tail left out", seen="a C or F that is no multiple of 16")
class TailLeftOut(FFN):
    def affine(self, x, w, b, step):
        whole = x.shape[1] // 16 * 16 or x.shape[1]
        return super().affine(x[:, :whole], w[:whole], b, step)


@mutant("ffn", bug="one tile configuration wrong", seen="more rows than a group of tiles holds")
class WrongInManyRows(FFN):
    def forward(self, x, w1, b1, w2, b2, activation):
        y, saved = super().forward(x, w1, b1, w2, b2, activation)
        y[1024:] -= b2
        return y, saved


@mutant("ffn", bug="gradient of the last row block left out", seen="several row blocks")
class LastRowBlockLost(FFN):
    def over_rows(self, a, b):
        whole = len(a) // 32 * 32 or len(a)
        return super().over_rows(a[:whole], b[:whole])
