"""Everybody's answers to the same questions: sampled from models or taken from people, then scored."""

import hashlib
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks import prompts
from tasks.ingest.dataset import best_answer, iter_questions
from tasks.reward.model import RewardModel
from tasks.rollout import generate_shared

CHUNK = 256  # rows sampled between two signs of life; part of the seeding, so not a setting


@dataclass
class Answers:
    """What one writer wrote: S answers to each of Q questions."""

    texts: list[list[str]]
    ids: list[list[list[int]]]
    """Tokens, EOS included where the answer ended by itself."""
    finished: np.ndarray
    """(Q, S) bool: ended by itself."""
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    """(Q, S) by scorer: reward, judge, true."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens, (Q, S)."""
        return np.array([[len(ids) for ids in row] for row in self.ids], dtype=np.int64)


def seed_of(*parts: Any) -> int:
    """A seed of its own for every purpose: 31 bits of the digest of the parts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def choose_questions(data: Path, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """The eval split's questions, or the `limit` with the smallest digests of (seed, site, qid): a sample that is stable when
    questions come or go. In the order of site and qid."""
    columns = ["site", "qid", "title", "question", "answers"]
    answered = (q for q in iter_questions(data, "eval", columns=columns) if q["answers"])
    if limit is None:
        chosen = list(answered)
    else:
        chosen = heapq.nsmallest(limit, answered, key=lambda q: hashlib.sha256(f"{seed}/{q['site']}/{q['qid']}".encode()).digest())
    if not chosen:
        raise ValueError(
            f"the eval split under {data} has no question with an answer: use a larger dump, or more simulated questions"
        )
    return sorted(chosen, key=lambda q: (q["site"], q["qid"]))


def human_answers(questions: Sequence[dict[str, Any]], tokenizer: Any) -> Answers:
    """Each question's best answer, whole."""
    texts = [[best_answer(q)["text"]] for q in questions]
    ids = [[prompts.encode_response(tokenizer, row[0])] for row in texts]
    return Answers(texts, ids, np.ones((len(texts), 1), dtype=bool))


def sample_answers(
    model: Any,
    tokenizer: Any,
    queries: Sequence[list[int]],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
    batch_size: int,
    told: Callable[[int, int], None],
) -> Answers:
    """`samples` answers to each query, each from a random stream of its own; the ranks share the work, and each gets them all."""
    rows = [query for query in queries for _ in range(samples)]
    ids: list[list[int]] = []
    finished: list[bool] = []
    for start in range(0, len(rows), CHUNK):
        rollout = generate_shared(
            model, tokenizer, rows[start : start + CHUNK], max_new_tokens=max_new_tokens, temperature=temperature,
            seed=seed_of(seed, start), device=device, batch_size=batch_size,
        )  # fmt: skip
        ids += rollout.responses
        finished += rollout.finished
        told(len(ids), len(rows))
    grouped = [ids[i : i + samples] for i in range(0, len(ids), samples)]
    texts = [[prompts.decode_response(tokenizer, answer) for answer in row] for row in grouped]
    return Answers(texts, grouped, np.array(finished, dtype=bool).reshape(len(queries), samples))


def best_of(answers: Answers, scores: np.ndarray, n: int) -> Answers:
    """Of each n answers in a row the one that the reward model scores highest; (Q, S * n) -> (Q, S)."""
    count = scores.shape[1] // n
    best = scores.reshape(len(scores), count, n).argmax(-1) + np.arange(count) * n
    return Answers(
        [[row[i] for i in chosen] for row, chosen in zip(answers.texts, best)],
        [[row[i] for i in chosen] for row, chosen in zip(answers.ids, best)],
        np.take_along_axis(answers.finished, best, axis=1),
        {"reward": np.take_along_axis(scores, best, axis=1)},
    )


def scores_of(
    reward: RewardModel, queries: Sequence[list[int]], answers: Sequence[Sequence[list[int]]], max_length: int
) -> np.ndarray:
    """Scores in standard deviations of SFT samples; -> (Q, S). Answers are cut to `max_length` tokens together with their query.

    Every distinct answer is scored once, so that equal answers tie exactly; and each query is read once for all its answers.
    """
    keys = [
        [(q, tuple(answer[: max(1, max_length - len(query))])) for answer in row]
        for q, (query, row) in enumerate(zip(queries, answers))
    ]
    distinct = sorted({key for row in keys for key in row})
    raw = reward.shared_scores([queries[q] for q, _ in distinct], [list(answer) for _, answer in distinct])
    score = dict(zip(distinct, reward.normalise(raw.double()).tolist()))
    return np.array([[score[key] for key in row] for row in keys], dtype=np.float64)
