"""The scheduler's process: engine, loop and clients' sockets; the loop's thread does everything.

``python -m testbed.server.scheduler FD``
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq
from tokenizers import Tokenizer

from testbed.api import engine_options
from testbed.costs import HostProfile, load_host
from testbed.deployment import Engine, build_engine
from testbed.engine.builder import InputBuilder
from testbed.engine.device import Device, needs_installing, open_device
from testbed.loops.base import LoopContext
from testbed.messages import GenerateRequest, GrammarReady
from testbed.runtime import wall
from testbed.runtime.oracle import Oracle
from testbed.runtime.paced import PacedDevice
from testbed.runtime.real import RealDevice
from testbed.runtime.wall_threads import runtime_for
from testbed.scenario.schema import Scenario
from testbed.server import wire
from testbed.server.clients import SocketClients
from testbed.server.forgetful import ForgetfulLog, ForgetfulRecorder
from testbed.server.grammar import ServerGrammars, eos_token_ids
from testbed.server.modelled import ModelledLengths
from testbed.server.options import OWN_TOKENIZER, TINY, TINY_PRESET, ServeOptions
from testbed.server.part import Part, run_part
from testbed.server.recording import ServerRecorder
from testbed.server.trial import TrialOptions

OUTPUTS_AHEAD = 10_000
"""Messages (about steps) that the detokenizer may be behind before the loop waits for it: nothing is dropped."""


def serve(part: Part) -> None:
    """Run the loop until the parent asks to end. Raises InputError for what cannot run, DeviceLost."""
    options, folder = part.start.options, part.start.folder
    cores = os.sched_getaffinity(0)  # before the loop gets one of them for itself
    scenario = _scenario(options, folder)
    clock = wall.WallClock()

    def stop() -> None:
        clock.stopping = True

    part.watch(stop)
    with _opened(options, scenario) as device, zmq.Context() as context:
        recorder = ServerRecorder() if options.record else ForgetfulRecorder()
        engine = build_engine(scenario, real=None if device is None else device.info, recorder=recorder)
        if not options.record:
            engine.scheduler.decision_log = ForgetfulLog()
        requests, outputs = _sockets(context, folder)
        lengths = ModelledLengths(engine, options.tokenizer) if device is None else None
        clients = SocketClients(
            clock,
            requests,
            outputs,
            engine.model.vocab,
            expect=lengths.expect if lengths else _nothing,
            forget=lengths.forget if lengths else _nothing,
            times_of=recorder.times_of,
            arrived=recorder.arrived,
            check=device.check if device else _no_check,
        )
        known = _tokens(options.tokenizer)
        ends = _ends(device, options.tokenizer, min(known, engine.model.vocab))
        with _grammars(context, part.start, engine.model.vocab, known, ends, cores) as grammars:
            runtime = runtime_for(engine.loop)(
                clock=clock,
                device=_device(clock, engine, device, lengths.oracle if lengths else engine.oracle, ends),
                recorder=recorder,
                clients=clients,
                inject=_inject(scenario),
                grammars=grammars,
            )
            part.tell(_ready(engine, device, options, known))
            gc.collect()
            gc.freeze()  # what lives as long as the server is looked at no more
            wall.run_to_the_end(engine.loop(LoopContext(engine.scheduler, runtime)))
        requests.close(0)
        outputs.close(0)
        if isinstance(recorder, ServerRecorder):
            info = None if device is None else device.info
            recorder.run(engine, options.backend, info, options.command).save(options.record)


def _nothing(what: GenerateRequest | str) -> None:
    """A real device learns of an output's end by computing it."""


def _no_check() -> None:
    """A modelled device is not lost."""


def _scenario(options: ServeOptions, folder: str) -> Scenario:
    """The scenario; its model is made here if it is the tiny one."""
    scenario = options.read_scenario()
    if not options.tiny:
        return scenario
    with needs_installing():
        from testbed.engine.models.create import Sizes, create_model
    model = create_model(TINY_PRESET, Path(folder) / TINY, Sizes(), seed=scenario.seed)
    return scenario.model_copy(update={"model": str(model)})


@contextmanager
def _opened(options: ServeOptions, scenario: Scenario) -> Iterator[Device | None]:
    """The real device; None where it is modelled."""
    if options.backend == "paced":
        yield None
        return
    with open_device(engine_options(scenario)) as device:
        yield device


