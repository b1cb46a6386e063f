"""GPT: a decoder with learned positions, its gradients, and its fine-tuning on tasks.

    h = wte[ids] + wpe[0 … T−1]
    per layer:  h = h + attn(ln_1(h)) c_proj,   h = h + ffn(ln_2(h))             GPT-2, GPT-3
                h = ln_1(h + attn(h) c_proj),   h = ln_2(h + ffn(h))             GPT-1
    logits = ln_f(h) headᵀ + bias,   head = wte where tied;   no ln_f in GPT-1

`attention_windows` of the configuration has one entry a layer, null or the keys that a query of a
banded layer sees: GPT-3 alternates the two. A prefix of continuous frames, image patches or audio,
goes through a linear map and stands before the text; positions run on over both:

    h = [frames·w + b; wte[ids]] + wpe[0 … N + T − 1]

A model is a Hugging Face directory, `config.json` and `model.safetensors`, of model_type gpt2 or
openai-gpt: keys with or without the `transformer.` prefix, matrices stored (in, out).
`parameter_shapes` says which weights a configuration calls for; a missing bias is none.

Shapes: ids (B, T) int; frames (B, N, E); h (B, N + T, C); logits (B, N + T, V). dtype float64.
Source: Radford et al. 2018 and 2019; Brown et al. 2020, arXiv:2005.14165, section 2.1; the released
GPT-2 code.
"""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  gives NumPy the bfloat16 that safetensors asks it for
import numpy as np
from safetensors.numpy import load_file

from . import _heads as heads
from ._blocks import Blocks
from ._checks import expect_choice, expect_ids, expect_shape
from ._cross_entropy import cross_entropy, cross_entropy_backward
from ._embedding import embedding
from ._rounding import stored
from ._shapes import EMBEDDINGS, MULTIPLE_CHOICE, as_dict, parameter_shapes

# Hugging Face's names for the activations that `ffn` defines
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
# where the configuration says it, and what it means there
_OF_TYPE = {
    "gpt2": ("activation_function", "gelu_new", _ACTIVATIONS),
    "openai-gpt": ("afn", "gelu", _ACTIVATIONS | {"gelu": "gelu_tanh"}),
}
# what these keys must be for the mathematics above to be the model's
_FIXED = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}
# and these where the head for multiple choice is there
_FIXED_SUMMARY = {"summary_activation": None, "summary_use_proj": True}
# a task's head, its gradients and its key
_TASKS = {
    "classification": (
        heads.classification_head, heads.classification_head_backward, "score"
    ),
    "similarity": (heads.similarity_head, heads.similarity_head_backward, "score"),
    "multiple_choice": (
        heads.multiple_choice_head, heads.multiple_choice_head_backward, MULTIPLE_CHOICE
    ),
}  # fmt: skip


