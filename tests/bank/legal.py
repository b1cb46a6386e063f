"""Legal kernels: `VARIANTS`, none of which the oracle may call wrong.

Most are models with knobs drawn at random, the same ones every time; every value of every knob
occurs. Beside them stand torch's own functions, the eager twins, and the Triton kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from gaugeblock.reference.catalog import CATALOG

from gaugeblock import kernels

from . import models

ALL = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Variant:
    """A legal kernel of an op, and where it holds.

    expression: over the catalog's cases, for kernels that do less.
    slow:       interpreted kernels, which a long measurement runs less often.
    """

    name: str
    op: str
    fn: Callable
    dtypes: tuple[str, ...] = ALL
    expression: str | None = None
    framework: str = "torch"
    backward: bool = True
    slow: bool = field(default=False, compare=False)


def _drawn(op, model, count, **knobs):
    """`count` variants of a model: shuffled values of each knob, so that every one occurs."""
    rng = np.random.default_rng(list(op.encode()))
    columns = {}
    for knob, values in knobs.items():
        repeats = -(-count // len(values))
        columns[knob] = list(
            itertools.chain(*(rng.permutation(len(values)) for _ in range(repeats)))
        )
    defaults = {f.name: f.default for f in fields(model)}
    variants = {}
    for row in range(count):
        chosen = {knob: values[columns[knob][row]] for knob, values in knobs.items()}
        words = [_word(k, v) for k, v in chosen.items() if v != defaults[k]]
        name = "-".join([op, *words]) or op
        # models do what the kernels can
        variant = Variant(name, op, model(**chosen), expression=CATALOG[op].supported)
        variants.setdefault(name, variant)
    return list(variants.values())


def _word(knob, value):
    if isinstance(value, bool):
        return knob if value else f"no_{knob}"
    return f"{knob}={value}"


def _sdpa(q, k, v, *, scale=None, **options):
    """torch's scaled_dot_product_attention under the op's mask.

    What the mask hides from all is put to 0, and rows that see nothing see all and are dropped:
    torch leaves both undefined.
    """
    visible = models.attention.visible(
        q.shape[2], k.shape[2],
        **dict(causal=False, align="bottom_right", window=None, global_tokens=0, lengths=None,
               cu_seqlens=None) | options,
    )  # fmt: skip
    sees, seen = visible.any(-1, keepdim=True), visible.any(-2)[..., None]
    q, k, v = torch.where(sees, q, 0), torch.where(seen, k, 0), torch.where(seen, v, 0)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible | ~sees, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return torch.where(sees, o, 0)


class _Directions(torch.autograd.Function):
    """x/‖x‖ of rows in float32, 0 where x is; kept in x's dtype where `stored`."""

    @staticmethod
    def forward(ctx, x, stored):
        norm = x.float().square().sum(-1, keepdim=True).sqrt()
        rate = torch.where(norm == 0, 0.0, 1 / norm)
        xhat = models.rounded(x.float() * rate, x.dtype, stored)
        ctx.save_for_backward(xhat, rate)
        ctx.kept = x.dtype, stored
        return xhat

    @staticmethod
    def backward(ctx, dxhat):
        (dtype, stored), (xhat, rate) = ctx.kept, ctx.saved_tensors
        dxhat = models.rounded(dxhat, dtype, stored)
        dx = rate * (dxhat - xhat * (xhat * dxhat).sum(-1, keepdim=True))
        return dx.to(dtype), None


