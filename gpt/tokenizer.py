"""Byte-level text: 256 tokens, one a byte of UTF-8; and any tokenizer.json beside a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


class ByteTokenizer:
    """Token i is byte i."""

    vocab_size = 256

    def encode(self, text):
        """The UTF-8 bytes of a text as an int64 array."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def decode(self, ids):
        """The text of the bytes; a broken character becomes U+FFFD."""
        return bytes(int(i) for i in ids).decode(errors="replace")

    def save(self, directory):
        """Write tokenizer.json and tokenizer_config.json, which transformers loads."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {char: byte for byte, char in enumerate(_byte_characters())}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        directory = Path(directory)
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n"
        )


class FileTokenizer:
    """The tokenizer of a tokenizer.json."""

    def __init__(self, path):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer.json: must be whole, {path} is not: {error}") from None
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, text):
        """The tokens of a text as an int64 array. Raises ValueError for half characters."""
        try:
            # a command line's bytes that are no UTF-8 arrive as halves of pairs
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"tokenizer: text must be UTF-8, character {error.start} is not; convert it"
            ) from None
        return np.array(self._tokenizer.encode(text).ids, np.int64)

    def decode(self, ids):
        return self._tokenizer.decode([int(i) for i in ids])


def load_tokenizer(directory):
    """The tokenizer that lies beside a model. Raises FileNotFoundError where there is none."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer: {directory} must hold tokenizer.json, it does not; "
            "copy the one the model was trained with"
        )
    return FileTokenizer(path)


def _byte_characters():
    """The 256 printable characters that byte-level vocabularies write for the 256 bytes.

    Source: Radford et al. 2019, the released GPT-2 code (`bytes_to_unicode`).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte if byte in printable else next(rest)) for byte in range(256)]