class GPT(Blocks):
    """A GPT in float64. `weights` maps Hugging Face's keys to arrays.

    config: a config.json as a dict, or an object whose to_dict() gives one.
    """

    def __init__(self, config, weights):
        config = as_dict(config)
        weights = _plain(weights, config)
        # biases that a directory has without saying so
        config = {f"{k}_bias": f"{k}.bias" in weights for k in ("lm_head", "score")} | config
        kind = config.get("model_type", "gpt2")
        expect_choice("GPT", "config model_type", kind, EMBEDDINGS)
        chooses = f"{MULTIPLE_CHOICE}.weight" in weights
        for key, value in (_FIXED | _FIXED_SUMMARY if chooses else _FIXED).items():
            if config.get(key, value) != value:
                raise ValueError(f"GPT: config {key} must be {value!r}, got {config[key]!r}")
        key, default, known = _OF_TYPE[kind]
        activation = config.get(key, default)
        expect_choice("GPT", f"config {key}", activation, known)
        super().__init__(
            "GPT", weights, parameter_shapes(config), n_head=config["n_head"],
            eps=config.get("layer_norm_epsilon", 1e-5), activation=known[activation],
            post_norm=kind == "openai-gpt",
        )  # fmt: skip
        self.n_layer, self.n_embd = config["n_layer"], config["n_embd"]
        self.vocab_size, self.block_size = config["vocab_size"], config["n_positions"]
        self.wte, self.wpe = EMBEDDINGS[kind]
        self.scaled = config.get("scale_attn_weights", True)
        self.scaled_by_layer = config.get("scale_attn_by_inverse_layer_idx", False)
        self.windows = config.get("attention_windows") or [None] * self.n_layer
        _expect_windows(self.windows, self.n_layer)

    @classmethod
    def from_pretrained(cls, directory):
        """Read a Hugging Face directory of GPT-2 or of GPT-1."""
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
        return cls(config, load_file(directory / "model.safetensors"))

    def __call__(self, ids, frames=None):
        """ids (B, T), frames (B, N, E) -> logits (B, N + T, V)."""
        return self.forward(ids, frames)[0]

    def loss_and_gradients(self, ids, targets, frames=None, **options):
        """Cross-entropy of targets (B, N + T), already shifted; its gradients as of `backward`."""
        logits, cache = self.forward(ids, frames)
        loss, loss_cache = cross_entropy(logits, targets, **options)
        (dlogits,) = cross_entropy_backward(1.0, loss_cache)
        return loss, self.backward(dlogits, cache)

    def forward(self, ids, frames=None):
        """-> logits, cache."""
        h, cache = self.hidden(ids, frames)
        logits, headed = self.head(h, self.wte)
        return logits, (cache, headed)

    def backward(self, dlogits, cache):
        """-> {key: gradient} for every weight, and for `frames` where they were given."""
        cache, headed = cache
        grads = {}
        dh = self.head_backward(dlogits, headed, grads)
        return self.hidden_backward(dh, cache, grads)

    def hidden(self, ids, frames=None):
        """What the head reads, (B, N + T, C)  ->  h, cache."""
        h, embedded = self._embed(ids, frames)
        h, layers, normed = stored(h), [], None
        for i in range(self.n_layer):
            options = {"causal": True, "scale": self._scale(i), "window": self.windows[i]}
            h, layer = self.block(f"h.{i}", h, **options)
            layers.append(layer)
        if not self.post_norm:
            h, normed = self.norm("ln_f", h)
        return h, (embedded, layers, normed)

    def hidden_backward(self, dh, cache, grads=None):
        """-> {key: gradient}, added to those in `grads`."""
        embedded, layers, normed = cache
        grads = {} if grads is None else grads
        if not self.post_norm:
            dh = stored(self.norm_backward("ln_f", dh, normed, grads))
        for i in reversed(range(self.n_layer)):
            dh = self.block_backward(f"h.{i}", dh, layers[i], grads)
        self._embed_backward(dh, embedded, grads)
        return grads

    def _embed(self, ids, frames):
        """[frames·w + b; wte[ids]] + wpe[0 … N + T − 1]."""
        ids = expect_ids("GPT", "ids", ids, self.vocab_size, "vocab_size")
        expect_shape("GPT", "ids", ids, "(B, T)", (None, None))
        N = 0 if frames is None else self._expect_frames(frames, len(ids))
        if N + ids.shape[1] > self.block_size:
            raise ValueError(
                f"GPT: ids must have at most n_positions = {self.block_size} columns, "
                f"got {N + ids.shape[1]}; crop them"
            )
        wte, wpe = self[f"{self.wte}.weight"], self[f"{self.wpe}.weight"]
        text, embedded = embedding(ids, wte, wpe, N + np.arange(ids.shape[1]))
        if frames is None:
            return text, (embedded, None)
        prefix, mapped = self.linear("frames", frames)
        places, placed = embedding(np.arange(N), wpe)
        return np.concatenate([prefix + places, text], 1), (embedded, (N, mapped, placed))

    def _embed_backward(self, dh, cache, grads):
        embedded, framed = cache
        if framed is not None:
            N, mapped, placed = framed
            dprefix, dh = dh[:, :N], dh[:, N:]
            grads["frames"] = self.linear_backward("frames", dprefix, mapped, grads)
            self.embedding_backward([self.wpe], dprefix.sum(0), placed, grads)
        self.embedding_backward([self.wte, self.wpe], dh, embedded, grads)

    def _expect_frames(self, frames, B):
        """How many there are."""
        if "frames.weight" not in self.weights:
            raise ValueError("GPT: frames must be None where the config has no n_frame_embd")
        E = len(self["frames.weight"])
        expect_shape("GPT", "frames", frames, f"(B, N, E) = ({B}, N, {E})", (B, None, E))
        return frames.shape[1]

    def _scale(self, i):
        """The factor on the scores of layer i."""
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scaled else 1.0
        return scale / (i + 1) if self.scaled_by_layer else scale

    def task_loss_and_gradients(self, task, ids, extract, labels, mask=None, lm_coef=0.5):
        """A task's cross-entropy plus lm_coef times that of the text itself; gradients by key.

        task:    "classification", ids (B, T); "similarity", ids (B, 2, T), both orders;
                 "multiple_choice", ids (B, K, T).
        extract: where each sequence ends, ids' shape without T; labels (B,).
        mask:    like ids, 0 at padding: the text's loss is averaged over a sequence, then over
                 sequences. None has no padding.
        """
        expect_choice("GPT", "task", task, _TASKS)
        forward, backward, key = _TASKS[task]
        ids = np.asarray(ids)
        h, cache = self.hidden(ids.reshape(-1, ids.shape[-1]))
        of_task = h.reshape(*ids.shape, -1)
        if f"{key}.weight" not in self.weights:
            raise ValueError(f"GPT: weights must hold {key}.weight for {task}, they do not")
        w, b = self[f"{key}.weight"], self.weights.get(f"{key}.bias")
        logits, headed = forward(of_task, extract, w, b)
        loss, lossed = cross_entropy(logits, labels)
        (dlogits,) = cross_entropy_backward(1.0, lossed)
        dh, *pair = backward(dlogits, headed)
        dh, grads = dh.reshape(h.shape), {}
        self.collect(grads, key, *pair)
        if lm_coef:
            mask = np.ones_like(ids) if mask is None else np.asarray(mask)
            expect_shape("GPT", "mask", mask, "like ids", ids.shape)
            text = [x.reshape(-1, x.shape[-1]) for x in (ids, mask)]
            text_loss, dtext = self._text_loss(h[:, :-1], *text, lm_coef, grads)
            loss, dh = loss + lm_coef * text_loss, dh + dtext
        return loss, self.hidden_backward(dh, cache, grads)

    def _text_loss(self, h, ids, mask, dloss, grads):
        """Each sequence's mean loss of its next tokens, averaged  ->  loss, dh with a last 0."""
        kept = mask[:, 1:] != 0
        if not kept.any(1).all():
            raise ValueError("GPT: mask must keep a token after the first in every sequence")
        logits, headed = self.head(h, self.wte)
        losses, cache = cross_entropy(logits, ids[:, 1:], reduction="none")
        share = kept / kept.sum(1, keepdims=True) / len(kept)
        (dlogits,) = cross_entropy_backward(dloss * share, cache)
        dh = self.head_backward(dlogits, headed, grads)
        return (share * losses).sum(), np.pad(dh, ((0, 0), (0, 1), (0, 0)))


def _plain(weights, config):
    """The parameters by their keys without the prefix."""
    plain = {
        key.removeprefix("transformer."): w
        for key, w in weights.items()
        # older files also store the causal masks as buffers; they are not parameters
        if not key.endswith((".attn.bias", ".attn.masked_bias"))
    }
    if config.get("tie_word_embeddings", True) and "lm_head.weight" in plain:
        # a tied table has two names, of which a file holds one or both
        table, _ = EMBEDDINGS.get(config.get("model_type", "gpt2"), ("wte", "wpe"))
        plain.setdefault(f"{table}.weight", plain.pop("lm_head.weight"))
    return plain


def _expect_windows(windows, n_layer):
    if not isinstance(windows, (list, tuple)) or len(windows) != n_layer:
        raise ValueError(
            f"GPT: config attention_windows must be a list of n_layer = {n_layer} entries, "
            f"got {windows!r}"
        )
    for w in windows:
        if w is not None and not (isinstance(w, int) and w >= 1):
            raise ValueError(
                f"GPT: config attention_windows must hold null or whole numbers ≥ 1, got {w!r}"
            )
