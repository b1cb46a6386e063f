"""The ground truth: every operation and model of the GPT family in NumPy float64.

An operation returns ``(y, cache)``; its ``*_backward(dy, cache)`` returns one gradient for each
floating input. Nothing here is tiled, fused or tuned: one line of code per line of mathematics.
"""

from ._attention import attention, attention_backward
from ._cross_entropy import cross_entropy, cross_entropy_backward
from ._embedding import embedding, embedding_backward
from ._ffn import ffn, ffn_backward
from ._gpt import GPT
from ._layer_norm import layer_norm, layer_norm_backward
from ._linear import linear, linear_backward

__all__ = [
    "GPT",
    "attention",
    "attention_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "embedding",
    "embedding_backward",
    "ffn",
    "ffn_backward",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_backward",
]
