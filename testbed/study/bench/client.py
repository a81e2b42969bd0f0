"""The client: sends each request at its time, whatever became of the others, and reads all answers in one thread.

The event loop is uvloop's and the HTTP client aiohttp: at 500 requests/s of 33 chunks each they take a quarter of a
core, where httpx cannot keep up (``docs/bench.md``).
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import msgspec

from testbed import api
from testbed.deployment import Engine, build_engines
from testbed.messages import GenerateRequest, TokenPrompt
from testbed.metrics.columns import NS_PER_S
from testbed.metrics.run import Run
from testbed.scenario.errors import InputError
from testbed.scenario.schema import Scenario
from testbed.scenario.workload import AtIteration
from testbed.study.bench.exchange import Exchange, Failure
from testbed.study.bench.result import Driven, bench_run
from testbed.study.bench.wire import Asking, EventStream, Server, complaint
from testbed.workload import TimedRequest, Workload

if TYPE_CHECKING:
    import aiohttp

PROGRESS_EVERY_NS = 500_000_000
KEEPALIVE_S = 3.0
"""Idle connections are closed before the server does it: uvicorn waits 5 s, and a request that crosses with the
server's closing is lost."""
REST_S = 5.0
"""How long the rest of the stream may come after the answer's end: the count of tokens, and what lets the connection be
used again."""
COMPLAINT_BYTES = 4096
"""Of an answer that is an error, at most."""
PAUSE_S, PAUSE_MAX_S = 1.0, 60.0
"""A user whose request failed pauses as long as the server says (Retry-After), or this long."""
LARGE_BYTES = 1 << 20
"""A larger body is sent in pieces, so that others are read meanwhile."""


def check_bench(scenario: Scenario) -> Engine:
    """What ``scenario`` names, built: its requests are those that a simulation of it gets. Raises InputError for what
    a client cannot send."""
    if isinstance(scenario.workload.arrivals, AtIteration):
        raise InputError(
            "a client does not see the iterations of a server's loop",
            where="workload.arrivals",
            remedy="use arrivals in time, e.g. {kind: poisson, rate_per_s: 2}",
        )
    return build_engines(scenario)[0]


def bench(server: Server, scenario: Scenario, *, progress: api.Progress | None = None) -> Run:
    """Send the workload of ``scenario`` to ``server``; the run holds what its clients saw (``docs/bench.md``).

    Open loops send at the scheduled times whatever becomes of the answers; closed loops and sessions wait for them.
    Nothing is sent twice: every request ends once, with an answer or a failure. Ctrl-C ends the run; what is returned
    then holds the records so far. Raises InputError for what cannot run, and when the server does not answer a first
    request of one token.
    """
    try:
        import uvloop
    except ImportError:
        remedy = "pip install 'testbed[serve]'"
        raise InputError("a client needs aiohttp and uvloop", where="testbed bench", remedy=remedy) from None
    engine = check_bench(scenario)
    _allow_many_connections()
    with _short_collections(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        driven = runner.run(_bench(server, engine, progress))
    return bench_run(server, engine, driven)


@contextmanager
def _short_collections() -> Iterator[None]:
    """Keep the collector off what lives already: its walk through all modules takes 50 ms, and nothing is read then."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _allow_many_connections() -> None:
    """As many open files as the system grants: an open loop needs a connection for every open request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _bench(server: Server, engine: Engine, progress: api.Progress | None) -> Driven:
    import aiohttp

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=server.timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Authorization": f"Bearer {server.api_key}"} if server.api_key else None,
    ) as session:
        model = await _model(server, session)
        asking = Asking(server, model, engine.scenario.seed, engine.model.vocab)
        driver = Driver(server, session, asking, engine.workload, progress)
        await driver.try_out()
        return await driver.run(model)


async def _model(server: Server, session: aiohttp.ClientSession) -> str:
    """The name to ask for. Raises InputError when there is no server, or it lists none."""
    import aiohttp

    url = f"{server.base}/models"
    try:
        async with session.get(url, allow_redirects=False) as response:
            body = await _read_body(response, LARGE_BYTES)
    except (aiohttp.ClientError, OSError) as error:
        remedy = "start one, or mend the address"
        raise InputError(f"no server answers: {error}", where=server.url, remedy=remedy) from None
    if response.status != 200:
        remedy = "give its key with --api-key" if response.status in (401, 403) else "name an OpenAI-compatible server"
        raise InputError(f"HTTP {response.status}: {complaint(body)}", where=url, remedy=remedy)
    try:
        names = [one["id"] for one in msgspec.json.decode(body)["data"]]
    except (ValueError, TypeError, LookupError, RecursionError):
        names = []
    if server.model:
        return server.model
    if not names:
        raise InputError("the server lists no model", where=url, remedy="name one with --model")
    return str(names[0])


