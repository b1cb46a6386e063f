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
# where each kind of config.json says the activation, what it is by default, and its own meanings
_KINDS = {
    "gpt2": ("activation_function", "gelu_new", {}),
    "openai-gpt": ("afn", "gelu", {"gelu": "gelu_tanh"}),
}

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
    "attention_windows": "attention_windows",
}
# keys that would change the mathematics, with the only value that this model has
_FIXED = {"add_cross_attention": False, "is_encoder_decoder": False}
# keys that say nothing about the logits: they are kept and written back
_FOREIGN = {
    "architectures", "attn_pdrop", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing",
    "id2label", "initializer_range", "is_decoder", "label2id", "length_penalty", "max_length",
    "min_length", "n_ctx", "n_special", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_past", "output_scores", "pad_token_id", "predict_special_tokens", "prefix",
    "problem_type", "remove_invalid_values", "reorder_and_upcast_attn", "repetition_penalty",
    "resid_pdrop", "return_dict", "return_dict_in_generate", "sep_token_id", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
}  # fmt: skip

# what openai-gpt's config.json has no key for, and what is the same there
_OF_GPT1 = {
    "n_inner": (None,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "attention_windows": (None,),
    # the name of the exact one means the other there
    "activation": ("gelu_tanh", "relu"),
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    model_type:        "gpt2", norms before each part and one at the end; or "openai-gpt", GPT-1:
                       norms after each part and none at the end.
    n_inner:           the FFN's width F; None is 4·n_embd.
    attention_windows: for each layer None, or how many keys a query of a banded layer sees; None
                       is dense everywhere. transformers has no such key and would ignore it.
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
    attention_windows: tuple[int | None, ...] | None = None
    model_type: str = "gpt2"
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
        for name, choices in (("activation", _NAMES), ("model_type", _KINDS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"GPTConfig: {name} must be one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        self._expect_gpt1()
        self._expect_windows()

    def _expect_gpt1(self):
        """What openai-gpt's config.json cannot say, transformers would not know."""
        if self.model_type == "openai-gpt":
            for name, choices in _OF_GPT1.items():
                if getattr(self, name) not in choices:
                    raise ValueError(
                        f"GPTConfig: {name} must be {' or '.join(map(str, choices))} for "
                        f"openai-gpt, got {getattr(self, name)!r}"
                    )

    def _expect_windows(self):
        windows = self.attention_windows
        if windows is None:
            return
        if not isinstance(windows, (list, tuple)) or len(windows) != self.n_layer:
            raise ValueError(
                f"GPTConfig: attention_windows must be a list of n_layer = {self.n_layer} entries, "
                f"got {windows!r}"
            )
        object.__setattr__(self, "attention_windows", tuple(windows))
        for w in windows:
            if w is not None and (not isinstance(w, int) or w < 1):
                raise ValueError(
                    f"GPTConfig: attention_windows must hold None or whole numbers ≥ 1, got {w!r}"
                )

    @property
    def post_norm(self):
        """Whether each norm comes after the residual addition, and none at the end."""
        return self.model_type == "openai-gpt"

    def window(self, layer):
        return self.attention_windows[layer] if self.attention_windows else None

    @classmethod
    def preset(cls, name):
        """The shape of a published model, by its name in PRESETS."""
        if name not in PRESETS:
            raise ValueError(f"preset: name must be one of {', '.join(PRESETS)}, got {name!r}")
        return PRESETS[name]

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
        kind = config.pop("model_type", "gpt2")
        if kind not in _KINDS:
            raise ValueError(
                f"config.json: model_type must be one of {', '.join(_KINDS)}, got {kind!r}"
            )
        key, default, own = _KINDS[kind]
        known = _ACTIVATIONS | own
        activation = config.pop(key, default)
        if activation not in known:
            raise ValueError(
                f"config.json: {key} must be one of {', '.join(known)}, got {activation!r}"
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
                f"config.json: every key must be one of GPT's, got {unknown[0]!r}; "
                "remove it if the model does not depend on it"
            )
        return cls(activation=known[activation], model_type=kind, foreign=config, **sizes)

    def to_dict(self):
        """config.json's keys, as transformers reads them."""
        absent = set(_OF_GPT1) if self.post_norm else set()
        if self.attention_windows is None:
            absent.add("attention_windows")
        known = {key: getattr(self, name) for key, name in _FIELDS.items() if key not in absent}
        key, _, own = _KINDS[self.model_type]
        names = _NAMES | {ours: theirs for theirs, ours in own.items()}
        return {
            "architectures": ["OpenAIGPTLMHeadModel" if self.post_norm else "GPT2LMHeadModel"],
            # transformers' defaults lie outside small vocabularies
            "bos_token_id": None,
            "eos_token_id": None,
            **self.foreign,
            "model_type": self.model_type,
            "add_cross_attention": _FIXED["add_cross_attention"],
            key: names[self.activation],
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


# The paper says that GPT-3's layers alternate dense and locally banded patterns, and neither how
# wide the band is nor which comes first: 256 keys and dense first are choices of this repository
# (256 is GPT-Neo's).
_BAND = 256


def _gpt3(n_layer, n_embd, n_head):
    windows = tuple(_BAND if i % 2 else None for i in range(n_layer))
    return GPTConfig(n_layer, n_head, n_embd, block_size=2048, attention_windows=windows)


# Published shapes. The paper's table has 24 heads for 1.3b, which do not divide its width, and a
# width of 5140 for 13b, which its heads do not divide.
PRESETS = {
    "gpt1": GPTConfig(block_size=512, vocab_size=40478, model_type="openai-gpt"),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(24, 16, 1024),
    "gpt2-large": GPTConfig(36, 20, 1280),
    "gpt2-xl": GPTConfig(48, 25, 1600),
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
}
