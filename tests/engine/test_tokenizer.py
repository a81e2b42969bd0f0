"""The tokenizer that ships: any text comes back, and transformers reads it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from testbed.engine.tokenizer import FOLDER, SPECIAL_TOKENS, load_tokenizer
from testbed.engine.tokenizer.train import VOCAB, repository_texts, train
from tests.engine.world import FAMILIES, tiny_model

TOKENIZER = load_tokenizer()
PROSE = "The scheduler decides, an event loop orders the deciding in time, a runtime says what time is."


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= token < VOCAB for token in ids)


def test_every_byte_is_a_token() -> None:
    """Else some text would have none."""
    singles = {token for token in TOKENIZER.get_vocab() if len(token) == 1}
    assert len(singles) == 256


def test_special_tokens_come_first_and_are_one_token_each() -> None:
    assert TOKENIZER.get_vocab_size() == VOCAB
    for index, token in enumerate(SPECIAL_TOKENS):
        assert TOKENIZER.encode(f"a{token}b").ids[1] == TOKENIZER.token_to_id(token) == index
    assert TOKENIZER.decode([*range(len(SPECIAL_TOKENS)), *TOKENIZER.encode("word").ids]) == "word"


def test_it_has_learned_words() -> None:
    assert len(TOKENIZER.encode(PROSE).ids) < len(PROSE) / 2.5


def test_training_is_repeatable_and_reads_this_repository() -> None:
    texts = [text for _, text in zip(range(20), repository_texts(Path(__file__).parents[2]), strict=False)]
    assert len(texts) == 20 and texts[0].startswith("#")
    one, two = train(iter(texts), 600), train(iter(texts), 600)
    assert one.to_str() == two.to_str() and one.get_vocab_size() == 600
    assert one.decode(one.encode(PROSE).ids) == PROSE


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_it(family: str, tmp_path: Path) -> None:
    """Beside any family's config: families with a tokenizer class of their own must not bend it."""
    theirs = AutoTokenizer.from_pretrained(tiny_model(family, tmp_path / "model"))
    for text in (PROSE, "v2.13 has 12345 tokens: DON'T", "  two  spaces, 你好 👩‍👩‍👧\n\tand\x00a <|end|>token"):
        ids = theirs(text)["input_ids"]
        assert ids == TOKENIZER.encode(text).ids
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, VOCAB)


def test_chat_template() -> None:
    theirs = AutoTokenizer.from_pretrained(FOLDER)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    closed = "<|bos|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi<|end|><|user|>Bye<|end|>"
    assert text == f"{closed}<|assistant|>"
    assert theirs.apply_chat_template(chat, tokenize=False) == closed
    specials = [token for token in theirs(text)["input_ids"] if token < len(SPECIAL_TOKENS)]
    assert specials == [0, 4, 5, 2, 5, 3, 5, 2, 5, 3]
