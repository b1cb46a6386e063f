"""Training text: files in, token arrays and batches out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


def read_text(paths):
    """The text of all files, one after the other.

    Raises FileNotFoundError for a missing file, ValueError for an empty one or one that is not
    UTF-8.
    """
    texts = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"data: {path} must be a text file, there is none")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data: {path} must be UTF-8 text, byte {error.start} is not; convert it"
            ) from None
        if not text.strip():
            raise ValueError(f"data: {path} must hold text, it is empty")
        texts.append(text)
    return "\n".join(texts)


def split(ids, block_size, held_out=0.1):
    """(training, held-out) ids: the last tenth of the text is never trained on.

    Raises ValueError where either part is shorter than one block and its target.
    """
    cut = len(ids) - int(len(ids) * held_out)
    for part, name in ((ids[:cut], "training"), (ids[cut:], "held-out")):
        if len(part) <= block_size:
            raise ValueError(
                f"data: the {name} text must be longer than block_size = {block_size} tokens, "
                f"got {len(part)}; give more text or a smaller --block-size"
            )
    return ids[:cut], ids[cut:]


def batch(ids, block_size, batch_size, seed, step):
    """Random windows of a step, (x, y) each (batch_size, block_size), y shifted by one.

    A function of seed and step alone, so that a resumed run sees what an unbroken one would.
    """
    draw = np.random.default_rng([seed, step])
    starts = draw.integers(0, len(ids) - block_size, batch_size)
    windows = torch.from_numpy(ids[starts[:, None] + np.arange(block_size + 1)])
    return windows[:, :-1], windows[:, 1:]


def held_out_batches(ids, block_size, batch_size):
    """All whole windows of a text in order, without overlap: (x, y) batches."""
    count = (len(ids) - 1) // block_size
    x = torch.from_numpy(ids[: count * block_size].reshape(count, block_size))
    y = torch.from_numpy(ids[1 : count * block_size + 1].reshape(count, block_size))
    return list(zip(x.split(batch_size), y.split(batch_size)))


def unigram_entropy(ids):
    """−Σ p log p of the token frequencies, in nats: what a model that knows only them can reach."""
    p = np.unique(ids, return_counts=True)[1] / len(ids)
    return float(-(p * np.log(p)).sum())
