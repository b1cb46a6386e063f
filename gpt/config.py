"""A GPT's shape, and its translation to and from Hugging Face's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

# Hugging Face's names for the activations that the kernels compute
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}

# config.json's name -> ours
_FIELDS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
    "n_inner": "n_inner",
    "layer_norm_epsilon": "eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "scale_attn_weights": "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
}
# keys that would change the mathematics, with the only value that this model has
_FIXED = {"model_type": "gpt2", "add_cross_attention": False, "is_encoder_decoder": False}
# keys that say nothing about the logits: they are kept and written back
_FOREIGN = {
    "architectures", "attn_pdrop", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing",
    "id2label", "initializer_range", "is_decoder", "label2id", "length_penalty", "max_length",
    "min_length", "n_ctx", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_past",
    "output_scores", "pad_token_id", "prefix", "problem_type", "remove_invalid_values",
    "reorder_and_upcast_attn", "repetition_penalty", "resid_pdrop", "return_dict",
    "return_dict_in_generate", "sep_token_id", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "use_bfloat16", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. `n_inner`, the FFN's width F, is 4·n_embd where None.

    Raises ValueError for sizes below 1 or an n_embd that n_head does not divide.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50257
    n_inner: int | None = None
    activation: str = "gelu_tanh"
    eps: float = 1e-5
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    foreign: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "n_inner"):
            value = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"GPTConfig: {name} must be a whole number ≥ 1, got {value!r}")
        if not isinstance(self.eps, (int, float)) or not self.eps >= 0:
            raise ValueError(f"GPTConfig: eps must be a number ≥ 0, got {self.eps!r}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_head must divide n_embd = {self.n_embd}, got {self.n_head}"
            )
        if self.activation not in _NAMES:
            raise ValueError(
                f"GPTConfig: activation must be one of {', '.join(_NAMES)}, got {self.activation!r}"
            )

    @classmethod
    def from_dict(cls, config):
        """From config.json's keys.

        Raises ValueError for a missing key, and for a key or value that changes the mathematics in
        a way that this model does not have.
        """
        if not isinstance(config, dict):
            raise ValueError(f"config.json: must hold an object, got {type(config).__name__}")
        config = dict(config)
        for key, value in _FIXED.items():
            got = config.pop(key, value)
            if got != value:
                raise ValueError(f"config.json: {key} must be {value!r}, got {got!r}")
        activation = config.pop("activation_function", "gelu_new")
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"config.json: activation_function must be one of {', '.join(_ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        sizes = {}
        for key, name in _FIELDS.items():
            if key in config:
                sizes[name] = config.pop(key)
            elif key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
                raise ValueError(f"config.json: {key} must be set, it is missing")
        unknown = [k for k in config if k not in _FOREIGN and not k.startswith("_")]
        if unknown:
            raise ValueError(
                f"config.json: every key must be one of GPT-2's, got {unknown[0]!r}; "
                "remove it if the model does not depend on it"
            )
        return cls(activation=_ACTIVATIONS[activation], foreign=config, **sizes)

    def to_dict(self):
        """config.json's keys, as transformers reads them."""
        known = {key: getattr(self, name) for key, name in _FIELDS.items()}
        return {
            "architectures": ["GPT2LMHeadModel"],
            # transformers' defaults lie outside small vocabularies
            "bos_token_id": None,
            "eos_token_id": None,
            **self.foreign,
            "model_type": _FIXED["model_type"],
            "add_cross_attention": _FIXED["add_cross_attention"],
            "activation_function": _NAMES[self.activation],
            **known,
        }

    @classmethod
    def load(cls, path):
        """Read a config.json."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"model: {path.parent} must hold config.json, it does not; "
                "give a directory that save_pretrained wrote"
            )
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"config.json: must be JSON, {path} is not: {error}") from None
