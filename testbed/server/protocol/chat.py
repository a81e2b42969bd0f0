"""Chat templates: a model folder's own Jinja template makes one text of a chat's messages.

A template is a program of somebody else's. It never comes from a request, runs in Jinja's immutable sandbox, and its
output, the turns of its loops and its products are bounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from testbed.scenario.errors import InputError
from testbed.server.protocol.errors import ApiError
from testbed.server.protocol.tools import OPEN

TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Entries of ``tokenizer_config.json`` that templates know by name."""
REASON_CHARS = 200
"""Of what a template says about messages that it refuses."""
PRODUCT_CHARS = 1 << 20
"""Of a string or list that a template makes by multiplication."""
TURNS = 200_000
"""Of all loops of one rendering."""


class RefusedMessages(TemplateError):
    """A template's own refusal: ``raise_exception('...')``."""


class Generation(Extension):
    """``{% generation %}`` marks what the model wrote, for training; in serving its body is simply there."""

    tags = {"generation"}  # noqa: RUF012 (Jinja reads it from the class)

    def parse(self, parser: Parser) -> nodes.Node:
        """Jinja's hook."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also bounds what a template can do within Jinja's own rules."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products of text are bounded; powers, which no template needs, are refused."""
        if operator == "**":
            raise RefusedMessages("the template uses powers")
        size = max((len(side) for side in (left, right) if isinstance(side, str | list | tuple)), default=0)
        times = max((side for side in (left, right) if isinstance(side, int)), default=0)
        if size * times > PRODUCT_CHARS:
            raise RefusedMessages("the template makes too much text")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Every turn of a loop begins with ``turn``."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            turn = nodes.Call(nodes.EnvironmentAttribute("turn"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(turn, lineno=loop.lineno))
        return tree

    @staticmethod
    @pass_context
    def turn(context: Context) -> None:
        """Counted in the rendering's own ``turns``."""
        if next(context.resolve("turns"), None) is None:
            raise RefusedMessages("the template runs for too long")


class ChatTemplate:
    """A compiled template. ``tool_source``: another one for chats with tools, where a model has two.

    ``tokens``: special tokens by name, as in ``tokenizer_config.json``; ``now``: the clock for templates that tell the
    model the date. Raises InputError for a template that does not compile.
    """

    def __init__(
        self,
        source: str,
        *,
        tool_source: str | None = None,
        tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
        where: str = "chat_template",
    ) -> None:
        environment = _environment(now)
        self._tokens = dict(tokens or {})
        self._plain = _compiled(environment, source, where)
        self._with_tools = self._plain if tool_source is None else _compiled(environment, tool_source, where)
        written = source if tool_source is None else tool_source
        self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(written))
        """Whether it has a place for tools."""
        self.tool_form: Literal["hermes"] | None = "hermes" if self.takes_tools and OPEN in written else None
        """The form of calls that it teaches, if it is one that we know."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        chars_max: int,
    ) -> str:
        """The chat as text, ready for the model's answer. ``options``: more variables of the template.

        Raises ApiError when the template refuses the messages or makes more than ``chars_max`` characters.
        """
        template = self._with_tools if tools else self._plain
        given = {**self._tokens, **(options or {}), "messages": messages, "add_generation_prompt": True}
        given["turns"] = iter(range(TURNS))
        parts: list[str] = []
        size = 0
        try:
            for part in template.generate(tools=list(tools) or None, documents=None, **given):
                size += len(part)
                if size > chars_max:
                    break
                part.encode()  # a template can unescape half of a surrogate pair
                parts.append(part)
        except RefusedMessages as refusal:
            reason = ascii(str(refusal.message))[1:-1][:REASON_CHARS]
            message = f"messages were refused by the model's chat template: '{reason}'."
            raise ApiError(message, param="messages") from None
        except Exception:
            message = (
                "messages cannot be rendered by the model's chat template; use another order of roles or contents."
            )
            raise ApiError(message, param="messages") from None
        if size > chars_max:
            message = f"messages are too long; at most {chars_max} characters are allowed, with what the template adds."
            raise ApiError(message, param="messages", code="context_length_exceeded")
        return "".join(parts)


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a model folder: ``chat_template.jinja`` or that of ``tokenizer_config.json``; None without one.

    Raises InputError for files that cannot be read as that.
    """
    config = _config(folder / "tokenizer_config.json")
    tokens = {name: text for name in TOKENS if (text := _token(config.get(name))) is not None}
    file = folder / "chat_template.jinja"
    found = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    where = str(file if file.exists() else folder / "tokenizer_config.json")
    if found is None:
        return None
    if isinstance(found, str):
        return ChatTemplate(found, tokens=tokens, where=where)
    try:
        named = {entry["name"]: str(entry["template"]) for entry in found}
        return ChatTemplate(named["default"], tool_source=named.get("tool_use"), tokens=tokens, where=where)
    except (KeyError, TypeError):
        raise InputError(
            "chat_template is neither a template nor a list of named ones", where=where, remedy="name one 'default'"
        ) from None


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise InputError("this is not a JSON object", where=str(path), remedy="restore the model's own file")
    return config


def _token(entry: Any) -> str | None:
    """A special token: its text, or an object with it."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """As ``transformers`` sets up its own (utils/chat_template_utils.py), for templates are written against that."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _compiled(environment: ImmutableSandboxedEnvironment, source: str, where: str) -> Template:
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise InputError(
            f"the chat template does not compile: {error.message}",
            where=f"{where}: template line {error.lineno}",
            remedy="restore the model's own template",
        ) from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without HTML's escapes, which Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(reason: str) -> None:
    raise RefusedMessages(reason)
