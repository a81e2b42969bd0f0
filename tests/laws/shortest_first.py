"""A policy of one's own, as a scenario names it: shortest prompt first."""


def shortest_first(waiting, scheduler):
    waiting.sort(key=lambda request: request.prompt_tokens)
