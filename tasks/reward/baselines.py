"""What a reward model must beat: rankings that need no language model. Each gives one score an answer; higher is preferred."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from tasks.reward.accuracy import accuracy, differences, flatten
from tasks.reward.data import Question

READS_TEXT = ("longer_wins", "markup_wins", "tfidf")
"""The baselines that see what a reward model sees; the earlier answer wins by its exposure, which is not in the text."""

# one match a construct: at the start of a line fence, heading, list item, quote, table row; anywhere code, emphasis, link, tag
_MARKUP = re.compile(
    r"^[ \t]*(?:```+|~~~+|#{1,6}[ \t]|[-*+][ \t]|\d+[.)][ \t]|>|\|)"
    r"|`[^`\n]+`|\*\*|__|(?<![*\w])\*(?=\w)|!?\[[^\]\n]*\]\([^)\n]*\)|\$\$?|</?\w+>",
    re.MULTILINE,
)


def markup(text: str) -> int:
    """Number of Markdown constructs: fences, headings, items, quotes, code spans, emphasis, links, mathematics, tags."""
    return len(_MARKUP.findall(text))


class TfidfBradleyTerry:
    """A linear Bradley-Terry model on the answers' words: logistic regression of preferences on TF-IDF differences, no intercept.

    It sees the answer and not the question: what it gains is style and vocabulary, never relevance.
    """

    STRENGTHS = (0.03, 0.3, 3.0, 30.0)
    """Values of C (inverse of the penalty) to choose from, by likelihood on a fifth of the training questions."""

    def __init__(self, max_features: int = 50_000, seed: int = 0) -> None:
        self.max_features, self.seed = max_features, seed
        self.strength = float("nan")

    def fit(self, questions: Sequence[Question]) -> "TfidfBradleyTerry":
        texts = [answer for q in questions for answer in q.answers]
        rare = 2 if len(texts) >= 200 else 1
        self.vectorizer = TfidfVectorizer(
            sublinear_tf=True, min_df=rare, max_features=self.max_features, token_pattern=r"(?u)\b\w+\b"
        )
        rows = self.vectorizer.fit_transform(texts)
        starts = np.cumsum([0, *(len(q.answers) for q in questions)])
        chosen = np.array([starts[n] + j for n, q in enumerate(questions) for j, _ in q.pairs])
        rejected = np.array([starts[n] + k for n, q in enumerate(questions) for _, k in q.pairs])
        difference = sparse.csr_matrix(rows[chosen] - rows[rejected])
        weights = np.array([1 / len(q.pairs) for q in questions for _ in q.pairs])
        held_out = (np.random.default_rng(self.seed).random(len(questions)) < 0.2)[flatten(questions).question]

        def loss(strength: float) -> float:
            model = _logistic(difference[~held_out], weights[~held_out], strength)
            margins = difference[held_out] @ model.coef_[0]
            return float(np.average(np.logaddexp(0, -margins), weights=weights[held_out]))

        few = held_out.sum() < 10 or (~held_out).sum() < 10
        self.strength = 1.0 if few else min(self.STRENGTHS, key=loss)
        self.weight = _logistic(difference, weights, self.strength).coef_[0]
        return self

    def scores(self, answers: Sequence[str]) -> NDArray[np.float64]:
        return np.asarray(self.vectorizer.transform(answers) @ self.weight)


def _logistic(difference: Any, weights: NDArray[np.float64], strength: float) -> LogisticRegression:
    # every second difference is turned round, because a classifier wants both classes; without intercept that changes nothing
    sign = np.where(np.arange(difference.shape[0]) % 2 == 0, 1.0, -1.0)
    if len(sign) == 1:
        difference, sign, weights = sparse.vstack([difference, difference]), np.array([1.0, -1.0]), np.repeat(weights, 2)
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=200)
    return model.fit(sparse.diags(sign) @ difference, sign, sample_weight=weights)


def baseline_scores(train: Sequence[Question], evaluated: Sequence[Question]) -> dict[str, list[Sequence[float]]]:
    """Scores of the answers of each evaluated question, by baseline."""
    tfidf = TfidfBradleyTerry().fit(train)
    return {
        "longer_wins": [[len(answer) for answer in q.answers] for q in evaluated],
        "markup_wins": [[markup(answer) for answer in q.answers] for q in evaluated],
        "earlier_wins": [q.earliness for q in evaluated],
        "tfidf": [tfidf.scores(q.answers).tolist() for q in evaluated],
    }


def baselines(train: Sequence[Question], evaluated: Sequence[Question], best_possible: float | None) -> dict[str, Any]:
    """Accuracy of each baseline on the evaluated pairs, the best of those that read the text, and what is possible at all."""
    pairs = flatten(evaluated)
    result: dict[str, Any] = {}
    for name, scores in baseline_scores(train, evaluated).items():
        result[name] = accuracy(differences([q.pairs for q in evaluated], scores), pairs)
    best = max(READS_TEXT, key=lambda name: result[name]["accuracy"])
    result["best"] = {"name": best, **result[best]}
    if best_possible is not None:
        result["best_possible"] = best_possible
    return result
