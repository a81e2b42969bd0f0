"""Chat templates give what transformers gives, and what a hostile one may not do."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from testbed.engine.tokenizer import FOLDER
from testbed.scenario.errors import InputError
from testbed.server.protocol.chat import ChatTemplate, load_chat_template
from testbed.server.protocol.errors import ApiError
from tests.server.protocol.bodies import WEATHER

CHARS_MAX = 100_000
CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}"
    '{{ \'\\n</tools>\\nuse <tool_call>{"name": 1, "arguments": 2}</tool_call><|im_end|>\\n\' }}{% endif %}'
    "{% for message in messages %}{% generation %}\n"
    "    <|im_start|>{{ message.role }}\n"
    "{{ message.content | default('', true) | trim }}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson(indent=2) }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endgeneration %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "[{{ m['role'].upper() }}] {{ m.content }}{{ eos_token }}{% endfor %}"
)
"""Templates in the manner of ChatML and of Llama 2, with what templates use: loop controls, filters, refusals."""

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
CALL = st.builds(
    lambda name, arguments: {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["f", "weather"]),
    st.dictionaries(st.text("ab<>&'", max_size=3), TEXT | st.integers() | st.none(), max_size=2),
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT})
CALLING = st.builds(lambda message, calls: {**message, "tool_calls": calls}, MESSAGE, st.lists(CALL, max_size=2))
MESSAGES = st.lists(MESSAGE | CALLING, min_size=1, max_size=4)


def theirs(folder: Path) -> Callable[..., str]:
    """What transformers renders of messages and tools."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def render(messages: list[Any], tools: list[Any]) -> str:
        text = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    return render


def model_folder(path: Path, template: Any, file: bool = False) -> Path:
    """A copy of the tiny tokenizer with this template, as a file of its own or in its config."""
    path.mkdir()
    config = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    config["eos_token"] = {
        "__type": "AddedToken",
        "content": "<|eos|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
    }
    if file:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    path = tmp_path_factory.mktemp("models")
    named = [{"name": "default", "template": STRICT}, {"name": "tool_use", "template": CHATML}]
    return [
        FOLDER,
        model_folder(path / "config", CHATML),
        model_folder(path / "file", STRICT, file=True),
        model_folder(path / "named", named),
    ]


def outcome(render: Callable[[], str]) -> str | None:
    """The text; None for messages that cannot be rendered."""
    try:
        return render()
    except Exception:
        return None


def test_it_renders_as_transformers_does(folders: list[Path]) -> None:
    pairs = [(load_chat_template(folder), theirs(folder)) for folder in folders]
    rendered = [0] * len(pairs)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(messages=MESSAGES, tools=st.sampled_from([[], [WEATHER]]))
    def check(messages: list[Any], tools: list[Any]) -> None:
        for index, (own, other) in enumerate(pairs):
            assert own is not None
            expected = outcome(lambda other=other: other(messages, tools))
            found = outcome(lambda own=own: own.render(messages, tools=tools, chars_max=CHARS_MAX))
            assert found == expected
            rendered[index] += found is not None

    check()
    assert min(rendered) > 5  # what is drawn depends on which modules were loaded before


def test_what_a_template_does_with_tools_is_read_off_it(folders: list[Path]) -> None:
    templates = [load_chat_template(folder) for folder in folders]
    assert [template and template.takes_tools for template in templates] == [True, True, False, True]
    assert [template and template.tool_form for template in templates] == ["hermes", "hermes", None, "hermes"]


def test_a_folder_without_template(tmp_path: Path) -> None:
    assert load_chat_template(model_folder(tmp_path / "none", None)) is None
    assert load_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for x in %}", "does not compile"),
        ("{% nonsense %}", "does not compile"),
        ([{"name": "tool_use", "template": ""}], "neither a template nor"),
        ([1], "neither a template nor"),
        (5, "neither a template nor"),
    ],
)
def test_a_broken_template_is_told_at_the_start(tmp_path: Path, template: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        load_chat_template(model_folder(tmp_path / "model", template))
    assert "tokenizer_config.json" in raised.value.where and raised.value.remedy


@pytest.mark.parametrize("text", ["[]", "{", "\ud800"])
def test_a_broken_config_is_told_at_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match="not a JSON object"):
        load_chat_template(tmp_path)


USER = [{"role": "user", "content": "hi"}]


def test_a_templates_own_refusal_reaches_the_client() -> None:
    with pytest.raises(ApiError) as raised:
        ChatTemplate(STRICT).render([*USER, *USER], chars_max=CHARS_MAX)
    assert raised.value.param == "messages" and "'Roles must alternate user/assistant'" in raised.value.message


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '%s' | format(messages.__class__.__base__) }}{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% set text = 'x' * 2000000 %}",
        "{% set many = 2000000 * ['x'] %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% set turns = range(99999) %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99) recursive %}{{ loop(range(99)) }}{% endfor %}",
        "{{ raise_exception('\\n\\x1b' * 500) }}",
        "{{ '\\ud800' }}",
    ],
)
def test_a_hostile_template_ends_in_a_client_error(template: str) -> None:
    """I6: no way out of the sandbox, no file, no endless loop, no text without end."""
    with pytest.raises(ApiError) as raised:
        ChatTemplate(template).render(USER, chars_max=1000)
    assert raised.value.status == 400 and len(raised.value.message) < 500 and raised.value.message.isprintable()
    assert USER == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "name", ["messages.__class__", "lipsum.__globals__", "strftime_now.__globals__", "self.__dict__"]
)
def test_a_template_sees_nothing_of_pythons_inside(name: str) -> None:
    assert ChatTemplate(f"{{{{ {name} }}}}").render(USER, chars_max=1000) == ""


def test_output_is_bounded_exactly() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render(USER, chars_max=2) == "hi"
    with pytest.raises(ApiError, match="at most 1 characters"):
        template.render(USER, chars_max=1)


def test_options_and_clock() -> None:
    template = ChatTemplate(
        "{{ strftime_now('%Y') }}{{ thinking }}{{ bos_token }}",
        tokens={"bos_token": "B"},
        now=lambda: datetime(2031, 5, 1),
    )
    assert template.render(USER, options={"thinking": "no", "bos_token": "C"}, chars_max=99) == "2031noC"


def test_two_renderings_do_not_share_their_turns() -> None:
    template = ChatTemplate("{% for a in range(99999) %}{% endfor %}done")
    assert {template.render(USER, chars_max=99) for _ in range(3)} == {"done"}
