"""Incremental detokenisation: token ids go in, text comes out that never has to be taken back.

The joined text of a stream is the text that ``tokenizers`` (so ``transformers``, with ``clean_up_tokenization_spaces``
off) decodes from all the ids at once, however they were cut into pushes. Decoders do that in two ways:

* Byte-level ones (GPT, Qwen, Llama 3) join the bytes of all tokens and read them as UTF-8. A character that is not
  complete is kept back; bytes that can no longer become one are U+FFFD at once.
* Others join texts of tokens (SentencePiece, WordPiece). There a run of byte tokens (``<0xE4>``) is U+FFFD for each
  byte if *any* part of it is not UTF-8: a run that is valid so far is kept back until it ends.

A token costs the same however long the text is. No window of tokens is decoded over and over (``prefix_offset`` and
``read_offset`` in other servers, ``tokenizers.decoders.DecodeStream``): a window cannot move on over broken bytes, and
it sends the beginning of a run of byte tokens before the end has decided what it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from encodings.utf_8 import IncrementalDecoder
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from testbed.scenario.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from testbed.messages import TextOptions

PROMPT_TAIL_TOKENS = 5
"""So many last tokens of the prompt are enough for a stream: at most three hold the bytes of an open character."""

REPLACEMENT = "\ufffd"

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted({*range(256)} - {*_PRINTABLE})
CHARACTER_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""What byte a character stands for in a byte-level vocabulary (``bytes_to_unicode`` of GPT-2's encoder.py)."""

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")

_STREAMABLE = re.compile("ByteLevel |WordPiece |(?:Replace |Metaspace )*(?:ByteFallback )?(?:Fuse )?(?:Strip )?")
"""Decoders that add the same text for a token whatever stands around it, but for the first token of a text."""


class TextStream:
    """The text of one request.

    ``prompt_tail``, the last ``PROMPT_TAIL_TOKENS`` of its prompt, says that a text goes on rather than begins (where
    a SentencePiece word loses its space). If the prompt ends inside a character, the text begins with all of it.

    Of the stop strings, the one that begins first in the text ends it; of several there, the one that is named first.
    That does not depend on pushes, but it may take a few tokens more to decide between stop strings that overlap.
    ``options.spaces_between_special_tokens`` changes nothing, as in the fast tokenizers of ``transformers``.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_tail: Iterable[int], options: TextOptions) -> None:
        self._text = vocabulary.text_after(prompt_tail, options.skip_special_tokens)
        self._stops = _StopStrings(options.stop, options.include_stop)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text; None while there is none."""
        return self._stops.found

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now; nothing once ``stopped`` is set."""
        return self._stops.push(self._text.push(token_ids)) if self.stopped is None else ""

    def finish(self) -> str:
        """The rest, as no tokens follow. May set ``stopped``."""
        return self._stops.push(self._text.finish(), last=True) if self.stopped is None else ""


def decode_all(
    vocabulary: Vocabulary, prompt_tail: Iterable[int], token_ids: Iterable[int], options: TextOptions
) -> tuple[str, str | None]:
    """(text, stop string that ended it or None) of all tokens of a request at once: what a ``TextStream`` sends."""
    stream = TextStream(vocabulary, prompt_tail, options)
    text = stream.push(token_ids) + stream.finish()
    return text, stream.stopped


def shown_ids(token_ids: list[int], ended_by_token: bool, options: TextOptions) -> list[int]:
    """The outputs that have a text: without the token that ended the request, special or not, unless ``include_stop``.

    So do SGLang (``trim_matched_stop`` in detokenizer_manager.py) and vLLM (``update`` in v1/engine/detokenizer.py).
    """
    return token_ids[:-1] if ended_by_token and not options.include_stop else token_ids


class Vocabulary:
    """What each token of a tokenizer adds to a text. Made once, for all streams.

    Raises InputError for a tokenizer whose decoder looks at several tokens at once (``BPEDecoder``, ``CTC``).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        added = tokenizer.get_added_tokens_decoder().values()
        special = frozenset(token.content for token in added if token.special)
        hidden = (frozenset[str](), special)
        self._bytes = [_TokenBytes(tokenizer, names) for names in hidden]
        self._pieces = [_TokenPieces(tokenizer, names, "ByteFallback" in kinds) for names in hidden]

    def text_after(self, prompt_tail: Iterable[int], skip_special_tokens: bool) -> _ByteText | _PieceText:
        """A text that goes on after these tokens."""
        if self._byte_level:
            return _ByteText(self._bytes[skip_special_tokens], prompt_tail)
        return _PieceText(self._pieces[skip_special_tokens], prompt_tail)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds behind others, special ones too; its bytes need not be whole characters."""
        if self._byte_level:
            return self._bytes[False][token_id]
        piece = self._pieces[False][token_id]
        return b"" if piece is None else piece.byte or piece.later.encode()


def _decoder_kinds(tokenizer: Tokenizer) -> list[str]:
    """The kinds of the tokenizer's decoders, in order; InputError if they cannot be streamed."""
    steps = list(_decoders(json.loads(tokenizer.decoder.__getstate__()))) if tokenizer.decoder else []
    kinds = [step["type"] for step in steps]
    strips = [(step["start"], step["stop"]) for step in steps if step["type"] == "Strip"]
    if not _STREAMABLE.fullmatch("".join(f"{kind} " for kind in kinds)) or strips not in ([], [(1, 0)], [(0, 0)]):
        raise InputError(
            f"text of this tokenizer cannot be sent as it comes: its decoder is {', '.join(kinds)}",
            where="tokenizer.json: decoder",
            remedy="use a model with a byte-level, SentencePiece or WordPiece tokenizer",
        )
    return kinds


