"""The addresses of the server: who may call them, what they do, and what the OpenAPI page says of them."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any, Literal, NamedTuple

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import testbed
from testbed.messages import FlushCache
from testbed.server import wire
from testbed.server.calls import Gone
from testbed.server.protocol import native, openai, responses
from testbed.server.protocol.errors import ApiError, internal, no_route, not_supported, unknown_model, wrong_key
from testbed.server.protocol.fields import Fields, published
from testbed.server.replies import ChatForm, CompletionForm, NativeForm
from testbed.server.service import CLOSED_REQUEST, Service, late
from testbed.server.wire import Answer

Rights = Literal["open", "user", "admin"]
"""Who may call: everybody; who has the API key, if there is one; who has the admin key, so nobody if there is none."""
Handler = Callable[[Request], Awaitable[Response]]


class Route(NamedTuple):
    """One address."""

    method: Literal["GET", "POST"]
    path: str
    rights: Rights
    handler: Handler
    body: type[Fields] | None = None
    """What is sent to it."""


class PlainRoute(APIRoute):
    """A route whose handler takes the request as it is: nothing is to be read from it, or solved, before."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        return self.endpoint


class Keys:
    """Who a request comes from. Keys are compared as digests, in constant time."""

    def __init__(self, api_key: str, admin_key: str) -> None:
        self._user, self._admin = (_digest(key.encode("utf-8", "surrogateescape")) for key in (api_key, admin_key))
        self._asks_users, self._has_admin = bool(api_key), bool(admin_key)

    def check(self, request: Request, rights: Rights) -> None:
        """Whether whoever sends this may. Raises ApiError."""
        if rights == "open" or (rights == "user" and not self._asks_users):
            return
        if rights == "admin" and not self._has_admin:
            message = "This address is for administrators; the server was started without an admin key."
            raise ApiError(message, status=403, code="no_admin_key")
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        sent = _digest(key.strip().encode("latin-1"))  # as the library has read the header's bytes
        user, admin = hmac.compare_digest(sent, self._user), hmac.compare_digest(sent, self._admin)
        if scheme.lower() != "bearer" or not ((user and rights == "user") or (admin and self._has_admin)):
            raise wrong_key()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Api:
    """What the addresses do."""

    def __init__(self, service: Service, start: wire.Start, keys: Keys) -> None:
        assert start.scheduler is not None
        self._service, self._options, self._ready, self._keys = service, start.options, start.scheduler, keys
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("POST", "/v1/completions", "user", self.completions, openai.CompletionRequest),
            Route("POST", "/v1/chat/completions", "user", self.chat, openai.ChatRequest),
            Route("POST", "/generate", "user", self.generate, native.GenerateBody),
            Route("GET", "/v1/models", "user", self.models),
            Route("GET", "/v1/models/{name:path}", "user", self.model),
            Route("POST", "/v1/embeddings", "user", self.embeddings),
            Route("GET", "/health", "open", self.health),
            Route("GET", "/health_generate", "user", self.health_generate),
            Route("GET", "/metrics", "open", self.metrics),
            Route("GET", "/get_server_info", "user", self.server_info),
            Route("GET", "/server_info", "user", self.server_info),
            Route("GET", "/get_model_info", "user", self.model_info),
            Route("GET", "/get_load", "user", self.load),
            Route("POST", "/abort_request", "user", self.abort, native.AbortBody),
            Route("POST", "/flush_cache", "admin", self.flush_cache),
        ]

    async def completions(self, request: Request) -> Response:
        """Continue prompts (OpenAI)."""
        return await self._service.generate(request, openai.parse_completion, CompletionForm)

    async def chat(self, request: Request) -> Response:
        """Answer a chat (OpenAI)."""
        return await self._service.generate(request, openai.parse_chat, ChatForm)

    async def generate(self, request: Request) -> Response:
        """Continue prompts (SGLang)."""
        return await self._service.generate(request, native.parse_generate, NativeForm)

    async def models(self, request: Request) -> Response:
        """The names of the model."""
        return _json(responses.models(self._options.names, self._created, self._ready.context_length))

    async def model(self, request: Request) -> Response:
        """One name of the model."""
        name = request.path_params["name"]
        if name not in self._options.names:
            raise unknown_model(self._options.names)
        return _json(responses.model(name, self._created, self._ready.context_length))

    async def embeddings(self, request: Request) -> Response:
        """Not there yet."""
        raise not_supported("/v1/embeddings")

    async def health(self, request: Request) -> Response:
        """Whether requests are taken."""
        self._service.check_open()
        return Response()

    async def health_generate(self, request: Request) -> Response:
        """Whether a token comes out."""
        await self._service.probe()
        return Response()

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response((await self._state()).metrics, media_type=CONTENT_TYPE_LATEST)

    async def server_info(self, request: Request) -> Response:
        """Settings, and what the scheduler says of itself."""
        options, ready = self._options, self._ready
        settings = {
            "served_model_name": options.names[0],
            "backend": options.backend,
            "device": ready.device,
            "loop": ready.loop,
            "max_req_input_len": ready.max_req_input_len,
            "max_queued_requests": options.max_queued,
            "workers": options.workers,
            "limits": msgspec.to_builtins(options.limits),
            "scenario": msgspec.json.decode(options.scenario),
            "worker": self._service.state(),
        }
        state = (await self._state()).state
        return _json(native.server_info(settings, state, testbed.__version__))

    async def model_info(self, request: Request) -> Response:
        """The model."""
        return _json(native.model_info(self._options.names[0], self._ready.context_length))

    async def load(self, request: Request) -> Response:
        """How much there is to do."""
        return _json(native.load([(await self._state()).state]))

    async def abort(self, request: Request) -> Response:
        """End a request by its id; with the admin key all of them. Also well when there is none: it has ended."""
        asked = native.parse_abort(await self._service.read_body(request), self._service.served)
        if asked.abort_all:
            self._keys.check(request, "admin")
            self._service.calls.abort_all()
        else:
            self._service.calls.abort(asked.rid)
        return Response()

    async def flush_cache(self, request: Request) -> Response:
        """Empty the prefix cache, if nothing waits or runs."""
        answer = await self._in_time(self._service.calls.ask(FlushCache(), self._options.waits.answer_s))
        if not answer.success:
            raise ApiError(f"The cache was not flushed: {answer.message}.", code="not_idle")
        return Response("Cache flushed.\n", media_type="text/plain")

    async def _state(self) -> Answer:
        return await self._in_time(self._service.calls.state(self._options.waits.answer_s))

    @staticmethod
    async def _in_time(answer: Awaitable[Answer]) -> Answer:
        try:
            return await answer
        except TimeoutError:
            raise late() from None


