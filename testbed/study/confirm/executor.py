"""Faults of an executor that a run's own records show: tokens that are not the right ones, or not there.

The oracle's token is a function of request and position alone (``testbed.tokens``), so where a run has the oracle's
tokens (paced, or ``tokens: oracle``) every single one can be held against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from testbed.metrics.columns import completed, ints
from testbed.metrics.journal import Journal
from testbed.metrics.run import Run
from testbed.request import FinishReason
from testbed.scheduler.decisions import read_decisions
from testbed.study.confirm.decisions import ids_by_rank, sent_requests
from testbed.tokens import STEP, oracle_key, scale, token_ids

NEIGHBOURS = {1: "the next one's: a token was dropped", -1: "the one before's: a token came twice"}
"""What it means when a token is the right one of a neighbouring position."""


class Fault(NamedTuple):
    """Faults of one kind in a run."""

    kind: str
    """``no token``, ``wrong token`` or ``length``."""
    request: str
    """The first that has it."""
    number: int
    """Rows, tokens or requests that have it."""
    told: str
    """The first, in words."""


class Tokens(NamedTuple):
    """Tokens of one step that were sent: int arrays [tokens]."""

    step: int
    ranks: NDArray[np.int64]
    positions: NDArray[np.int64]
    """Index among the outputs of its request."""
    token_ids: NDArray[np.int32]


def executor_faults(run: Run, simulated: Run) -> list[Fault]:
    """Every kind of fault in ``run``, a run on the wall clock: rows without a token; where it has the oracle's tokens,
    others than those; and requests with more or fewer tokens than the simulation gave them under the same limit."""
    journal = run.records.journal
    if journal is None or not journal.keeps_tokens:
        return []
    wrong = _wrong(run, journal) if _has_oracle(run) else []
    return [*_missing(run, journal), *wrong, *_lengths(run, simulated, journal)]


def _missing(run: Run, journal: Journal) -> list[Fault]:
    """Rows for which the device had no token, where that ended their request."""
    table = run.records.requests
    reasons = dict(zip(table["id"], table["finish_reason"], strict=True))
    ids, rows = ids_by_rank(run), []
    decisions = read_decisions(run.records.decisions)
    for step, (decision, tokens) in enumerate(zip(decisions, journal.tokens, strict=False)):
        ranks = [rank for rank, _, _ in decision.prefills] + decision.decodes
        empty = [row for row in journal.invalid.get(step, ()) if reasons.get(ids[ranks[row]]) == FinishReason.ERROR]
        rows += [(step, ids[ranks[row]]) for row in [*empty, *range(len(tokens), len(ranks))]]
    return [Fault("no token", rows[0][1], len(rows), f"step {rows[0][0]:,} gave {rows[0][1]} no token")] if rows else []


def _wrong(run: Run, journal: Journal) -> list[Fault]:
    """Tokens that are not the oracle's of their request and position."""
    ids = ids_by_rank(run)
    assert journal.setting is not None
    vocab_size = journal.setting.vocab_size
    keys = np.array([oracle_key(run.seed, rid) for rid in ids], dtype=np.uint64)
    first, count = None, 0
    for tokens in sent_tokens(run, journal):
        ranks, positions = tokens.ranks, tokens.positions.astype(np.uint64)
        right = scale(keys[ranks] + positions * np.uint64(STEP), vocab_size)
        wrong = np.flatnonzero(right != tokens.token_ids)
        count += len(wrong)
        if first is None and len(wrong):
            first = tokens, int(wrong[0])
    if first is None:
        return []
    tokens, row = first
    key, position, got = int(keys[tokens.ranks[row]]), int(tokens.positions[row]), int(tokens.token_ids[row])
    told = f"token {position} of {ids[tokens.ranks[row]]} (step {tokens.step:,}) is {got}, not the oracle's"
    for shift, meaning in NEIGHBOURS.items():
        if position + shift >= 0 and token_ids(key, position + shift, 1, vocab_size)[0] == got:
            told += f" but {meaning}"
    return [Fault("wrong token", ids[tokens.ranks[row]], count, told)]


def sent_tokens(run: Run, journal: Journal) -> Iterator[Tokens]:
    """The tokens of every step that reached their users, by request and position, from decisions and results alone.

    A decode row's token follows the one before it. A prefill that makes ``n`` tokens of KV yields output
    ``n - prompt``, if it is the last part of what is to be prefilled: it is, when the request decodes or is retracted
    next, or nothing comes but that one token. What lies behind a request's last token is the overlap loop's extra step.
    """
    table = run.records.requests
    ended = dict(zip(table["id"], ints(table, "output_tokens").tolist(), strict=True))
    ids = ids_by_rank(run)
    prompts = {message.rid: len(message.prompt) for _, message in sent_requests(journal)}
    prompt = np.array([prompts[rid] for rid in ids], dtype=np.int64)
    sent = np.array([ended.get(rid, 0) for rid in ids], dtype=np.int64)
    following = np.zeros(len(ids), dtype=np.int64)
    """Position of each request's next token."""
    open_prefills: dict[int, Tokens] = {}
    """The last prefill of each request, until what comes next tells what it was."""
    for step, (decision, results) in enumerate(
        zip(read_decisions(run.records.decisions), journal.tokens, strict=False)
    ):
        for rank in [*decision.decodes, *decision.retracted] if open_prefills else ():
            if rank in open_prefills:
                yield open_prefills.pop(rank)
        first = len(decision.prefills)
        for row, (rank, prefix, new_tokens) in enumerate(decision.prefills[: len(results)]):
            position = prefix + new_tokens - int(prompt[rank])
            following[rank] = position + 1
            if 0 <= position < sent[rank]:
                at = np.array([rank]), np.array([position])
                open_prefills[rank] = Tokens(step, *at, results[row : row + 1])
        ranks = np.array(decision.decodes[: max(len(results) - first, 0)], dtype=np.int64)
        positions = following[ranks]
        following[ranks] += 1
        kept = positions < sent[ranks]
        yield Tokens(step, ranks[kept], positions[kept], results[first : first + len(ranks)][kept])
    yield from (tokens for rank, tokens in open_prefills.items() if tokens.positions[0] == sent[rank] - 1)


def _lengths(run: Run, simulated: Run, journal: Journal) -> list[Fault]:
    """Completed requests with another number of tokens than in the simulation, where both were told the same limit.

    Where the model chooses the tokens, requests that may end at one of them are left out.
    """
    free = {message.rid for _, message in sent_requests(journal) if not message.ignore_eos}
    asked, got = _outputs(simulated), _outputs(run)
    wrong = [
        rid
        for rid, (limit, tokens) in got.items()
        if asked.get(rid, (-1, 0))[0] == limit and asked[rid][1] != tokens and (_has_oracle(run) or rid not in free)
    ]
    if not wrong:
        return []
    told = f"{wrong[0]} has {got[wrong[0]][1]} tokens; asked were {asked[wrong[0]][1]}"
    return [Fault("length", wrong[0], len(wrong), told)]


def _outputs(run: Run) -> dict[str, tuple[int, int]]:
    """(limit that the scheduler was told, tokens sent) of every completed request by id."""
    table = run.records.requests
    limits, outputs = ints(table, "max_new_tokens").tolist(), ints(table, "output_tokens").tolist()
    columns = zip(table["id"], limits, outputs, completed(run.records), strict=True)
    return {rid: (limit, tokens) for rid, limit, tokens, done in columns if done}


def _has_oracle(run: Run) -> bool:
    """Whether its tokens are the oracle's."""
    return run.meta.get("label") == "paced" or run.scenario.get("tokens") == "oracle"
