"""How often the preferred answer scores higher, with an interval that knows that pairs of one question are not independent."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.reward.data import Question


@dataclass(frozen=True)
class Pairs:
    """All pairs of some questions, flat; (P,) each."""

    question: NDArray[np.int64]
    """Number of the question."""
    gap: NDArray[np.int64]
    site: NDArray[Any]


def flatten(questions: Sequence[Question]) -> Pairs:
    """The pairs of these questions, in their order."""
    sizes = [len(q.pairs) for q in questions]
    return Pairs(
        question=np.repeat(np.arange(len(questions)), sizes),
        gap=np.array([gap for q in questions for gap in q.gaps], dtype=np.int64),
        site=np.repeat(np.array([q.site for q in questions]), sizes),
    )


def differences(pairs: Sequence[Sequence[tuple[int, int]]], scores: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """score of j minus score of k for each pair (j, k) of each question; scores[q][a] is that of answer a of question q -> (P,)."""
    return np.array([float(s[j]) - float(s[k]) for q, s in zip(pairs, scores, strict=True) for j, k in q], dtype=np.float64)


def wins(difference: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where the preferred answer has the higher score, 1/2 where both have the same, else 0; (P,) -> (P,)."""
    return (np.sign(difference) + 1) / 2


def clustered_interval(
    values: NDArray[np.float64], cluster: NDArray[Any], draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, drawing whole clusters with replacement; (P,), (P,) -> (low, high)."""
    _, index = np.unique(cluster, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index).astype(float)
    n, rng = len(counts), np.random.default_rng(seed)
    means = np.empty(draws)
    chunk = max(1, 4_000_000 // n)  # draws at a time: 32 MB of indices
    for start in range(0, draws, chunk):
        drawn = rng.integers(0, n, size=(min(chunk, draws - start), n))
        means[start : start + len(drawn)] = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def accuracy(difference: NDArray[np.float64], pairs: Pairs) -> dict[str, Any]:
    """Share of pairs won, ties as half, with its 95 % interval clustered by question; (P,) -> one JSON object."""
    won = wins(difference)
    low, high = clustered_interval(won, pairs.question)
    return {
        "accuracy": float(won.mean()),
        "interval": [low, high],
        "n_pairs": len(won),
        "n_questions": len(np.unique(pairs.question)),
        "ties": int((difference == 0).sum()),
    }


def accuracy_by(difference: NDArray[np.float64], pairs: Pairs, labels: Sequence[Hashable]) -> dict[str, dict[str, Any]]:
    """`accuracy` of each group of pairs that share a label, labels in order."""
    names = np.array([str(label) for label in labels])
    return {
        str(name): accuracy(
            difference[names == name], Pairs(pairs.question[names == name], pairs.gap[names == name], pairs.site[names == name])
        )
        for name in sorted(set(names.tolist()))
    }


def full_accuracy(difference: NDArray[np.float64], pairs: Pairs) -> dict[str, Any]:
    """Accuracy of all the pairs, by score_gap (4 and more together) and by site."""
    gaps = ["4+" if gap >= 4 else str(gap) for gap in pairs.gap]
    return {
        **accuracy(difference, pairs),
        "by_gap": accuracy_by(difference, pairs, gaps),
        "by_site": accuracy_by(difference, pairs, pairs.site.tolist()),
    }