def _strides_and_cosines(
    q, k, v, *, stored=False, stride=None, score="dot", scale=None, temperature=None, dropout=0.0,
    seed=0, return_lse=False, **mask,
):  # fmt: skip
    """What the kernels lack of attention, in float32 over whole rows; causal bottom right."""
    (B, H, Tq, D), (Hkv, Tk) = q.shape, k.shape[1:3]
    options = dict(causal=False, align="bottom_right", window=None, global_tokens=0, lengths=None,
                   cu_seqlens=None) | mask  # fmt: skip
    visible = models.attention.visible(Tq, Tk, **options)
    if stride is not None:
        position = torch.arange(Tq)[:, None] - torch.arange(Tk)
        n = Tk if mask.get("lengths") is None else mask["lengths"].view(-1, 1, 1)
        if mask.get("align") != "top_left" and mask.get("cu_seqlens") is None:
            position = position + n - Tq
        every = models.attention.visible(Tq, Tk, **options | {"window": None})
        visible = visible | every & (position % stride == 0).view(-1, 1, Tq, Tk)
    sees, seen = visible.any(-1, keepdim=True), visible.any(-2)[..., None]
    q = torch.where(sees, q, 0)
    k, v = (torch.where(seen, x, 0).repeat_interleave(H // Hkv, 1) for x in (k, v))
    if score == "cosine":
        q, k = _Directions.apply(q, stored), _Directions.apply(k, stored)
    scale = (D**-0.5 if score == "dot" else 1.0) if scale is None else scale
    s = scale * (q.float() @ k.float().mT)
    s = s if temperature is None else s / temperature.float()[:, None, None]
    s = s.masked_fill(~visible & sees, -torch.inf)
    p = s.softmax(-1)
    if dropout:
        p = p * models.keep_mask((B, H, Tq, Tk), dropout, seed) / (1 - dropout)
    p = p.to(v.dtype).float() if stored else p
    o = torch.where(sees, p @ v.float(), 0.0).to(v.dtype)
    return (o, torch.where(sees[..., 0], s.logsumexp(-1), -torch.inf)) if return_lse else o


# a single column has no gradient; torch's CPU kernel leaves a residue: pytorch#188372
_COLUMNS = "not one_column"


def _layer_norm(x, w, b, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def _residual_layer_norm(x, r, w, b, eps=1e-5):
    h = x + r
    return F.layer_norm(h, h.shape[-1:], w, b, eps), h


def _cross_entropy(logits, targets, reduction="mean", **options):
    losses = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), reduction=reduction, **options
    )
    return losses.view(targets.shape) if reduction == "none" else losses


def _gelu_ffn(x, w1, b1, w2, b2, residual=None, activation="gelu_tanh"):
    z = F.linear(x, w1.T, b1)
    if activation == "relu":
        a = F.relu(z)
    else:
        a = F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    y = F.linear(a, w2.T, b2)
    return y if residual is None else y + residual


def _embedding(tokens, wte, wpe=None, positions=None):
    y = F.embedding(tokens, wte)
    if wpe is None:
        return y
    if positions is None:
        positions = torch.arange(tokens.shape[-1])
    return y + F.embedding(positions.expand(tokens.shape), wpe)


def _linear_cross_entropy(x, w, targets, b=None, **options):
    return F.cross_entropy(F.linear(x, w, b), targets, **options)


def _adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, foreach=False):
    """torch.optim.AdamW continued from a state."""
    p = p.detach().clone().requires_grad_()
    p.grad = g.detach().clone()
    optimiser = torch.optim.AdamW(
        [p], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, foreach=foreach
    )
    state = {"step": torch.tensor(float(step - 1)), "exp_avg": m.detach().clone()}
    optimiser.state[p] = state | {"exp_avg_sq": v.detach().clone()}
    optimiser.step()
    return p.detach(), optimiser.state[p]["exp_avg"], optimiser.state[p]["exp_avg_sq"]


_TORCH = [
    *(
        Variant(f"attention-torch-{name}", "attention", partial(_strides_and_cosines, stored=on),
                expression="stride or cosine")
        for name, on in (("float32", False), ("stored", True))
    ),
    Variant(
        "attention-torch-sdpa",
        "attention",
        _sdpa,
        expression="not (return_lse or dropout or stride or cosine)",
    ),
    # in 16 bits its CPU kernel rounds more than it must
    Variant("layer_norm-torch", "layer_norm", _layer_norm, ("float32",), _COLUMNS),
    Variant(
        "residual_layer_norm-torch",
        "residual_layer_norm",
        _residual_layer_norm,
        ("float32",),
        _COLUMNS,
    ),
    Variant("ffn-torch", "ffn", _gelu_ffn),
    Variant("cross_entropy-torch", "cross_entropy", _cross_entropy, ("float32",)),
    Variant(
        "linear_cross_entropy-torch", "linear_cross_entropy", _linear_cross_entropy, ("float32",)
    ),
    Variant("linear-torch", "linear", lambda x, w, b=None: F.linear(x, w.T, b)),
    Variant("embedding-torch", "embedding", _embedding, ("float32",)),
    Variant("adamw-torch", "adamw", _adamw, ("float32",), backward=False),
    Variant("adamw-torch-foreach", "adamw", partial(_adamw, foreach=True), ("float32",),
            backward=False),
]  # fmt: skip


def _twins():
    """The eager twin and the Triton kernel of every op that has them."""
    for op in kernels.OPS:
        if op not in CATALOG:
            continue
        fn, row = getattr(kernels, op), CATALOG[op]
        shared = dict(
            expression=f"not ({row.lacks})" if row.lacks else None,
            backward=bool(row.differentiable()),
        )
        yield Variant(f"{op}-eager", op, partial(fn, impl="eager"), **shared)
        yield Variant(f"{op}-triton", op, partial(fn, impl="triton"), slow=True, **shared)


