"""Train the tokenizer that ships with the project: ``python -m testbed.engine.tokenizer.train``.

Byte-level BPE on this repository's own prose and sources, so that its licence is ours. A rerun on the same files gives
the same tokenizer; it need not follow every change of the repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from testbed.engine.tokenizer import FOLDER, SPECIAL_TOKENS

VOCAB = 4096
WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English endings
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters with what leads to them
        r"\p{N}",  # one digit
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
"""Where text is cut before merging: as Qwen2's tokenizer does, since ``transformers`` 5 cuts so beside the config of a
``qwen2`` whatever the tokenizer's own file says (models/qwen2/tokenization_qwen2.py; it also composes characters, NFC,
which we do not: text must come back as it was)."""
SOURCES = ("README.md", "docs/**/*.md", "testbed/**/*.py", "kernels/**/*.py", "tests/**/*.py")


def train(texts: Iterator[str], vocab: int = VOCAB) -> Tokenizer:
    """A tokenizer with ``vocab`` tokens: the special ones, every byte, and merges. Any text comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def repository_texts(root: Path) -> Iterator[str]:
    """Every file of ``SOURCES``, in an order that does not depend on the file system."""
    for pattern in SOURCES:
        for file in sorted(root.glob(pattern)):
            yield file.read_text(encoding="utf-8")


if __name__ == "__main__":
    repository = Path(__file__).parents[3]
    train(repository_texts(repository)).save(str(FOLDER / "tokenizer.json"))
