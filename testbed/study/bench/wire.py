"""What goes over the wire: the body of a request, and the events that come back.

Fields are those of OpenAI's completions API, and those beyond it that vLLM and SGLang both take: ``ignore_eos``,
``top_k``, ``min_p``, ``repetition_penalty``, ``priority`` and ``stream_options.continuous_usage_stats``. What is at its
default is not sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
from numpy.typing import NDArray

from testbed.sampling import SamplingParams
from testbed.scenario.errors import InputError
from testbed.tokens import oracle_key, stream_key, token_ids
from testbed.workload import TimedRequest

LINE_MAX_BYTES = 1 << 24
"""A longer line of a stream is no event."""
DONE = b"[DONE]"

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server, and how it is to be asked."""

    url: str
    """With or without ``/v1``."""
    model: str = ""
    """Its name there; '': the first that the server lists."""
    api_key: str = ""
    tokenizer: Path | None = None
    """A folder with ``tokenizer.json``: prompts are sent as text. None: as token ids."""
    chat: bool = False
    """The prompt as one user message to the chat endpoint; needs ``tokenizer``."""
    timeout_s: float = 1800.0
    """A request that has not ended after so long is given up."""

    @property
    def base(self) -> str:
        """The address that endpoints are appended to. Raises InputError for what is no address of a server."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InputError("is no address of a server", where=self.url, remedy="write for example http://host:30000")
        if parts.username or parts.password:  # it would be written into the run
            raise InputError("an address may not hold credentials", where="URL", remedy="give a key with --api-key")
        return self.url.rstrip("/").removesuffix("/v1") + "/v1"

    @property
    def endpoint(self) -> str:
        """Where requests go."""
        return self.base + ("/chat/completions" if self.chat else "/completions")


class Asking:
    """Turns a workload's requests into bodies, and answers into the tokens that a workload wants to hear of."""

    def __init__(self, server: Server, model: str, seed: int, vocab_size: int) -> None:
        """``model``: its name on the server; ``seed``: the scenario's. Raises InputError when the tokenizer cannot be
        loaded, or is missing where text is to be sent."""
        self._server = server
        self._model = model
        self._seed = seed
        self._vocab_size = vocab_size
        self._tokenizer = _load_tokenizer(server.tokenizer) if server.tokenizer else None
        if server.chat and self._tokenizer is None:
            raise InputError("a chat is made of text", where="--chat", remedy="give --tokenizer FOLDER")

    def first_prompt(self) -> NDArray[np.int32]:
        """Of a request that tries whether the server takes prompts at all: the last id of the vocabulary, which a
        smaller model has not; or a word. int32 [tokens]."""
        if self._tokenizer is None:
            return np.array([self._vocab_size - 1], np.int32)
        return np.array(self._tokenizer.encode("Hello", add_special_tokens=False).ids, np.int32)

    def body(self, timed: TimedRequest) -> bytes:
        """The JSON of a request."""
        request = timed.request
        ids = request.prompt.ids(self._vocab_size)
        prompt = _text(self._tokenizer, ids) if self._tokenizer else ids.tolist()
        fields: dict[str, Any] = {
            "model": self._model,
            **({"messages": [{"role": "user", "content": prompt}]} if self._server.chat else {"prompt": prompt}),
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "ignore_eos": request.ignore_eos,
            **_sampling(request.sampling),
        }
        if request.max_new_tokens is not None:
            fields["max_tokens"] = request.max_new_tokens
        if request.priority is not None:
            fields["priority"] = request.priority
        if not request.sampling.greedy:  # the seed that the engine of this project draws with, as a signed number
            seed = stream_key("sampling", self._seed, request.rid)
            fields["seed"] = seed - (1 << 64) * (seed >> 63)
        if timed.session and self._tokenizer is None:
            fields["return_token_ids"] = True  # vLLM's; the next turn repeats them
        return msgspec.json.encode(fields)

    def outputs(self, rid: str, ids: list[int], text: str, tokens: int) -> NDArray[np.int32]:
        """What a request produced, for the next turn of its session: the server's own ids, else its text tokenized,
        else the stand-ins that a modelled device would have made."""
        if not ids and self._tokenizer is not None:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.int32) if ids else token_ids(oracle_key(self._seed, rid), 0, tokens, self._vocab_size)


def _text(tokenizer: Any, ids: NDArray[np.int32]) -> str:
    """As many tokens of text: where the scenario's model has more than the tokenizer, others stand for those."""
    known = ids % tokenizer.get_vocab_size()
    text: str = tokenizer.decode(known.tolist(), skip_special_tokens=True)
    return text


def _sampling(params: SamplingParams) -> dict[str, float]:
    default = SamplingParams()
    names = ("top_k", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    chosen = {name: getattr(params, name) for name in names if getattr(params, name) != getattr(default, name)}
    return {"temperature": params.temperature, **chosen}  # a server's own default is often not greedy


def _load_tokenizer(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError(
            "text needs the tokenizers package", where="--tokenizer", remedy="pip install 'testbed[serve]'"
        ) from None
    file = folder / "tokenizer.json" if folder.is_dir() else folder
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more special
        raise InputError(f"cannot be read: {error}", where=str(file), remedy="name a model's folder") from None


class Delta(msgspec.Struct):
    """What a chunk adds to a chat."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    """What a chunk adds to an answer."""

    text: str | None = None
    delta: Delta | None = None
    token_ids: list[_Id] | None = None
    finish_reason: str | None = None

    @property
    def said(self) -> str:
        """The text that it adds, thoughts included."""
        if self.delta is None:
            return self.text or ""
        return (self.delta.reasoning_content or self.delta.reasoning or "") + (self.delta.content or "")


class PromptDetails(msgspec.Struct):
    """Of the tokens of a prompt."""

    cached_tokens: _Count | None = None


class Usage(msgspec.Struct):
    """The server's own count of tokens."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: PromptDetails | None = None


class Event(msgspec.Struct):
    """One chunk of an answer. What else it holds is not looked at."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(Event)


def decode_event(data: bytes) -> Event:
    """The chunk in ``data``. Raises ValueError for what is none."""
    try:
        return _decoder.decode(data)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


class EventStream:
    """Cuts bytes into server-sent events (WHATWG HTML, 9.2.6), however they are cut on their way: also inside a line,
    or a character. Comments, and fields other than ``data``, mean nothing here."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """The data of the events that ``received`` completes. Raises ValueError for a line without an end."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > LINE_MAX_BYTES:
            raise ValueError(f"a line of more than {LINE_MAX_BYTES} bytes")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


def complaint(body: bytes) -> str:
    """What a server says is wrong, in at most 300 characters: OpenAI's ``error.message`` where there is one."""
    try:
        told = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        told = body.decode("utf-8", "replace")
    return complaint_of(told)


def complaint_of(told: Any) -> str:
    """As ``complaint``, of JSON that is decoded already."""
    for name in ("error", "message", "detail"):
        if isinstance(told, dict) and told.get(name):
            told = told[name]
    return " ".join(str(told).split())[:300]
