"""Plain torch models of what kernels do, with a knob for every choice that a kernel may make.

A model is a class: its fields are the knobs, an instance is called with the op's public signature,
and each step is a method, so that a subclass may break exactly one. `forward` returns (outputs,
saved), `backward` the gradients from output gradients and `saved`. Everything is computed in
float32 and rounded to the storage dtype where a knob says so and at the end.

    attention = Attention(block_m=16, block_n=32, exp2=True)
    o = attention(q, k, v, causal=True)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

LOG2E = math.log2(math.e)


class _Explicit(torch.autograd.Function):
    """A model's own forward and backward."""

    @staticmethod
    def forward(ctx, model, options, *inputs):
        outputs, saved = model.forward(*inputs, **options)
        ctx.model, ctx.saved = model, saved
        return outputs

    @staticmethod
    def backward(ctx, *dys):
        return None, None, *ctx.model.backward(*dys, saved=ctx.saved)


class Model:
    """Called with tensors by position and options by keyword."""

    def __call__(self, *inputs, **options):
        return _Explicit.apply(self, options, *inputs)


def rounded(x, dtype, on=True):
    """x rounded to a dtype and back in float32, where `on`."""
    return x.to(dtype).float() if on else x


def in_order(items, order):
    """The items "forward", "backward" or "outside_in"."""
    items = list(items)
    if order == "backward":
        return items[::-1]
    if order == "outside_in":
        return [items.pop(0 if i % 2 else -1) for i in range(len(items))]
    return items


def tiles(length, block=None, order="forward"):
    """Slices of at most `block` that cover 0 … length, in an order."""
    block = block or max(length, 1)
    return in_order([slice(i, min(i + block, length)) for i in range(0, length, block)], order)


def product(a, b, step=None, order="forward"):
    """a @ b in float32, added over slices of `step` of the contraction."""
    total = None
    for part in tiles(a.shape[-1], step, order):
        partial = a[..., part] @ b[..., part, :]
        total = partial if total is None else total + partial
    return a @ b if total is None else total


def sum_over(x, dim, how="torch", block=32):
    """Σ x over one dimension: "torch", "serial", "tree" or "tiled" (blocks, then serial)."""
    if how == "torch" or x.shape[dim] == 0:
        return x.sum(dim)
    x = x.movedim(dim, 0)
    if how == "tree":
        while len(x) > 1:
            half = len(x) // 2
            x = torch.cat([x[:half] + x[half : 2 * half], x[2 * half :]])
        return x[0]
    if how == "tiled":
        x = torch.stack([x[part].sum(0) for part in tiles(len(x), block)])
    # NumPy accumulates float32 in float32, one after the other; torch's cumsum is wider
    return torch.from_numpy(np.add.accumulate(x.detach().numpy(), axis=0)[-1:])[0]


def sum_rows(x, rows=None, order="forward", how="torch"):
    """Σ over the first axis, in chunks of `rows` that are added one after the other."""
    total = x.new_zeros(x.shape[1:])
    for part in tiles(len(x), rows, order):
        total = total + sum_over(x[part], 0, how)
    return total


def safe(m):
    """m, 0 where it is −∞."""
    return torch.where(m == -math.inf, 0.0, m)


@lru_cache(maxsize=256)
def keep_mask(shape, p, seed):
    """Boolean tensor: which elements dropout keeps, counted in C order."""
    from gaugeblock.reference._dropout import keep_mask

    index = np.arange(math.prod(shape)).reshape(shape)
    return torch.from_numpy(np.asarray(keep_mask(index, p, seed)))


