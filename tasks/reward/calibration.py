"""Are the model's probabilities right? P(j preferred to k) = sigmoid(r_j - r_k)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.reward.accuracy import wins

Array = NDArray[np.float64]


def confidence(difference: Array, temperature: float = 1.0) -> Array:
    """Probability the model gives to the answer that it prefers itself, 1/2 to 1; (P,) -> (P,)."""
    return 1 / (1 + np.exp(-np.minimum(np.abs(difference) / temperature, 700)))


def reliability(confidences: Array, won: Array, bins: int = 10) -> list[dict[str, float]]:
    """Mean confidence and accuracy in equally wide bins of [1/2, 1]; empty bins are left out."""
    index = np.clip(((confidences - 0.5) * 2 * bins).astype(int), 0, bins - 1)
    return [
        {
            "confidence": float(confidences[index == b].mean()),
            "accuracy": float(won[index == b].mean()),
            "n": int((index == b).sum()),
        }
        for b in np.unique(index)
    ]


def expected_calibration_error(confidences: Array, won: Array, bins: int = 10) -> float:
    """ECE = sum over bins of n_b / n |accuracy_b - confidence_b| (Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 3)."""
    return sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in reliability(confidences, won, bins)) / len(won)


def negative_log_likelihood(difference: Array, temperature: float = 1.0) -> float:
    """Mean of -log sigmoid((r_j - r_k) / temperature); (P,) -> nats."""
    return float(np.logaddexp(0, -difference / temperature).mean())


def fit_temperature(difference: Array, low: float = 1e-2, high: float = 1e2) -> float:
    """The temperature in [low, high] with the least negative log-likelihood (Guo et al. 2017); (P,) -> temperature.

    The likelihood is concave in 1/temperature, so a golden-section search in log temperature finds it. It ends at `high` where
    the scores say nothing, and at `low` where they are never wrong.
    """
    ratio, a, b = (5**0.5 - 1) / 2, np.log(low), np.log(high)
    for _ in range(60):
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        if negative_log_likelihood(difference, float(np.exp(c))) < negative_log_likelihood(difference, float(np.exp(d))):
            b = d
        else:
            a = c
    return float(np.exp((a + b) / 2))


def calibrate(difference: Array, question: NDArray[np.int64], seed: int = 0) -> dict[str, Any]:
    """Temperature fitted on one half of the questions; ECE and likelihood on the other half without and with it."""
    names = np.random.default_rng(seed).permutation(np.unique(question))
    if len(names) < 2:
        raise ValueError("calibration needs at least two questions with pairs in the eval split: raise reward.max_eval_questions")
    fitted = np.isin(question, names[: len(names) // 2])
    temperature = fit_temperature(difference[fitted])
    held_out = difference[~fitted]
    won, before, after = wins(held_out), confidence(held_out), confidence(held_out, temperature)
    return {
        "temperature": temperature,
        "ece": expected_calibration_error(before, won),
        "ece_with_temperature": expected_calibration_error(after, won),
        "nll": negative_log_likelihood(held_out),
        "nll_with_temperature": negative_log_likelihood(held_out, temperature),
        "n_pairs_fitted": int(fitted.sum()),
        "n_pairs_held_out": len(held_out),
        "bins": reliability(before, won),
        "bins_with_temperature": reliability(after, won),
    }
