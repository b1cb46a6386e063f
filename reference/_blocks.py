"""What GPT and the encoder-decoder are made of: blocks of named weights, forward beside backward.

    pre-LN:   h ← h + f(ln(h)),   post-LN:   h ← ln(h + f(h))

for f self-attention, attention over a memory where the block has one, and the FFN, in this order.
An attention of H heads projects, attends and merges:

    q, k, v = heads(x c_attn),   y = merge(attention(q, k, v)) c_proj
    q = heads(x q_attn),  k, v = heads(memory c_attn)          over a memory

A 16-bit model keeps the results of its ops, the residual stream h among them, in its dtype or in
float32: they are marked `stored`. A missing bias is 0.

Shapes: h, x (B, T, C); memory (B, S, C); heads (B, H, T, D). dtype float64.
Source: Vaswani et al. 2017, arXiv:1706.03762, section 3; pre-LN as in Radford et al. 2019.
"""

from functools import partial

import numpy as np

from ._attention import attention, attention_backward
from ._embedding import row_gradients
from ._ffn import ffn, ffn_backward
from ._heads import head, head_backward
from ._layer_norm import layer_norm, layer_norm_backward
from ._linear import linear, linear_backward
from ._rounding import floats, stored
from ._shapes import expect_weights


class Blocks:
    """Weights by their keys, and the parts that read them.

    Gradients are collected in a dict: one for each weight, and `memory` where there is one.
    """

    def __init__(self, name, weights, shapes, *, n_head, eps, activation, post_norm):
        self.name, self.weights = name, {key: floats(w) for key, w in weights.items()}
        self.n_head, self.eps, self.activation = n_head, eps, activation
        self.post_norm = post_norm
        expect_weights(name, self.weights, shapes)

    def __getitem__(self, key):
        return self.weights[key]

    def block(self, key, h, memory=None, memory_lengths=None, **options):
        """-> h, cache. options are those of the self-attention."""
        attend = partial(self.attend, f"{key}.attn", **options)
        h, attended = self._sublayer(f"{key}.ln_1", attend, h)
        crossed = None
        if memory is not None:
            options = {"memory": memory, "lengths": memory_lengths}
            look = partial(self.attend, f"{key}.crossattention", **options)
            h, crossed = self._sublayer(f"{key}.ln_cross_attn", look, h)
        h, fed = self._sublayer(f"{key}.ln_2", partial(self._feed, f"{key}.mlp"), h)
        return h, (attended, crossed, fed)

    def block_backward(self, key, dh, cache, grads):
        """-> dh."""
        attended, crossed, fed = cache
        feed = partial(self._feed_backward, f"{key}.mlp")
        dh = self._sublayer_backward(f"{key}.ln_2", feed, dh, fed, grads)
        if crossed is not None:
            look = partial(self.attend_backward, f"{key}.crossattention")
            dh = self._sublayer_backward(f"{key}.ln_cross_attn", look, dh, crossed, grads)
        attend = partial(self.attend_backward, f"{key}.attn")
        return self._sublayer_backward(f"{key}.ln_1", attend, dh, attended, grads)

    def _sublayer(self, norm, part, h):
        """h + part(norm(h)), or norm(h + part(h)) where the norm comes last."""
        if self.post_norm:
            y, parted = part(h)
            h, normed = self.norm(norm, h + stored(y))
            return stored(h), (parted, normed)
        x, normed = self.norm(norm, h)
        y, parted = part(stored(x))
        return stored(h + stored(y)), (parted, normed)

    def _sublayer_backward(self, norm, part_backward, dh, cache, grads):
        parted, normed = cache
        if self.post_norm:
            dh = stored(self.norm_backward(norm, dh, normed, grads))
            return stored(dh + stored(part_backward(dh, parted, grads)))
        dx = part_backward(dh, parted, grads)
        dx = self.norm_backward(norm, stored(dx), normed, grads)
        return stored(dh + stored(dx))

    def attend(self, key, x, memory=None, **options):
        """Attention of x over itself or over a memory  ->  y, cache."""
        of_memory = None
        if memory is None:
            qkv, of_x = self.linear(f"{key}.c_attn", x)
            q, k, v = self._split(stored(qkv), 3)
        else:
            q, of_x = self.linear(f"{key}.q_attn", x)
            kv, of_memory = self.linear(f"{key}.c_attn", memory)
            (q,), (k, v) = self._split(stored(q), 1), self._split(stored(kv), 2)
        o, attended = attention(q, k, v, **options)
        y, merged = self.linear(f"{key}.c_proj", _merge(stored(o)))
        return y, (of_x, of_memory, attended, merged)

    def attend_backward(self, key, dy, cache, grads):
        """-> dx."""
        of_x, of_memory, attended, merged = cache
        do = self.linear_backward(f"{key}.c_proj", dy, merged, grads)
        (do,) = self._split(stored(do), 1)
        dq, dk, dv = attention_backward(do, attended)
        if of_memory is None:
            dqkv = stored(_merge(dq, dk, dv))
            return self.linear_backward(f"{key}.c_attn", dqkv, of_x, grads)
        dkv = stored(_merge(dk, dv))
        dmemory = self.linear_backward(f"{key}.c_attn", dkv, of_memory, grads)
        add(grads, "memory", dmemory)
        return self.linear_backward(f"{key}.q_attn", stored(_merge(dq)), of_x, grads)

    def _split(self, x, n):
        """(B, T, n·C) -> n × (B, H, T, D)."""
        B, T, _ = x.shape
        return x.reshape(B, T, n, self.n_head, -1).transpose(2, 0, 3, 1, 4)

    def _feed(self, key, x):
        maps = (*self._pair(f"{key}.c_fc"), *self._pair(f"{key}.c_proj"))
        return ffn(x, *maps, self.activation)

    def _feed_backward(self, key, dy, cache, grads):
        dx, dw1, db1, dw2, db2 = ffn_backward(dy, cache)
        self.collect(grads, f"{key}.c_fc", dw1, db1)
        self.collect(grads, f"{key}.c_proj", dw2, db2)
        return dx

    def linear(self, key, x):
        return linear(x, *self._pair(key))

    def linear_backward(self, key, dy, cache, grads):
        dx, *pair = linear_backward(dy, cache)
        self.collect(grads, key, *pair)
        return dx

    def norm(self, key, x):
        return layer_norm(x, *self._pair(key), self.eps)

    def norm_backward(self, key, dy, cache, grads):
        dx, *pair = layer_norm_backward(dy, cache)
        self.collect(grads, key, *pair)
        return dx

    def head(self, h, tied):
        """The logits. tied: the key of the table that is the head where there is no other."""
        key = "lm_head" if "lm_head.weight" in self.weights else tied
        logits, cache = head(stored(h), self[f"{key}.weight"], self.weights.get("lm_head.bias"))
        return stored(logits), (key, cache)

    def head_backward(self, dlogits, cache, grads):
        """-> dh."""
        key, cache = cache
        dh, dw, db = head_backward(stored(dlogits), cache)
        self.collect(grads, key, dw)
        if db is not None:
            grads["lm_head.bias"] = db
        return stored(dh)

    def embedding_backward(self, tables, dy, cache, grads):
        """The gradients of the tables of these keys."""
        for key, rows in zip(tables, row_gradients(dy, cache)):
            self._collect_rows(grads, f"{key}.weight", *rows)

    def _collect_rows(self, grads, key, ids, rows):
        """`add`, of a table that has no other rows: it may be most of a small model."""
        if key in grads:
            grads[key] = stored(grads[key])
            grads[key][ids] = grads[key][ids] + stored(rows)
        else:
            grads[key] = np.zeros_like(rows, shape=self[key].shape)
            grads[key][ids] = rows

    def _pair(self, key):
        w, b = self[f"{key}.weight"], self.weights.get(f"{key}.bias")
        return w, np.zeros_like(w, shape=w.shape[-1:]) if b is None else b

    def collect(self, grads, key, dw, db=None):
        """Add to the gradients of key.weight and, where there is one, key.bias."""
        add(grads, f"{key}.weight", dw)
        if db is not None and f"{key}.bias" in self.weights:
            add(grads, f"{key}.bias", db)


def add(grads, key, g):
    """Add to what other uses of a weight gave."""
    grads[key] = stored(grads[key]) + stored(g) if key in grads else g


def _merge(*heads):
    """n × (B, H, T, D) -> (B, T, n·C)."""
    B, _, T, _ = heads[0].shape
    return np.stack([x.transpose(0, 2, 1, 3) for x in heads], 2).reshape(B, T, -1)
