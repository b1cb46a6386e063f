"""GPT-2: a pre-LN decoder with learned positions and a tied head.

    h = wte[ids] + wpe[0 … T−1]
    per layer:  h = h + attn(ln_1(h)) c_proj,   h = h + ffn(ln_2(h))
    logits = ln_f(h) headᵀ,   head = wte where tied

A 16-bit model keeps the results of its ops, the residual stream h among them, in its dtype or in
float32: they are marked `stored`.

Weights are a Hugging Face GPT-2 directory: `config.json` and `model.safetensors`, keys with or
without the `transformer.` prefix, matrices stored (in, out).

Shapes: ids (B, T) int; logits (B, T, V). dtype float64.
Source: Radford et al. 2019; the released GPT-2 code.
"""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  gives NumPy the bfloat16 that safetensors asks it for
import numpy as np
from safetensors.numpy import load_file

from ._attention import attention, attention_backward
from ._checks import expect_ids, expect_shape
from ._cross_entropy import cross_entropy, cross_entropy_backward
from ._embedding import embedding, embedding_backward
from ._ffn import ffn, ffn_backward
from ._layer_norm import layer_norm, layer_norm_backward
from ._linear import linear, linear_backward
from ._rounding import floats, stored

# Hugging Face's names for the activations that `ffn` defines
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
# what these keys must be for the mathematics above to be the model's
_FIXED = {"model_type": "gpt2", "add_cross_attention": False}


