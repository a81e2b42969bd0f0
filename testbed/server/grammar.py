"""The grammars of a server's requests (llguidance): compiled beside the loop, moved on by it.

A grammar is tried in a process of its own first (see ``trial``), where it can be stopped. What passes is compiled
again here, by the same library from the same text, in a thread that waits for it in C: it takes what it took there.
The loop hears of it by a message in its inbox, as of everything. Requests with equal grammars share one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import msgspec
import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray
from tokenizers import Tokenizer

from testbed.batch import Batch
from testbed.messages import GrammarReady, GrammarSpec
from testbed.scenario.errors import InputError
from testbed.server.trial import LEAST_BYTES, MIB, Question, TrialOptions, Verdict, build, load_tokenizer

COMPILERS = 2
"""Grammars compiled at a time: a hard one keeps the others waiting for the time it may take, not for ever."""
STACK_BYTES = 64 * MIB
"""Of a compiling thread: more than a trial has, so what did not overflow there does not here."""
ROWS_AT_ONCE = 8
"""Above it, masks are made by several threads."""
UNAVAILABLE = 503


def eos_token_ids(tokenizer: str) -> tuple[int, ...]:
    """The end of sequence that the tokenizer in this folder names; empty if it names none."""
    folder = Path(tokenizer)
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except OSError:
        return ()
    token = named.get("content") if isinstance(named, dict) else named
    found = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token) if isinstance(token, str) else None
    return () if found is None else (found,)


@dataclass(slots=True, eq=False)
class Compiled:
    """A grammar's outcome, for everybody who asks for it."""

    matcher: LLMatcher | None
    """At its beginning; None: it cannot be had."""
    memory_bytes: int
    error: str = ""
    status: int = 400
    users: int = 0
    """Open requests."""


