"""The encoder-decoder Transformer of 2017, and its gradients.

    encoder:  h = √C·wte[source] + p;   h = ln_1(h + attn(h)),   memory = ln_2(h + ffn(h))
    decoder:  h = √C·wte[targets_in] + p;   h = ln_1(h + attn(h)), causal,
              h = ln_cross_attn(h + crossattention(h, memory)),   h = ln_2(h + ffn(h))
    logits = h headᵀ + bias,   head = wte where tied

p are sinusoidal positions and the FFN's activation is ReLU. `source_lengths` says how many tokens
of each source are none of the padding; nothing sees the others. The paper's base model has 6
layers, C = 512, F = 2048, 8 heads, its big one 1024, 4096, 16; both tie the head, smooth the labels
by 0.1 (`label_smoothing` of `cross_entropy`) and share the tables of both languages. Its attention
has no biases, so their weights may be left out. The configuration is that of `parameter_shapes`,
model_type "transformer".

Shapes: source (B, S) int; targets_in (B, T) int; memory (B, S, C); logits (B, T, V). dtype float64.
Source: Vaswani et al. 2017, arXiv:1706.03762.
"""

import math

from ._blocks import Blocks
from ._checks import expect_ids, expect_shape
from ._cross_entropy import cross_entropy, cross_entropy_backward
from ._embedding import embedding
from ._positions import sinusoidal_positions
from ._rounding import stored
from ._shapes import as_dict, parameter_shapes


class Transformer(Blocks):
    """An encoder-decoder in float64. `weights` maps the keys of `parameter_shapes` to arrays."""

    def __init__(self, config, weights):
        config = {"lm_head_bias": "lm_head.bias" in weights} | as_dict(config)
        config["model_type"] = "transformer"
        super().__init__(
            "Transformer", weights, parameter_shapes(config), n_head=config["n_head"],
            eps=config.get("layer_norm_epsilon", 1e-5), activation="relu", post_norm=True,
        )  # fmt: skip
        self.n_layer, self.vocab_size = config["n_layer"], config["vocab_size"]

    def __call__(self, source, targets_in, source_lengths=None):
        """-> logits (B, T, V)."""
        return self.forward(source, targets_in, source_lengths)[0]

    def loss_and_gradients(self, source, targets_in, targets, source_lengths=None, **options):
        """Cross-entropy of targets (B, T) given those before them; its gradient by every weight."""
        logits, cache = self.forward(source, targets_in, source_lengths)
        loss, loss_cache = cross_entropy(logits, targets, **options)
        (dlogits,) = cross_entropy_backward(1.0, loss_cache)
        return loss, self.backward(dlogits, cache)

    def forward(self, source, targets_in, source_lengths=None):
        """-> logits, cache."""
        if len(source) != len(targets_in):
            raise ValueError(
                f"Transformer: source and targets_in must have one B, got {len(source)} and "
                f"{len(targets_in)}"
            )
        memory, encoded = self._stack(
            "encoder", source, lambda key, h: self.block(key, h, lengths=source_lengths)
        )
        h, decoded = self._stack(
            "decoder", targets_in,
            lambda key, h: self.block(key, h, memory, source_lengths, causal=True),
        )  # fmt: skip
        logits, headed = self.head(h, "wte")
        return logits, (encoded, decoded, headed)

    def backward(self, dlogits, cache):
        """-> {key: gradient} for every weight."""
        encoded, decoded, headed = cache
        grads = {}
        dh = self.head_backward(dlogits, headed, grads)
        self._stack_backward("decoder", dh, decoded, grads)
        self._stack_backward("encoder", grads.pop("memory"), encoded, grads)
        return grads

    def _stack(self, side, ids, block):
        """Embedding and blocks of one side  ->  h, cache."""
        expect_shape("Transformer", f"{side}'s ids", ids, "(B, T)", (None, None))
        ids = expect_ids("Transformer", f"{side}'s ids", ids, self.vocab_size, "vocab_size")
        x, embedded = embedding(ids, self["wte.weight"])
        C, layers = x.shape[-1], []
        h = stored(math.sqrt(C) * x + sinusoidal_positions(ids.shape[1], C))
        for i in range(self.n_layer):
            h, layer = block(f"{side}.h.{i}", h)
            layers.append(layer)
        return h, (embedded, layers)

    def _stack_backward(self, side, dh, cache, grads):
        embedded, layers = cache
        for i in reversed(range(self.n_layer)):
            dh = self.block_backward(f"{side}.h.{i}", dh, layers[i], grads)
        self.embedding_backward(["wte"], math.sqrt(dh.shape[-1]) * dh, embedded, grads)
