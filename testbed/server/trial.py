"""Whether a grammar can be compiled, tried where nothing can be harmed: ``python -m testbed.server.trial FD``.

A grammar of a few bytes may want minutes or gigabytes. So each is compiled in a process of its own, a copy of this
one, that the kernel ends when its time or memory is used up. What has been compiled cannot be sent; but whoever asked
may now compile the same, knowing what it takes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between the parts of JSON: a model that likes spaces does not go on for ever."""
ERROR_CHARS = 500
"""Of what a client is told."""
MIB = 1 << 20
LEAST_BYTES = 64 << 10
"""A small grammar's memory: less than what the allocator had at hand cannot be seen."""

LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""llguidance's own, but for states of the lexer, which are 1 to 2 kB each and come with the text."""


class TrialOptions(msgspec.Struct, frozen=True):
    """The first message: what to try with."""

    tokenizer: str
    """Its folder."""
    vocab_size: int
    """Of the model or of the tokenizer, whichever has more tokens."""
    eos_token_ids: tuple[int, ...]
    """At least one."""
    cpu_ms: int
    """Of processor time that a grammar may take."""
    memory_mib: int


class Question(msgspec.Struct, frozen=True):
    """Can this be compiled? See ``testbed.messages.GrammarSpec``."""

    kind: str
    text: str


class Verdict(msgspec.Struct, frozen=True):
    """The answer."""

    grammar: str = ""
    """In llguidance's form."""
    memory_bytes: int = 0
    """What it takes once it is compiled."""
    error: str = ""
    """Why it cannot be had, in words for the client."""


def load_tokenizer(options: TrialOptions) -> LLTokenizer:
    """The tokenizer as grammars see it. Raises ValueError for one with more tokens than the options say."""
    path = Path(options.tokenizer) / "tokenizer.json"
    return LLTokenizer(str(path), n_vocab=options.vocab_size, eos_token=list(options.eos_token_ids))


def build(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile, up to what may come first: some defects of a grammar show only there. Raises ValueError."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.stop_reason() == "NoExtensionBias":
        raise ValueError("no text matches it")
    if matcher.is_error():
        raise ValueError(matcher.get_error().removesuffix("<non-verbose/>").rstrip())
    return matcher


def read_grammar(kind: str, text: str) -> str:
    """A grammar in llguidance's form. Raises ValueError."""
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "ebnf":
        try:
            return LLMatcher.grammar_from_lark(any_to_lark(text))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"not an EBNF grammar: {error}") from error
    schema = {"type": "object"} if kind == "json_object" else json.loads(text)
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})


def try_alone(tokenizer: LLTokenizer, question: Question, options: TrialOptions) -> Verdict:
    """The verdict of a copy of this process, or on its end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(tokenizer, question, options, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if said and status == 0:
        return msgspec.msgpack.decode(said, type=Verdict)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return Verdict(error=f"the grammar takes more than {options.cpu_ms} ms to compile")
    return Verdict(error=f"the grammar takes more than {options.memory_mib} MiB to compile, or breaks the compiler")


def _answer(tokenizer: LLTokenizer, question: Question, options: TrialOptions, writer: int) -> NoReturn:
    """In the copy: compile, say what came of it, end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # last words of the library, on a grammar that breaks it
        most = _pages(0) * resource.getpagesize() + options.memory_mib * MIB
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.setitimer(signal.ITIMER_PROF, options.cpu_ms / 1000)
        verdict = _compiled(tokenizer, question)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(msgspec.msgpack.encode(verdict))
    except BaseException:
        os._exit(1)
    os._exit(0)


def _compiled(tokenizer: LLTokenizer, question: Question) -> Verdict:
    before = _pages(5)
    try:
        grammar = read_grammar(question.kind, question.text)
        matcher = build(tokenizer, grammar)
    except (ValueError, RecursionError) as error:
        return Verdict(error=f"the grammar cannot be compiled: {error}"[:ERROR_CHARS])
    verdict = Verdict(grammar, LEAST_BYTES + (_pages(5) - before) * resource.getpagesize())
    del matcher
    return verdict


def _pages(place: int) -> int:
    """A figure of ``/proc/self/statm`` (proc(5)): 0 is the address space, 5 what is data, in pages."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[place])


def main() -> None:
    """Answer questions until nobody asks any more."""
    connection = Connection(int(sys.argv[1]))
    try:
        options = msgspec.msgpack.decode(connection.recv_bytes(), type=TrialOptions)
        tokenizer = load_tokenizer(options)
        while True:
            question = msgspec.msgpack.decode(connection.recv_bytes(), type=Question)
            connection.send_bytes(msgspec.msgpack.encode(try_alone(tokenizer, question, options)))
    except (EOFError, OSError):
        return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