def _sockets(context: zmq.Context[zmq.Socket[bytes]], folder: str) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """Requests have no mark to be refused at: how many are open is bounded by those who send them."""
    requests, outputs = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    requests.rcvhwm = 0
    requests.bind(wire.requests_address(folder))
    outputs.sndhwm = OUTPUTS_AHEAD
    outputs.connect(wire.outputs_address(folder))
    return requests, outputs


def _tokens(tokenizer: str) -> int:
    """Of a folder's tokenizer: one more than its highest id."""
    return max(Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json")).get_vocab().values()) + 1


def _ends(device: Device | None, tokenizer: str, tokens: int) -> tuple[int, ...]:
    """The ends of sequence that grammars know: the model's, where its tokenizer is not another one that stands in.
    ``tokens``: that both have."""
    ends = eos_token_ids(tokenizer) if device is None else device.info.eos_token_ids
    return tuple(token for token in ends if token < tokens)


@contextmanager
def _grammars(
    context: zmq.Context[zmq.Socket[bytes]],
    start: wire.Start,
    vocab_size: int,
    known: int,
    ends: tuple[int, ...],
    cores: set[int],
) -> Iterator[ServerGrammars | None]:
    """What compiles grammars and tells the loop through its own socket; None where the tokenizer has no end of
    sequence, which ends what a grammar allows. ``known``: tokens of the tokenizer; ``cores``: to compile on."""
    if not ends:
        yield None
        return
    limits = start.options.limits
    tokens = max(vocab_size, known)
    trial = TrialOptions(start.options.tokenizer, tokens, ends, limits.grammar_ms, limits.grammar_mib)
    inbox = context.socket(zmq.PUSH)
    inbox.sndhwm = 0
    inbox.connect(wire.requests_address(start.folder))

    def post(ready: GrammarReady) -> None:
        inbox.send(wire.asked(0, 0, ready))

    try:
        with ServerGrammars(trial, vocab_size, limits.grammars_mib, post, cores) as grammars:
            yield grammars
    finally:
        inbox.close(0)


def _device(
    clock: wall.WallClock, engine: Engine, device: Device | None, oracle: Oracle, ends: tuple[int, ...]
) -> wall.Device:
    scenario = engine.scenario
    if device is None:
        return PacedDevice(clock, engine.cost_model, oracle, ends)
    info, slots = device.info, engine.scheduler.memory.slots
    builder = InputBuilder(slots, scenario.engine.page_size, info.table_width, scenario.seed)
    priced = engine.cost_model if scenario.host_inject else None
    return RealDevice(clock, device, builder, oracle, forced=False, cost_model=priced)


def _inject(scenario: Scenario) -> HostProfile | None:
    """The host whose times the loop spends."""
    if scenario.host_inject is None:
        return None
    return load_host(scenario.host_inject, tp=scenario.engine.parallel.tp, where="host_inject")


def _ready(engine: Engine, device: Device | None, options: ServeOptions, known: int) -> wire.Ready:
    """``known``: tokens of the tokenizer."""
    modelled = engine.device.name if engine.device is not None else "constant"
    return wire.Ready(
        max_total_num_tokens=engine.kv_tokens,
        max_req_input_len=engine.scheduler.max_prompt_tokens,
        context_length=engine.scheduler.context_length,
        context_tokens=engine.scheduler.max_request_tokens - 1,
        vocab_size=engine.model.vocab,
        max_running_requests=engine.scheduler.max_running_requests,
        device=device.info.name if device is not None else f"{modelled} (modelled)",
        loop=engine.loop_name,
        notes=_notes(engine, device, options, known),
    )


def _notes(engine: Engine, device: Device | None, options: ServeOptions, known: int) -> tuple[str, ...]:
    unmeasured = engine.cost_model.unmeasured() if device is None else ()
    notes = [f"unmeasured: {what}" for what in unmeasured] if device is None else [*device.info.notes]
    if device is not None and not options.tiny and Path(options.tokenizer) == OWN_TOKENIZER:
        notes.append("the model has no tokenizer.json: ours stands in, and most of its tokens have no text")
    if known > engine.model.vocab:
        more = f"the tokenizer has {known:,} tokens, the model {engine.model.vocab:,}"
        notes.append(f"{more}: prompts with any of the others are refused")
    return tuple(notes)


if __name__ == "__main__":
    run_part(serve)