def build_app(api: Api, keys: Keys, service: Service) -> FastAPI:
    """All addresses, with their guards."""
    app = FastAPI(
        title="testbed",
        version=testbed.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to whatever host the client names
    )
    app.router.route_class = PlainRoute
    schemas: dict[str, Any] = {}
    for route in api.routes():
        endpoint, name = _guarded(route, keys), route.path.partition("{")[0].strip("/").replace("/", "_")
        app.add_api_route(
            route.path,
            endpoint,
            methods=[route.method],
            response_class=Response,
            operation_id=f"{route.handler.__name__}_{name}",
            summary=route.handler.__doc__,
            openapi_extra=_documented(route, service, schemas),
        )
        if route.method == "GET":
            app.add_api_route(route.path, endpoint, methods=["HEAD"], include_in_schema=False)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)
    app.openapi = partial(_openapi, app, schemas)  # type: ignore[method-assign]
    return app


def _guarded(route: Route, keys: Keys) -> Handler:
    async def endpoint(request: Request) -> Response:
        keys.check(request, route.rights)
        try:
            return await route.handler(request)
        except Gone:
            return Response(status_code=CLOSED_REQUEST)

    endpoint.__doc__ = route.handler.__doc__
    return endpoint


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code != HTTPStatus.METHOD_NOT_ALLOWED:
        return _error(no_route())
    refusal = ApiError("This address takes another method; /openapi.json says which.", status=405)
    return _error(refusal, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return _error(internal())  # the library raises it again: it is in the log


def _error(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    headers = {**error.headers(), **(headers or {})}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413) or error.code == "draining":  # what is left of the body is not read
        headers["Connection"] = "close"
    return Response(error.body(), error.status, headers, media_type="application/json")


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


# -- the OpenAPI page -------------------------------------------------------------------------------------------------

REFUSALS = {
    400: "The request is not valid; the message names the field and the remedy.",
    401: "The key is missing or wrong.",
    403: "Only for administrators, and there are none.",
    404: "No such address or model.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    503: "Nothing more is taken now; Retry-After says when to ask again.",
}


def _documented(route: Route, service: Service, schemas: dict[str, Any]) -> dict[str, Any]:
    """The parts of the page that the library cannot know. Schemas of bodies are added to ``schemas``."""
    reference = {"$ref": "#/components/schemas/Error"}
    made: dict[str, Any] = {
        "responses": {
            str(status): {"description": words, "content": {"application/json": {"schema": reference}}}
            for status, words in REFUSALS.items()
        }
    }
    made["responses"]["200"] = {"description": "Done.", "content": _reply_content(route)}
    if route.rights != "open":
        made["security"] = [{"key": []}]
    if "{" in route.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        made["parameters"] = [name]
    if route.body is not None:
        schema = published(route.body, service.served)
        schemas.update(schema.pop("$defs", {}))
        schemas[route.body.__name__] = schema
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{route.body.__name__}"}}}
        made["requestBody"] = {"required": True, "content": content}
    return made


def _reply_content(route: Route) -> dict[str, Any]:
    if route.path == "/metrics":
        return {"text/plain": {"schema": {"type": "string"}}}
    if route.path in ("/health", "/health_generate", "/abort_request"):
        return {}
    if route.path == "/flush_cache":
        return {"text/plain": {"schema": {"type": "string"}}}
    content: dict[str, Any] = {"application/json": {"schema": {}}}
    if route.body is not None:
        content["text/event-stream"] = {"schema": {}}  # of what each event is, OpenAPI 3.1 has no word
    return content


ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _openapi(app: FastAPI, schemas: dict[str, Any]) -> dict[str, Any]:
    """The page, made once."""
    if app.openapi_schema is None:
        page = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = page.setdefault("components", {})
        components["schemas"] = {**_moved(schemas), "Error": ERROR_SCHEMA}
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = page
    return app.openapi_schema


def _moved(node: Any) -> Any:
    """A schema whose definitions lie where those of an OpenAPI page do."""
    if isinstance(node, dict):
        return {name: _moved(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_moved(value) for value in node]
    if isinstance(node, str) and node.startswith("#/$defs/"):
        return node.replace("#/$defs/", "#/components/schemas/", 1)
    return node