_MODELS = [
    *_drawn(
        "attention", models.Attention, 64,
        block_m=(None, 16, 32, 64, 128), block_n=(None, 16, 32, 64, 128),
        key_order=("forward", "backward", "outside_in"), query_order=("forward", "backward"),
        scale_at=("scores", "q"), exp2=(False, True), splits=(1, 1, 2, 3),
        p_rounded=("no", "running", "normalised"), p_rounded_bwd=(False, True),
        dp_rounded=(False, True), ds_rounded=(False, True),
        delta=("stored", "unrounded", "p_dp"), lse_unit=("ln", "log2"),
        late_dropout_scale=(False, True), step=(None, 4, 16),
    ),
    *_drawn(
        "paged_attention", models.PagedAttention, 24,
        block_n=(None, 16, 64), key_order=("forward", "backward"), scale_at=("scores", "q"),
        exp2=(False, True), splits=(1, 2, 3, 5), p_rounded=("no", "running", "normalised"),
        p_rounded_bwd=(False, True), dp_rounded=(False, True), ds_rounded=(False, True),
        delta=("stored", "unrounded", "p_dp"), step=(None, 4, 16),
    ),
    *_drawn(
        "layer_norm", models.LayerNorm, 40,
        stats=("two_pass", "corrected", "welford", "shifted"),
        sums=("torch", "serial", "tree", "tiled"),
        block=(1, 8, 32, 128), inverse_root=("rsqrt", "divide"), form=("centred", "affine"),
        saved=("stats", "xhat"), dx_form=("centred", "collected"), chunk=(None, 1, 4, 32),
        row_order=("forward", "backward"),
    ),
    *_drawn(
        "residual_layer_norm", models.ResidualLayerNorm, 24,
        stats=("two_pass", "corrected", "welford", "shifted"),
        sums=("torch", "serial", "tree", "tiled"),
        block=(1, 8, 32, 128), inverse_root=("rsqrt", "divide"), form=("centred", "affine"),
        saved=("stats", "xhat", "written"), dx_form=("centred", "collected"),
        chunk=(None, 1, 4, 32), row_order=("forward", "backward"),
    ),
    *_drawn(
        "ffn", models.FFN, 40,
        step_c=(None, 4, 16), splits_f=(1, 2, 5), chunk=(None, 8, 32),
        row_order=("forward", "backward"), z_rounded=(False, True), a_rounded=(False, True),
        da_rounded=(False, True), dz_rounded=(False, True), recompute=(False, True),
        tanh=("tanh", "exp", "sigmoid"), erf=("erf", "polynomial"), bias_first=(False, True),
    ),
    *_drawn(
        "cross_entropy", models.CrossEntropy, 32,
        block_v=(None, 1, 8, 32, 1024), order=("forward", "backward", "outside_in"),
        exp2=(False, True), p_from=("lse", "sum"), reduce=("sum", "term"),
        sums=("torch", "serial", "tree"), loss_float32=(True, False),
    ),
    *_drawn(
        "linear_cross_entropy", models.LinearCrossEntropy, 24,
        block_v=(None, 8, 32, 1024), order=("forward", "backward", "outside_in"),
        exp2=(False, True), p_from=("lse", "sum"), reduce=("sum", "term"),
        sums=("torch", "serial", "tree"), loss_float32=(True, False), chunk=(None, 1, 4, 16),
        step=(None, 4, 16), d_rounded=(False, True),
    ),
    *_drawn(
        "linear", models.Linear, 12,
        step=(None, 1, 8, 32), order=("forward", "backward", "outside_in"),
        chunk=(None, 1, 8), bias_first=(False, True),
    ),
    *_drawn(
        "embedding", models.Embedding, 10,
        order=("forward", "backward", "outside_in"), by_id=(False, True),
        sums=("torch", "serial", "tree"),
    ),
    *_drawn("dropout", models.Dropout, 2, multiply=(False, True)),
    *_drawn(
        "adamw", models.AdamW, 12,
        form=("textbook", "torch", "folded"), lerp=(False, True), decay=("first", "update"),
        in_place=(False, True),
    ),
    *_drawn(
        "adam", models.Adam, 9,
        form=("textbook", "torch", "folded"), lerp=(False, True), decay=("first", "update"),
        in_place=(False, True),
    ),
    *_drawn(
        "additive_attention", models.AdditiveAttention, 12,
        h_rounded=(False, True), t_rounded=(False, True), p_rounded=(False, True),
        ds_rounded=(False, True), dh_rounded=(False, True), recompute=(False, True),
        delta=("unrounded", "stored", "p_dp"), order=("forward", "backward", "outside_in"),
        step=(None, 1, 4, 16),
    ),
    *_drawn(
        "sample", models.Sample, 8,
        sums=("serial", "tiled"), block=(8, 32, 128), normalise=(False, True),
    ),
]  # fmt: skip

VARIANTS = [*_MODELS, *_TORCH, *_twins()]