def _decoders(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Decoders as in tokenizer.json, without the nesting."""
    if spec["type"] != "Sequence":
        yield spec
    for inner in spec.get("decoders", ()):
        yield from _decoders(inner)


class _TokenBytes(dict[int, bytes]):
    """Of a byte-level tokenizer: the bytes of each token, as its decoder reads them; looked up when first wanted."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[str]) -> None:
        super().__init__()
        self._tokenizer, self._hidden = tokenizer, hidden

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._hidden:
            found = b""
        elif all(character in CHARACTER_BYTES for character in token):
            found = bytes(CHARACTER_BYTES[character] for character in token)
        else:
            found = token.encode()  # an added token with, say, a space
        self[token_id] = found
        return found


class _ByteText:
    """Text as the bytes of all tokens."""

    def __init__(self, tokens: _TokenBytes, prompt_tail: Iterable[int]) -> None:
        self._tokens = tokens
        self._utf8 = IncrementalDecoder("replace")  # replaces what Rust's from_utf8_lossy does
        self.push(prompt_tail)

    def push(self, token_ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(map(self._tokens.__getitem__, token_ids)))

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class _Piece(NamedTuple):
    """What a token adds to a text."""

    first: str
    """As its first token."""
    later: str
    byte: bytes
    """If it is a byte token; else empty."""


class _TokenPieces(dict[int, "_Piece | None"]):
    """Of other tokenizers: what each token adds, looked up when first wanted; None: as if it were not there."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[str], byte_fallback: bool) -> None:
        super().__init__()
        self._tokenizer, self._hidden, self._byte_fallback = tokenizer, hidden, byte_fallback

    def __missing__(self, token_id: int) -> _Piece | None:
        token = self._tokenizer.id_to_token(token_id)
        found = None
        if token is not None and token not in self._hidden:
            byte = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
            first, later = (self.decode([token_id], first) for first in (True, False))
            found = _Piece(first, later, bytes.fromhex(byte[1]) if byte else b"")
        self[token_id] = found
        return found

    def decode(self, token_ids: list[int], first: bool) -> str:
        """What the library makes of these tokens where a text begins, or else after others: after themselves."""
        text = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text if first else self._tokenizer.decode(token_ids * 2, skip_special_tokens=False)[len(text) :]


class _PieceText:
    """Text as the pieces of all tokens, and runs of byte tokens among them."""

    def __init__(self, tokens: _TokenPieces, prompt_tail: Iterable[int]) -> None:
        self._tokens = tokens
        prompt = [(token_id, piece) for token_id in prompt_tail if (piece := tokens[token_id])]
        self._first = not prompt
        self._run: list[int] = []
        """Byte tokens whose text is not known before their run ends."""
        self._broken = False
        """The run is not UTF-8; what there was of it is sent."""
        self._utf8 = IncrementalDecoder("strict")
        self._begin_open_character(prompt)

    def _begin_open_character(self, prompt: list[tuple[int, _Piece]]) -> None:
        """Take over the byte tokens at the prompt's end that begin a character: what is complete was the prompt's."""
        run = list(takewhile(lambda token: token[1].byte, reversed(prompt)))[::-1]
        read = IncrementalDecoder("replace")
        read.decode(b"".join(piece.byte for _, piece in run))
        begun = read.getstate()[0]
        self._utf8.decode(begun)
        self._run = [token_id for token_id, _ in run[len(run) - len(begun) :]]

    def push(self, token_ids: Iterable[int]) -> str:
        parts = []
        for token_id in token_ids:
            piece = self._tokens[token_id]
            if piece is None:
                continue
            if piece.byte:
                parts.append(self._add_byte(token_id, piece.byte))
                continue
            if self._run or self._broken:
                parts.append(self.finish())
            parts.append(piece.first if self._first else piece.later)
            self._first = False
        return "".join(parts)

    def finish(self) -> str:
        """The text of a run that ends here."""
        text = self._tokens.decode(self._run, self._first)
        self._first = self._first and not self._run
        self._run, self._broken = [], False
        self._utf8.reset()
        return text

    def _add_byte(self, token_id: int, byte: bytes) -> str:
        self._run.append(token_id)
        if not self._broken:
            try:
                self._utf8.decode(byte)
                return ""
            except UnicodeDecodeError:
                self._broken = True
        text = REPLACEMENT * len(self._run)
        self._run, self._first = [], False
        return text


class _StopStrings:
    """Looks for stop strings in a text that comes in parts, and keeps back what may become one."""

    def __init__(self, stop: Iterable[str], include: bool) -> None:
        self._stop = tuple(filter(None, stop))
        self._include = include
        self._begins = frozenset(one[0] for one in self._stop)
        self._length_max = max(map(len, self._stop), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, last: bool = False) -> str:
        """The text that no stop string can take back; all there is, up to one, if this is the last part."""
        if not self._stop:
            return text
        self._held += text
        match, open_match = self._match(), None if last else self._open_match()
        if match is not None and (open_match is None or match < open_match):
            self.found = self._stop[match[1]]
            return self._held[: match[0] + len(self.found) * self._include]
        sure = len(self._held) if open_match is None else open_match[0]
        text, self._held = self._held[:sure], self._held[sure:]
        return text

    def _match(self) -> tuple[int, int] | None:
        """(place in the text, place in the list) of the first stop string."""
        places = ((self._held.find(one), order) for order, one in enumerate(self._stop))
        return min((place for place in places if place[0] >= 0), default=None)

    def _open_match(self) -> tuple[int, int] | None:
        """The same of the first that the text breaks off in."""
        held = self._held
        for at in range(max(0, len(held) - self._length_max + 1), len(held)):
            if held[at] in self._begins:
                end = held[at:]
                for order, one in enumerate(self._stop):
                    if one.startswith(end) and one != end:
                        return at, order
        return None
