"""Which questions are trained on, in which order, and where random numbers come from."""

import hashlib
from pathlib import Path

import numpy as np

from tasks.ingest.dataset import iter_questions

ORDER, EPOCHS, ROLLOUT, EVAL = range(4)
"""What a stream of random numbers is for."""


def stream(seed: int, purpose: int, step: int) -> int:
    """The seed of one use of random numbers: nothing depends on how many were drawn before it (row 17)."""
    return int(np.random.SeedSequence((seed, purpose, step)).generate_state(1)[0])


def split_questions(data: Path, n_eval: int) -> tuple[list[str], list[str]]:
    """The rl split's questions, training and held out: those with the n smallest hashes, whatever else is in the split."""
    rows = [(r["site"], r["qid"], r["question"]) for r in iter_questions(data, "rl", ["site", "qid", "question"])]
    if len(rows) <= n_eval:
        raise ValueError(f"the rl split has {len(rows)} questions, ppo.eval_queries={n_eval} leaves none to train on: lower it")
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"ppo-eval:{row[0]}:{row[1]}".encode()).digest())
    held_out = {row[:2] for row in ranked[:n_eval]}
    return [row[2] for row in rows if row[:2] not in held_out], [row[2] for row in ranked[:n_eval]]


def draw(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of the queries of this step: every query once in each seeded epoch, batches running on over their ends."""
    places = range((step - 1) * batch_size, step * batch_size)
    orders = {e: np.random.default_rng((seed, ORDER, e)).permutation(n) for e in {place // n for place in places}}
    return [int(orders[place // n][place % n]) for place in places]