class ServerGrammars:
    """See ports.Grammars. The loop's thread calls; the compiling ones touch only what the lock guards."""

    def __init__(
        self,
        options: TrialOptions,
        vocab_size: int,
        memory_mib: int,
        post: Callable[[GrammarReady], None],
        cores: Collection[int],
    ) -> None:
        """``vocab_size``: of the model, which may have fewer tokens than ``options``. ``memory_mib``: of all grammars
        that are kept; those that nobody uses go first, the longest unused before others. ``post``: puts a message into
        the loop's inbox; called under the lock, from any thread. ``cores``: of the compiling threads, since the calling
        one may have a core of its own.

        Raises InputError for a tokenizer that does not fit the model.
        """
        try:
            self._tokenizer = load_tokenizer(options)
        except ValueError as error:
            remedy = "give the model's own tokenizer"
            raise InputError(f"grammars cannot use this tokenizer: {error}", where="tokenizer", remedy=remedy) from None
        self._options = options
        self._words, self._model_words = -(-options.vocab_size // 32), -(-vocab_size // 32)
        special = [token for token in range(vocab_size) if self._tokenizer.is_special_token(token)]
        special += range(vocab_size, options.vocab_size)
        self._text = self._all_but(special)
        self._text_or_end = self._all_but([token for token in special if token not in options.eos_token_ids])
        self._most_bytes = memory_mib * MIB
        self._post = post
        self._cores = cores
        self._executor = LLExecutor()
        self._lock = threading.Lock()
        self._kept: dict[GrammarSpec, Compiled] = {}
        """By last use."""
        self._asking: dict[GrammarSpec, list[int]] = {}
        """Requests whose grammar is being compiled, or waits for it."""
        self._open: dict[int, tuple[LLMatcher, Compiled]] = {}
        """By rank: how far each has come."""
        self._jobs: SimpleQueue[GrammarSpec | None] = SimpleQueue()
        self._trials = [Trial(options) for _ in range(COMPILERS)]
        self._threads = [threading.Thread(target=self._work, args=(trial,), daemon=True) for trial in self._trials]
        before = threading.stack_size(STACK_BYTES)
        for thread in self._threads:
            thread.start()
        threading.stack_size(before)

    # -- the loop's thread ------------------------------------------------------------------------------------------

    def compile(self, rank: int, spec: GrammarSpec) -> None:
        """See ports.Grammars."""
        with self._lock:
            compiled = self._kept.pop(spec, None)
            if compiled is not None:
                self._kept[spec] = compiled
                self._hand_out(rank, compiled)
            elif spec in self._asking:
                self._asking[spec].append(rank)
            else:
                self._asking[spec] = [rank]
                self._jobs.put(spec)

    def masks(self, batch: Batch) -> NDArray[np.int32] | None:
        """See ports.Grammars."""
        drawing = [(row, prefill.request) for row, prefill in enumerate(batch.prefills) if prefill.last]
        drawing += enumerate(batch.decodes, len(batch.prefills))
        wanted = [
            (self._open[request.rank][0], row)
            for row, request in drawing
            if request.grammar is not None and request.finish_reason is None
        ]
        if not wanted:
            return None
        masks = np.full((batch.rows, self._words), -1, np.int32)
        if len(wanted) > ROWS_AT_ONCE:
            self._executor.unsafe_compute_mask_ptr(wanted, masks.ctypes.data, masks.strides[0], len(masks))
        else:
            for matcher, row in wanted:
                matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks.strides[0])
        for matcher, row in wanted:
            if matcher.is_error():  # it would allow an end of sequence
                masks[row] = 0
            else:  # a special token is not the text by which it is called
                masks[row] &= self._text_or_end if matcher.is_accepting() else self._text
        return np.ascontiguousarray(masks[:, : self._model_words])

    def _all_but(self, token_ids: Collection[int]) -> NDArray[np.int32]:
        """A row of a mask."""
        bits = np.ones(32 * self._words, np.uint8)
        bits[list(token_ids)] = 0
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, rank: int, token_id: int) -> None:
        """See ports.Grammars. What goes wrong shows in the next masks."""
        self._open[rank][0].consume_token(token_id)

    def forget(self, rank: int) -> None:
        """See ports.Grammars."""
        with self._lock:
            if rank in self._open:
                self._open.pop(rank)[1].users -= 1
            for ranks in self._asking.values():
                if rank in ranks:
                    ranks.remove(rank)

    @property
    def open(self) -> int:
        """Requests that have a grammar, or wait for one."""
        with self._lock:
            return len(self._open) + sum(map(len, self._asking.values()))

    @property
    def kept_bytes(self) -> int:
        """Memory of the grammars that are kept."""
        return sum(compiled.memory_bytes for compiled in self._kept.values())

    # -- compiling --------------------------------------------------------------------------------------------------

    def _work(self, trial: Trial) -> None:
        """A compiling thread."""
        os.sched_setaffinity(0, self._cores)
        while (spec := self._jobs.get()) is not None:
            with self._lock:
                if not self._asking[spec]:
                    del self._asking[spec]
                    continue
            compiled = self._compiled(trial, spec)
            with self._lock:
                compiled = self._keep(spec, compiled)
                for rank in self._asking.pop(spec):
                    self._hand_out(rank, compiled)

    def _compiled(self, trial: Trial, spec: GrammarSpec) -> Compiled:
        try:
            verdict = trial.ask(spec)
        except OSError:
            return Compiled(None, 0, "the grammar's compiler has ended; try again", UNAVAILABLE)
        if verdict.error:
            return Compiled(None, LEAST_BYTES, verdict.error)
        try:
            return Compiled(build(self._tokenizer, verdict.grammar), verdict.memory_bytes)
        except ValueError as error:
            return Compiled(None, LEAST_BYTES, f"the grammar cannot be compiled: {error}")

    def _keep(self, spec: GrammarSpec, compiled: Compiled) -> Compiled:
        """Remember an outcome, if it is one of the grammar alone and there is room. Returns what became of it."""
        free = self._most_bytes - self.kept_bytes - compiled.memory_bytes
        for other, unused in list(self._kept.items()):
            if free >= 0:
                break
            if not unused.users:
                del self._kept[other]
                free += unused.memory_bytes
        if free < 0:
            return Compiled(None, 0, "too many different grammars are in use; try again later", UNAVAILABLE)
        if compiled.status != UNAVAILABLE:
            self._kept[spec] = compiled
        return compiled

    def _hand_out(self, rank: int, compiled: Compiled) -> None:
        if compiled.matcher is not None:
            compiled.users += 1
            self._open[rank] = compiled.matcher.deep_copy(), compiled
        self._post(GrammarReady(rank, compiled.error, compiled.status))

    # -- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the compilers. A second call has no effect."""
        for trial in self._trials:
            trial.close()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Trial:
    """A process that tries grammars, started when it is first asked, and again when it has ended."""

    def __init__(self, options: TrialOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._closed = False

    def ask(self, spec: GrammarSpec) -> Verdict:
        """Blocks until there is a verdict. Raises OSError when the process ends."""
        connection = self._started()
        try:
            connection.send_bytes(msgspec.msgpack.encode(Question(spec.kind, spec.text)))
            return msgspec.msgpack.decode(connection.recv_bytes(), type=Verdict)
        except (EOFError, OSError) as error:
            self._stop()
            raise OSError("the trial has ended") from error

    def _started(self) -> Connection:
        with self._lock:
            if self._closed:
                raise OSError("the trial is closed")
            if self._connection is None:
                ours, theirs = socket.socketpair()
                with theirs:
                    command = [sys.executable, "-m", "testbed.server.trial", str(theirs.fileno())]
                    self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0)
                self._connection = Connection(ours.detach())
                self._connection.send_bytes(msgspec.msgpack.encode(self._options))
            return self._connection

    def _stop(self) -> None:
        with self._lock:
            self._kill()
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _kill(self) -> None:
        """End the process, and its copy that may be at work."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def close(self) -> None:
        """End the process: whoever waits for a verdict hears it."""
        with self._lock:
            self._closed = True
            self._kill()
