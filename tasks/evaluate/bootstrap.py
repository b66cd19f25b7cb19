"""How sure are we? Percentile bootstrap intervals in which questions, not answers, are drawn anew (Efron 1979).

Answers to one question share its difficulty, so they are no independent evidence: a question is drawn with all its
answers. Everything here takes one number per question, the mean over that question's answers.
"""

from typing import NamedTuple

import numpy as np

CELLS = 4_000_000  # of the (resamples, questions) matrix held at once


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


def resample_counts(questions: int, samples: int, seed: int) -> np.ndarray:
    """How often each question is drawn in each resample, with replacement; -> (samples, questions), rows sum to `questions`."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(questions, size=(samples, questions), dtype=np.int64)
    drawn += np.arange(samples, dtype=np.int64)[:, None] * questions
    return np.bincount(drawn.ravel(), minlength=samples * questions).reshape(samples, questions)


def percentile_interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """The middle `confidence` of the values."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_interval(values: np.ndarray, *, samples: int, confidence: float, seed: int) -> Interval:
    """Mean over questions with its bootstrap interval; one value per question, (Q,)."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"one value per question is needed, not an array of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} questions have a score that is not finite")
    centre = values.mean()  # summed around the mean, so that a constant comes out as itself
    chunk = max(1, CELLS // len(values))
    means = [
        resample_counts(len(values), min(chunk, samples - start), seed + start) @ (values - centre) / len(values)
        for start in range(0, samples, chunk)
    ]
    low, high = percentile_interval(np.concatenate(means) + centre, confidence)
    return Interval(float(centre), low, high)


def gain_interval(ours: np.ndarray, theirs: np.ndarray, *, samples: int, confidence: float, seed: int) -> Interval:
    """Mean of ours - theirs over the same questions, paired: what makes a question hard for both cancels; (Q,), (Q,)."""
    if np.shape(ours) != np.shape(theirs):
        raise ValueError(f"paired scores must be of the same questions, not {np.shape(ours)} and {np.shape(theirs)}")
    return mean_interval(np.subtract(ours, theirs), samples=samples, confidence=confidence, seed=seed)
