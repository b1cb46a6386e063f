"""Which weights a model has, and their shapes, from its configuration alone.

The keys of a configuration are those of a Hugging Face config.json; `model_type` says which model:

    gpt2         wte (V, C), wpe (P, C), h.0 … h.(n_layer − 1), ln_f
    openai-gpt   tokens_embed (V, C), positions_embed (P, C), h.0 …: GPT-1
    transformer  wte (V, C), encoder.h.0 …, decoder.h.0 …: the encoder-decoder of 2017

A block `h.i` has ln_1, attn.c_attn (C, 3C), attn.c_proj (C, C), ln_2, mlp.c_fc (C, F),
mlp.c_proj (F, C); one of the decoder also ln_cross_attn and crossattention.q_attn (C, C), c_attn
(C, 2C), c_proj (C, C). Norms and maps of a block have a `.weight` and a `.bias`. Beside them:

    lm_head.weight (V, C)        tie_word_embeddings false
    lm_head.bias (V,)            lm_head_bias
    frames.weight (E, C), .bias  n_frame_embd = E, a prefix of continuous frames
    score.weight (K, C)          architectures name …ForSequenceClassification; K = num_labels
    score.bias (K,)              score_bias
    multiple_choice_head.summary.weight (1, C), .bias      architectures name …DoubleHeadsModel

F is n_inner, 4C where that is null. `bias` false takes every bias away.
Source: Radford et al. 2018 and 2019, their released weights; Vaswani et al. 2017,
arXiv:1706.03762.
"""

import math

# the names of the two tables
EMBEDDINGS = {
    "gpt2": ("wte", "wpe"),
    "openai-gpt": ("tokens_embed", "positions_embed"),
}
MULTIPLE_CHOICE = "multiple_choice_head.summary"


def parameter_count(config):
    """How many numbers a model learns; nothing is allocated."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def parameter_shapes(config):
    """{key: shape} of a configuration: a dict, or an object whose to_dict() gives one."""
    config = as_dict(config)
    kind = config.get("model_type", "gpt2")
    if kind not in (*EMBEDDINGS, "transformer"):
        kinds = ", ".join((*EMBEDDINGS, "transformer"))
        raise ValueError(f"parameter_shapes: model_type must be one of {kinds}, got {kind!r}")
    shapes = _transformer(config) if kind == "transformer" else _gpt(config, *EMBEDDINGS[kind])
    if not config.get("bias", True):
        shapes = {key: shape for key, shape in shapes.items() if not key.endswith(".bias")}
    return shapes


def as_dict(config):
    """A configuration's keys and values."""
    return config if isinstance(config, dict) else config.to_dict()


def expect_weights(name, weights, shapes):
    """Raise ValueError unless the weights are those of `shapes`; a bias may be missing."""
    for key in shapes:
        if key not in weights and not key.endswith(".bias"):
            raise ValueError(f"{name}: weights must hold {key!r}, they do not")
    for key, w in weights.items():
        if key not in shapes:
            raise ValueError(
                f"{name}: weights must be those that the config calls for, got {key!r} too"
            )
        if w.shape != shapes[key]:
            raise ValueError(f"{name}: {key} must have shape {shapes[key]}, got {w.shape}")


def expect_sizes(name, config, *keys):
    """Raise ValueError unless these keys hold whole numbers and the heads divide the width."""
    for key in keys:
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise ValueError(
                f"{name}: config {key} must be a whole number ≥ 1, got {config.get(key)!r}"
            )
    if config["n_embd"] % config["n_head"]:
        raise ValueError(
            f"{name}: config n_head must divide n_embd = {config['n_embd']}, got {config['n_head']}"
        )


def _gpt(config, wte, wpe):
    expect_sizes("GPT", config, "n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
    V, P, C = config["vocab_size"], config["n_positions"], config["n_embd"]
    shapes = {f"{wte}.weight": (V, C), f"{wpe}.weight": (P, C)}
    if config.get("n_frame_embd"):
        shapes |= _affine("frames", config["n_frame_embd"], C)
    for i in range(config["n_layer"]):
        shapes |= _block(f"h.{i}", config)
    if wte == "wte":
        shapes |= _norm("ln_f", C)
    return shapes | _head(config) | _task_heads(config)


def _transformer(config):
    expect_sizes("Transformer", config, "n_layer", "n_head", "n_embd", "vocab_size")
    shapes = {"wte.weight": (config["vocab_size"], config["n_embd"])}
    for side in ("encoder", "decoder"):
        for i in range(config["n_layer"]):
            shapes |= _block(f"{side}.h.{i}", config, crosses=side == "decoder")
    return shapes | _head(config)


def _block(key, config, crosses=False):
    C = config["n_embd"]
    F = config.get("n_inner") or 4 * C
    return {
        **_norm(f"{key}.ln_1", C),
        **_affine(f"{key}.attn.c_attn", C, 3 * C),
        **_affine(f"{key}.attn.c_proj", C, C),
        **(_crossing(key, C) if crosses else {}),
        **_norm(f"{key}.ln_2", C),
        **_affine(f"{key}.mlp.c_fc", C, F),
        **_affine(f"{key}.mlp.c_proj", F, C),
    }


def _crossing(key, C):
    return {
        **_norm(f"{key}.ln_cross_attn", C),
        **_affine(f"{key}.crossattention.q_attn", C, C),
        **_affine(f"{key}.crossattention.c_attn", C, 2 * C),
        **_affine(f"{key}.crossattention.c_proj", C, C),
    }


def _head(config):
    V, C = config["vocab_size"], config["n_embd"]
    weight = {} if config.get("tie_word_embeddings", True) else {"lm_head.weight": (V, C)}
    return weight | ({"lm_head.bias": (V,)} if config.get("lm_head_bias") else {})


def _task_heads(config):
    C, shapes = config["n_embd"], {}
    named = " ".join(config.get("architectures") or ())
    if "ForSequenceClassification" in named:
        K = config.get("num_labels") or len(config.get("id2label") or (0, 1))
        shapes |= {"score.weight": (K, C)}
        shapes |= {"score.bias": (K,)} if config.get("score_bias") else {}
    if "DoubleHeadsModel" in named:
        shapes |= {f"{MULTIPLE_CHOICE}.weight": (1, C), f"{MULTIPLE_CHOICE}.bias": (1,)}
    return shapes


def _norm(key, C):
    return {f"{key}.weight": (C,), f"{key}.bias": (C,)}


def _affine(key, n_in, n_out):
    return {f"{key}.weight": (n_in, n_out), f"{key}.bias": (n_out,)}