class Driver:
    """Sends one workload to one server. Times are ns since ``run`` began."""

    def __init__(
        self,
        server: Server,
        session: aiohttp.ClientSession,
        asking: Asking,
        workload: Workload,
        progress: api.Progress | None,
    ) -> None:
        self._server = server
        self._session = session
        self._asking = asking
        self._workload = workload
        self._progress = progress
        self._progress_due_ns = 0
        self._origin_ns = time.perf_counter_ns()
        self._sent: list[Exchange] = []
        self._open: dict[str, Exchange] = {}

    def _now_ns(self) -> int:
        return time.perf_counter_ns() - self._origin_ns

    async def try_out(self) -> None:
        """Ask for one token. Raises InputError, in the server's words, when the answer is not what a run needs."""
        request = GenerateRequest("try-out", TokenPrompt(self._asking.first_prompt()), 1)
        one = Exchange(TimedRequest(0, request, 1))
        await self._ask(one, self._asking.body(one.timed))
        if one.failure is not None:
            by_ids = "is the scenario's model the one that is served, and does the server take token ids?"
            by_text = "does the server take such requests? --chat asks the chat endpoint"
            raise InputError(
                f"a first request of one token failed ({one.failure}): {one.message}",
                where=self._server.endpoint,
                remedy=by_text if self._server.tokenizer else f"{by_ids} --tokenizer FOLDER sends text",
            )

    async def run(self, model: str) -> Driven:
        """Send everything and wait for every end, or for somebody to interrupt."""
        self._origin_ns, cpu_s = time.perf_counter_ns(), time.process_time()
        interrupted = False
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._send_the_rest())
        except asyncio.CancelledError:
            interrupted = True
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        cpu_s, wall_s = time.process_time() - cpu_s, self._now_ns() / NS_PER_S
        return Driven(model, self._sent, interrupted, cpu_s / wall_s)

    async def _send_the_rest(self) -> None:
        """Requests that wait for no other. Each is written out before its time has come, and sent at it."""
        for timed in self._workload.start():
            body = self._asking.body(timed)
            await self._until(timed.arrival_ns)
            self._tasks.create_task(self._exchange(timed, body))

    async def _send(self, timed: TimedRequest) -> None:
        body = self._asking.body(timed)
        await self._until(timed.arrival_ns)
        await self._exchange(timed, body)

    async def _until(self, when_ns: int) -> None:
        await asyncio.sleep(0)  # the others' turn, also where everything is late
        while (ahead_ns := when_ns - self._now_ns()) > 0:
            await asyncio.sleep(ahead_ns / NS_PER_S)  # uvloop rounds to whole ms, also down

    async def _exchange(self, timed: TimedRequest, body: bytes) -> None:
        """One request from its sending to its end, and what its user sends next."""
        one = Exchange(timed)
        rid = timed.request.rid
        self._sent.append(one)
        self._open[rid] = one
        self._tell_progress()
        await self._ask(one, body)
        del self._open[rid]
        outputs = self._asking.outputs(rid, one.ids, one.text, one.tokens)
        one.forget()
        heard_ns = self._now_ns()
        if one.failure is not None:
            pause_s = PAUSE_S if one.retry_after_s is None else min(one.retry_after_s, PAUSE_MAX_S)
            heard_ns += round(pause_s * NS_PER_S)
        for following in self._workload.on_finish(rid, heard_ns, outputs):
            self._tasks.create_task(self._send(following))
        self._tell_progress()

    async def _ask(self, one: Exchange, body: bytes) -> None:
        """Send a request and read its answer; whatever happens, it has ended then."""
        import aiohttp

        headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",  # a compressor would hold chunks back
            "X-Request-Id": one.timed.request.rid,
        }
        one.sent_ns = self._now_ns()
        try:
            async with self._session.post(
                self._server.endpoint,
                data=body if len(body) < LARGE_BYTES else BytesIO(body),
                headers=headers,
                allow_redirects=False,
            ) as response:
                one.status = response.status
                await self._read(one, response)
        except TimeoutError:
            one.fail(Failure.TIMEOUT, f"no end after {self._server.timeout_s:g} s", self._now_ns())
        except (aiohttp.ClientResponseError, ValueError) as error:
            one.fail(Failure.GARBAGE, str(error), self._now_ns())
        except (aiohttp.ClientError, OSError) as error:
            lost = Failure.BROKEN if one.status else Failure.CONNECTION
            one.fail(lost, str(error) or type(error).__name__, self._now_ns())

    async def _read(self, one: Exchange, response: aiohttp.ClientResponse) -> None:
        if response.status != 200:
            kind = Failure.REFUSED if response.status in (429, 503) else Failure.STATUS
            one.retry_after_s = _retry_after_s(response.headers)
            body = await _read_body(response, COMPLAINT_BYTES)
            one.fail(kind, f"HTTP {response.status}: {complaint(body)}", self._now_ns())
            return
        if response.content_type != "text/event-stream":
            one.fail(Failure.GARBAGE, f"the answer is {response.content_type}, not text/event-stream", self._now_ns())
            return
        events = EventStream()
        async with asyncio.timeout(None) as rest:
            async for received in response.content.iter_any():
                now_ns = self._now_ns()
                for data in events.feed(received):
                    one.take(data, now_ns)
                if one.ended and rest.when() is None:
                    rest.reschedule(asyncio.get_running_loop().time() + REST_S)
        one.fail(Failure.BROKEN, "the stream ended before the answer", self._now_ns())

    def _tell_progress(self) -> None:
        now_ns = self._now_ns()
        if self._progress is None or now_ns < self._progress_due_ns:
            return
        self._progress_due_ns = now_ns + PROGRESS_EVERY_NS
        running = sum(one.started for one in self._open.values())
        ended, waiting = len(self._sent) - len(self._open), len(self._open) - running
        self._progress(now_ns, ended, running, waiting, self._workload.expected_requests())


async def _read_body(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """The body, or the beginning of a long one."""
    try:
        return await response.content.readexactly(most_bytes)
    except asyncio.IncompleteReadError as whole:
        return whole.partial


def _retry_after_s(headers: Mapping[str, Any]) -> float | None:
    """Seconds that the server asks to wait; None where it does not say, or names a date."""
    told = headers.get("Retry-After", "")
    return float(told) if told.isdecimal() else None
