"""A small tokenizer of our own, for tests, demonstrations and models without one. ``train.py`` made it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

FOLDER = Path(__file__).parent
FILES = ("tokenizer.json", "tokenizer_config.json")
"""What a model folder needs for ``transformers.AutoTokenizer``."""

BOS, EOS, END = "<|bos|>", "<|eos|>", "<|end|>"
SPECIAL_TOKENS = (BOS, EOS, "<|user|>", "<|assistant|>", "<|system|>", END)
"""Each is one token, ids from 0. ``END`` closes a turn of a chat, ``EOS`` a text."""


def load_tokenizer() -> Tokenizer:
    """The tokenizer that ships with the project."""
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
