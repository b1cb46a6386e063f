"""The fast model: GPT on the kernels, its tokenizer, training and generation."""

from importlib import import_module

_HOMES = {
    "AdamW": "optimizer",
    "GPT": "model",
    "GPTConfig": "config",
    "KVCache": "model",
    "ByteTokenizer": "tokenizer",
    "TrainConfig": "train",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
