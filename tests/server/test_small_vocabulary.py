"""A model with fewer tokens than its tokenizer: what it cannot compute is refused in words, all else is served."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from testbed.scenario.models import find_config
from tests.server.serving import CONSTANT, Serving, serving

TOKENS = 300
FEW = {"max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Our tokenizer's first tokens: the special ones, the bytes, and some of the shortest words."""
    folder = tmp_path_factory.mktemp("small")
    config = json.loads(find_config("qwen3-0.6b").read_text(encoding="utf-8"))
    sizes = {"vocab_size": TOKENS, "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps({**config, **sizes}), encoding="utf-8")
    with serving(folder, *CONSTANT, "--model", str(folder), "--set", "engine.kv_tokens=4000") as server:
        yield server


def test_it_is_told_at_the_start(small: Serving) -> None:
    (note,) = [line for line in small.said if "tokenizer" in line]
    assert note.startswith("note: the tokenizer has 4,096 tokens, the model 300")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "something longer"}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "something longer"]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "something longer"}]}, "messages"),
        ("/generate", {"text": "something longer"}, "text"),
        ("/v1/completions", {"prompt": [5, TOKENS]}, "prompt"),
    ],
)
def test_a_prompt_that_it_has_no_tokens_for_is_refused(small: Serving, path: str, body: object, param: str) -> None:
    status, _, data = small.request("POST", path, body)
    error = json.loads(data)["error"]
    assert status == 400 and error["param"] == param and re.search(r"\b(299|300)\b", error["message"])


def test_others_are_served_and_grammars_keep_to_its_tokens(small: Serving) -> None:
    for prompt in ("a", [5, TOKENS - 1]):
        reply = small.ask("POST", "/v1/completions", {"prompt": prompt, "return_token_ids": True, **FEW})
        ids = reply["choices"][0]["token_ids"]
        assert len(ids) == 40 and max(ids) < TOKENS
    body = {"prompt": "a", "regex": "[a-z]{30}", "max_tokens": 60, "return_token_ids": True}
    (choice,) = small.ask("POST", "/v1/completions", body)["choices"]
    assert max(choice["token_ids"]) < TOKENS and re.fullmatch("[a-z]{30}", choice["text"])
    small.comes_to_rest()
    assert small.errors == ""
