"""How much one request may ask for. Every limit can be set when the server starts."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that is accepted of each; more is refused by name, before anything is made of it.

    Raises ValueError for a limit below 1.
    """

    body_bytes: int = 8 << 20
    """Of the whole body; more is status 413."""
    json_depth: int = 64
    """Objects and lists inside each other."""
    prompts: int = 2048
    """In one completion request."""
    prompt_chars: int = 2 << 20
    """Of a prompt given as text, or of the text that a chat template makes of the messages."""
    prompt_tokens: int = 1 << 20
    """Of a prompt given as token ids. The engine's own limit, of any prompt, is what fits into its context."""
    messages: int = 2048
    """In one chat; also the parts of one message."""
    n: int = 128
    """Choices for one prompt."""
    choices: int = 2048
    """Choices for all prompts of a request: ``n`` times prompts."""
    max_tokens: int = 1 << 20
    """Output tokens of one choice."""
    asked_tokens: int = 16 << 20
    """Output tokens of all choices of a request: ``max_tokens`` times choices."""
    logprobs: int = 20
    """Most likely tokens told beside each."""
    logprob_values: int = 1 << 20
    """Log-probabilities of a request: output tokens times 1 and those beside them, of all choices, and the prompt's."""
    stops: int = 16
    stop_chars: int = 256
    """Of one stop string."""
    stop_token_ids: int = 64
    logit_bias: int = 1024
    """Entries."""
    grammar_bytes: int = 64 << 10
    """Of a JSON schema, regular expression or EBNF grammar, as UTF-8."""
    grammar_ms: int = 2000
    """Of processor time to compile one."""
    grammar_mib: int = 256
    """Of memory to compile one, in MiB."""
    grammars_mib: int = 512
    """Of memory for all compiled ones, in MiB: those of open requests, and those that may be asked for again."""
    tools: int = 128
    """Also the tool calls of one message."""
    tools_bytes: int = 256 << 10
    """Of all tools, as JSON."""
    template_options: int = 16
    """Entries of ``chat_template_kwargs``."""
    name_chars: int = 256
    """Of a model's name, a request's id, a user, a key of the prefix cache."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"the limit {field.name} is {getattr(self, field.name)}; it must be 1 or more")
