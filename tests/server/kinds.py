"""Tokenizers of the kinds that users bring, small and trained here, and texts in many scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from testbed.engine.tokenizer import load_tokenizer

SCRIPTS = {
    "Latin": "Zażółć gęślą jaźń. Über façade, naïve œuvre; İstanbul ıŞığı. Tiếng Việt đẹp.",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ἐν ἀρχῇ ἦν ὁ λόγος",
    "Cyrillic": "Съешь же ещё этих мягких французских булок",
    "Armenian, Georgian": "Բարեւ աշխարհ — გამარჯობა მსოფლიო",
    "Hebrew": "שָׁלוֹם עוֹלָם, מה שלומך?",
    "Arabic": "اَلسَّلَامُ عَلَيْكُمْ — كيف حالك؟ ﷽",
    "RTL in LTR": "abc \u202eשלום\u202c def \u200f\u061c 123",
    "Devanagari": "नमस्ते दुनिया क्षत्रिय श्री",
    "Bengali, Tamil": "হ্যালো বিশ্ব வணக்கம் உலகம்",
    "Thai, Lao, Khmer": "สวัสดีชาวโลก ສະບາຍດີ សួស្តី",
    "Tibetan, Burmese": "བཀྲ་ཤིས་བདེ་ལེགས། မင်္ဂလာပါ",
    "Ethiopic, Cherokee": "ሰላም ልዑል ᎣᏏᏲ ᎡᎶᎯ",
    "Chinese": "你好，世界。龍鳳呈祥 𠮷野家 𰻝麵",
    "Japanese": "こんにちは世界、カタカナ ﾊﾝｶｸ がぎ か\u3099",
    "Hangul": "안녕하세요 세계 \u1112\u1161\u11ab\u1100\u1173\u11af 뷁",
    "combining": "e\u0301 n\u0303 Z\u0351\u036b\u0343a\u0340l\u0322g\u0348o\u0361 \u0301\u0302",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇺🇳🇩🇪 1️⃣ ☺️ 🧑🏿‍🚀 🫠",
    "old": "𐌲𐌿𐍄𐌹𐍃𐌺 𓀀𓁐𓂀 𒀀𒀁 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "control": "a\x00b\x7f\r\n\t\u00a0\u00ad\u2028\ufeff\u200b\ue000\U0010ffff \ufffd \ufffe",
    "code": "def f(x: int) -> str:\n    return f'<0x41> ▁ ## [{x}]'\n\n\nUser: it's don't, ok ?!",
    "spaces": " a  b   c    d \n e",
}
ENGLISH = ["the quick brown fox jumps over the lazy dog, does it not? " * 8, "there then these those " * 5]
PROSE = [*SCRIPTS.values(), *ENGLISH]
ADDED = ("<think>", "two words", "naïve", "🫠", "</s><s>", "<0xE4>")
SPECIAL = ("<|start|>", "<|ende ü|>")


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    """With added tokens, special and not."""
    tokenizer.add_tokens([AddedToken(one, normalized=False) for one in ADDED])
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(PROSE, trainer)
    return with_added(tokenizer)


def trained(texts: list[str], size: int) -> dict[str, Any]:
    """A BPE model over ``▁`` as in tokenizer.json. The other trainers give another vocabulary each time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def sentencepiece(strip: bool) -> Tokenizer:
    """As Llama 2's (a first space is stripped) or Gemma's: BPE over ``▁``, with byte tokens for unknown characters."""
    model = trained(ENGLISH, 200)
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    return with_added(tokenizer)


def unigram() -> Tokenizer:
    """As T5's: the first word has its space removed by the decoder."""
    pieces = [("<unk>", 0.0), *((piece, -float(len(piece) < 3)) for piece in trained(PROSE, 700)["vocab"])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return with_added(tokenizer)


def word_piece(cleanup: bool) -> Tokenizer:
    """As BERT's; ``cleanup`` removes spaces before punctuation."""
    pieces = [piece for piece in trained(PROSE, 700)["vocab"] if "▁" not in piece]
    names = ["[UNK]", "[CLS]", *pieces, *(f"##{piece}" for piece in pieces)]
    tokenizer = Tokenizer(models.WordPiece({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return with_added(tokenizer)


def words() -> Tokenizer:
    """Without a decoder: tokens are joined with spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(PROSE, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return with_added(tokenizer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "our own": load_tokenizer,
    "byte-level": byte_level,
    "llama": lambda: sentencepiece(strip=True),
    "gemma": lambda: sentencepiece(strip=False),
    "unigram": unigram,
    "wordpiece": lambda: word_piece(cleanup=False),
    "wordpiece, clean": lambda: word_piece(cleanup=True),
    "words": words,
}