@dataclass
class Attention(Model):
    """Masked-softmax attention, naive (no blocks) or tiled with an online softmax.

    block_m, block_n: rows of a tile of queries and of keys; None takes all at once.
    key_order, query_order: in_order of the tiles.
    scale_at:  scale multiplies the "scores" or, in float32, "q".
    exp2:      exponentials are 2^x, log2(e) folded into the scale.
    splits:    the keys are cut into so many ranges, merged by their lse.
    p_rounded: "no", "running" (before P·V, in the unit of the running maximum) or "normalised"
               (a second pass that knows lse).
    p_rounded_bwd, dp_rounded, ds_rounded: in the backward's products.
    delta:     rowsum(do ∘ o) from the "stored" o or the "unrounded", or "p_dp", rowsum(p ∘ dp) with
               p divided by its sum, as a softmax's own backward does.
    lse_unit:  "ln" or "log2", as it is saved for the backward.
    late_dropout_scale: 1/(1 − dropout) multiplies o instead of p.
    step:      products over D are added in steps of so many.
    """

    block_m: int | None = None
    block_n: int | None = None
    key_order: str = "forward"
    query_order: str = "forward"
    scale_at: str = "scores"
    exp2: bool = False
    splits: int = 1
    p_rounded: str = "running"
    p_rounded_bwd: bool = True
    dp_rounded: bool = False
    ds_rounded: bool = True
    delta: str = "stored"
    lse_unit: str = "ln"
    late_dropout_scale: bool = False
    step: int | None = None

    def __call__(
        self, q, k, v, *, causal=False, align="bottom_right", window=None, global_tokens=0,
        lengths=None, cu_seqlens=None, scale=None, dropout=0.0, seed=0, return_lse=False,
    ):  # fmt: skip
        B, H, Tq, D = q.shape
        visible = self.visible(
            Tq, k.shape[2], causal, align, window, global_tokens, lengths, cu_seqlens
        )
        keep = self.keep((B, H, Tq, k.shape[2]), dropout, seed) if dropout else None
        scale = D**-0.5 if scale is None else scale
        o, lse = _Explicit.apply(
            self, dict(visible=visible, keep=keep, dropout=dropout, scale=scale), q, k, v
        )
        return (o, lse) if return_lse else o

    # the mask

    def visible(self, Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens):
        """Boolean (B or 1, 1, Tq, Tk)."""
        i, j = torch.arange(Tq)[:, None], torch.arange(Tk)[None, :]
        n = torch.tensor([Tk]) if lengths is None else lengths.cpu().long()
        n = n[:, None, None]  # (B, 1, 1)
        shift = n - Tq if align == "bottom_right" else torch.zeros_like(n)
        visible = (j < n).expand(len(n), Tq, Tk)
        if cu_seqlens is not None:
            starts = cu_seqlens.cpu().long()
            document = torch.searchsorted(starts, torch.arange(Tk), right=True) - 1
            visible = visible & (document[:, None] == document[None, :])
            i, j = i - starts[document][:, None], j - starts[document][None, :]
            shift = torch.zeros_like(n)
        if causal:
            visible = visible & (j <= i + shift)
        if window is not None:
            near = j > i + shift - window
            if not causal:
                near = near & (j < i + shift + window)
            visible = visible & (near | (j < global_tokens))
        return visible[:, None]

    def keep(self, shape, dropout, seed):
        """Boolean (B, H, Tq, Tk): which probabilities dropout keeps."""
        return keep_mask(tuple(shape), dropout, seed)

    # forward

    def forward(self, q, k, v, visible, keep, dropout, scale):
        storage, Hkv = q.dtype, k.shape[1]
        sees = visible.any(-1, keepdim=True)  # (B or 1, 1, Tq, 1)
        seen = visible.any(-2)[..., None]  # (B or 1, 1, Tk, 1)
        q = torch.where(sees, q.float(), 0.0)
        k, v = (self.heads(torch.where(seen, x.float(), 0.0), q.shape[1]) for x in (k, v))
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        for rows in tiles(q.shape[2], self.block_m, self.query_order):
            o[:, :, rows], lse[:, :, rows] = self.query_tile(
                q[:, :, rows], k, v, visible[:, :, rows],
                None if keep is None else keep[:, :, rows], dropout, scale, storage,
            )  # fmt: skip
        out = o.to(storage)
        saved_o = o if self.delta == "unrounded" else out.float()
        saved_lse = lse * LOG2E if self.lse_unit == "log2" else lse.clone()
        saved = (q, k, v, saved_o, saved_lse, visible, keep, dropout, scale, storage, Hkv)
        return (out, lse), saved

    def heads(self, k, H):
        """Key heads, each repeated for the query heads that read it."""
        return k.repeat_interleave(H // k.shape[1], 1)

    def query_tile(self, q, k, v, visible, keep, dropout, scale, storage):
        """o and lse (natural log) of a tile of queries."""
        Tk = k.shape[2]
        parts = []
        for part in tiles(Tk, -(-Tk // self.splits)):
            parts.append(self.walk(q, k, v, visible, keep, dropout, scale, storage, part))
        o, lse = self.merge(parts)
        if self.p_rounded == "normalised":
            o = torch.zeros_like(o)
            for cols in tiles(Tk, self.block_n, self.key_order):
                s = self.scores(q, k[:, :, cols], visible[..., cols], scale)
                p = rounded(self.exp(s - safe(lse)[..., None]), storage)
                o = o + self.dropped(p, keep, cols, dropout) @ v[:, :, cols]
        if dropout and self.late_dropout_scale:
            o = o / (1 - dropout)
        return o, lse / LOG2E if self.exp2 else lse

    def walk(self, q, k, v, visible, keep, dropout, scale, storage, part):
        """Online softmax over a range of keys -> o, lse in the unit of `exp`."""
        m_i = q.new_full(q.shape[:3], -math.inf)
        l_i, acc = torch.zeros_like(m_i), torch.zeros_like(q)
        for cols in tiles(part.stop - part.start, self.block_n, self.key_order):
            cols = slice(part.start + cols.start, part.start + cols.stop)
            s = self.scores(q, k[:, :, cols], visible[..., cols], scale)
            m_new = self.new_maximum(m_i, s)
            m_safe = safe(m_new)
            p = self.exp(s - m_safe[..., None])
            alpha = self.rescale(m_i, m_safe)
            l_i = l_i * alpha + p.sum(-1)
            p = self.dropped(rounded(p, storage, self.p_rounded == "running"), keep, cols, dropout)
            acc = acc * alpha[..., None] + p @ v[:, :, cols]
            m_i = m_new
        return self.normalise(acc, m_i, l_i)

    def scores(self, q, k, visible, scale):
        """scale·q kᵀ in the unit of `exp`, −∞ where hidden."""
        unit = scale * LOG2E if self.exp2 else scale
        if self.scale_at == "q":
            s = product(q * unit, k.mT, self.step)
        else:
            s = product(q, k.mT, self.step) * unit
        return torch.where(visible, s, -math.inf)

    def new_maximum(self, m_i, s):
        return torch.maximum(m_i, s.amax(-1))

    def rescale(self, m_i, m_new):
        """The factor that brings sums in the unit of m_i to that of m_new."""
        return self.exp(m_i - m_new)

    def normalise(self, acc, m_i, l_i):
        """-> o, lse; 0 and −∞ where nothing was seen."""
        saw = l_i != 0
        l_safe = torch.where(saw, l_i, 1.0)
        lse = torch.where(saw, safe(m_i) + self.log(l_safe), -math.inf)
        return acc / l_safe[..., None], lse

    def merge(self, parts):
        """The parts of a split row, weighted by exp(lse of the part − lse of the row)."""
        if len(parts) == 1:
            return parts[0]
        o, lse = (torch.stack(x) for x in zip(*parts))
        m = safe(lse.amax(0))
        weights = self.exp(lse - m)
        _, whole = self.normalise(torch.zeros_like(o[0]), m, weights.sum(0))
        weights = self.exp(lse - safe(whole))
        return (weights[..., None] * o).sum(0), whole

    def dropped(self, p, keep, cols, dropout):
        if keep is None:
            return p
        p = torch.where(keep[..., cols], p, 0.0)
        return p if self.late_dropout_scale else p / (1 - dropout)

    def exp(self, x):
        return torch.exp2(x) if self.exp2 else torch.exp(x)

    def log(self, x):
        return torch.log2(x) if self.exp2 else torch.log(x)

    # backward

    def backward(self, do, dlse, saved):
        q, k, v, o, lse, visible, keep, dropout, scale, storage, Hkv = saved
        do = torch.where(visible.any(-1, keepdim=True), do.float(), 0.0)
        rows = tiles(q.shape[2], self.block_m, self.query_order)
        columns = tiles(k.shape[2], self.block_n, self.key_order)
        lse = lse if self.lse_unit == "log2" or not self.exp2 else lse * LOG2E
        if self.lse_unit == "log2" and not self.exp2:
            lse = lse / LOG2E
        lse = safe(lse)

        def tile_of(m, n):
            """p and dp of a tile, dropout applied to dp."""
            s = self.scores(q[:, :, m], k[:, :, n], visible[..., m, n], scale)
            p = self.exp(s - lse[:, :, m, None])
            dp = rounded(product(do[:, :, m], v[:, :, n].mT, self.step), storage, self.dp_rounded)
            return p, self.dropped_bwd(dp, keep, m, n, dropout)

        delta = self.row_delta(do, o, tile_of, rows, columns)
        if dlse is not None:
            dlse = torch.where(visible.any(-1), dlse.float(), 0.0)
            delta = delta - dlse
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for n in columns:
            for m in rows:
                if not visible[..., m, n].any():
                    continue
                p, dp = tile_of(m, n)
                ds = self.score_gradient(p, dp, delta[:, :, m, None])
                ds = rounded(ds, storage, self.ds_rounded)
                p = self.dropped_bwd(rounded(p, storage, self.p_rounded_bwd), keep, m, n, dropout)
                dv[:, :, n] += p.mT @ do[:, :, m]
                dk[:, :, n] += ds.mT @ q[:, :, m]
                dq[:, :, m] += ds @ k[:, :, n]
        dk, dv = self.over_groups(dk * self.dk_scale(scale), Hkv), self.over_groups(dv, Hkv)
        return (dq * scale).to(storage), dk.to(storage), dv.to(storage)

    def row_delta(self, do, o, tile_of, rows, columns):
        """rowsum(do ∘ o), or the mean of dp under p."""
        if self.delta != "p_dp":
            return (do * o).sum(-1)
        delta, total = do.new_zeros(do.shape[:3]), do.new_zeros(do.shape[:3])
        for m in rows:
            for n in columns:
                p, dp = tile_of(m, n)
                delta[:, :, m] += (p * dp).sum(-1)
                total[:, :, m] += p.sum(-1)
        return delta / torch.where(total == 0, 1.0, total)

    def score_gradient(self, p, dp, delta):
        return p * (dp - delta)

    def dropped_bwd(self, dp, keep, rows, cols, dropout):
        if keep is None:
            return dp
        return torch.where(keep[..., rows, cols], dp / (1 - dropout), 0.0)

    def dk_scale(self, scale):
        return scale

    def over_groups(self, dk, Hkv):
        """The gradients of the query heads that read the same key head, added in float32."""
        B, H, Tk, D = dk.shape
        return dk.reshape(B, Hkv, H // Hkv, Tk, D).sum(2)


@dataclass
class PagedAttention(Attention):
    """Attention over a cache in pages; `splits` cuts the keys as a decode kernel does."""

    def __call__(self, q, k_pages, v_pages, block_table, lengths, *, window=None, scale=None):
        page, D = k_pages.shape[2:]
        table = self.used_pages(block_table.cpu().long(), lengths.cpu().long(), page)
        visible = self.visible(
            q.shape[2], table.shape[1] * page, True, "bottom_right", window, 0, lengths, None
        )
        scale = D**-0.5 if scale is None else scale
        options = dict(visible=visible, scale=scale, table=table)
        return _Explicit.apply(self, options, q, k_pages, v_pages)

    def used_pages(self, table, lengths, page):
        """The table with entries that no key lies in replaced by 0: they may hold anything."""
        used = torch.arange(table.shape[1]) * page < lengths[:, None]
        return torch.where(used, table, 0)

    def gather(self, pages, table):
        """(B, Hkv, pages·page, D)."""
        rows = pages[table].transpose(1, 2)  # (B, Hkv, pages, page, D)
        return rows.flatten(2, 3)

    def forward(self, q, k_pages, v_pages, visible, scale, table):
        k, v = self.gather(k_pages, table), self.gather(v_pages, table)
        (o, _), saved = super().forward(q, k, v, visible, None, 0.0, scale)
        return o, (saved, table, k_pages.shape)

    def backward(self, do, saved):
        saved, table, shape = saved
        storage = saved[9]
        # dk and dv stay float32 until the pages that rows share are added
        dq, dk, dv = super().backward(do, None, saved=(*saved[:9], torch.float32, saved[10]))
        dk, dv = self.scatter(dk, table, shape), self.scatter(dv, table, shape)
        return dq.to(storage), dk.to(storage), dv.to(storage)

    def scatter(self, dk, table, shape):
        _, Hkv, page, D = shape
        rows = dk.reshape(dk.shape[0], Hkv, -1, page, D).transpose(1, 2).flatten(0, 1)
        return torch.zeros(shape).index_add_(0, table.flatten(), rows)


@dataclass
class AdditiveAttention(Model):
    """A network scores each pair of a query and a key; one pass over whole rows.

    h_rounded, t_rounded: the projections and tanh of their sums, before the products they are in.
    p_rounded, ds_rounded, dh_rounded: likewise.
    delta: rowsum(do ∘ o) from the "unrounded" o or the "stored", or "p_dp".
    recompute: the backward computes tanh again.
    order, step: of the sums over the units.
    """

    h_rounded: bool = False
    t_rounded: bool = False
    p_rounded: bool = True
    ds_rounded: bool = False
    dh_rounded: bool = False
    delta: str = "unrounded"
    recompute: bool = False
    order: str = "forward"
    step: int | None = None

    def __call__(self, q, k, v, w_q, w_k, w, *, lengths=None):
        return _Explicit.apply(self, {"lengths": lengths}, q, k, v, w_q, w_k, w)

    def forward(self, q, k, v, w_q, w_k, w, lengths):
        storage, n = q.dtype, k.shape[1]
        there = torch.ones(len(k), n, dtype=torch.bool)
        if lengths is not None:
            there = torch.arange(n) < lengths.cpu()[:, None]
        sees = there.any(1)[:, None, None]
        q = torch.where(sees, q.float(), 0.0)
        k, v = (torch.where(there[..., None], x.float(), 0.0) for x in (k, v))
        w_q, w_k, w = w_q.float(), w_k.float(), w.float()
        h_q, h_k = (
            rounded(product(x, y, self.step, self.order), storage, self.h_rounded)
            for x, y in ((q, w_q), (k, w_k))
        )
        t = self.units(h_q, h_k, storage)
        s = product(t, w[:, None], self.step, self.order)[..., 0]
        s = s.masked_fill(~there[:, None], -math.inf)
        e = (s - safe(s.amax(-1, keepdim=True))).exp()
        p = e / e.sum(-1, keepdim=True).clamp_min(1e-30)
        o = rounded(p, storage, self.p_rounded) @ v
        saved = q, k, v, w_q, w_k, w, h_q, h_k, t, p, o, sees, storage
        return torch.where(sees, o, 0.0).to(storage), saved

    def units(self, h_q, h_k, storage):
        """tanh of every sum, (B, Tq, Tk, A)."""
        return rounded((h_q[:, :, None] + h_k[:, None]).tanh(), storage, self.t_rounded)

    def backward(self, do, saved):
        q, k, v, w_q, w_k, w, h_q, h_k, t, p, o, sees, storage = saved
        do = torch.where(sees, do.float(), 0.0)
        t = self.units(h_q, h_k, storage) if self.recompute else t
        dv = rounded(p, storage, self.p_rounded).mT @ do
        dp = do @ v.mT
        o = o.to(storage).float() if self.delta == "stored" else o
        delta = (p * dp if self.delta == "p_dp" else do * o).sum(-1, keepdim=True)
        ds = rounded(p * (dp - delta), storage, self.ds_rounded)[..., None]
        dz = ds * w * (1 - t * t)
        dh_q, dh_k = (rounded(dz.sum(axis), storage, self.dh_rounded) for axis in (2, 1))
        dw_q, dw_k = (x.flatten(0, 1).mT @ dh.flatten(0, 1) for x, dh in ((q, dh_q), (k, dh_k)))
        dw = sum_rows((ds * t).flatten(0, 2), self.step, self.order)
        gradients = dh_q @ w_q.mT, dh_k @ w_k.mT, dv, dw_q, dw_k, dw
        return tuple(x.to(storage) for x in gradients)


@dataclass
class LayerNorm(Model):
    """Layer normalisation over the last axis.

    stats:  "two_pass", "corrected" (two passes, less the square of the mean that is left),
            "welford" (merging `block` columns at a time; 1 is Welford's own) or "shifted" (one pass
            over x less the mean of the first columns; x₀ alone may lie 3σ off, and costs digits).
    sums:   how rows are summed (`sum_over`), `block` columns at a time.
    inverse_root: "rsqrt" or "divide" (1/√).
    form:   x̂ is "centred", (x − μ)·r, or "affine", x·r − μ·r.
    saved:  the backward reads "xhat", or makes it again from x, μ and r: "stats".
    dx_form: "centred", r(g − mean g − x̂·mean(g x̂)), or "collected", r·g + B·x + C.
    chunk:  rows that are added into dw and db at a time; row_order of the chunks.
    """

    stats: str = "two_pass"
    sums: str = "torch"
    block: int = 32
    inverse_root: str = "rsqrt"
    form: str = "centred"
    saved: str = "stats"
    dx_form: str = "centred"
    chunk: int | None = None
    row_order: str = "forward"

    def __call__(self, x, w, b, eps=1e-5):
        return _Explicit.apply(self, dict(eps=eps), x, w, b)

    def forward(self, x, w, b, eps):
        x32, w32, b32 = (t.float() for t in (x.reshape(-1, x.shape[-1]), w, b))
        y, saved = self.norm(x32, w32, b32, eps)
        return y.to(x.dtype).reshape(x.shape), (saved, x.dtype)

    def norm(self, x, w, b, eps):
        """y of rows x (M, N), and what the backward needs."""
        mean, var = self.moments(x)
        rstd = self.rstd(var, eps)
        xhat = self.normalised(x, mean, rstd)
        return xhat * w + b, (x, mean, rstd, w, xhat if self.saved == "xhat" else None)

    def normalised(self, x, mean, rstd):
        return x * rstd - mean * rstd if self.form == "affine" else (x - mean) * rstd

    def row_mean(self, x):
        return sum_over(x, -1, self.sums, self.block)[:, None] / x.shape[-1]

    def moments(self, x):
        """Mean and biased variance of each row, (M, 1)."""
        if self.stats == "welford":
            return self.welford(x)
        if self.stats == "shifted":
            return self.corrected(x, x[:, :16].mean(-1, keepdim=True))
        mean = self.row_mean(x)
        if self.stats == "corrected":
            return self.corrected(x, mean)
        return mean, self.row_mean((x - mean).square())

    def corrected(self, x, near):
        """Moments from x − near, where near is close to the mean."""
        d = x - near
        rest = self.row_mean(d)
        return near + rest, (self.row_mean(d * d) - rest * rest).clamp(min=0)

    def welford(self, x):
        count, mean, m2 = 0, torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])
        for cols in tiles(x.shape[1], self.block):
            part = x[:, cols]
            n = part.shape[1]
            part_mean = part.mean(-1, keepdim=True)
            delta = part_mean - mean
            m2 = m2 + (part - part_mean).square().sum(-1, keepdim=True)
            m2 = m2 + delta * delta * (count * n / (count + n))
            mean = mean + delta * (n / (count + n))
            count += n
        return mean, m2 / count

    def rstd(self, var, eps):
        return torch.rsqrt(var + eps) if self.inverse_root == "rsqrt" else 1 / (var + eps).sqrt()

    def backward(self, dy, saved):
        saved, storage = saved
        rows = dy.float().reshape(-1, dy.shape[-1])
        dx, dw, db = self.gradients(rows, *saved)
        return dx.to(storage).reshape(dy.shape), dw.to(storage), db.to(storage)

    def gradients(self, dy, x, mean, rstd, w, xhat):
        if xhat is None:
            xhat = self.normalised(x, mean, rstd)
        g = w * dy
        if self.dx_form == "collected":
            N = x.shape[-1]
            ds = sum_over(g * x, -1, self.sums, self.block)[:, None]
            db = sum_over(g, -1, self.sums, self.block)[:, None]
            slope = (db * mean - ds) * rstd * rstd * rstd / N
            dx = rstd * g + slope * x + (-slope * mean - db * rstd / N)
        else:
            dx = rstd * (g - self.row_mean(g) - xhat * self.row_mean(g * xhat))
        return dx, self.over_rows(dy * xhat), self.over_rows(dy)

    def over_rows(self, x):
        return sum_rows(x, self.chunk, self.row_order)


@dataclass
class ResidualLayerNorm(LayerNorm):
    """h = x + r, y = layer_norm(h) from the unrounded h -> y, h.

    saved may also be "written": the backward reads the rounded h that was returned.
    """

    def __call__(self, x, r, w, b, eps=1e-5):
        return _Explicit.apply(self, dict(eps=eps), x, r, w, b)

    def forward(self, x, r, w, b, eps):
        h = self.add(x.float(), r.float())
        y, saved = self.norm(h.reshape(-1, h.shape[-1]), w.float(), b.float(), eps)
        written = h.to(x.dtype)
        if self.saved == "written":
            saved = (written.float().reshape(-1, h.shape[-1]), *saved[1:])
        return (y.to(x.dtype).reshape(x.shape), written), (saved, x.dtype)

    def add(self, x, r):
        return x + r

    def backward(self, dy, dh, saved):
        saved, storage = saved
        rows = dy.float().reshape(-1, dy.shape[-1])
        dx, dw, db = self.gradients(rows, *saved)
        dx = self.add(dx.reshape(dy.shape), dh.float()).to(storage)
        return dx, dx.clone(), dw.to(storage), db.to(storage)


@dataclass
class FFN(Model):
    """y = f(x w1 + b1) w2 + b2.

    step_c, splits_f: products over C in steps, over F in so many parts, added in float32.
    chunk:      rows that are added into the weight gradients at a time, in row_order.
    z_rounded, a_rounded, da_rounded, dz_rounded: intermediates kept in the storage dtype.
    recompute:  the backward makes z again from x; else it reads it.
    tanh:       "tanh", "exp" (1 − 2/(e^2u + 1)) or "sigmoid" (z·σ(2u)).
    erf:        "erf" or "polynomial" (Abramowitz and Stegun 7.1.26, to 1.5e-7).
    bias_first: the accumulator starts as the bias.
    """

    step_c: int | None = None
    splits_f: int = 1
    chunk: int | None = None
    row_order: str = "forward"
    z_rounded: bool = False
    a_rounded: bool = True
    da_rounded: bool = False
    dz_rounded: bool = True
    recompute: bool = False
    tanh: str = "tanh"
    erf: str = "erf"
    bias_first: bool = False

    def __call__(self, x, w1, b1, w2, b2, activation="gelu_tanh", residual=None):
        y = _Explicit.apply(self, dict(activation=activation), x, w1, b1, w2, b2)
        return y if residual is None else y + residual

    def affine(self, x, w, b, step):
        return b + product(x, w, step) if self.bias_first else product(x, w, step) + b

    def over_f(self, F):
        return None if self.splits_f == 1 else -(-F // self.splits_f)

    def forward(self, x, w1, b1, w2, b2, activation):
        storage, shape = x.dtype, x.shape
        x, w1, b1, w2, b2 = (t.float() for t in (x.reshape(-1, shape[-1]), w1, b1, w2, b2))
        z = self.hidden(x, w1, b1, storage)
        a = rounded(self.activate(z, activation), storage, self.a_rounded)
        y = self.affine(a, w2, b2, self.over_f(len(w2)))
        saved = (x, w1, b1, w2, None if self.recompute else z, a, activation, storage, shape)
        return y.to(storage).reshape(shape), saved

    def hidden(self, x, w1, b1, storage):
        return rounded(self.affine(x, w1, b1, self.step_c), storage, self.z_rounded)

    def backward(self, dy, saved):
        x, w1, b1, w2, z, a, activation, storage, shape = saved
        dy = dy.float().reshape(x.shape)
        if z is None:
            z = self.hidden(x, w1, b1, storage)
            a = rounded(self.activate(z, activation), storage, self.a_rounded)
        da = rounded(product(dy, w2.mT, self.step_c), storage, self.da_rounded)
        dz = rounded(da * self.slope(z, activation), storage, self.dz_rounded)
        dx = product(dz, w1.mT, self.over_f(len(w2))).reshape(shape)
        dw1, dw2 = self.over_rows(x, dz), self.over_rows(a, dy)
        db1, db2 = self.sum_rows(dz), self.sum_rows(dy)
        return tuple(g.to(storage) for g in (dx, dw1, db1, dw2, db2))

    def over_rows(self, a, b):
        """aᵀ b, in chunks of rows."""
        return product(a.mT, b, self.chunk, self.row_order)

    def sum_rows(self, x):
        return sum_rows(x, self.chunk, self.row_order)

    def activate(self, z, activation):
        if activation == "relu":
            return torch.where(z > 0, z, torch.where(z.isnan(), z, 0.0))
        if activation == "gelu":
            return z * self.phi(z)
        if self.tanh == "sigmoid":
            return z * torch.sigmoid(2 * self.inner(z))
        return 0.5 * z * (1 + self.tanh_of(self.inner(z)))

    def slope(self, z, activation):
        """f'(z)."""
        if activation == "relu":
            return (z > 0).float()
        if activation == "gelu":
            return self.phi(z) + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
        du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
        if self.tanh == "sigmoid":
            s = torch.sigmoid(2 * self.inner(z))
            return s + z * s * (1 - s) * 2 * du
        t = self.tanh_of(self.inner(z))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * du

    def inner(self, z):
        return math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)

    def tanh_of(self, u):
        return 1 - 2 / (torch.exp(2 * u) + 1) if self.tanh == "exp" else torch.tanh(u)

    def phi(self, z):
        """The normal distribution function."""
        x = z * math.sqrt(0.5)
        if self.erf == "erf":
            return 0.5 * (1 + torch.erf(x))
        t = 1 / (1 + 0.3275911 * x.abs())
        series = torch.zeros_like(x)
        for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
            series = (series + c) * t
        return 0.5 * (1 + torch.copysign(1 - series * torch.exp(-x * x), x))


@dataclass
class CrossEntropy(Model):
    """Softmax cross-entropy.

    block_v:   columns of a tile of the online log-sum-exp; None takes the row at once.
    order:     in_order of the tiles.
    exp2:      exponentials are 2^x.
    p_from:    the backward's softmax is exp(x − "lse") or exp(x − m)/l: "sum".
    reduce:    "mean" divides the "sum" or each "term".
    sums:      how the losses of the rows are added.
    loss_float32: the loss is returned in float32; else in the dtype of the logits.
    """

    block_v: int | None = None
    order: str = "forward"
    exp2: bool = False
    p_from: str = "lse"
    reduce: str = "sum"
    sums: str = "torch"
    loss_float32: bool = True

    def __call__(
        self, logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"
    ):
        options = dict(
            targets=targets.reshape(-1), ignore_index=ignore_index, alpha=label_smoothing,
            reduction=reduction,
        )  # fmt: skip
        return _Explicit.apply(self, options, logits)

    def forward(self, logits, targets, ignore_index, alpha, reduction):
        x = logits.float().reshape(-1, logits.shape[-1])
        kept = targets != ignore_index
        index = torch.where(kept, targets, 0)
        lse, m, total = self.statistics(x)
        losses = self.row_losses(x, lse, index, alpha)
        losses = torch.where(kept, losses, 0.0)
        count = self.count(kept) if reduction == "mean" else 1.0
        loss = self.reduced(losses, count, reduction)
        if reduction == "none":
            loss = loss.reshape(logits.shape[:-1])
        dtype = torch.float32 if self.loss_float32 else logits.dtype
        saved = (x, lse, m, total, index, kept, count, alpha, logits.dtype, logits.shape)
        return loss.to(dtype), saved

    def statistics(self, x):
        """lse, maximum and Σ exp(x − maximum) of each row, (M,)."""
        m_i, l_i = x.new_full(x.shape[:1], -math.inf), x.new_zeros(x.shape[:1])
        for cols in tiles(x.shape[1], self.block_v, self.order):
            m_new = torch.maximum(m_i, x[:, cols].amax(-1))
            m_safe = safe(m_new)
            l_i = l_i * self.exp(m_i - m_safe) + self.exp(x[:, cols] - m_safe[:, None]).sum(-1)
            m_i = m_new
        m_i = safe(m_i)
        return m_i + torch.log(l_i), m_i, l_i

    def exp(self, x):
        return torch.exp2(x * LOG2E) if self.exp2 else torch.exp(x)

    def row_losses(self, x, lse, index, alpha):
        loss = (1 - alpha) * (lse - x.gather(1, index[:, None])[:, 0])
        return loss + alpha * (lse - x.mean(-1)) if alpha else loss

    def count(self, kept):
        return kept.sum().float()

    def reduced(self, losses, count, reduction):
        if reduction == "none":
            return losses
        if self.reduce == "term":
            return sum_over(losses / count, 0, self.sums)
        return sum_over(losses, 0, self.sums) / count

    def backward(self, dloss, saved):
        x, lse, m, total, index, kept, count, alpha, storage, shape = saved
        d = self.dlogits(dloss.float(), x, lse, m, total, index, kept, count, alpha)
        return (d.to(storage).reshape(shape),)

    def dlogits(self, dloss, x, lse, m, total, index, kept, count, alpha):
        """(M, V) in float32."""
        if self.p_from == "sum":
            p = self.exp(x - m[:, None]) / total[:, None]
        else:
            p = self.exp(x - lse[:, None])
        p = p - alpha / x.shape[1] if alpha else p
        p = p.scatter_add(1, index[:, None], p.new_full((len(p), 1), -(1 - alpha)))
        rows = (dloss.reshape(-1) / count).expand(len(x))[:, None]
        return torch.where(kept[:, None], rows * p, 0.0)


@dataclass
class LinearCrossEntropy(CrossEntropy):
    """The head and the loss, x wᵀ + b in tiles that are never kept.

    chunk:     rows that are done at a time; dw and db are added over chunks in float32.
    step:      products over C in steps.
    d_rounded: dlogits in the storage dtype before its products.
    """

    chunk: int | None = None
    step: int | None = None
    d_rounded: bool = True

    def __call__(
        self, x, w, targets, b=None, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"
    ):
        options = dict(
            targets=targets.reshape(-1), ignore_index=ignore_index, alpha=label_smoothing,
            reduction=reduction,
        )  # fmt: skip
        return _Explicit.apply(self, options, x, w, b)

    def forward(self, x, w, b, targets, ignore_index, alpha, reduction):
        x32, w32 = x.float().reshape(-1, x.shape[-1]), w.float()
        b32 = None if b is None else b.float()
        kept = targets != ignore_index
        index = torch.where(kept, targets, 0)
        losses, stats = [], []
        for rows in tiles(len(x32), self.chunk):
            logits = self.logits(x32[rows], w32, b32)
            stats.append(self.statistics(logits))
            losses.append(self.row_losses(logits, stats[-1][0], index[rows], alpha))
        losses = torch.where(kept, torch.cat(losses), 0.0)
        count = self.count(kept) if reduction == "mean" else 1.0
        loss = self.reduced(losses, count, reduction)
        if reduction == "none":
            loss = loss.reshape(x.shape[:-1])
        dtype = torch.float32 if self.loss_float32 else x.dtype
        stats = [torch.cat(s) for s in zip(*stats)]
        return loss.to(dtype), (x32, w32, b32, stats, index, kept, count, alpha, x.dtype, x.shape)

    def logits(self, x, w, b):
        logits = product(x, w.mT, self.step)
        return logits if b is None else logits + b

    def backward(self, dloss, saved):
        x, w, b, stats, index, kept, count, alpha, storage, shape = saved
        dloss = (dloss.float().reshape(-1)).expand(len(x))
        dx, dw, db = torch.zeros_like(x), torch.zeros_like(w), w.new_zeros(len(w))
        for rows in tiles(len(x), self.chunk, self.order):
            d = self.dlogits(
                dloss[rows], self.logits(x[rows], w, b), *(s[rows] for s in stats),
                index[rows], kept[rows], count, alpha,
            )  # fmt: skip
            db = db + d.sum(0)
            d = rounded(d, storage, self.d_rounded)
            dx[rows] = product(d, w, self.block_v, self.order)
            dw = dw + d.mT @ x[rows]
        db = None if b is None else db.to(storage)
        return dx.to(storage).reshape(shape), dw.to(storage), db


@dataclass
class Linear(Model):
    """y = x w + b; products in steps of `step` over K, `chunk` rows at a time in the gradients."""

    step: int | None = None
    order: str = "forward"
    chunk: int | None = None
    bias_first: bool = False

    def __call__(self, x, w, b=None):
        return _Explicit.apply(self, {}, x, w, b)

    def forward(self, x, w, b):
        x32, w32 = x.float().reshape(-1, x.shape[-1]), w.float()
        y = product(x32, w32, self.step, self.order)
        if b is not None:
            y = b.float() + y
            if self.bias_first:
                y = b.float().expand_as(y)
                for part in tiles(len(w), self.step or 16, self.order):
                    y = y + x32[:, part] @ w32[part]
        return y.to(x.dtype).reshape(*x.shape[:-1], -1), (x32, w32, b is not None, x.dtype, x.shape)

    def backward(self, dy, saved):
        x, w, has_b, storage, shape = saved
        dy = dy.float().reshape(len(x), -1)
        dx = product(dy, w.mT, self.step, self.order).to(storage).reshape(shape)
        dw = product(x.mT, dy, self.chunk, self.order).to(storage)
        return dx, dw, sum_rows(dy, self.chunk, self.order).to(storage) if has_b else None


@dataclass
class Embedding(Model):
    """wte[tokens] + wpe[positions]; the gradients of equal ids are added in float32.

    order: in which the tokens are added; by_id: sorted by id first, each id's rows summed `sums`.
    """

    order: str = "forward"
    by_id: bool = False
    sums: str = "torch"

    def __call__(self, tokens, wte, wpe=None, positions=None):
        if positions is None:
            positions = torch.arange(tokens.shape[-1])
        positions = positions.expand(tokens.shape)
        return _Explicit.apply(self, dict(tokens=tokens, positions=positions), wte, wpe)

    def forward(self, wte, wpe, tokens, positions):
        y = wte[tokens].float()
        if wpe is not None:
            y = y + wpe[positions].float()
        shapes = wte.shape, None if wpe is None else wpe.shape
        return y.to(wte.dtype), (tokens, positions, shapes, wte.dtype)

    def backward(self, dy, saved):
        tokens, positions, (wte, wpe), storage = saved
        rows = dy.float().reshape(-1, dy.shape[-1])
        dwte = self.scatter(wte, tokens.reshape(-1), rows).to(storage)
        dwpe = None if wpe is None else self.scatter(wpe, positions.reshape(-1), rows).to(storage)
        return dwte, dwpe

    def scatter(self, shape, ids, rows):
        """Σ of the rows of each id."""
        table = torch.zeros(shape)
        if self.by_id:
            for i in ids.unique().tolist():
                table[i] = sum_over(rows[ids == i], 0, self.sums)
            return table
        at = torch.tensor(in_order(range(len(ids)), self.order), dtype=torch.long)
        return table.index_add_(0, ids[at], rows[at])


@dataclass
class Dropout(Model):
    """x·keep/(1 − p); `multiply` by 1/(1 − p) in float32 instead of dividing."""

    multiply: bool = False

    def __call__(self, x, p, seed):
        return _Explicit.apply(self, dict(p=p, seed=seed), x)

    def forward(self, x, p, seed):
        keep = self.keep(x.shape, p, seed)
        return self.scaled(x, keep, p), (keep, p)

    def backward(self, dy, saved):
        return (self.scaled(dy, *saved),)

    def keep(self, shape, p, seed):
        return keep_mask(tuple(shape), p, seed)

    def scaled(self, x, keep, p):
        share = 1 - p or 1.0
        y = x.float() * (1 / share) if self.multiply else x.float() / share
        return torch.where(keep, y, 0.0).to(x.dtype)


@dataclass
class AdamW:
    """One AdamW step in float32 -> p, m, v, each in its dtype.

    form:     "textbook" (m̂, v̂ formed), "torch" (√v/√bias2 + ε) or "folded" (bias corrections in
              the step size and ε).
    lerp:     m from m to g by 1 − β1, as torch.lerp does, instead of β1 m + (1 − β1) g.
    decay:    weight decay "first", p(1 − lr·λ), or in the "update", lr(… + λ p).
    in_place: the arguments are overwritten and returned.
    """

    form: str = "textbook"
    lerp: bool = False
    decay: str = "first"
    in_place: bool = False

    def __call__(self, p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
        with torch.no_grad():
            p32, g32, m32, v32 = (t.float() for t in (p, g, m, v))
            new = self.update(p32, g32, m32, v32, step, lr, beta1, beta2, eps, weight_decay)
            if not self.in_place:
                return tuple(x.to(t.dtype) for x, t in zip(new, (p, m, v)))
            for x, t in zip(new, (p, m, v)):
                t.copy_(x)
            return p, m, v

    def update(self, p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
        m, v = self.moments(g, m, v, beta1, beta2)
        bias1, bias2 = self.bias(beta1, step), self.bias(beta2, step)
        ratio = self.direction(m, v, bias1, bias2, eps)
        if self.decay == "first":
            return p * (1 - lr * weight_decay) - lr * ratio, m, v
        return p - lr * (ratio + weight_decay * p), m, v

    def moments(self, g, m, v, beta1, beta2):
        m = torch.lerp(m, g, 1 - beta1) if self.lerp else beta1 * m + (1 - beta1) * g
        return m, beta2 * v + (1 - beta2) * g * g

    def bias(self, beta, step):
        return 1 - beta**step

    def direction(self, m, v, bias1, bias2, eps):
        """m̂/(√v̂ + ε)."""
        if self.form == "torch":
            return m / (v.sqrt() / math.sqrt(bias2) + eps) / bias1
        if self.form == "folded":
            root = math.sqrt(bias2)
            return m / (v.sqrt() + eps * root) * (root / bias1)
        return (m / bias1) / ((v / bias2).sqrt() + eps)


@dataclass
class Adam(AdamW):
    """GPT-1's step of Adam: the bias corrections in the rate, the decay beside the direction.

    form: "textbook" (the rate formed first), "torch" (the correction of m last) or "folded" (the
          direction times both corrections).
    """

    def __call__(self, p, g, m, v, step, lr, beta1, beta2, eps, weight_decay=0.0):
        return super().__call__(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay)

    def update(self, p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
        m, v = self.moments(g, m, v, beta1, beta2)
        root, bias1 = math.sqrt(self.bias(beta2, step)), self.bias(beta1, step)
        direction, rate = m / (v.sqrt() + eps), lr * root / bias1
        if self.decay == "first":
            p = p * (1 - rate * weight_decay)
        else:
            direction = direction + weight_decay * p
        if self.form == "textbook":
            return p - rate * direction, m, v
        if self.form == "torch":
            return p - direction * (lr * root) / bias1, m, v
        return p - direction * root * (lr / bias1), m, v


@dataclass
class Sample:
    """The token whose cumulative interval holds u, in float32.

    sums:      the cumulative sum "serial", or in blocks of `block` whose totals are added: "tiled".
    normalise: divide the weights by their sum, or multiply u by it.
    """

    sums: str = "serial"
    block: int = 32
    normalise: bool = True

    def __call__(self, logits, u, temperature=1.0, top_k=None, top_p=None, min_p=None):
        with torch.no_grad():
            x = logits.float().reshape(-1, logits.shape[-1])
            return self.choose(x, u.float().reshape(-1), temperature, top_k, top_p, min_p).reshape(
                logits.shape[:-1]
            )

    def choose(self, x, u, temperature, top_k, top_p, min_p):
        if temperature == 0:
            return x.argmax(-1)
        weights = self.weights(x, temperature)
        weights = torch.where(self.allowed(weights, top_k, top_p, min_p), weights, 0.0)
        return self.inverse(weights, u)

    def weights(self, x, temperature):
        """exp of the scaled logits, relative to the largest."""
        x = x / temperature
        return torch.exp(x - x.amax(-1, keepdim=True))

    def allowed(self, weights, top_k, top_p, min_p):
        """Boolean (M, V): what top_k, then top_p, then min_p leave."""
        allowed = torch.ones_like(weights, dtype=torch.bool)
        if top_k is not None and top_k < weights.shape[-1]:
            allowed &= weights >= weights.topk(top_k, -1).values[:, -1:]
        if top_p is not None and top_p < 1:
            values, order = torch.where(allowed, weights, 0.0).sort(dim=-1, stable=True)
            sums = self.cumulative(values)
            stays = sums > (1 - top_p) * sums[:, -1:]
            stays[:, -1] = True
            allowed &= torch.zeros_like(allowed).scatter(1, order, stays)
        if min_p is not None:
            allowed &= weights >= min_p * weights.amax(-1, keepdim=True)
        return allowed

    def cumulative(self, x):
        if self.sums == "serial":
            return torch.from_numpy(np.add.accumulate(x.numpy(), axis=-1))
        parts, total = [], torch.zeros_like(x[:, :1])
        for cols in tiles(x.shape[-1], self.block):
            parts.append(total + torch.from_numpy(np.add.accumulate(x[:, cols].numpy(), axis=-1)))
            total = parts[-1][:, -1:]
        return torch.cat(parts, -1)

    def inverse(self, weights, u):
        """The first index whose cumulative weight exceeds u."""
        sums = self.cumulative(weights)
        if self.normalise:
            sums, u = sums / sums[:, -1:], u[:, None]
        else:
            u = u[:, None] * sums[:, -1:]
        index = (sums <= u).sum(-1)
        # u just below 1 may pass the last sum: the last token that has weight
        last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
        return torch.minimum(index, last)


attention = Attention()
paged_attention = PagedAttention()
layer_norm = LayerNorm()
residual_layer_norm = ResidualLayerNorm()
ffn = FFN()
cross_entropy = CrossEntropy()
linear_cross_entropy = LinearCrossEntropy()
linear = Linear()
embedding = Embedding()
dropout = Dropout()
adamw = AdamW()
sample = Sample()
