"""Questions with preference pairs: each distinct answer is encoded once, the pairs are indices into them."""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.ingest.dataset import iter_questions
from tasks.prompts import encode_query, encode_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A question and those of its answers that stand in a pair."""

    site: str
    qid: int
    text: str
    answers: list[str]
    earliness: list[int]
    """Minus the rank in time of each answer: the earliest has the largest."""
    pairs: list[tuple[int, int]]
    """(j, k): answers[j] was preferred to answers[k]."""
    gaps: list[int]
    """pm_score of j minus that of k, for each pair."""


@dataclass(frozen=True)
class Encoded:
    """A question as tokens."""

    query: list[int]
    responses: list[list[int]]
    """The distinct ones: answers that are equal once cut are one response."""
    pairs: list[tuple[int, int]]
    """Indices into responses."""
    gaps: list[int]
    cut: int
    """Responses that lost their end to max_length."""

    @property
    def tokens(self) -> int:
        """The query is read once."""
        return len(self.query) + sum(map(len, self.responses))


def read_questions(data: Path, split: str, limit: int | None, seed: int) -> list[Question]:
    """The questions of a split that have pairs, in the order of the files; with `limit`, a random subset fixed by the seed.

    The subset holds the questions with the smallest keyed hashes, so it hardly changes when a dump grows.
    """
    rows = _rows(data, split)
    if limit is not None:
        numbered = ((_digest(row["site"], row["qid"], seed), number, row) for number, row in enumerate(rows))
        rows = (row for _, row in sorted((number, row) for _, number, row in heapq.nsmallest(limit, numbered, key=lambda x: x[:2])))
    questions = [_question(row) for row in rows]
    if not questions:
        raise ValueError(
            f"no question of split {split!r} under {data} has a preference pair: the dump is too small, or has no votes"
        )
    return questions


def _rows(data: Path, split: str) -> Iterator[dict[str, Any]]:
    return (row for row in iter_questions(data, split, ["site", "qid", "question", "answers", "pairs"]) if row["pairs"])


def _digest(site: str, qid: int, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{site}/{qid}".encode(), digest_size=8).digest()


def _question(row: dict[str, Any]) -> Question:
    everyone = row["answers"]
    dated = all(answer.get("created") is not None for answer in everyone)
    order = sorted(range(len(everyone)), key=lambda a: (everyone[a]["created"] if dated else 0, everyone[a]["answer_id"]))
    rank = {a: place for place, a in enumerate(order)}
    used = sorted({a for pair in row["pairs"] for a in (pair["j"], pair["k"])})
    new = {a: place for place, a in enumerate(used)}
    return Question(
        site=row["site"],
        qid=row["qid"],
        text=row["question"],
        answers=[everyone[a]["text"] for a in used],
        earliness=[-rank[a] for a in used],
        pairs=[(new[pair["j"]], new[pair["k"]]) for pair in row["pairs"]],
        gaps=[everyone[pair["j"]]["pm_score"] - everyone[pair["k"]]["pm_score"] for pair in row["pairs"]],
    )


def encode(tokenizer: "PreTrainedTokenizerBase", question: Question, max_length: int, max_query_tokens: int) -> Encoded:
    """Query and responses as ids, together at most `max_length` tokens."""
    if max_query_tokens >= max_length:
        raise ValueError(
            f"reward.max_query_tokens={max_query_tokens} leaves no room for a response in reward.max_length={max_length}: lower it"
        )
    query = encode_query(tokenizer, question.text, max_query_tokens)
    room = max_length - len(query)
    places: dict[tuple[int, ...], int] = {}
    where, cut = [], 0
    for answer in question.answers:
        ids = tuple(encode_response(tokenizer, answer, room))
        cut += len(ids) == room and ids[-1] != tokenizer.eos_token_id
        where.append(places.setdefault(ids, len(places)))
    return Encoded(query, [list(ids) for ids in places], [(where[j], where[k]) for j, k in question.pairs], question.gaps, cut)


def batches_of_questions(encoded: Sequence[Encoded], max_tokens: int) -> Iterator[list[Encoded]]:
    """Whole questions, in order, in groups of at most `max_tokens` tokens; a longer question is a group of its own."""
    group: list[Encoded] = []
    total = 0
    for question in encoded:
        if group and total + question.tokens > max_tokens:
            yield group
            group, total = [], 0
        group.append(question)
        total += question.tokens
    if group:
        yield group