class GPT:
    """A GPT-2 in float64. `weights` maps Hugging Face's keys, unprefixed, to arrays."""

    def __init__(self, config, weights):
        for key, value in _FIXED.items():
            if config.get(key, value) != value:
                raise ValueError(f"GPT: config {key} must be {value!r}, got {config[key]!r}")
        activation = config.get("activation_function", "gelu_new")
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"GPT: config activation_function must be one of {', '.join(_ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        for key in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions"):
            if not isinstance(config.get(key), int) or config[key] < 1:
                raise ValueError(
                    f"GPT: config {key} must be a whole number ≥ 1, got {config.get(key)!r}"
                )
        if config["n_embd"] % config["n_head"]:
            raise ValueError(
                f"GPT: config n_head must divide n_embd = {config['n_embd']}, "
                f"got {config['n_head']}"
            )
        self.n_layer, self.n_head = config["n_layer"], config["n_head"]
        self.n_embd, self.vocab_size = config["n_embd"], config["vocab_size"]
        self.block_size = config["n_positions"]
        self.eps = config.get("layer_norm_epsilon", 1e-5)
        self.activation = _ACTIVATIONS[activation]
        self.tied = config.get("tie_word_embeddings", True)
        self.scaled = config.get("scale_attn_weights", True)
        self.scaled_by_layer = config.get("scale_attn_by_inverse_layer_idx", False)
        self.weights = {k: floats(v) for k, v in weights.items()}
        expect_shape("GPT", "wte", self["wte.weight"], "(V, C)", (self.vocab_size, self.n_embd))
        expect_shape("GPT", "wpe", self["wpe.weight"], "(T, C)", (self.block_size, self.n_embd))

    @classmethod
    def from_pretrained(cls, directory):
        """Read a Hugging Face GPT-2 directory."""
        directory = Path(directory)
        for name in ("config.json", "model.safetensors"):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"GPT: {directory} must hold {name}, it does not; "
                    "give a directory that save_pretrained wrote"
                )
        try:
            config = json.loads((directory / "config.json").read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"GPT: config.json must be JSON, it is not: {error}") from None
        weights = load_file(directory / "model.safetensors")
        # older files also store the causal masks as buffers; they are not parameters
        masks = (".attn.bias", ".attn.masked_bias")
        return cls(
            config,
            {
                k.removeprefix("transformer."): v
                for k, v in weights.items()
                if not k.endswith(masks)
            },
        )

    def __getitem__(self, key):
        if key not in self.weights:
            raise ValueError(f"GPT: weights must hold {key!r}, they do not")
        return self.weights[key]

    def __call__(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        return self.forward(ids)[0]

    def loss_and_gradients(self, ids, targets, **options):
        """Cross-entropy of targets (B, T), already shifted, and its gradient by every weight."""
        logits, cache = self.forward(ids)
        loss, loss_cache = cross_entropy(logits, targets, **options)
        (dlogits,) = cross_entropy_backward(1.0, loss_cache)
        return loss, self.backward(dlogits, cache)

    def forward(self, ids):
        """-> logits, cache."""
        ids = expect_ids("GPT", "ids", ids, self.vocab_size, "vocab_size")
        expect_shape("GPT", "ids", ids, "(B, T)", (None, None))
        if ids.shape[1] > self.block_size:
            raise ValueError(
                f"GPT: ids must have at most n_positions = {self.block_size} columns, "
                f"got {ids.shape[1]}; crop them"
            )
        h, embedded = embedding(ids, self["wte.weight"], self["wpe.weight"])
        h = stored(h)
        layers = []
        for i in range(self.n_layer):
            h, layer = self._block(i, h)
            layers.append(layer)
        h, normed = layer_norm(h, self["ln_f.weight"], self["ln_f.bias"], self.eps)
        logits, head = linear(stored(h), self._head().T)
        return stored(logits), (embedded, layers, normed, head)

    def backward(self, dlogits, cache):
        """-> {key: gradient} for every weight."""
        embedded, layers, normed, head = cache
        grads = {}
        dh, dhead, _ = linear_backward(stored(dlogits), head)
        dh, grads["ln_f.weight"], grads["ln_f.bias"] = layer_norm_backward(stored(dh), normed)
        dh = stored(dh)
        for i in reversed(range(self.n_layer)):
            dh = self._block_backward(i, dh, layers[i], grads)
        grads["wte.weight"], grads["wpe.weight"] = embedding_backward(dh, embedded)
        if self.tied:
            grads["wte.weight"] = stored(grads["wte.weight"]) + stored(dhead.T)
        else:
            grads["lm_head.weight"] = dhead.T
        return grads

    def _head(self):
        return self["wte.weight"] if self.tied else self["lm_head.weight"]

    def _pair(self, key):
        return self[f"{key}.weight"], self[f"{key}.bias"]

    def _block(self, i, h):
        x, ln_1 = layer_norm(h, *self._pair(f"h.{i}.ln_1"), self.eps)
        x, attended = self._attend(i, stored(x))
        h = stored(h + stored(x))
        x, ln_2 = layer_norm(h, *self._pair(f"h.{i}.ln_2"), self.eps)
        c_fc, c_proj = self._pair(f"h.{i}.mlp.c_fc"), self._pair(f"h.{i}.mlp.c_proj")
        x, fed = ffn(stored(x), *c_fc, *c_proj, self.activation)
        return stored(h + stored(x)), (ln_1, attended, ln_2, fed)

    def _block_backward(self, i, dh, cache, grads):
        ln_1, attended, ln_2, fed = cache
        key = f"h.{i}."
        dx, *dffn = ffn_backward(dh, fed)
        names = ("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
        grads.update(zip((key + name for name in names), dffn))
        dx, grads[key + "ln_2.weight"], grads[key + "ln_2.bias"] = layer_norm_backward(
            stored(dx), ln_2
        )
        dh = stored(dh + stored(dx))
        dx = self._attend_backward(i, dh, attended, grads)
        dx, grads[key + "ln_1.weight"], grads[key + "ln_1.bias"] = layer_norm_backward(
            stored(dx), ln_1
        )
        return stored(dh + stored(dx))

    def _attend(self, i, x):
        B, T, C = x.shape
        qkv, projected = linear(x, *self._pair(f"h.{i}.attn.c_attn"))
        heads = stored(qkv).reshape(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)  # 3 × (B, H, T, D)
        o, attended = attention(q, k, v, causal=True, scale=self._scale(i))
        o = stored(o).transpose(0, 2, 1, 3).reshape(B, T, C)
        y, merged = linear(o, *self._pair(f"h.{i}.attn.c_proj"))
        return y, (projected, attended, merged)

    def _attend_backward(self, i, dy, cache, grads):
        projected, attended, merged = cache
        B, T, C = dy.shape
        key = f"h.{i}.attn."
        do, grads[key + "c_proj.weight"], grads[key + "c_proj.bias"] = linear_backward(dy, merged)
        do = stored(do).reshape(B, T, self.n_head, C // self.n_head).transpose(0, 2, 1, 3)
        dqkv = stored(np.stack(attention_backward(do, attended)))  # (3, B, H, T, D)
        dqkv = dqkv.transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * C)
        dx, grads[key + "c_attn.weight"], grads[key + "c_attn.bias"] = linear_backward(
            dqkv, projected
        )
        return dx

    def _scale(self, i):
        """The factor on the scores of layer i."""
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scaled else 1.0
        return scale / (i + 1) if self.scaled_by_layer else scale
